"""A tiny cache, drafters of several block sizes, and the slow decode at every anchor."""

# K context layers, D context features (K x H), H hidden width, G block size, V vocabulary
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from vpd.data.cache.cache import Cache
from vpd.data.cache.drafts import DraftedSequence, FirstDrafts
from vpd.data.cache.index import SequenceRow
from vpd.data.cache.reader import CachedSequence
from vpd.data.cache.target_files import store_target_files
from vpd.data.cache.writer import StateWriter
from vpd.stages.draft.config import DraftConfig
from vpd.stages.draft.first_draft import FirstDrafting
from vpd.stages.drafter.checkpoint import load_drafter, save_drafter
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.shape import DrafterShape
from vpd.stages.evaluate.config import EvalConfig
from vpd.stages.evaluate.replay import Replay
from vpd.stages.evaluate.report import FirstDraftOutcomes, ReplayReport
from vpd.stages.evaluate.slices import Response
from vpd.stages.evaluate.ways import Way

from support.slow_decode import (
    POLICIES,
    Ranked,
    SlowDrafter,
    slow_accept_length,
    slow_candidates,
    slow_continued,
    slow_resampled,
)
from support.slow_tree import slow_best_chain, slow_tables, slow_third_level, slow_tree, united
from support.tiny import SHAPE as ANY_SHAPE
from support.tiny import append, make_manifest

V = 12
SHAPE = replace(ANY_SHAPE, vocab_size=V, mask_token_id=V - 1)
H, K, G = SHAPE.hidden_size, len(SHAPE.target_layer_ids), SHAPE.block_size
MAX_K = 20
"""More than the pairs of a first draft."""


SECONDS = {"same-block": "same", "larger-block": "larger", "smaller-block": "smaller"}
"""Folders of second drafters, by what their block size is compared with the first drafter's."""
SHAPES = {
    "first": SHAPE,
    "same": replace(SHAPE, num_layers=1, mask_token_id=V - 2),
    "larger": replace(SHAPE, block_size=G + 3),
    "smaller": replace(SHAPE, block_size=G - 2, mask_token_id=V - 3),
}
TALKS = {
    # Lengths of prompt and response in turn; the last response may end in a token without a state.
    "one-answer": ([3, 60], True),
    "answer-given-in-full": ([2, 11], False),
    "two-answers": ([2, 9, 4, 20], True),
    "short-answers": ([1, 1, 3, 2, 2, 3], False),
}


def responses_of(lengths: list[int]) -> list[tuple[int, int]]:
    """Spans of the responses that hold something to draft."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [
        (end - length, end) for i, (length, end) in enumerate(zip(lengths, ends, strict=True)) if i % 2 and length > 1
    ]


class Anchor(NamedTuple):
    """An anchor, its token, and the target's continuation."""

    seq_id: str
    position: int
    token: int
    continuation: list[int]


@dataclass
class Recorder(ReplayReport):
    """A report that also keeps every accept length and cost."""

    accept_lens: list[np.ndarray] = field(default_factory=list)

    costs: list[np.ndarray] = field(default_factory=list)

    def add(
        self,
        accept_lens_NC: np.ndarray,
        costs_NCX: np.ndarray,
        responses: Sequence[Sequence[Response]],
        outcomes: FirstDraftOutcomes,
    ) -> None:
        self.accept_lens.append(accept_lens_NC)
        self.costs.append(costs_NCX)
        super().add(accept_lens_NC, costs_NCX, responses, outcomes)

    def by_way(self) -> dict[Way, list[int]]:
        """Accept lengths at all anchors."""
        return dict(zip(self.ways, np.concatenate(self.accept_lens).T.tolist(), strict=True))


def is_unlimited(way: Way) -> bool:
    """The ways of the paper with all of their candidates, which a slow decode finds quickly."""
    return way.nodes is None and way.name in ("chain", "resampled", "branches")


def record(replay: Replay, wanted: Callable[[Way], bool] = is_unlimited) -> None:
    """Has a replay keep what it finds for the wanted ways and those of the headline."""
    reported = replay.report.reported
    replay.ways = [way for way in replay.ways if wanted(way) or way in reported.values()]
    replay.report = Recorder(replay.ways, reported, replay.config, replay.report.block_size)


class World:
    """Cache and drafters, which tests only read; results of the slow decode are kept."""

    def __init__(self, folder: Path, pieces: dict[str, Tensor]):
        self.folder, self.pieces = folder, pieces
        self.cache = Cache.open(folder / "cache")
        self.sequence: Callable[[str], CachedSequence] = cache(lambda seq_id: self.cache.read(self.row(seq_id)))
        self.drafted: Callable[[str], DraftedSequence] = cache(lambda seq_id: self.drafts.read(self.row(seq_id)))
        self.slow: Callable[[str, str], SlowDrafter] = cache(self._slow)
        self.expected: Callable[[str, bool], dict[Way, list[int]]] = cache(self._expected)

    def row(self, seq_id: str) -> SequenceRow:
        (row,) = [row for row in self.cache.rows if row.seq_id == seq_id]
        return row

    @property
    def talks(self) -> list[SequenceRow]:
        return [self.row(seq_id) for seq_id in TALKS]

    @cached_property
    def drafts(self) -> FirstDrafts:
        """Recorded first drafts."""
        return FirstDrafting(self.folder / "first", DraftConfig(device="cpu")).run(self.cache)

    def replay(self, second: str | None = None, first: FirstDrafts | None = None, **config: Any) -> Replay:
        settings = {"policies": list(POLICIES), "device": "cpu", "way": "branches"} | config
        path = None if second is None else self.folder / second
        return Replay(self.cache, first or self.folder / "first", path, EvalConfig(**settings))

    def run(
        self, rows: Sequence[SequenceRow], *args: Any, wanted: Callable[[Way], bool] = is_unlimited, **config: Any
    ) -> Recorder:
        """Replays the wanted ways and those of the headline."""
        replay = self.replay(*args, **config)
        record(replay, wanted)
        replay.run(rows)
        assert isinstance(replay.report, Recorder)
        return replay.report

    def anchors(self, seq_ids: Sequence[str] = tuple(TALKS)) -> list[Anchor]:
        """The anchors of all responses, in order."""
        found = []
        for seq_id in seq_ids:
            tokens = self.sequence(seq_id).token_ids_S.tolist()
            for start, end in responses_of(TALKS[seq_id][0]):
                found += [Anchor(seq_id, a, tokens[a], tokens[a + 1 : end]) for a in range(start, end - 1)]
        return found

    def _slow(self, seq_id: str, second: str) -> SlowDrafter:
        features_TD = self.sequence(seq_id).hidden_TKH.flatten(1).float()
        return SlowDrafter(load_drafter(self.folder / second), self.pieces, features_TD)

    def ranked(self, anchor: Anchor) -> Ranked:
        """The first draft and its alternatives, best first."""
        return self.slow(anchor.seq_id, "first").ranked(anchor.position, (anchor.token,))

    def recorded(self, anchor: Anchor) -> Ranked:
        """The recorded first draft and its alternatives, with rounded probabilities."""
        drafted = self.drafted(anchor.seq_id)
        rows = zip(
            drafted.probs_TGA[anchor.position].tolist(), drafted.tokens_TGA[anchor.position].tolist(), strict=True
        )
        return [list(zip(probs, tokens, strict=True)) for probs, tokens in rows]

    def _expected(self, second: str, recorded: bool) -> dict[Way, list[int]]:
        """Accept lengths of the ways that are not limited in nodes at all anchors, by the slow decode."""
        seconds = {"d2sd": second} if recorded else {"first_as_second": "first", "d2sd": second}
        ranked = self.recorded if recorded else self.ranked
        found = [self.slow_lens(seconds, anchor, ranked(anchor)) for anchor in self.anchors()]
        return {way: [lens[way] for lens in found] for way in found[0]}

    def slow_lens(self, seconds: dict[str, str], anchor: Anchor, ranked: Ranked, max_k: int = MAX_K) -> dict[Way, int]:
        """Accept lengths of the first draft alone and with candidates beside it."""
        draft = [best[0][1] for best in ranked]
        found = {Way("chain"): slow_accept_length([draft], anchor.continuation)}
        drawn = [draft, *slow_resampled(ranked, anchor.position, max_k)]
        for k in range(1, max_k + 1):
            found[Way("resampled", k=k)] = slow_accept_length(drawn[: k + 1], anchor.continuation)
        for name, policy in product(seconds, POLICIES):
            second = self.slow(anchor.seq_id, seconds[name])
            candidates = slow_candidates(ranked, second, policy, anchor.position, anchor.token)
            continued = slow_continued(draft, second, anchor.position, anchor.token)
            for k in range(max_k + 1):
                launched = candidates[: k + 1] + (continued if k else [])
                found[Way("branches", name, policy, k)] = slow_accept_length(launched, anchor.continuation)
        return found

    def slow_nodes(self, way: Way, second: SlowDrafter | None, anchor: Anchor, ranked: Ranked) -> list[tuple[int, ...]]:
        """The nodes that a cycle verifies, in order of their worth."""
        draft = [best[0][1] for best in ranked]
        if way.name in ("chain", "resampled"):
            return united([draft, *slow_resampled(ranked, anchor.position, way.k)])[: way.nodes]
        if way.name in ("branches", "three levels"):
            candidates = slow_candidates(ranked, second, way.policy or "", anchor.position, anchor.token)
            continued = slow_continued(draft, second, anchor.position, anchor.token) if way.k else []
            third: list[list[int]] = []
            if way.name == "three levels":
                assert second is not None
                third = slow_third_level(
                    ranked, second, way.policy or "", way.k, anchor.position, anchor.token
                ).candidates
            return united([draft, *continued, *candidates[1 : way.k + 1], *third])[: way.nodes]
        tables = slow_tables(ranked, second, way.policy or "", way.k, anchor.position, anchor.token)
        return slow_best_chain(tables)[: way.nodes] if way.name == "best chain" else slow_tree(tables, way.nodes or 0)


def write_drafter(folder: Path, shape: DrafterShape, seed: int) -> Path:
    """A drafter whose drafts differ between anchors, since its attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    drafter = Drafter(shape)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5, generator=generator)
    save_drafter(drafter.state_dict(), folder, shape.to_json(training_mode="dflash", prefix_weight_base=None))
    return folder


def write_response(tokens: list[int], length: int, drafters: list[SlowDrafter], generator: torch.Generator) -> None:
    """Appends a response that the random drafters partly predict: each stretch follows one of their candidates for some
    tokens, then leaves it."""

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    tokens.append(pick(V))
    end = len(tokens) + length - 1
    while len(tokens) < end:
        anchor, token = len(tokens) - 1, tokens[-1]
        ranked = drafters[0].ranked(anchor, (token,))
        second = [None, *drafters][pick(len(drafters) + 1)]
        policy = POLICIES[pick(len(POLICIES))] if second is not None else "runner-up"
        candidates = slow_candidates(ranked, second, policy, anchor, token)[:5]
        candidate = candidates[pick(len(candidates))]
        tokens += candidate[: max(pick(len(candidate) + 1), pick(len(candidate) + 1))]
        tokens.append(pick(V))
    del tokens[end:]


def make_world(folder: Path) -> World:
    folders = [write_drafter(folder / name, shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())]
    generator = torch.Generator().manual_seed(3)
    pieces = {
        "embed_tokens.weight": torch.randn(V, H, generator=generator),
        "lm_head.weight": torch.randn(V, H, generator=generator),
        "norm.weight": torch.ones(H),
    }
    manifest = make_manifest(
        layer_ids=SHAPE.target_layer_ids,
        vllm_layer_ids=tuple(i + 1 for i in SHAPE.target_layer_ids),
        num_target_layers=SHAPE.num_target_layers,
        hidden_size=H,
        vocab_size=V,
    )
    empty = Cache.create_or_open(folder / "cache", manifest)
    (folder / "pieces").mkdir()
    save_file(pieces, folder / "pieces/pieces.safetensors")
    store_target_files(empty.storage, folder / "pieces")
    writer = StateWriter(empty, part_bytes=1 << 20, facts={})

    def add(seq_id: str, lengths: list[int], unseen_end: bool, greedy: Callable[[int], bool]) -> None:
        """`greedy` says for each position of a response whether its token is the target's choice."""
        hidden_TKH = torch.randn(sum(lengths), K, H, generator=generator).bfloat16()
        features_TD = hidden_TKH.flatten(1).float()
        drafters = [SlowDrafter(load_drafter(path), pieces, features_TD) for path in folders]
        tokens: list[int] = []
        mask: list[int] = []
        for i, length in enumerate(lengths):
            if i % 2:
                write_response(tokens, length, drafters, generator)
            else:
                tokens += torch.randint(V, (length,), generator=generator).tolist()
            mask += [i % 2] * length
        choices = [token if greedy(p) else (token + 1) % V for p, token in enumerate(tokens)]
        argmax = [*choices[1:], 0]
        T = len(tokens) - unseen_end
        append(
            writer,
            seq_id=seq_id,
            source="prompts.jsonl",
            source_row=0,
            hidden_TKH=hidden_TKH[:T],
            token_ids=tokens[:T],
            loss_mask=mask[:T],
            target_argmax=argmax[:T],
            prompt_len=lengths[0],
            final_token_id=tokens[-1] if unseen_end else None,
            finish_reason="stop" if unseen_end else "given",
        )

    for seq_id, (lengths, unseen_end) in TALKS.items():
        add(seq_id, lengths, unseen_end, lambda position: True)
    add("second-answer-sampled", [2, 6, 1, 8], False, lambda position: position < 13)
    add("not-greedy", [2, 6], False, lambda position: position != 5)
    add("last-token-not-greedy", [2, 6], True, lambda position: position != 7)
    writer.commit()
    return World(folder, pieces)
