"""The held-out sequences, and the blocks drawn from a sequence, against loops over the recorded sequence."""

# S tokens of a sequence, T with a state, K layers, H hidden width, N blocks, G block size
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recorded import (
    ARGMAX,
    MASK,
    TOKEN,
    G,
    make_cache,
    make_config,
    make_drafts,
    make_sequence,
    parse_mask,
    prefixes,
    training_blocks,
)
from vpd.data.cache.arrays import NO_CHOICE
from vpd.data.errors import CacheNotFoundError
from vpd.stages.holdout import is_held_out, split_rows
from vpd.stages.train.objective import position_weights
from vpd.stages.train.samples import draw_blocks, feature_rms, label_tokens

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
    # Written out, since every version must hold out the same sequences: else an evaluation could use training data.
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


# Blocks


class Case(NamedTuple):
    id: str
    turns: str
    final_token: bool = False
    settings: Mapping[str, Any] = MappingProxyType({})
    accept_len: list[int] | None = None


BOUNDARY = {"prefix": {"sampler": "mixture", "mixture": {"boundary": 1, "geometric": 1}}}
CASES = [
    Case("one-turn", "...aaaaaaaaa"),
    Case("several-turns", "..aaaa.aa...aaaaaaaa.a"),
    Case("last-token-without-a-state", "..aaa..aaaaaa", final_token=True),
    Case("few-anchors", "..aaaaaaaaaaaaaaa", settings={"num_anchors": 4}),
    Case("first-drafter", "..aaaaaaa.aaaa", settings={"objective": "dflash", "tau": 2.0}),
    Case("visible-geometric", "..aaaaaaa.aa", settings={"prefix": {"sampler": "visible-geometric"}}),
    Case("batch", "..aaaaaaa.aaaa", settings={"normalize": "batch", "tau": 1.5}),
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


def labeled_positions(mask: list[bool], anchor: int) -> list[int]:
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
    blocks = training_blocks(sequence, config, step, drafts)

    num_context = min(sequence.row.num_tokens, config.max_len)
    # The token after the states that are read can be a label.
    mask = parse_mask(case.turns)[: config.max_len + 1]
    candidates = expected_anchors(mask, num_context)
    anchors = blocks.anchors_N.tolist()
    assert anchors == sorted(set(anchors))
    assert set(anchors) <= set(candidates)
    assert len(anchors) == min(config.num_anchors, len(candidates))
    assert torch.equal(blocks.features_TD, sequence.hidden_TKH[:num_context].reshape(num_context, 6))
    assert (blocks.num_tokens, blocks.num_blocks) == ([num_context], [len(anchors)])

    label_base = ARGMAX if config.labels == "argmax" else TOKEN
    for n, anchor in enumerate(anchors):
        labeled = labeled_positions(mask, anchor)
        ids = blocks.block_ids_NG[n].tolist()
        prefix = sum(token != MASK for token in ids) - 1
        assert ids == [TOKEN + anchor + k for k in range(prefix + 1)] + [MASK] * (G - 1 - prefix)
        assert prefix < len(labeled)
        weights = [0.0] * G
        for position in labeled:
            k = position - anchor
            if k > prefix:
                weights[k] = math.exp(-(k - prefix - 1) / config.tau)
                assert blocks.labels.labels_NG[n, k] == label_base + position
        assert position_weights(blocks.labels, config.tau)[n].tolist() == pytest.approx(weights, rel=1e-5)


def test_a_first_drafter_sees_the_anchor_alone():
    config = make_config(objective="dflash")
    assert prefixes(training_blocks(make_sequence("..aaaaaaaa"), config)) == [0] * 7


def test_the_accept_length_at_the_anchor_is_the_prefix():
    # One value per position of the sequence; 9 and 8 stand at positions that no block may read.
    accept_len = [9, 9, 0, 3, 1, 2, 0, 0, 9, 2, 1, 8, 8]
    config = make_config(prefix={"sampler": "boundary"})
    blocks = training_blocks(make_sequence("..aaaaaa.aaaa"), config, 0, make_drafts(accept_len))
    assert blocks.anchors_N.tolist() == [2, 3, 4, 5, 6, 9, 10, 11]
    found = dict(zip(blocks.anchors_N.tolist(), prefixes(blocks), strict=True))
    assert {anchor: found[anchor] for anchor in (2, 3, 4, 6, 9, 10)} == {2: 0, 3: 3, 4: 1, 6: 0, 9: 2, 10: 1}
    assert found[5] < 2
    assert found[11] == 0


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
    config = make_config(max_len=max_len)
    assert draw_blocks(make_sequence(turns, final_token=final_token), None, config, G, step=0) is None


@pytest.mark.parametrize("labels", ["recorded", "argmax"])
def test_label_tokens_hold_every_label(labels: str):
    sequences = [
        make_sequence(turns, final_token=True, seq_id=f"s{i}")
        for i, turns in enumerate(["..aaaaa", "...aa.aaaaaaa", "aaa"])
    ]
    sequences[0].target_argmax_T[0] = NO_CHOICE
    cache = make_cache(sequences)
    tokens = label_tokens(cache, cache.rows).tolist()
    assert tokens == sorted(set(tokens))
    assert min(tokens) >= 0
    for sequence in sequences:
        blocks = training_blocks(sequence, make_config(labels=labels)).labels
        assert set(blocks.labels_NG[blocks.predicted_NG].tolist()) <= set(tokens)


def test_feature_sizes_are_those_of_the_first_sequences():
    sequences = [make_sequence("." * (i + 1), seq_id=f"s{i}", seed=i) for i in range(5)]
    cache = make_cache(sequences)
    tokens = [token for sequence in sequences[:3] for token in sequence.hidden_TKH.reshape(-1, 6).tolist()]
    expected = [math.sqrt(sum(token[d] ** 2 for token in tokens) / len(tokens)) for d in range(6)]
    assert feature_rms(cache, cache.rows, num_sequences=3).tolist() == pytest.approx(expected, rel=1e-5)
