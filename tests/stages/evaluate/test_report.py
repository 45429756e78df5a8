"""Statistics of a replay against loops over anchors and sequences."""

# N anchors, E sequences, C ways of decoding, J = G - 1 drafted positions
import json
from collections import Counter

import numpy as np
import pytest
from support.slow_decode import slow_count
from vpd.stages.evaluate.config import EvalConfig
from vpd.stages.evaluate.outcomes import COSTS
from vpd.stages.evaluate.report import FirstDraftOutcomes, ReplayReport
from vpd.stages.evaluate.slices import Response
from vpd.stages.evaluate.ways import Way

J, MAX_K = 4, 3
WAYS = [
    Way("chain"),
    *(Way("tree", nodes=nodes) for nodes in (8, 16, 32)),
    *(Way("branches", "d2sd", policy, k) for policy in ("paper", "runner-up") for k in range(MAX_K + 1)),
]
REPORTED = {"first": WAYS[0], "first_tree": WAYS[2], "d2sd": Way("branches", "d2sd", "runner-up", 2)}
CONFIG = EvalConfig(policies=["runner-up"], k=2, nodes=16, way="branches")
BATCHES = [[[6, 3], [9], [1]], [[12]], [[2, 2, 2], [7]]]
"""Anchors of every response of every sequence of a batch."""
LENS = [lens for batch in BATCHES for lens in batch]


def responses_with(lens_of_sequences: list[list[int]]) -> list[list[Response]]:
    return [[Response(0, num_anchors, 1, "a.jsonl") for num_anchors in lens] for lens in lens_of_sequences]


def costs_of(accept_lens_NC: np.ndarray) -> np.ndarray:
    """Costs [N, C, X] that differ between anchors, ways and kinds."""
    return np.arange(accept_lens_NC.size * len(COSTS)).reshape(*accept_lens_NC.shape, len(COSTS)) % 97


def random_batch(num_recorded: list[int], generator: np.random.Generator) -> tuple[np.ndarray, FirstDraftOutcomes]:
    """Accept lengths and outcomes at anchors after which this many tokens are recorded."""
    N = len(num_recorded)
    num_recorded_N = np.minimum(num_recorded, J)
    first_len_N = np.minimum(generator.integers(J + 1, size=N), num_recorded_N)
    ways_NC = first_len_N[:, None] + generator.integers(3, size=(N, len(WAYS)))
    ways_NC = np.minimum(ways_NC, num_recorded_N[:, None])
    ways_NC[:, 0] = first_len_N
    failed_N = first_len_N < num_recorded_N
    boundary_N, pair_N = (np.where(failed_N, generator.integers(-1, MAX_K + 2, size=N), -1) for _ in range(2))
    # The values include the ends of all bins, and 1.
    confidence_NJ = generator.integers(21, size=(N, J)).astype(np.float32) / 20
    return ways_NC, FirstDraftOutcomes(first_len_N, confidence_NJ, num_recorded_N, boundary_N, pair_N)


@pytest.fixture
def batches() -> list[tuple[np.ndarray, FirstDraftOutcomes]]:
    generator = np.random.default_rng(5)
    found = []
    for batch in BATCHES:
        num_recorded = [n - i for lens in batch for n in lens for i in range(n)]
        found.append(random_batch(num_recorded, generator))
    return found


@pytest.fixture
def report(batches: list[tuple[np.ndarray, FirstDraftOutcomes]]) -> ReplayReport:
    found = ReplayReport(WAYS, REPORTED, CONFIG, J + 1)
    for (accept_lens_NC, outcomes), lens in zip(batches, BATCHES, strict=True):
        found.add(accept_lens_NC, costs_of(accept_lens_NC), responses_with(lens), outcomes)
    return found


def anchors_of(batches: list[tuple[np.ndarray, FirstDraftOutcomes]]) -> list[dict]:
    """One record for each anchor."""
    found = []
    for accept_lens_NC, outcomes in batches:
        for n, accept_lens in enumerate(accept_lens_NC.tolist()):
            record = {"accept_lens": dict(zip(WAYS, accept_lens, strict=True))}
            record |= {
                name[:-2]: values[n].tolist() for name, values in outcomes._asdict().items() if name[-2:] == "_N"
            }
            found.append(record | {"confidence": outcomes.confidence_NJ[n].tolist()})
    return found


def slow_cycles(batches: list[tuple[np.ndarray, FirstDraftOutcomes]]) -> list[dict[Way, int]]:
    """Cycles of every sequence."""
    anchors = iter(anchors_of(batches))
    found = []
    for lens in LENS:
        responses = [[next(anchors)["accept_lens"] for _ in range(n)] for n in lens]
        found.append(
            {way: sum(slow_count([each[way] for each in r].__getitem__, len(r) + 1) for r in responses) for way in WAYS}
        )
    return found


def test_cycles_and_alpha(report: ReplayReport, batches: list[tuple[np.ndarray, FirstDraftOutcomes]]):
    cycles = slow_cycles(batches)
    totals = {way: sum(each[way] for each in cycles) for way in WAYS}
    num_tokens = sum(map(sum, LENS))
    assert report.num_tokens_E == [sum(lens) for lens in LENS]
    assert (report.num_tokens, report.num_responses) == (num_tokens, sum(map(len, LENS)))
    assert [row.tolist() for row in report.cycles_EC] == [[each[way] for way in WAYS] for each in cycles]
    assert report.alphas().tolist() == [num_tokens / totals[way] for way in WAYS]
    assert report.num_cycles == {name: totals[way] for name, way in REPORTED.items()}
    assert report.alpha == {name: num_tokens / totals[way] for name, way in REPORTED.items()}
    assert report.cycles_of_reported() == {name: [row[way] for row in cycles] for name, way in REPORTED.items()}


def test_costs_are_means_over_the_cycles(report: ReplayReport, batches: list[tuple[np.ndarray, FirstDraftOutcomes]]):
    """Cycle by cycle, with the costs of the anchors at which cycles begin."""
    totals, cycles = np.zeros((len(WAYS), len(COSTS))), np.zeros(len(WAYS))
    for (accept_lens_NC, _), lens_of_batch in zip(batches, BATCHES, strict=True):
        costs_NCX, start = costs_of(accept_lens_NC), 0
        for num_anchors in (n for lens in lens_of_batch for n in lens):
            for way in range(len(WAYS)):
                place = start
                while place < start + num_anchors:
                    totals[way] += costs_NCX[place, way]
                    cycles[way] += 1
                    place += accept_lens_NC[place, way] + 1
            start += num_anchors
    found = [(each["verified"], *list(each["passes"].values())[1:]) for each in report.to_json()["by_nodes"]]
    np.testing.assert_allclose(found, totals / cycles[:, None])


def test_the_mean_of_answers_counts_every_answer_alike(
    report: ReplayReport, batches: list[tuple[np.ndarray, FirstDraftOutcomes]]
):
    anchors = iter(anchors_of(batches))
    for_way: dict[Way, list[float]] = {way: [] for way in WAYS}
    for num_anchors in (n for lens in LENS for n in lens):
        answer = [next(anchors)["accept_lens"] for _ in range(num_anchors)]
        for way in WAYS:
            cycles = slow_count([each[way] for each in answer].__getitem__, num_anchors + 1)
            for_way[way].append(num_anchors / cycles)
    means = {name: sum(for_way[way]) / len(for_way[way]) for name, way in REPORTED.items()}
    assert report.alpha_mean_of_answers == pytest.approx(means)
    # Else the two could be mixed up.
    assert all(abs(means[name] - alpha) > 0.01 for name, alpha in report.alpha.items())


def slow_quantile(values: list[float], share: float) -> float:
    """With linear interpolation between neighbors."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_intervals_are_those_of_a_bootstrap_sequence_by_sequence(
    report: ReplayReport, batches: list[tuple[np.ndarray, FirstDraftOutcomes]]
):
    cycles = slow_cycles(batches)
    samples = np.random.default_rng(0).integers(len(LENS), size=(1000, len(LENS))).tolist()
    low_C, high_C = report.intervals()
    for way, low, high in zip(WAYS, low_C, high_C, strict=True):
        alphas = [sum(sum(LENS[s]) for s in sample) / sum(cycles[s][way] for s in sample) for sample in samples]
        assert (low, high) == pytest.approx((slow_quantile(alphas, 0.025), slow_quantile(alphas, 0.975)))


def test_intervals_hold_alpha_and_repeat(report: ReplayReport):
    low_C, high_C = report.intervals()
    assert (low_C, high_C) == report.intervals()
    assert all(low < alpha < high for low, alpha, high in zip(low_C, report.alphas(), high_C, strict=True))


def test_one_sequence_leaves_no_doubt():
    report = ReplayReport(WAYS, REPORTED, CONFIG, J + 1)
    accept_lens_NC, outcomes = random_batch([3, 2, 1], np.random.default_rng(0))
    report.add(accept_lens_NC, costs_of(accept_lens_NC), responses_with([[3]]), outcomes)
    assert report.intervals() == (report.alphas().tolist(), report.alphas().tolist())


def test_recovery_by_boundary(report: ReplayReport, batches: list[tuple[np.ndarray, FirstDraftOutcomes]]):
    expected = []
    for boundary in range(1, J + 1):
        gains = []
        for anchor in anchors_of(batches):
            # The response has a token at the boundary, so the draft failed there.
            if anchor["first_len"] == boundary - 1 and anchor["num_recorded"] >= boundary:
                gains.append(anchor["accept_lens"][REPORTED["d2sd"]] - anchor["first_len"])
        assert gains
        expected.append(
            {
                "boundary": boundary,
                "num_anchors": len(gains),
                "recovered": sum(gain > 0 for gain in gains) / len(gains),
                "gained_tokens": pytest.approx(sum(gains) / len(gains)),
            }
        )
    assert report.recovery() == expected


def test_a_boundary_that_never_happens_is_left_out():
    report = ReplayReport(WAYS, REPORTED, CONFIG, J + 1)
    first_len_N, num_recorded_N = np.array([0, 2, 1]), np.array([4, 4, 1])
    outcomes = FirstDraftOutcomes(first_len_N, np.full((3, J), 0.5), num_recorded_N, np.full(3, -1), np.full(3, -1))
    accept_lens_NC = np.tile(first_len_N[:, None], len(WAYS))
    report.add(accept_lens_NC, costs_of(accept_lens_NC), responses_with([[3]]), outcomes)
    assert [(row["boundary"], row["num_anchors"], row["gained_tokens"]) for row in report.recovery()] == [
        (1, 1, 0.0),
        (3, 1, 0.0),
    ]


def test_calibration_bin_by_bin(report: ReplayReport, batches: list[tuple[np.ndarray, FirstDraftOutcomes]]):
    pairs = []
    for anchor in anchors_of(batches):
        # The draft reaches the accepted tokens and the next one, if the response has it.
        for position in range(min(anchor["first_len"] + 1, anchor["num_recorded"])):
            pairs.append((anchor["confidence"][position], position < anchor["first_len"]))
    bins = []
    for b in range(10):
        inside = [pair for pair in pairs if b <= int(pair[0] * 10) <= b + (b == 9)]
        assert inside
        confidence, accepted = (sum(values) / len(inside) for values in zip(*inside, strict=True))
        bins.append(
            {"num_positions": len(inside), "confidence": pytest.approx(confidence), "accepted": pytest.approx(accepted)}
        )
    found = report.calibration()
    assert found["bins"] == bins
    assert sum(each["num_positions"] for each in found["bins"]) == len(pairs)
    gaps = [abs(each["confidence"] - each["accepted"]) * each["num_positions"] for each in found["bins"]]
    assert found["ece"] == pytest.approx(sum(gaps) / len(pairs))


@pytest.mark.parametrize(
    ("confidences", "ece"),
    [
        # One draft: two tokens right, the third wrong, the fourth never reached.
        pytest.param([1.0, 1.0, 0.0, 0.9], 0.0, id="as-sure-as-right"),
        pytest.param([0.0, 0.0, 1.0, 0.9], 1.0, id="the-reverse"),
        pytest.param([0.65, 0.65, 0.65, 0.0], 1 / 60, id="two-in-three"),
    ],
)
def test_calibration_error_written_out(confidences: list[float], ece: float):
    report = ReplayReport(WAYS, REPORTED, CONFIG, J + 1)
    outcomes = FirstDraftOutcomes(np.array([2]), np.array([confidences]), np.array([4]), np.array([-1]), np.array([-1]))
    accept_lens_NC = np.full((1, len(WAYS)), 2)
    report.add(accept_lens_NC, costs_of(accept_lens_NC), responses_with([[1]]), outcomes)
    assert report.calibration()["ece"] == pytest.approx(ece)


def test_hits_by_number_of_branches(report: ReplayReport, batches: list[tuple[np.ndarray, FirstDraftOutcomes]]):
    failed = [anchor for anchor in anchors_of(batches) if anchor["first_len"] < anchor["num_recorded"]]
    expected = {}
    for name in ("boundary", "pair"):
        launched = [sum(anchor[f"{name}_rank"] in range(k) for anchor in failed) for k in range(MAX_K + 1)]
        expected[name] = [pytest.approx(count / len(failed)) for count in launched]
        assert launched == sorted(launched)
        assert 0 < launched[1] < launched[-1] < len(failed)
    assert report.hits() == expected


def test_drafts_that_never_fail_have_no_boundary_to_hit():
    report = ReplayReport(WAYS, REPORTED, CONFIG, J + 1)
    never = np.full(2, -1)
    accept_lens_NC = np.array([[2], [1]]).repeat(len(WAYS), axis=1)
    report.add(
        accept_lens_NC,
        costs_of(accept_lens_NC),
        responses_with([[2]]),
        FirstDraftOutcomes(np.array([2, 1]), np.full((2, J), 0.5), np.array([2, 1]), never, never),
    )
    assert report.hits() == {"boundary": [0.0] * (MAX_K + 1), "pair": [0.0] * (MAX_K + 1)}
    assert report.recovery() == []


def test_the_report_as_json_holds_plain_values(report: ReplayReport):
    report.skipped.update(["no response", "no response"])
    report.seq_ids += ["a", "b"]
    report.trained_on |= {"first": ["no", "yes"], "second": ["unknown", "no"]}
    report.warnings.append("swapped")
    found = report.to_json()
    assert json.loads(json.dumps(found)) == found
    low_C, high_C = report.intervals()
    intervals = {way: list(bounds) for way, *bounds in zip(WAYS, low_C, high_C, strict=True)}
    assert found == {
        "alpha": report.alpha,
        "interval": {name: intervals[way] for name, way in REPORTED.items()},
        "alpha_mean_of_answers": report.alpha_mean_of_answers,
        "way": "branches",
        "policy": "runner-up",
        "k": 2,
        "nodes": 16,
        "block_size": J + 1,
        "num_cycles": report.num_cycles,
        "num_tokens": report.num_tokens,
        "num_sequences": len(LENS),
        "num_responses": report.num_responses,
        "skipped": {"no response": 2},
        "trained_on": {"first": {"yes": 1, "no": 1, "unknown": 0}, "second": {"yes": 0, "no": 1, "unknown": 1}},
        "warnings": ["swapped"],
        "by_nodes": [
            {
                **{field: value for field, value in way._asdict().items() if field != "name"},
                "way": way.name,
                "verified": each["verified"],
                "passes": each["passes"],
                "alpha": alpha,
                "interval": intervals[way],
            }
            for way, alpha, each in zip(WAYS, report.alphas().tolist(), found["by_nodes"], strict=True)
        ],
        "slices": report.slices.to_json([*REPORTED]),
        "recovery": report.recovery(),
        "calibration": report.calibration(),
        "hits": report.hits(),
        "sequences": {
            "seq_ids": ["a", "b"],
            "trained_on": report.trained_on,
            "num_tokens": report.num_tokens_E,
            "num_cycles": report.cycles_of_reported(),
        },
    }
    assert report.skipped == Counter({"no response": 2})
