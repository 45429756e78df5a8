"""Which sequences a step reads."""

# E training sequences
from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch

from ...data.cache.index import SequenceIndex
from .steps import count_steps_per_epoch

PARTS_AT_ONCE = 8
"""Parts whose sequences are shuffled together. Only these parts need local copies at one time."""


def counter_generator(*key: object) -> torch.Generator:
    """A generator that depends on the key alone, so that a resumed run draws the same as an unbroken run."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(seed)


class _Epoch(NamedTuple):
    number: int
    order_E: np.ndarray
    first_of_step: np.ndarray
    """Position in `order_E` where each step begins, and the end."""


class DataOrder:
    """The order of the sequences in each epoch, cut into steps of a token budget.

    Every epoch visits each sequence once. The order depends on seed and epoch: the parts are shuffled, then the
    sequences of each `PARTS_AT_ONCE` parts together.
    """

    def __init__(self, num_tokens_E: np.ndarray, part_E: np.ndarray, tokens_per_step: int, seed: int):
        """
        Args:
            num_tokens_E: context tokens of each sequence; >= 1.
            part_E: the number of each sequence's part, from 0 on.
            tokens_per_step: largest mean number of tokens of a step; a step takes whole sequences.
        """
        self.num_tokens_E, self.part_E, self.seed = num_tokens_E, part_E, seed
        self.steps_per_epoch = count_steps_per_epoch(int(num_tokens_E.sum()), len(num_tokens_E), tokens_per_step)
        self._epoch = self._shuffle(0)

    @classmethod
    def of(cls, rows: SequenceIndex, max_len: int, tokens_per_step: int, seed: int) -> DataOrder:
        num_tokens_E = np.minimum(rows.column("num_tokens"), max_len)
        part_E = np.unique(rows.strings("part"), return_inverse=True)[1]
        return cls(num_tokens_E, part_E, tokens_per_step, seed)

    def indices(self, step: int) -> list[int]:
        """Indices of the sequences of a 0-based step, at least one."""
        number, position = divmod(step, self.steps_per_epoch)
        epoch = self._epoch
        if epoch.number != number:
            epoch = self._epoch = self._shuffle(number)
        return epoch.order_E[slice(*epoch.first_of_step[position : position + 2])].tolist()

    def num_tokens(self, step: int) -> int:
        return int(self.num_tokens_E[self.indices(step)].sum())

    def share(self, step: int, process: int, num_processes: int) -> list[int]:
        """The sequences of a step that one of several processes reads; all processes get about as many tokens."""
        indices = self.indices(step)
        loads = [0] * num_processes
        owner: dict[int, int] = {}
        for index in sorted(indices, key=lambda index: -self.num_tokens_E[index]):
            owner[index] = loads.index(min(loads))
            loads[owner[index]] += int(self.num_tokens_E[index])
        return [index for index in indices if owner[index] == process]

    def _shuffle(self, number: int) -> _Epoch:
        generator = counter_generator(self.seed, "epoch", number)
        part_order = torch.randperm(int(self.part_E.max()) + 1, generator=generator).numpy()
        key_E = torch.randperm(len(self.part_E), generator=generator).numpy()
        order_E = np.lexsort((key_E, part_order[self.part_E] // PARTS_AT_ONCE))
        lengths_E = self.num_tokens_E[order_E].astype(np.int64)
        num_sequences, steps = len(order_E), np.arange(self.steps_per_epoch + 1)
        first = np.searchsorted(lengths_E.cumsum() - lengths_E, steps * lengths_E.sum() / self.steps_per_epoch)
        # Where a long sequence leaves a step empty, the step takes the next sequence.
        first = np.maximum.accumulate(first - steps) + steps
        return _Epoch(number, order_E, np.minimum(first, num_sequences - steps[::-1]))
