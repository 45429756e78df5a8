"""Acceptance length by slice: where in the context, in which turn, from which file."""

# N anchors, C ways of decoding, E sequences
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise, takewhile
from math import isnan
from typing import Any, NamedTuple

import numpy as np

from .intervals import alphas

DEPTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Where the slices by depth begin, in tokens from the start of the sequence; the first one begins at 0."""


class Response(NamedTuple):
    """A response that is replayed."""

    start: int
    """Position of the response's first token, which is the first anchor."""
    num_anchors: int
    turn: int
    """1 for the sequence's first response."""
    source: str
    """The file that the sequence comes from."""


class SliceCounts:
    """Committed tokens and cycles of some ways of decoding, by slice and sequence."""

    def __init__(self) -> None:
        self._counts: defaultdict[tuple[str, str], defaultdict[int, Any]] = defaultdict(lambda: defaultdict(int))
        """By slice and sequence: tokens and cycles [2, C]."""

    def add(self, sequence: int, response: Response, visited_NC: np.ndarray) -> None:
        """Adds a response.

        Args:
            sequence: the sequence's number.
            visited_NC: the anchors at which cycles begin.
        """
        for kind, label, first, last in parts_of(response):
            # A cycle belongs to the slice in which it begins, with all tokens that it commits.
            tokens_C = next_cycle(visited_NC, last) - next_cycle(visited_NC, first)
            cycles_C = visited_NC[first:last].sum(axis=0)
            self._counts[kind, label][sequence] += np.stack([tokens_C, cycles_C])

    def to_json(self, names: list[str]) -> list[dict[str, Any]]:
        """Alpha of each slice with its 95 % interval over the slice's sequences, by name of the C ways."""
        found = []
        for (kind, label), by_sequence in self._counts.items():
            tokens_EC, cycles_EC = np.stack(list(by_sequence.values()), axis=1)
            # A slice may be so short that no cycle of some way begins there.
            alpha_C, low_C, high_C = ([None if isnan(x) else x for x in row] for row in alphas(tokens_EC, cycles_EC))
            found.append(
                {
                    "by": kind,
                    "slice": label,
                    "num_sequences": len(tokens_EC),
                    "num_tokens": int(tokens_EC[:, 0].sum()),
                    "alpha": dict(zip(names, alpha_C, strict=True)),
                    "interval": dict(zip(names, map(list, zip(low_C, high_C, strict=True)), strict=True)),
                }
            )
        return sorted(found, key=lambda each: (each["by"], natural(each["slice"])))


def natural(label: str) -> tuple[int, str]:
    """Sorts labels that begin with a number by that number."""
    digits = "".join(takewhile(str.isdigit, label))
    return int(digits or -1), label


def next_cycle(visited_NC: np.ndarray, place: int) -> np.ndarray:
    """The first anchor from `place` on at which a cycle begins [C]; N if there is none."""
    rest_NC = visited_NC[place:]
    if not len(rest_NC):
        return np.full(visited_NC.shape[1], len(visited_NC))
    return np.where(rest_NC.any(axis=0), place + rest_NC.argmax(axis=0), len(visited_NC))


def parts_of(response: Response) -> Iterator[tuple[str, str, int, int]]:
    """Kind and label of each slice that a response is part of, with the range of its anchors there."""
    yield "source", response.source, 0, response.num_anchors
    yield "turn", str(response.turn), 0, response.num_anchors
    bounds = [0, *DEPTHS, max(DEPTHS[-1], response.start + response.num_anchors) + 1]
    for low, high in pairwise(bounds):
        first, last = (min(max(bound - response.start, 0), response.num_anchors) for bound in (low, high))
        if first < last:
            yield "depth", f"{low}-{high - 1}" if high in DEPTHS else f"{low}-", first, last
