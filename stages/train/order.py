"""Which sequences a step reads."""

# S training sequences
from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch

from ...data.cache.index import SequenceIndex

PARTS_AT_ONCE = 8
"""Parts whose sequences are shuffled together: far apart in an epoch, the rest of the cache need not be at hand."""


def counter_generator(*key: object) -> torch.Generator:
    """A generator that depends on the key alone, so that a resumed run draws what an unbroken one would."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(seed)


class _Epoch(NamedTuple):
    number: int
    order_S: np.ndarray
    first_of_step: np.ndarray
    """Position in `order_S` where each step begins, and the end."""


class DataOrder:
    """Every epoch visits each sequence once, in an order drawn by (seed, epoch), cut into steps of a token budget.

    Parts are shuffled, then the sequences of `PARTS_AT_ONCE` parts together.
    """

    def __init__(self, num_tokens_S: np.ndarray, part_S: np.ndarray, tokens_per_step: int, seed: int):
        """
        Args:
            num_tokens_S: what each sequence adds to a step; >= 1.
            part_S: the number of each sequence's part, 0 and on.
            tokens_per_step: how many tokens a step takes in the mean, at most; it takes whole sequences.
        """
        self.num_tokens_S, self.part_S, self.seed = num_tokens_S, part_S, seed
        self.steps_per_epoch = min(-(-int(num_tokens_S.sum()) // tokens_per_step), len(num_tokens_S))
        self._epoch = self._shuffle(0)

    @classmethod
    def of(cls, rows: SequenceIndex, max_len: int, tokens_per_step: int, seed: int) -> DataOrder:
        num_tokens_S = np.minimum(rows.column("num_tokens"), max_len)
        part_S = np.unique(rows.strings("part"), return_inverse=True)[1]
        return cls(num_tokens_S, part_S, tokens_per_step, seed)

    def indices(self, step: int) -> list[int]:
        """Indices of the sequences of a 0-based step, at least one."""
        number, position = divmod(step, self.steps_per_epoch)
        epoch = self._epoch
        if epoch.number != number:
            epoch = self._epoch = self._shuffle(number)
        return epoch.order_S[slice(*epoch.first_of_step[position : position + 2])].tolist()

    def num_tokens(self, step: int) -> int:
        return int(self.num_tokens_S[self.indices(step)].sum())

    def share(self, step: int, process: int, num_processes: int) -> list[int]:
        """The sequences of a step that fall to one of several processes, with about the same tokens for each."""
        indices = self.indices(step)
        loads = [0] * num_processes
        owner: dict[int, int] = {}
        for index in sorted(indices, key=lambda index: -self.num_tokens_S[index]):
            owner[index] = loads.index(min(loads))
            loads[owner[index]] += int(self.num_tokens_S[index])
        return [index for index in indices if owner[index] == process]

    def _shuffle(self, number: int) -> _Epoch:
        generator = counter_generator(self.seed, "epoch", number)
        part_order = torch.randperm(int(self.part_S.max()) + 1, generator=generator).numpy()
        key_S = torch.randperm(len(self.part_S), generator=generator).numpy()
        order_S = np.lexsort((key_S, part_order[self.part_S] // PARTS_AT_ONCE))
        lengths_S = self.num_tokens_S[order_S].astype(np.int64)
        num_sequences, steps = len(order_S), np.arange(self.steps_per_epoch + 1)
        first = np.searchsorted(lengths_S.cumsum() - lengths_S, steps * lengths_S.sum() / self.steps_per_epoch)
        # A step that a long sequence leaves nothing to takes the next one, so that none is empty.
        first = np.maximum.accumulate(first - steps) + steps
        return _Epoch(number, order_S, np.minimum(first, num_sequences - steps[::-1]))
