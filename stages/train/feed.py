"""Feeds training: a thread reads, draws and packs the next passes while the device computes."""

# T context tokens, D context features
from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.cache.cache import Cache
from ...data.cache.drafts import FirstDrafts
from ...data.cache.index import SequenceIndex
from ...data.cache.reader import CachedSequence, Request, read_ahead
from ..config import ReadConfig
from .config import TrainConfig
from .order import DataOrder
from .samples import SequenceBlocks, TrainingBlocks, draw_blocks, pack

PASSES_AHEAD = 2
"""Finished passes that wait for training."""


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """How one run draws its blocks."""

    config: TrainConfig
    drafts: FirstDrafts | None
    block_size: int
    mask_token_id: int


class Pass(NamedTuple):
    """What one forward pass takes."""

    blocks: list[TrainingBlocks]
    """The blocks of each run; empty if the step has nothing to learn from for this process."""
    last: bool
    """Whether the pass ends a step."""


class Feed:
    """The passes of this process, step after step, for all runs that read the cache together.

    The runs have the same order, `max_len` and `tokens_per_pass`. Each run draws its own anchors and prefixes.
    """

    def __init__(
        self,
        cache: Cache,
        rows: SequenceIndex,
        order: DataOrder,
        plans: Sequence[BlockPlan],
        read: ReadConfig,
        device: torch.device,
        steps: range,
        process: int = 0,
        num_processes: int = 1,
    ):
        self.cache, self.rows, self.order, self.plans, self.read = cache, rows, order, plans, read
        self.device, self.steps, self.process, self.num_processes = device, steps, process, num_processes
        self.seconds_waited = 0.0
        """Seconds that `take` has waited for the thread."""
        self._ready: queue.Queue[Pass | BaseException | None] = queue.Queue(PASSES_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="vpd-feed", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        while self._thread.is_alive():  # the thread may wait for a free place in the queue
            with self._ready.mutex:
                self._ready.queue.clear()
                self._ready.not_full.notify_all()
            self._thread.join(0.01)

    def take(self) -> Pass:
        """The next pass.

        Raises:
            CacheCorruptError: a sequence of this pass can't be read.
            RuntimeError: there are no more passes.
        """
        started = time.monotonic()
        found = self._ready.get()
        self.seconds_waited += time.monotonic() - started
        if found is None:
            raise RuntimeError("the last step is over")
        if isinstance(found, BaseException):
            raise found
        if self.device.type == "cuda":
            for tensor in tensors_of(found.blocks):
                tensor.record_stream(torch.cuda.current_stream())
        return found

    def _work(self) -> None:
        # More threads would compete with the training thread for the cores.
        torch.set_num_threads(1)
        try:
            with own_stream(self.device):
                for each in self._passes():
                    if self.device.type == "cuda":
                        torch.cuda.current_stream().synchronize()
                    self._ready.put(each)
                    if self._closed.is_set():
                        return
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def _passes(self) -> Iterator[Pass]:
        with closing(read_ahead(self.cache.states, self._requests(), self.read.num_threads)) as sequences:
            for step in self.steps:
                mine = islice(sequences, len(self.order.share(step, self.process, self.num_processes)))
                yield from self._passes_of_step(step, mine)

    def _requests(self) -> Iterator[Request]:
        for step in self.steps:
            verify = self.read.verify == "always"
            verify |= self.read.verify == "first-epoch" and step < self.order.steps_per_epoch
            for index in self.order.share(step, self.process, self.num_processes):
                yield Request(self.rows[index], verify)

    def _passes_of_step(self, step: int, sequences: Iterator[CachedSequence]) -> Iterator[Pass]:
        """The blocks of a step's sequences, packed up to `tokens_per_pass`."""
        shared = self.plans[0].config
        waiting: list[list[SequenceBlocks]] = []
        features: list[Tensor] = []
        num_waiting = 0
        for sequence in sequences:
            drawn = [draw_blocks(sequence, plan.drafts, plan.config, plan.block_size, step) for plan in self.plans]
            found = [each for each in drawn if each is not None]
            if not found:
                continue
            # A copy, since the reader fills its buffer again while later sequences of the pass are drawn.
            features_TD = sequence.hidden(self.device)[: shared.max_len].flatten(1).clone()
            size = len(features_TD) + max(each.tokens_NG.numel() for each in found)
            if waiting and num_waiting + size > shared.tokens_per_pass:
                yield Pass(self._pack(waiting, features), last=False)
                waiting, features, num_waiting = [], [], 0
            waiting.append(found)
            features.append(features_TD)
            num_waiting += size
        yield Pass(self._pack(waiting, features) if waiting else [], last=True)

    def _pack(self, waiting: list[list[SequenceBlocks]], features: list[Tensor]) -> list[TrainingBlocks]:
        features_TD, num_tokens = torch.cat(features), [len(each) for each in features]
        return [
            pack([*drawn], features_TD, num_tokens, plan.config, plan.block_size, plan.mask_token_id)
            for plan, drawn in zip(self.plans, zip(*waiting, strict=True), strict=True)
        ]


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """A GPU stream beside the one that trains. From then on the calling thread works on that GPU."""
    if device.type != "cuda":
        return nullcontext()
    torch.cuda.set_device(device)  # a new thread works on the first GPU
    return torch.cuda.stream(torch.cuda.Stream(device))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)
    elif isinstance(value, TrainingBlocks):
        for name in TrainingBlocks.__slots__:
            yield from tensors_of(getattr(value, name))
