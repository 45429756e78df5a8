"""Replay against a slow decode: one block at a time, all branches completed, one cycle after another."""

# N anchors, C ways of decoding
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from support.slow_decode import NUM_ALTERNATIVES, POLICIES, slow_branches, slow_count
from support.slow_tree import accepted
from support.tiny import make_cached, make_row
from support.tiny_world import (
    MAX_K,
    SECONDS,
    SHAPE,
    SHAPES,
    TALKS,
    Anchor,
    Recorder,
    V,
    World,
    record,
    responses_of,
    write_drafter,
)
from vpd.data.cache.cache import Cache
from vpd.data.errors import CacheNotFoundError, DrafterError
from vpd.stages.draft.config import DraftConfig
from vpd.stages.draft.first_draft import FirstDrafting
from vpd.stages.evaluate import replay as replay_module
from vpd.stages.evaluate.config import EvalConfig
from vpd.stages.evaluate.replay import Replay
from vpd.stages.evaluate.ways import Way

FIRST = "first"
SEVERAL_SECONDS = [pytest.param(second, id=name) for name, second in SECONDS.items()]
SIZES = [
    # Tokens per batch, blocks per pass, batches of TALKS.
    pytest.param(4096, 512, 1, id="all-at-once"),
    pytest.param(75, 7, 2, id="some-in-small-passes"),
    pytest.param(1, 16, 4, id="one-by-one"),
]


def set_sizes(monkeypatch: pytest.MonkeyPatch, tokens_per_batch: int, blocks_per_pass: int) -> None:
    monkeypatch.setattr(replay_module, "TOKENS_PER_BATCH", tokens_per_batch)
    monkeypatch.setattr(replay_module, "BLOCKS_PER_PASS", blocks_per_pass)


@pytest.mark.parametrize(("tokens_per_batch", "blocks_per_pass", "num_batches"), SIZES)
@pytest.mark.parametrize("second", SEVERAL_SECONDS)
def test_accept_lengths_are_those_of_the_slow_decode(
    world: World,
    second: str,
    tokens_per_batch: int,
    blocks_per_pass: int,
    num_batches: int,
    monkeypatch: pytest.MonkeyPatch,
):
    set_sizes(monkeypatch, tokens_per_batch, blocks_per_pass)
    report = world.run(world.talks, second, k=3, max_k=MAX_K)
    expected = world.expected(second, False)
    found = {way: lens for way, lens in report.by_way().items() if way.nodes is None}
    assert set(found) == set(expected)
    assert [way for way in found if found[way] != expected[way]] == []
    assert len(report.accept_lens) == num_batches


@pytest.mark.parametrize(("tokens_per_batch", "blocks_per_pass", "num_batches"), SIZES)
@pytest.mark.parametrize("second", SEVERAL_SECONDS)
def test_recorded_first_drafts_replace_the_drafter(
    world: World,
    second: str,
    tokens_per_batch: int,
    blocks_per_pass: int,
    num_batches: int,
    monkeypatch: pytest.MonkeyPatch,
):
    set_sizes(monkeypatch, tokens_per_batch, blocks_per_pass)
    report = world.run(world.talks, second, world.drafts, k=3, max_k=MAX_K)
    expected = world.expected(second, True)
    found = {way: lens for way, lens in report.by_way().items() if way.nodes is None}
    assert set(found) == set(expected)
    assert [way for way in found if found[way] != expected[way]] == []
    assert len(report.accept_lens) == num_batches
    # Probabilities rounded to float16 may change the order of branches, nothing else.
    as_drafted = world.run(world.talks, second, k=3, max_k=MAX_K)
    assert report.block_size == as_drafted.block_size
    drafted = as_drafted.by_way()
    of_first_alone = [policy for policy in POLICIES if policy != "reranked"]
    same_order = [
        all(slow_branches(name, world.ranked(a)) == slow_branches(name, world.recorded(a)) for name in of_first_alone)
        for a in world.anchors()
    ]
    assert np.mean(same_order) > 0.9
    for way in (way for way in found if way.policy != "reranked"):
        pairs = zip(found[way], drafted[way], same_order, strict=True)
        assert all(ours == theirs for ours, theirs, same in pairs if same)


def test_the_ways_differ_on_the_tiny_cache(world: World):
    # Else the comparisons with the slow decode would show little.
    lens = {name: world.run(world.talks, second, max_k=MAX_K).by_way() for name, second in SECONDS.items()}
    same = lens["same-block"]
    ways = [Way("chain"), Way("resampled", k=4)]
    ways += [Way("branches", name, policy, 4) for name in ("first_as_second", "d2sd") for policy in POLICIES]
    # A second drafter with other random weights rarely proposes the first draft's token.
    ways.remove(Way("branches", "d2sd", "exclude", 4))
    assert len({tuple(same[way]) for way in ways}) == len(ways)
    assert all(sum(same[way]) > sum(same[ways[0]]) for way in ways[1:])
    for policy in POLICIES:
        assert len({tuple(lens[name][Way("branches", "d2sd", policy, 4)]) for name in SECONDS}) == len(SECONDS), policy
    J = SHAPE.block_size - 1
    assert max(same[Way("branches", "d2sd", "paper", 4)]) == J
    # Effects of another block size: more tokens are accepted than the first draft has; visible tokens reach past the
    # second drafter's block.
    assert max(lens["larger-block"][Way("branches", "d2sd", "paper", 4)]) > J
    assert max(lens["smaller-block"][Way("branches", "d2sd", "runner-up", MAX_K)]) == J


@pytest.mark.parametrize("second", SEVERAL_SECONDS)
def test_a_second_drafter_with_a_larger_block_continues_the_whole_first_draft(world: World, second: str):
    """Cycle after cycle in which the target takes the first draft and what a larger second block adds."""
    states = world.sequence("one-answer")
    tokens, mask = [1, 2, 3], [False] * 2 + [True]
    longest = max(SHAPES[name].block_size for name in SECONDS.values()) - 1
    while len(tokens) + longest < len(states.hidden_TKH):
        anchor = len(tokens) - 1
        ranked = world.slow("one-answer", "first").ranked(anchor, (tokens[-1],))
        draft = tuple(best[0][1] for best in ranked)
        tokens += world.slow("one-answer", "larger").complete(anchor, (tokens[-1], *draft))
    mask += [True] * (len(tokens) - len(mask))
    hidden_TKH = states.hidden_TKH[: len(tokens)]
    replay = world.replay(second, k=3, max_k=MAX_K)
    record(replay)
    assert isinstance(replay.report, Recorder)
    row = make_row("whole-drafts", len(tokens))
    batch = replay.responses_of(make_cached(row, hidden_TKH, tokens, mask, [*tokens[1:], 0]))
    assert batch is not None
    replay.replay(batch)
    found = {way: lens for way, lens in replay.report.by_way().items() if way.nodes is None}
    anchors = [Anchor("one-answer", a, tokens[a], tokens[a + 1 :]) for a in range(2, len(tokens) - 1)]
    seconds = {"first_as_second": FIRST, "d2sd": second}
    expected = [world.slow_lens(seconds, anchor, world.ranked(anchor)) for anchor in anchors]
    assert {way: [lens[way] for lens in expected] for way in expected[0]} == found
    gained = 3 if second == "larger" else 0
    for policy in POLICIES:
        assert [found[Way("branches", "d2sd", policy, k)][0] - found[Way("chain")][0] for k in (0, 1)] == [0, gained]


@pytest.mark.parametrize("second", SEVERAL_SECONDS)
def test_more_branches_never_accept_less(world: World, second: str):
    report = world.run(world.talks, second, max_k=MAX_K)
    found = report.by_way()
    for way in (way for way in report.ways if way.nodes is None):
        fewer = way._replace(k=way.k - 1) if way._replace(k=way.k - 1) in found else Way("chain")
        assert all(some >= more for some, more in zip(found[way], found[fewer], strict=True))


def test_what_is_listed_does_not_depend_on_the_largest_number_of_branches(world: World):
    second = SECONDS["same-block"]
    most = world.run(world.talks, second, k=1, max_k=MAX_K).by_way()
    for k, max_k in ((0, 0), (2, 5), (5, 2)):
        found = world.run(world.talks, second, k=k, max_k=max_k).by_way()
        assert max(way.k for way in found) == max(k, max_k)
        assert {way: most[way] for way in found} == found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("k", [0, 2, MAX_K])
def test_a_replay_is_a_decode_cycle_by_cycle(world: World, policy: str, k: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replay_module, "TOKENS_PER_BATCH", 40)
    second = SECONDS["same-block"]
    report = world.run(world.talks, second, k=k, max_k=3, policies=[policy])
    seconds, tree = {"first_as_second": FIRST, "d2sd": second}, Way("tree", nodes=32)
    num_tokens, cycles = [], []
    for seq_id, (lengths, _) in TALKS.items():
        anchors = iter(world.anchors([seq_id]))
        cycles.append(dict.fromkeys(report.ways, 0))
        spans = responses_of(lengths)
        num_tokens.append(sum(end - start - 1 for start, end in spans))
        for start, end in spans:
            here = islice(anchors, end - 1 - start)
            lens = [
                world.slow_lens(seconds, anchor, world.ranked(anchor))
                | {tree: accepted(world.slow_nodes(tree, None, anchor, world.ranked(anchor)), anchor.continuation)}
                for anchor in here
            ]
            for way in report.ways:
                cycles[-1][way] += slow_count(lambda i, way=way, lens=lens: lens[i][way], end - start)
    assert report.num_tokens_E == num_tokens
    assert [row.tolist() for row in report.cycles_EC] == [list(each.values()) for each in cycles]
    totals = {way: sum(each[way] for each in cycles) for way in report.ways}
    assert report.alphas().tolist() == pytest.approx([sum(num_tokens) / total for total in totals.values()])
    reported = {
        "first": totals[Way("chain")],
        "first_tree": totals[tree],
        "first_as_second": totals[Way("branches", "first_as_second", policy, k)],
        "d2sd": totals[Way("branches", "d2sd", policy, k)],
    }
    assert report.num_cycles == reported
    assert report.alpha == {name: pytest.approx(sum(num_tokens) / count) for name, count in reported.items()}
    assert (report.num_tokens, report.num_responses) == (sum(num_tokens), 6)
    assert not report.skipped


@pytest.mark.parametrize("second", SEVERAL_SECONDS)
def test_outcomes_of_the_first_draft(world: World, second: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replay_module, "TOKENS_PER_BATCH", 40)
    num_branches, J = 6, SHAPE.block_size - 1
    report = world.run(world.talks, second, k=num_branches, max_k=2)
    expected = []
    for anchor in world.anchors():
        ranked = world.ranked(anchor)
        accept_len = world.slow_lens({}, anchor, ranked, 0)[Way("chain")]
        num_recorded = min(J, len(anchor.continuation))
        boundary = pair = -1
        if accept_len < num_recorded:
            prefixes = [branch.prefix_len for branch in slow_branches("paper", ranked)[:num_branches]]
            pairs = [branch[:2] for branch in slow_branches("runner-up", ranked)[:num_branches]]
            right = (accept_len, anchor.continuation[accept_len])
            boundary = prefixes.index(accept_len) if accept_len in prefixes else -1
            pair = pairs.index(right) if right in pairs else -1
        expected.append((accept_len, num_recorded, boundary, pair))
    names = ("first_len_N", "num_recorded_N", "boundary_rank_N", "pair_rank_N")
    columns = [np.concatenate([getattr(outcomes, name) for outcomes in report.outcomes]).tolist() for name in names]
    assert list(zip(*columns, strict=True)) == expected
    confidences = [[best[0][0] for best in world.ranked(anchor)] for anchor in world.anchors()]
    found = np.concatenate([outcomes.confidence_NJ for outcomes in report.outcomes])
    np.testing.assert_allclose(found, confidences, rtol=1e-4)
    assert np.concatenate(report.final_lens).tolist() == report.by_way()[Way("branches", "d2sd", "paper", num_branches)]
    # Every case occurs.
    assert {-1, 0, 1} <= set(columns[2]) & set(columns[3])
    assert {0, J} <= set(columns[0])


def test_first_drafts_are_recorded_as_the_slow_decode_finds_them(world: World):
    for anchor in world.anchors():
        pairs = zip(world.ranked(anchor), world.recorded(anchor), strict=True)
        for slow, recorded in pairs:
            assert [token for _, token in recorded] == [token for _, token in slow[:NUM_ALTERNATIVES]]
            # float16 has 11 bits.
            exact = [prob for prob, _ in slow[:NUM_ALTERNATIVES]]
            assert [prob for prob, _ in recorded] == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("recorded", [False, True], ids=["drafter", "recorded"])
def test_without_a_second_drafter_its_way_is_left_out(world: World, recorded: bool):
    first = world.drafts if recorded else None
    alone = world.run(world.talks, None, first, k=2)
    both = world.run(world.talks, SECONDS["same-block"], first, k=2)
    assert set(both.num_cycles) - set(alone.num_cycles) == {"d2sd"}
    assert ("first_as_second" in alone.num_cycles) == (not recorded)
    assert alone.num_cycles == {name: both.num_cycles[name] for name in alone.num_cycles}


def test_the_first_drafter_given_as_second_equals_itself_reused(world: World):
    found = world.run(world.talks, FIRST, k=3).by_way()
    for way in [way for way in found if way.name == "d2sd"]:
        assert found[way] == found[way._replace(name="first_as_second")]


def test_what_cannot_be_replayed_is_counted_by_reason(world: World):
    report = world.run(world.cache.rows, SECONDS["same-block"], k=1)
    assert dict(report.skipped) == {"not the target's greedy output": 2}
    # All of TALKS, and the turn before the answer that is not greedy.
    lengths = [*(lengths for lengths, _ in TALKS.values()), [2, 6]]
    expected = [[end - start - 1 for start, end in responses_of(each)] for each in lengths]
    assert report.num_tokens_E == [sum(each) for each in expected]
    assert report.num_responses == sum(len(each) for each in expected)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        pytest.param([0, 0, 0, 0], "no response", id="prompt-alone"),
        pytest.param([0, 1, 0, 1], "a response of one token", id="nothing-to-draft"),
        pytest.param([1, 1, 1, 0], "not the target's greedy output", id="no-prompt"),
    ],
)
def test_a_sequence_without_anchors_is_skipped(world: World, mask: list[bool], reason: str):
    tokens = [1, 2, 3, 4]
    row = make_row("s", len(tokens))
    hidden_TKH = torch.zeros(len(tokens), len(SHAPE.target_layer_ids), SHAPE.hidden_size, dtype=torch.bfloat16)
    replay = world.replay()
    assert replay.responses_of(make_cached(row, hidden_TKH, tokens, mask, [*tokens[1:], 0])) is None
    assert dict(replay.report.skipped) == {reason: 1}


def test_a_limit_reads_the_first_rows_and_every_sequence_is_reported(world: World):
    seen: list[None] = []
    report = world.replay(k=1, limit=2).run(world.cache.rows, lambda: seen.append(None))
    assert (len(report.num_tokens_E), len(seen)) == (2, 2)


def test_nothing_to_replay_is_an_error(world: World):
    rows = [world.row("last-token-not-greedy"), world.row("not-greedy")]
    with pytest.raises(CacheNotFoundError, match="among 2 held-out sequences"):
        world.replay(k=1).run(rows)


def test_drafts_that_leave_out_anchors_are_refused(world: World, tmp_path: Path):
    shutil.copytree(world.folder / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("drafts"))
    cache = Cache.open(tmp_path / "cache")
    drafts = FirstDrafting(world.folder / "first", DraftConfig(device="cpu", stride=2)).run(cache)
    with pytest.raises(DrafterError, match=r"leave out anchors \(stride 2\).*Remove .*drafts/.*--stride 1"):
        Replay(cache, drafts, None, EvalConfig(device="cpu")).run(cache.rows)


@pytest.mark.parametrize("place", ["first", "second"])
def test_a_drafter_that_does_not_fit_is_refused(world: World, tmp_path: Path, place: str):
    other = write_drafter(tmp_path / "other", replace(SHAPE, vocab_size=V + 1), seed=5)
    folders = {"first": world.folder / "first", "second": world.folder / "same"} | {place: other}
    with pytest.raises(DrafterError, match="vocabulary: the cache has 12, the drafter 13"):
        Replay(world.cache, folders["first"], folders["second"], EvalConfig(device="cpu"))
