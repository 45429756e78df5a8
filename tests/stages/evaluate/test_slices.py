"""Acceptance length by slice, against a decode token by token."""

# N anchors, C ways of decoding
from collections import defaultdict

import numpy as np
import pytest
from vpd.stages.evaluate.responses import visited_anchors
from vpd.stages.evaluate.slices import DEPTHS, Response, SliceCounts

NAMES = ["first", "d2sd"]
RESPONSES = [
    [Response(3, 40, 1, "a.jsonl"), Response(500, 30, 2, "a.jsonl")],
    [Response(505, 9, 1, "b.jsonl")],
    [Response(1000, 1100, 1, "a.jsonl"), Response(131_060, 30, 10, "a.jsonl")],
]


def depth_of(position: int) -> str:
    low = max([0, *(depth for depth in DEPTHS if depth <= position)])
    above = [depth for depth in DEPTHS if depth > low]
    return f"{low}-{above[0] - 1}" if above else f"{low}-"


def slow_slices(lens: list[list[np.ndarray]]) -> dict[tuple[str, str], dict[str, list[int]]]:
    """Tokens and cycles of every slice by way; a cycle counts where it begins."""
    found: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: {name: [0, 0] for name in NAMES})
    for responses, lens_of_sequence in zip(RESPONSES, lens, strict=True):
        for response, accept_lens_NC in zip(responses, lens_of_sequence, strict=True):
            for c, name in enumerate(NAMES):
                place = 0
                while place < response.num_anchors:
                    committed = min(int(accept_lens_NC[place, c]) + 1, response.num_anchors - place)
                    labels = {
                        ("source", response.source),
                        ("turn", str(response.turn)),
                        ("depth", depth_of(response.start + place)),
                    }
                    for label in labels:
                        found[label][name][0] += committed
                        found[label][name][1] += 1
                    place += committed
    return found


@pytest.fixture
def lens() -> list[list[np.ndarray]]:
    generator = np.random.default_rng(2)
    return [[generator.integers(5, size=(each.num_anchors, len(NAMES))) for each in row] for row in RESPONSES]


def test_slices_are_those_of_a_decode(lens: list[list[np.ndarray]]):
    counts = SliceCounts()
    for sequence, (responses, lens_of_sequence) in enumerate(zip(RESPONSES, lens, strict=True)):
        for response, accept_lens_NC in zip(responses, lens_of_sequence, strict=True):
            counts.add(sequence, response, visited_anchors(accept_lens_NC))
    found = {(each["by"], each["slice"]): each for each in counts.to_json(NAMES)}
    expected = slow_slices(lens)
    assert found.keys() == expected.keys()
    for label, each in found.items():
        assert each["alpha"] == {name: tokens / cycles for name, (tokens, cycles) in expected[label].items()}
        assert each["num_tokens"] == expected[label]["first"][0]
        for name, (low, high) in each["interval"].items():
            assert low - 1e-9 <= each["alpha"][name] <= high + 1e-9
    assert [each["slice"] for each in counts.to_json(NAMES) if each["by"] == "turn"] == ["1", "2", "10"]
    assert {"0-511", "512-1023", "1024-2047", "2048-4095", "131072-"} <= {label for _, label in found}


def test_a_slice_in_which_no_cycle_begins_has_no_alpha():
    """One way's cycle reaches over the whole slice, the other one's does not."""
    counts = SliceCounts()
    response = Response(510, 6, 1, "a.jsonl")
    counts.add(0, response, visited_anchors(np.array([[5, 0]] * 6)))
    (deep,) = [each for each in counts.to_json(NAMES) if each["slice"] == "512-1023"]
    assert deep["alpha"] == {"first": None, "d2sd": 1.0}
    assert deep["interval"] == {"first": [None, None], "d2sd": [1.0, 1.0]}
