"""Replay against a slow decode: one block at a time, its context cut off before the anchor, one cycle after another."""

# S tokens of a sequence, T with a state, K context layers, D context features (K x H), H hidden width, G block size
# V vocabulary, N anchors, B branches
import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import make_cached, make_manifest, make_row
from torch import Tensor
from vpd.data.cache.index import SequenceRow
from vpd.data.cache.reader import CachedSequence
from vpd.data.cache.store import Cache
from vpd.data.cache.target_files import store_target_files
from vpd.data.cache.writer import StateWriter
from vpd.data.errors import CacheNotFoundError, DrafterError
from vpd.stages.config import EvalConfig
from vpd.stages.drafter.checkpoint import load_drafter, save_drafter
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.shape import DrafterShape
from vpd.stages.evaluate import replay as replay_module
from vpd.stages.evaluate.replay import (
    NUM_ALTERNATIVES,
    Replay,
    ReplayReport,
    count_cycles,
    find_responses,
    is_greedy,
)

K, H, G, V = 2, 8, 5, 12
SETTINGS = ["first", "first_tree", "first_as_second", "d2sd"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """With tensors this small, threads only wait for each other, on a busy machine for long."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# Responses, greediness, cycles


def make_sequence(mask: list[bool], token_ids: list[int], argmax: list[int]) -> CachedSequence:
    """A sequence of which replay's bookkeeping reads tokens alone."""
    row = make_row("s", len(argmax), num_supervised=sum(mask), finish_reason="stop")
    return make_cached(row, torch.empty(0, K, H, dtype=torch.bfloat16), token_ids, mask, argmax)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), max_size=20))
def test_responses_are_the_runs_of_assistant_tokens(mask: list[bool]):
    responses = find_responses(torch.tensor(mask, dtype=torch.bool))
    covered = [position for start, end in responses for position in range(start, end)]
    assert covered == [position for position, assistant in enumerate(mask) if assistant]
    assert all(start < end for start, end in responses)
    # Two runs never touch, so none of them could be longer.
    assert all(end < start for (_, end), (start, _) in pairwise(responses))


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(2, 8), st.booleans())
def test_a_response_is_greedy_if_decoding_step_by_step_gives_it(data: st.DataObject, num_tokens: int, cut: bool):
    ids = st.integers(0, 1)
    tokens = data.draw(st.lists(ids, min_size=num_tokens, max_size=num_tokens))
    argmax = data.draw(st.lists(ids, min_size=num_tokens, max_size=num_tokens))
    if data.draw(st.booleans()):
        argmax = [*tokens[1:], 0]
    start = data.draw(st.integers(0, num_tokens - 1))
    end = data.draw(st.integers(start + 1, num_tokens))
    # The target may never have seen the last token, which then has no choice after it.
    sequence = make_sequence([True] * num_tokens, tokens, argmax[:-1] if cut else argmax)
    written = tokens[:start]
    while 0 < len(written) < end:
        written.append(argmax[len(written) - 1])
    # Without a token before it, nobody can say whether the first one was the target's choice.
    assert is_greedy(sequence, (start, end)) == (start > 0 and written == tokens[:end])


def slow_count(accept_len_at: Callable[[int], int], num_tokens: int) -> int:
    """Decodes a response token by token; its first one is there already."""
    num_written, cycles = 1, 0
    while num_written < num_tokens:
        cycles += 1
        drafted = accept_len_at(num_written - 1)
        for _ in range(drafted):
            num_written += 1
        num_written += 1  # the bonus token
    return cycles


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 6), max_size=25))
def test_cycles_are_those_of_a_decode_token_by_token(accept_lens: list[int]):
    assert count_cycles(accept_lens, len(accept_lens) + 1) == slow_count(lambda i: accept_lens[i], len(accept_lens) + 1)


@pytest.mark.parametrize(
    ("accept_lens", "cycles"),
    [
        pytest.param([], 0, id="one-token"),
        pytest.param([0], 1, id="bonus-alone"),
        pytest.param([0, 0, 0], 3, id="never-accepted"),
        pytest.param([2, 9, 9], 1, id="bonus-completes-it"),
        pytest.param([1, 9, 0], 2, id="one-left"),
    ],
)
def test_count_cycles(accept_lens: list[int], cycles: int):
    assert count_cycles(accept_lens, len(accept_lens) + 1) == cycles


# Slow decode


class SlowDrafter:
    """One block at a time over a context that ends before the anchor: nothing it must not see is there."""

    def __init__(self, drafter: Drafter, pieces: dict[str, Tensor], features_TD: Tensor):
        self.drafter, self.features_TD = drafter, features_TD
        self.embed_VH, self.head_VH = pieces["embed_tokens.weight"], pieces["lm_head.weight"]
        self.ranked = cache(self._ranked)

    @torch.no_grad()
    def _ranked(self, anchor: int, visible: tuple[int, ...]) -> list[list[tuple[float, int]]]:
        """For every masked position, all tokens with their probabilities, most likely first."""
        context = self.drafter.context(self.features_TD[:anchor])
        ids = [*visible, *[self.drafter.shape.mask_token_id] * (G - len(visible))]
        states_GH = self.drafter(self.embed_VH[ids][None], torch.tensor([anchor]), context)[0]
        found = []
        for state in states_GH[len(visible) :]:
            probs = (self.head_VH @ state).double().softmax(dim=0).tolist()
            found.append(sorted(((prob, token) for token, prob in enumerate(probs)), reverse=True))
        return found

    def draft(self, anchor: int, visible: tuple[int, ...]) -> list[int]:
        """The G - 1 tokens after the anchor, of which the visible ones are kept."""
        return [*visible[1:], *(ranked[0][1] for ranked in self.ranked(anchor, visible))]


def slow_candidates(first: SlowDrafter, second: SlowDrafter, anchor: int, token: int, k: int) -> dict[str, list]:
    """Every setting's candidates at one anchor, from the method's words."""
    ranked = first.ranked(anchor, (token,))
    draft = [position[0][1] for position in ranked]
    confidences = [position[0][0] for position in ranked]
    swaps = [
        (math.prod(confidences[:i]) * prob, [*draft[:i], other, *draft[i + 1 :]])
        for i in range(G - 1)
        for prob, other in ranked[i][1:NUM_ALTERNATIVES]
    ]
    posterior = [math.prod(confidences[:i]) * (1 - confidences[i]) for i in range(G - 1)]
    prefixes = sorted(range(G - 1), key=lambda i: posterior[i], reverse=True)[:k]
    return {
        "first": [draft],
        "first_tree": [draft, *(candidate for _, candidate in sorted(swaps, reverse=True)[:k])],
        "first_as_second": [draft, *(first.draft(anchor, (token, *draft[:i])) for i in prefixes)],
        "d2sd": [draft, *(second.draft(anchor, (token, *draft[:i])) for i in prefixes)],
    }


def slow_accept_length(candidates: list[list[int]], continuation: list[int]) -> int:
    """Longest common beginning of a candidate and what the target goes on with."""
    best = 0
    for candidate in candidates:
        length = 0
        while length < min(len(candidate), len(continuation)) and candidate[length] == continuation[length]:
            length += 1
        best = max(best, length)
    return best


# A tiny cache with two drafters


def make_shape(**changes: int) -> DrafterShape:
    return DrafterShape(
        **{
            "num_layers": 2,
            "hidden_size": H,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 4,
            "intermediate_size": 6,
            "rms_norm_eps": 1e-6,
            "rope_theta": 100.0,
            "max_position_embeddings": 128,
            "vocab_size": V,
            "block_size": G,
            "mask_token_id": V - 1,
            "target_layer_ids": (0, 2),
            "num_target_layers": 4,
            **changes,
        }
    )


def write_drafter(folder: Path, shape: DrafterShape, seed: int) -> Path:
    """A drafter whose drafts differ from place to place: its attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    drafter = Drafter(shape)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5, generator=generator)
    save_drafter(drafter.state_dict(), folder, shape.to_json(training_mode="dflash", prefix_weight_base=None))
    return folder


class World(NamedTuple):
    """A cache with the folders of its drafters, and what the slow decode reads of them."""

    cache: Cache
    folder: Path
    pieces: dict[str, Tensor]

    @property
    def first(self) -> Path:
        return self.folder / "first"

    @property
    def second(self) -> Path:
        return self.folder / "second"

    def replay(self, **config: int) -> Replay:
        return Replay(self.cache, self.first, self.second, EvalConfig(device="cpu", **config))

    def row(self, seq_id: str) -> SequenceRow:
        (row,) = [row for row in self.cache.rows if row.seq_id == seq_id]
        return row

    def slow(self, seq_id: str) -> tuple[SlowDrafter, SlowDrafter]:
        features_TD = self.cache.read(self.row(seq_id)).hidden_TKH.flatten(1).float()
        first, second = (load_drafter(folder) for folder in (self.first, self.second))
        return SlowDrafter(first, self.pieces, features_TD), SlowDrafter(second, self.pieces, features_TD)


def write_response(
    tokens: list[int], length: int, first: SlowDrafter, second: SlowDrafter, generator: torch.Generator
) -> None:
    """Appends a response that random drafters would partly get right: each stretch follows one of their candidates
    for some tokens, then goes another way."""

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    tokens.append(pick(V))
    end = len(tokens) + length - 1
    while len(tokens) < end:
        candidates = slow_candidates(first, second, len(tokens) - 1, tokens[-1], 4)
        branches = candidates[SETTINGS[pick(4)]]
        tokens += branches[pick(len(branches))][: pick(G)]
        tokens.append(pick(V))
    del tokens[end:]


TALKS = {
    # Lengths of prompt and response in turn; the last response may end in a token without a state.
    "one-answer": ([3, 45], True),
    "answer-given-in-full": ([2, 11], False),
    "two-answers": ([2, 9, 4, 20], True),
    "short-answers": ([1, 1, 3, 2, 2, 3], False),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("replay")
    first = write_drafter(folder / "first", make_shape(), seed=1)
    second = write_drafter(folder / "second", make_shape(num_layers=1, mask_token_id=V - 2), seed=2)
    generator = torch.Generator().manual_seed(3)
    pieces = {
        "embed_tokens.weight": torch.randn(V, H, generator=generator),
        "lm_head.weight": torch.randn(V, H, generator=generator),
        "norm.weight": torch.ones(H),
    }
    manifest = make_manifest(layer_ids=(0, 2), vllm_layer_ids=(1, 3), num_target_layers=4, hidden_size=H, vocab_size=V)
    empty = Cache.create_or_open(folder / "cache", manifest)
    (folder / "pieces").mkdir()
    save_file(pieces, folder / "pieces/pieces.safetensors")
    store_target_files(empty.storage, folder / "pieces")
    writer = StateWriter(empty, part_bytes=1 << 20, facts={})

    def add(seq_id: str, lengths: list[int], unseen_end: bool, greedy: Callable[[int], bool]) -> None:
        """`greedy` says of each position of a response whether its token is the target's own choice."""
        hidden_TKH = torch.randn(sum(lengths), K, H, generator=generator).bfloat16()
        features_TD = hidden_TKH.flatten(1).float()
        drafters = [SlowDrafter(load_drafter(path), pieces, features_TD) for path in (first, second)]
        tokens: list[int] = []
        mask: list[int] = []
        for i, length in enumerate(lengths):
            if i % 2:
                write_response(tokens, length, drafters[0], drafters[1], generator)
            else:
                tokens += torch.randint(V, (length,), generator=generator).tolist()
            mask += [i % 2] * length
        choices = [token if greedy(p) else (token + 1) % V for p, token in enumerate(tokens)]
        argmax = [*choices[1:], 0]
        T = len(tokens) - unseen_end
        writer.append(
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
    add("prompt-alone", [5], False, lambda position: True)
    add("nothing-to-draft", [4, 1], False, lambda position: True)
    writer.commit()
    return World(Cache.open(folder / "cache"), folder, pieces)


def responses_of(lengths: list[int]) -> list[tuple[int, int]]:
    """Spans of the responses that hold something to draft."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [
        (end - length, end) for i, (length, end) in enumerate(zip(lengths, ends, strict=True)) if i % 2 and length > 1
    ]


@pytest.mark.parametrize("seq_id", TALKS)
@pytest.mark.parametrize("k", [0, 3, 40])
def test_accept_lengths_are_those_of_the_slow_decode(
    world: World, k: int, seq_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(replay_module, "ANCHORS_PER_PASS", 7)
    replay = world.replay(k=k)
    assert replay.second is not None
    sequence = world.cache.read(world.row(seq_id))
    tokens = sequence.token_ids_S.tolist()
    features_TD = sequence.hidden_TKH.flatten(1).float()
    with torch.inference_mode():
        contexts = replay.first.context(features_TD), replay.second.context(features_TD)
    drafters = world.slow(seq_id)
    for start, end in responses_of(TALKS[seq_id][0]):
        found = replay.accept_lengths(sequence.token_ids_S[:end], start, *contexts)
        expected: dict[str, list[int]] = {setting: [] for setting in SETTINGS}
        for anchor in range(start, end - 1):
            candidates = slow_candidates(*drafters, anchor, tokens[anchor], k)
            for setting in SETTINGS:
                expected[setting].append(slow_accept_length(candidates[setting], tokens[anchor + 1 : end]))
        assert found == expected


def test_the_tiny_cache_tells_the_settings_apart(world: World):
    # Otherwise the comparisons with the slow decode would show little.
    report = world.replay(k=3).run([world.row(seq_id) for seq_id in TALKS])
    assert len(set(report.num_cycles.values())) == len(SETTINGS)
    assert all(report.alpha[setting] > report.alpha["first"] > 1.2 for setting in SETTINGS[1:])


@pytest.mark.parametrize("seq_id", TALKS)
def test_a_replay_is_a_decode_cycle_by_cycle(world: World, seq_id: str):
    report = world.replay(k=2).run([world.row(seq_id)])
    tokens = world.cache.read(world.row(seq_id)).token_ids_S.tolist()
    drafters = world.slow(seq_id)
    spans = responses_of(TALKS[seq_id][0])
    cycles = dict.fromkeys(SETTINGS, 0)
    for start, end in spans:
        for setting in SETTINGS:

            def accepted(i: int, setting: str = setting, start: int = start, end: int = end) -> int:
                candidates = slow_candidates(*drafters, start + i, tokens[start + i], 2)[setting]
                return slow_accept_length(candidates, tokens[start + i + 1 : end])

            cycles[setting] += slow_count(accepted, end - start)
    num_tokens = sum(end - start - 1 for start, end in spans)
    assert dict(report.num_cycles) == cycles
    assert (report.num_tokens, report.num_sequences, report.num_responses) == (num_tokens, 1, len(spans))
    assert report.alpha == {setting: pytest.approx(num_tokens / cycles[setting]) for setting in SETTINGS}
    assert not report.skipped


def test_without_a_second_drafter_its_setting_is_left_out(world: World):
    rows = [world.row("one-answer")]
    alone = Replay(world.cache, world.first, None, EvalConfig(k=2, device="cpu")).run(rows)
    both = world.replay(k=2).run(rows)
    assert dict(alone.num_cycles) == {setting: both.num_cycles[setting] for setting in SETTINGS[:3]}


def test_the_first_drafter_given_as_second_equals_itself_reused(world: World):
    replay = Replay(world.cache, world.first, world.first, EvalConfig(k=3, device="cpu"))
    report = replay.run([world.row(seq_id) for seq_id in TALKS])
    assert report.num_cycles["d2sd"] == report.num_cycles["first_as_second"]


def test_what_cannot_be_replayed_is_counted_by_reason(world: World):
    report = world.replay(k=1).run(world.cache.rows)
    assert dict(report.skipped) == {
        "not the target's greedy output": 2,
        "no response": 1,
        "a response of one token": 1,
    }
    # All of TALKS, and of the answer that goes astray the turn before it.
    lengths = [*(lengths for lengths, _ in TALKS.values()), [2, 6]]
    assert report.num_sequences == len(lengths)
    assert report.num_responses == sum(len(responses_of(each)) for each in lengths)
    assert report.num_tokens == sum(end - start - 1 for each in lengths for start, end in responses_of(each))


def test_a_limit_reads_the_first_rows_and_every_sequence_is_reported(world: World):
    seen: list[None] = []
    report = world.replay(k=1, limit=2).run(world.cache.rows, lambda: seen.append(None))
    assert (report.num_sequences, len(seen)) == (2, 2)


def test_nothing_to_replay_is_an_error(world: World):
    rows = [world.row("prompt-alone"), world.row("not-greedy")]
    with pytest.raises(CacheNotFoundError, match="among 2 held-out sequences"):
        world.replay(k=1).run(rows)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"block_size": G + 1}, "block size 5, the VP-Drafter 6", id="block-size"),
        pytest.param({"vocab_size": V + 1}, "vocabulary: the cache has 12, the drafter 13", id="vocabulary"),
    ],
)
def test_a_second_drafter_that_does_not_fit_is_refused(
    world: World, tmp_path: Path, changes: dict[str, int], reason: str
):
    other = write_drafter(tmp_path / "other", make_shape(**changes), seed=5)
    with pytest.raises(DrafterError, match=reason):
        Replay(world.cache, world.first, other, EvalConfig(device="cpu"))


def test_the_report_as_json_holds_plain_values():
    report = ReplayReport(k=4, block_size=8, num_tokens=30, num_sequences=2, num_responses=3)
    report.num_cycles.update({"first": 20, "d2sd": 12})
    report.skipped.update(["no response"])
    assert report.to_json() == {
        "alpha": {"first": 1.5, "d2sd": 2.5},
        "k": 4,
        "block_size": 8,
        "num_cycles": {"first": 20, "d2sd": 12},
        "num_tokens": 30,
        "num_sequences": 2,
        "num_responses": 3,
        "skipped": {"no response": 1},
    }
