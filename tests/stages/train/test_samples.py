"""Which sequences a step reads, and the blocks drawn from each, against loops over the recorded sequence."""

# S tokens of a sequence, T with a state, K layers, H hidden width, N blocks, G block size
import math
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_cached, make_index, make_row
from vpd.data.cache.drafts import FirstDrafts
from vpd.data.cache.index import SequenceRow
from vpd.data.cache.reader import CachedSequence
from vpd.data.cache.store import Cache
from vpd.data.errors import CacheNotFoundError
from vpd.stages.config import TrainConfig
from vpd.stages.train.samples import (
    DataOrder,
    TrainingBlocks,
    draw_blocks,
    feature_rms,
    is_held_out,
    label_tokens,
    split_rows,
)

G, MASK = 5, 999
TOKEN, ARGMAX = 100, 500
"""Position p holds token TOKEN + p, and the target's own choice there is ARGMAX + p: nothing passes for another."""


def parse_mask(turns: str) -> list[bool]:
    """`..aaa.`: dots are prompt tokens, letters an assistant's."""
    return [letter != "." for letter in turns]


def make_sequence(turns: str, *, final_token: bool = False, seq_id: str = "s", seed: int = 0) -> CachedSequence:
    """A sequence; with `final_token` its last token is one that the target never saw."""
    mask = parse_mask(turns)
    T = len(mask) - final_token
    row = make_row(
        seq_id,
        T,
        prompt_len=turns.index("a") if "a" in turns else len(turns),
        num_supervised=sum(mask),
        final_token_id=TOKEN + T if final_token else None,
        finish_reason="stop" if final_token else "given",
    )
    hidden_TKH = torch.randn(T, 2, 3, generator=torch.Generator().manual_seed(seed)).bfloat16()
    token_ids, argmax = ([base + p for p in range(count)] for base, count in ((TOKEN, len(mask)), (ARGMAX + 1, T)))
    return make_cached(row, hidden_TKH, token_ids, mask, argmax)


def make_drafts(accept_len_T: list[int]) -> FirstDrafts:
    """First drafts of which only the accept lengths are there."""
    found = torch.tensor(accept_len_T, dtype=torch.uint8)
    return cast(FirstDrafts, SimpleNamespace(accept_lengths=lambda row: found))


def make_cache(sequences: list[CachedSequence]) -> Cache:
    """A cache that has these sequences in memory."""
    by_id = {sequence.row.seq_id: sequence for sequence in sequences}
    rows = make_index(sequence.row for sequence in sequences)

    def read(row: SequenceRow) -> CachedSequence:
        return by_id[row.seq_id]

    return cast(Cache, SimpleNamespace(rows=rows, place="cache", read=read, read_tokens=read))


def make_config(**settings: Any) -> TrainConfig:
    return TrainConfig.model_validate({"prefix": {"sampler": "geometric"}, **settings})


def draw(sequence: CachedSequence, config: TrainConfig, step: int = 0, drafts: FirstDrafts | None = None):
    return draw_blocks(sequence, drafts, config, G, MASK, step)


# Held-out sequences


@settings(deadline=None)
@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_holds_out_all_that_a_smaller_one_does(seq_id: str, one: float, other: float):
    smaller, larger = sorted((one, other))
    assert is_held_out(seq_id, smaller) <= is_held_out(seq_id, larger)
    assert is_held_out(seq_id, larger) == is_held_out(seq_id, larger)


def test_the_share_is_that_of_the_sequences():
    ids = [f"sequence-{i}" for i in range(4000)]
    for share in (0.05, 0.5):
        count = sum(is_held_out(seq_id, share) for seq_id in ids)
        assert abs(count - 4000 * share) < 4.5 * (4000 * share * (1 - share)) ** 0.5
    assert not any(is_held_out(seq_id, 0.0) for seq_id in ids)
    assert all(is_held_out(seq_id, 1.0) for seq_id in ids)


def test_the_split_never_changes():
    # Literal on purpose: an evaluation on sequences that another version trained on would look too good.
    held_out = [i for i in range(40) if is_held_out(f"prompts.jsonl:{i}", 0.25)]
    assert held_out == [4, 11, 12, 13, 21, 24, 28, 39]


def test_rows_are_split_without_overlap_and_need_two_supervised_tokens():
    sequences = [make_sequence(turns, seq_id=f"{turns}{i}") for i in range(60) for turns in ("..aa", "...a", "....")]
    rows = [sequence.row for sequence in sequences]
    training, held_out = split_rows(make_cache(sequences), 0.3)
    assert list(held_out) == [row for row in rows if is_held_out(row.seq_id, 0.3)]
    assert list(training) == [row for row in rows if not is_held_out(row.seq_id, 0.3) and row.seq_id.startswith("..aa")]
    assert 0 < len(held_out) < 180


def test_a_cache_with_nothing_to_train_on_is_refused():
    cache = make_cache([make_sequence("...a")])
    with pytest.raises(CacheNotFoundError, match="sequences to train on in cache, found none: 1 sequences"):
        split_rows(cache, 0.0)


# Order


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 25), st.integers(1, 8), st.integers(0, 3), st.integers(1, 4))
def test_an_epoch_visits_each_sequence_at_most_once(num_sequences: int, per_step: int, seed: int, num_processes: int):
    order = DataOrder(num_sequences, per_step, seed)
    for epoch in range(3):
        visited: list[int] = []
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            indices = order.indices(step)
            assert len(indices) == min(per_step, num_sequences)
            # Every process works it out for itself, from scratch, and takes every n-th.
            shares = [
                DataOrder(num_sequences, per_step, seed).indices(step)[process::num_processes]
                for process in range(num_processes)
            ]
            assert sorted(index for share in shares for index in share) == sorted(indices)
            visited += indices
        assert len(set(visited)) == len(visited)
        assert set(visited) <= set(range(num_sequences))
        assert num_sequences - len(visited) < per_step


def test_order_changes_with_the_epoch_and_the_seed():
    orders = [DataOrder(50, 50, seed).indices(step) for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4


def test_what_an_epoch_leaves_out_comes_in_another():
    order = DataOrder(7, 3, seed=0)
    assert {index for step in range(20) for index in order.indices(step)} == set(range(7))


# Blocks


class Case(NamedTuple):
    id: str
    turns: str
    final_token: bool = False
    settings: Mapping[str, Any] = MappingProxyType({})
    accept_len: list[int] | None = None


BOUNDARY = {"prefix": {"sampler": "boundary", "prior_share": 0.5}}
CASES = [
    Case("one-turn", "...aaaaaaaaa"),
    Case("several-turns", "..aaaa.aa...aaaaaaaa.a"),
    Case("last-token-without-a-state", "..aaa..aaaaaa", final_token=True),
    Case("few-anchors", "..aaaaaaaaaaaaaaa", settings={"num_anchors": 4}),
    Case("first-drafter", "..aaaaaaa.aaaa", settings={"objective": "dflash", "tau": 2.0}),
    Case("visible-geometric", "..aaaaaaa.aa", settings={"prefix": {"sampler": "visible-geometric"}}),
    Case("batch", "..aaaaaaa.aaaa", settings={"normalise": "batch", "tau": 1.5}),
    Case("argmax", "..aaaaaaa.aaaa", settings={"labels": "argmax"}),
    Case("argmax-of-the-last-state", "..aaaaaaa", final_token=True, settings={"labels": "argmax"}),
    Case("argmax-from-the-first-token", "aaaa.aa", settings={"labels": "argmax"}),
    Case("cut-in-a-turn", "..aaaaaaa.aaaaaaa", settings={"max_len": 6}),
    Case("cut-before-the-last-state", "..aaaaaaa", final_token=True, settings={"max_len": 7, "labels": "argmax"}),
    Case("cut-at-the-end", "..aaaaaaa", final_token=True, settings={"max_len": 8}),
    Case("boundary", "..aaaaaaaaa", settings=BOUNDARY, accept_len=[255, 255, 0, 1, 2, 3, 4, 0, 1, 1, 255]),
]


def expected_anchors(mask: list[bool], num_context: int) -> list[int]:
    return [p for p in range(num_context) if mask[p] and p + 1 < len(mask) and mask[p + 1]]


def labelled_positions(mask: list[bool], anchor: int) -> list[int]:
    """Positions after the anchor, within its block and its turn."""
    positions = []
    for position in range(anchor + 1, min(anchor + G, len(mask))):
        if not mask[position]:
            break
        positions.append(position)
    return positions


@pytest.mark.parametrize("step", [0, 7])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_blocks_are_those_of_the_recorded_sequence(case: Case, step: int):
    config = make_config(**case.settings)
    sequence = make_sequence(case.turns, final_token=case.final_token)
    drafts = make_drafts(case.accept_len) if case.accept_len else None
    blocks = draw(sequence, config, step, drafts)
    assert blocks is not None

    num_context = min(sequence.row.num_tokens, config.max_len)
    # One token past the states that are read can still be a label.
    mask = parse_mask(case.turns)[: config.max_len + 1]
    candidates = expected_anchors(mask, num_context)
    anchors = blocks.anchors_N.tolist()
    assert anchors == sorted(set(anchors))
    assert set(anchors) <= set(candidates)
    assert len(anchors) == min(config.num_anchors, len(candidates))
    assert torch.equal(blocks.features_TD, sequence.hidden_TKH[:num_context].reshape(num_context, 6))

    label_base = ARGMAX if config.labels == "argmax" else TOKEN
    sums = []
    for n, anchor in enumerate(anchors):
        labelled = labelled_positions(mask, anchor)
        ids = blocks.block_ids_NG[n].tolist()
        visible = [token for token in ids if token != MASK]
        prefix = len(visible) - 1
        assert ids == [TOKEN + anchor + k for k in range(prefix + 1)] + [MASK] * (G - 1 - prefix)
        assert prefix < len(labelled)
        assert blocks.first_masked_NG[n].tolist() == [k == prefix + 1 for k in range(G)]
        raw = [0.0] * G
        for position in labelled:
            k = position - anchor
            if k > prefix:
                raw[k] = math.exp(-(k - prefix - 1) / config.tau)
                assert blocks.labels_NG[n, k] == label_base + position
        sums.append(sum(raw))
        divisor = sum(raw) if config.normalise == "block" else 1.0
        assert blocks.weights_NG[n].tolist() == pytest.approx([weight / divisor for weight in raw], rel=1e-5)
    expected = len(anchors) if config.normalise == "block" else sum(sums)
    assert float(blocks.denominator) == pytest.approx(expected, rel=1e-5)
    if config.normalise == "block":
        assert float(blocks.weights_NG.sum()) == pytest.approx(len(anchors), rel=1e-5)


def prefixes(blocks: TrainingBlocks | None) -> list[int]:
    assert blocks is not None
    return [sum(token != MASK for token in ids) - 1 for ids in blocks.block_ids_NG.tolist()]


def test_a_first_drafter_sees_the_anchor_alone():
    config = make_config(objective="dflash")
    assert prefixes(draw(make_sequence("..aaaaaaaa"), config)) == [0] * 7


def test_the_accept_length_at_the_anchor_is_the_prefix():
    # Rows of the drafts are positions of the sequence; 9 and 8 stand where no block may look.
    accept_len = [9, 9, 0, 3, 1, 2, 0, 0, 9, 2, 1, 8, 8]
    config = make_config(prefix={"sampler": "boundary", "prior_share": 0.0})
    blocks = draw(make_sequence("..aaaaaa.aaaa"), config, 0, make_drafts(accept_len))
    assert blocks is not None
    assert blocks.anchors_N.tolist() == [2, 3, 4, 5, 6, 9, 10, 11]
    found = dict(zip(blocks.anchors_N.tolist(), prefixes(blocks), strict=True))
    assert {anchor: found[anchor] for anchor in (2, 3, 4, 6, 9, 10)} == {2: 0, 3: 3, 4: 1, 6: 0, 9: 2, 10: 1}
    assert found[5] < 2
    assert found[11] == 0


def same(one: TrainingBlocks | None, other: TrainingBlocks | None) -> bool:
    assert one is not None
    assert other is not None
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in TrainingBlocks.__slots__)


@pytest.mark.parametrize("objective", ["dflash", "vp"])
def test_draws_depend_on_seed_step_and_sequence_alone(objective: str):
    turns = "." + "a" * 60
    config = make_config(objective=objective, num_anchors=20, seed=3)
    first = draw(make_sequence(turns), config, step=4)
    torch.rand(3)
    draw(make_sequence(turns, seq_id="other"), config, step=5)
    assert same(draw(make_sequence(turns), config, step=4), first)
    assert not same(draw(make_sequence(turns), config, step=5), first)
    assert not same(draw(make_sequence(turns, seq_id="other"), config, step=4), first)
    assert not same(draw(make_sequence(turns), config.model_copy(update={"seed": 4}), step=4), first)


def test_every_anchor_is_drawn_equally_often():
    sequence, config = make_sequence("..aaaaaaa"), make_config(num_anchors=2)
    counts: Counter[int] = Counter()
    for step in range(300):
        blocks = draw(sequence, config, step)
        assert blocks is not None
        counts.update(blocks.anchors_N.tolist())
    assert set(counts) == set(range(2, 8))
    # Two of six: each anchor is in a draw with probability 1/3.
    assert all(abs(count - 100) < 4.5 * (300 * 1 / 3 * 2 / 3) ** 0.5 for count in counts.values())


@pytest.mark.parametrize(
    ("turns", "final_token", "max_len"),
    [
        pytest.param("......", False, 100, id="no-answer"),
        pytest.param("...a..a", False, 100, id="answers-of-one-token"),
        pytest.param("......aaaa", False, 6, id="answer-beyond-what-is-read"),
        pytest.param("......a", True, 100, id="answer-without-a-state"),
    ],
)
def test_a_sequence_without_anchor_gives_nothing(turns: str, final_token: bool, max_len: int):
    assert draw(make_sequence(turns, final_token=final_token), make_config(max_len=max_len)) is None


@pytest.mark.parametrize("labels", ["recorded", "argmax"])
def test_label_tokens_hold_every_label(labels: str):
    sequences = [
        make_sequence(turns, final_token=True, seq_id=f"s{i}")
        for i, turns in enumerate(["..aaaaa", "...aa.aaaaaaa", "aaa"])
    ]
    cache = make_cache(sequences)
    tokens = label_tokens(cache, cache.rows).tolist()
    assert tokens == sorted(set(tokens))
    for sequence in sequences:
        blocks = draw(sequence, make_config(labels=labels))
        assert blocks is not None
        assert set(blocks.labels_NG[blocks.weights_NG > 0].tolist()) <= set(tokens)


def test_feature_sizes_are_those_of_the_first_sequences():
    sequences = [make_sequence("." * (i + 1), seq_id=f"s{i}", seed=i) for i in range(5)]
    cache = make_cache(sequences)
    tokens = [token for sequence in sequences[:3] for token in sequence.hidden_TKH.reshape(-1, 6).tolist()]
    expected = [math.sqrt(sum(token[d] ** 2 for token in tokens) / len(tokens)) for d in range(6)]
    assert feature_rms(cache, cache.rows, num_sequences=3).tolist() == pytest.approx(expected, rel=1e-5)
