"""Acceptance length by replay: decoding with two drafters over cached greedy responses, without the target.

On a greedy response the target would accept exactly the recorded continuation, and the states of every token
are recorded too. So each cycle's outcome follows from the drafters alone. Labels, masks and boundaries are
worked out here from the recorded tokens and share nothing with training.
"""

# S tokens of a sequence, N anchors, G block size, B branches, A alternatives
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.cache.index import SequenceRow
from ...data.cache.reader import CachedSequence, Request, read_ahead
from ...data.cache.store import Cache
from ...data.errors import CacheNotFoundError, DrafterError
from ..config import EvalConfig, ReadConfig
from ..devices import choose_device
from ..drafter.checkpoint import check_fits, load_drafter
from ..drafter.drafting import fill_blocks
from ..drafter.model import Drafter, LayerContext
from ..drafter.target_pieces import TargetPieces
from .branches import paper_prefixes, swapped_candidates

NUM_ALTERNATIVES = 5
ANCHORS_PER_PASS = 64
BEYOND = -1
"""Stands for "no recorded token": never equal to a drafted one."""


@dataclass
class ReplayReport:
    """Sums over all replayed responses."""

    k: int
    block_size: int
    num_tokens: int = 0
    """Tokens committed by drafting cycles: all of a response but its first, which the prefill gives."""
    num_cycles: Counter[str] = field(default_factory=Counter)
    """Cycles that each setting needs for them."""
    num_sequences: int = 0
    num_responses: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Sequences without a response that can be replayed, by reason."""

    @property
    def alpha(self) -> dict[str, float]:
        """Mean acceptance length by setting: tokens committed per cycle, the bonus token included."""
        return {name: self.num_tokens / cycles for name, cycles in self.num_cycles.items() if cycles}

    def to_json(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "k": self.k,
            "block_size": self.block_size,
            "num_cycles": dict(self.num_cycles),
            "num_tokens": self.num_tokens,
            "num_sequences": self.num_sequences,
            "num_responses": self.num_responses,
            "skipped": dict(self.skipped),
        }


class Replay:
    """Replays sequences with a first drafter and, if given, a VP-Drafter."""

    def __init__(
        self, cache: Cache, first: Path, second: Path | None, config: EvalConfig, read: ReadConfig | None = None
    ):
        """
        Raises:
            DrafterError: a drafter does not fit the cache or the other one.
        """
        self.cache, self.config, self.read = cache, config, read or ReadConfig()
        device = choose_device(config.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.device = device
        self.pieces = TargetPieces.load(cache.target_folder, device=device, dtype=dtype)
        self.first = load_drafter(first, device=device, dtype=dtype)
        self.second = load_drafter(second, device=device, dtype=dtype) if second is not None else None
        for drafter, where in ((self.first, first), (self.second, second)):
            if drafter is not None and where is not None:
                check_fits(drafter.shape, cache.manifest, where)
        self.block_size = self.first.shape.block_size
        if self.second is not None and self.second.shape.block_size != self.block_size:
            raise DrafterError(
                f"the first drafter has block size {self.block_size}, the VP-Drafter {self.second.shape.block_size}. "
                "Train the VP-Drafter with the first drafter's block size."
            )
        self.report = ReplayReport(config.k, self.block_size)

    def run(self, rows: Sequence[SequenceRow], on_sequence: Callable[[], None] = lambda: None) -> ReplayReport:
        """Replays these sequences.

        Raises:
            CacheNotFoundError: none of them can be replayed.
        """
        requests = map(Request, rows[: self.config.limit])
        with closing(read_ahead(self.cache, requests, self.read.num_threads, self.read.num_buffers)) as sequences:
            for sequence in sequences:
                self.replay(sequence)
                on_sequence()
        if not self.report.num_responses:
            raise CacheNotFoundError(
                f"expected held-out greedy responses in {self.cache.place}, found none among {len(rows)} held-out "
                f"sequences ({dict(self.report.skipped)}). Hold out more, or extract with --mode generate and "
                "temperature 0."
            )
        return self.report

    @torch.inference_mode()
    def replay(self, sequence: CachedSequence) -> None:
        """Adds one sequence to the report."""
        responses = find_responses(sequence.loss_mask_S)
        greedy = [span for span in responses if is_greedy(sequence, span)]
        usable = [(start, end) for start, end in greedy if end - start > 1]
        if not usable:
            reason = "no response" if not responses else "not the target's greedy output"
            self.report.skipped[reason if not greedy else "a response of one token"] += 1
            return
        self.report.num_sequences += 1
        features_TD = sequence.hidden(self.device).flatten(1).to(self.pieces.embed_VH.dtype)
        first_context = self.first.context(features_TD)
        second_context = self.second.context(features_TD) if self.second is not None else None
        for start, end in usable:
            tokens = sequence.token_ids_S[:end].to(self.device)
            accepted = self.accept_lengths(tokens, start, first_context, second_context)
            self.report.num_responses += 1
            self.report.num_tokens += end - start - 1
            for setting, lengths in accepted.items():
                self.report.num_cycles[setting] += count_cycles(lengths, end - start)

    def accept_lengths(
        self, tokens_S: Tensor, start: int, first_context: list[LayerContext], second_context: list[LayerContext] | None
    ) -> dict[str, list[int]]:
        """For each setting and each anchor start..S-2: drafted tokens that the target would accept."""
        parts: dict[str, list[int]] = {}
        for anchors_N in torch.arange(start, len(tokens_S) - 1, device=self.device).split(ANCHORS_PER_PASS):
            recorded_NG = self.recorded_after(tokens_S, anchors_N)
            for setting, candidates_NBG in self.candidates(tokens_S, anchors_N, first_context, second_context).items():
                right = (candidates_NBG == recorded_NG[:, None, :]).long().cumprod(dim=2).sum(dim=2)
                parts.setdefault(setting, []).extend(right.amax(dim=1).tolist())
        return parts

    def recorded_after(self, tokens_S: Tensor, anchors_N: Tensor) -> Tensor:
        """The G-1 recorded tokens after each anchor [N, G-1], `BEYOND` past the response."""
        padded = torch.cat([tokens_S, tokens_S.new_full((self.block_size,), BEYOND)])
        return padded.unfold(0, self.block_size, 1)[anchors_N, 1:]

    def candidates(
        self,
        tokens_S: Tensor,
        anchors_N: Tensor,
        first_context: list[LayerContext],
        second_context: list[LayerContext] | None,
    ) -> dict[str, Tensor]:
        """Each setting's candidates [N, B, G-1]; the first draft is always one of them."""
        anchor_ids_N = tokens_S[anchors_N]
        zero_N1 = torch.zeros_like(anchors_N)[:, None]
        no_draft_NG = tokens_S.new_zeros(len(anchors_N), self.block_size - 1)
        tokens_NBGA, probs_NBGA = self.redraft(self.first, first_context, anchors_N, anchor_ids_N, no_draft_NG, zero_N1)
        tokens_NGA, probs_NGA = tokens_NBGA[:, 0], probs_NBGA[:, 0]
        draft_NG = tokens_NGA[..., 0]
        found = {"first": draft_NG[:, None, :]}
        k = self.config.k
        found["first_tree"] = torch.cat([found["first"], swapped_candidates(tokens_NGA, probs_NGA, k)], dim=1)
        prefixes_NB = paper_prefixes(probs_NGA[..., 0], k)
        seconds = {"first_as_second": (self.first, first_context)}
        if self.second is not None and second_context is not None:
            seconds["d2sd"] = (self.second, second_context)
        for setting, (drafter, context) in seconds.items():
            redrafted, _ = self.redraft(drafter, context, anchors_N, anchor_ids_N, draft_NG, prefixes_NB)
            k_G = torch.arange(self.block_size - 1, device=self.device)
            kept = k_G < prefixes_NB[..., None]
            candidates = torch.where(kept, draft_NG[:, None, :], redrafted[..., 0])
            found[setting] = torch.cat([found["first"], candidates], dim=1)
        return found

    def redraft(
        self,
        drafter: Drafter,
        context: list[LayerContext],
        anchors_N: Tensor,
        anchor_ids_N: Tensor,
        draft_NG: Tensor,
        prefixes_NB: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Drafts with the anchor and the first `prefixes_NB` draft tokens visible: tokens and probabilities
        [N, B, G-1, A]; what the visible positions hold has no meaning."""
        N, B = prefixes_NB.shape
        G = self.block_size
        if B == 0:
            empty = draft_NG.new_zeros(N, 0, G - 1, NUM_ALTERNATIVES)
            return empty, empty.float()
        k_G = torch.arange(1, G, device=self.device)
        visible_NBG = k_G <= prefixes_NB[..., None]
        inside = torch.where(visible_NBG, draft_NG[:, None, :], drafter.shape.mask_token_id)
        block_ids = torch.cat([anchor_ids_N[:, None, None].expand(N, B, 1), inside], dim=2).view(N * B, G)
        wanted = torch.cat([torch.zeros_like(visible_NBG[..., :1]), ~visible_NBG], dim=2).view(N * B, G)
        tokens, probs = fill_blocks(
            drafter, self.pieces, context, block_ids, anchors_N.repeat_interleave(B), wanted, NUM_ALTERNATIVES
        )
        shape = (N, B, G - 1, NUM_ALTERNATIVES)
        return tokens[:, 1:].reshape(shape), probs[:, 1:].reshape(shape)


def find_responses(loss_mask_S: Tensor) -> list[tuple[int, int]]:
    """Start and end (exclusive) of every run of assistant tokens."""
    mask = [False, *loss_mask_S.tolist(), False]
    starts = [i for i in range(len(mask) - 1) if mask[i + 1] and not mask[i]]
    ends = [i for i in range(len(mask) - 1) if mask[i] and not mask[i + 1]]
    return list(zip(starts, ends, strict=True))


def is_greedy(sequence: CachedSequence, span: tuple[int, int]) -> bool:
    """Whether every token of a response is the target's greedy choice after the tokens before it."""
    start, end = span
    if start == 0:
        return False
    return torch.equal(sequence.token_ids_S[start:end], sequence.target_argmax_T[start - 1 : end - 1])


def count_cycles(accept_lens: list[int], num_tokens: int) -> int:
    """Cycles until a response is complete, when the cycle at token i commits accept_lens[i] tokens and a bonus.

    The first token is the anchor of the first cycle; nothing beyond the recorded response is committed.
    """
    position = cycles = 0
    while position < num_tokens - 1:
        position += accept_lens[position] + 1
        cycles += 1
    return cycles
