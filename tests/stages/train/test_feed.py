"""The passes of a feed against passes made one sequence at a time, and the end of the feed's threads."""

# T context tokens, D context features
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from support.recorded import make_config, pack_all
from torch import Tensor
from vpd.data.cache import reader
from vpd.data.cache.cache import Cache
from vpd.data.cache.drafts import FirstDrafts
from vpd.data.cache.index import SequenceIndex, SequenceRow
from vpd.data.cache.open_parts import OpenStates
from vpd.data.cache.part import OpenPart
from vpd.data.cache.reader import CachedSequence
from vpd.data.errors import CacheCorruptError
from vpd.stages.config import ReadConfig
from vpd.stages.train import feed
from vpd.stages.train.config import TrainConfig
from vpd.stages.train.feed import BlockPlan, Feed, Pass, own_stream, tensors_of
from vpd.stages.train.order import DataOrder
from vpd.stages.train.samples import SequenceBlocks, TrainingBlocks, draw_blocks

BLOCK_SIZE, MASK = 4, 300
GEOMETRIC: dict[str, Any] = {"num_anchors": 8, "batch_tokens": 150, "tokens_per_pass": 160}
CPU = torch.device("cpu")


class Data(NamedTuple):
    """A cache, the rows that training reads, and the first drafts."""

    cache: Cache
    rows: SequenceIndex
    drafts: FirstDrafts | None

    def order(self, config: TrainConfig) -> DataOrder:
        return DataOrder.of(self.rows, config.max_len, config.batch_tokens, config.seed)

    def feed(
        self,
        *configs: TrainConfig,
        steps: range | None = None,
        read: ReadConfig | None = None,
        process: int = 0,
        num_processes: int = 1,
    ) -> Feed:
        """A feed for these runs; by default for two epochs and one step."""
        order = self.order(configs[0])
        steps = range(2 * order.steps_per_epoch + 1) if steps is None else steps
        plans = [BlockPlan(config, self.drafts, BLOCK_SIZE, MASK) for config in configs]
        read = read or ReadConfig()
        return Feed(self.cache, self.rows, order, plans, read, CPU, steps, process, num_processes)


@pytest.fixture(scope="module")
def data(tiny_cache: Path) -> Data:
    cache = Cache.open(tiny_cache)
    return Data(cache, cache.rows, None)


@pytest.fixture(scope="module")
def drafted(drafted_cache: Path) -> Data:
    cache = Cache.open(drafted_cache)
    return Data(cache, cache.rows, FirstDrafts.open(cache))


@pytest.fixture(autouse=True)
def _threads_end() -> Iterator[None]:
    yield
    assert feed_threads() == []


def feed_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("vpd-feed", "vpd-read"))]


def take_all(opened: Feed) -> list[Pass]:
    """All passes; checks that there are no more."""
    with opened:
        found: list[Pass] = []
        for _ in opened.steps:
            found.append(opened.take())
            while not found[-1].last:
                found.append(opened.take())
        with pytest.raises(RuntimeError, match="the last step is over"):
            opened.take()
    return found


def passes_by_hand(data: Data, config: TrainConfig, steps: Sequence[int]) -> list[Pass]:
    """Reads and draws the sequences one after another; a pass ends before it exceeds `tokens_per_pass`."""
    order = data.order(config)
    found: list[Pass] = []
    for step in steps:
        groups: list[list[tuple[CachedSequence, SequenceBlocks]]] = [[]]
        room = config.tokens_per_pass
        for index in order.indices(step):
            sequence = data.cache.read(data.rows[index])
            drawn = draw_blocks(sequence, data.drafts, config, BLOCK_SIZE, step)
            if drawn is None:
                continue
            size = min(sequence.row.num_tokens, config.max_len) + BLOCK_SIZE * len(drawn.anchors_N)
            if groups[-1] and size > room:
                groups.append([])
                room = config.tokens_per_pass
            groups[-1].append((sequence, drawn))
            room -= size
        for group in groups:
            blocks = []
            if group:
                sequences, drawn = zip(*group, strict=True)
                blocks = [pack_all([*sequences], [*drawn], config, BLOCK_SIZE, MASK)]
            found.append(Pass(blocks, last=group is groups[-1]))
    return found


def same_blocks(one: TrainingBlocks, other: TrainingBlocks) -> bool:
    tensors = [*zip(tensors_of(one), tensors_of(other), strict=True)]
    assert len(tensors) == 6
    counts = [(blocks.num_tokens, blocks.num_blocks) for blocks in (one, other)]
    return counts[0] == counts[1] and all(ours.dtype == theirs.dtype and ours.equal(theirs) for ours, theirs in tensors)


def same_passes(one: Sequence[Pass], other: Sequence[Pass]) -> bool:
    return [found.last for found in one] == [found.last for found in other] and all(
        same_blocks(ours, theirs)
        for mine, yours in zip(one, other, strict=True)
        for ours, theirs in zip(mine.blocks, yours.blocks, strict=True)
    )


# Content of the passes


class Case(NamedTuple):
    id: str
    settings: dict[str, Any]
    read: Mapping[str, Any] = MappingProxyType({})


CASES = [
    Case("geometric", {}),
    Case("one-sequence-a-pass", {"tokens_per_pass": 1}),
    Case("one-pass-a-step", {"tokens_per_pass": 10**6}),
    Case("one-sequence-a-step", {"batch_tokens": 1}),
    Case("some-without-an-anchor", {"max_len": 32, "batch_tokens": 40}),
    Case("one-thread", {"tokens_per_pass": 10**6}, {"num_threads": 1}),
    Case("many-threads", {"seed": 1}, {"num_threads": 5, "verify": "never"}),
    Case("argmax", {"labels": "argmax", "normalize": "batch"}),
]
OF_DRAFTS = [
    Case("past-boundary", {"prefix": {"sampler": "past-boundary"}}),
    Case("failure", {"anchor": {"sampler": "failure"}, "prefix": {"sampler": "topk"}}),
]


@pytest.mark.parametrize("case", [*CASES, *OF_DRAFTS], ids=lambda case: case.id)
def test_passes_are_those_made_by_hand(case: Case, data: Data, drafted: Data):
    source = drafted if case in OF_DRAFTS else data
    config = make_config(**GEOMETRIC | case.settings)
    opened = source.feed(config, read=ReadConfig(**case.read))
    found = take_all(opened)
    assert same_passes(found, passes_by_hand(source, config, opened.steps))
    assert sum(found.last for found in found) == len(opened.steps)
    for blocks in chain.from_iterable(each.blocks for each in found):
        size = len(blocks.features_TD) + blocks.block_ids_NG.numel()
        assert size <= config.tokens_per_pass or len(blocks.num_tokens) == 1
    if case.id == "geometric":
        assert len(found) > len(opened.steps)
        assert any(len(blocks.num_tokens) > 1 for each in found for blocks in each.blocks)


def test_a_feed_goes_on_at_any_step(data: Data):
    config = make_config(**GEOMETRIC)
    steps = range(3, 7)
    assert same_passes(take_all(data.feed(config, steps=steps)), passes_by_hand(data, config, steps))


def test_two_runs_get_the_same_features_and_each_its_own_blocks(drafted: Data):
    one = make_config(**GEOMETRIC | {"tokens_per_pass": 10**6})
    other = make_config(**GEOMETRIC | {"tokens_per_pass": 10**6, "num_anchors": 5, "prefix": {"sampler": "boundary"}})
    together = take_all(drafted.feed(one, other))
    for found in together:
        assert len(found.blocks) == 2
        assert found.blocks[0].features_TD is found.blocks[1].features_TD
    for i, config in enumerate((one, other)):
        own = [Pass([found.blocks[i]], found.last) for found in together]
        assert same_passes(own, take_all(drafted.feed(config)))


def test_the_run_with_more_blocks_decides_how_much_fits_into_a_pass(data: Data):
    few, many = (make_config(**GEOMETRIC | {"num_anchors": count}) for count in (1, 16))
    together = take_all(data.feed(few, many))
    alone = take_all(data.feed(many))
    assert same_passes([Pass(found.blocks[1:], found.last) for found in together], alone)
    assert len(together) > len(take_all(data.feed(few)))


@pytest.mark.parametrize("verify", ["first-epoch", "always", "never"])
def test_checksums_are_verified_as_configured(verify: str, data: Data, monkeypatch: pytest.MonkeyPatch):
    config = make_config(**GEOMETRIC)
    verified: list[bool] = []
    original = reader.read_states

    def noted(states: OpenStates, row: SequenceRow, slot: reader.Slot, verify: bool) -> tuple[OpenPart, Tensor]:
        verified.append(verify)
        return original(states, row, slot, verify)

    monkeypatch.setattr(reader, "read_states", noted)
    steps = range(2 * data.order(config).steps_per_epoch)
    read = ReadConfig.model_validate({"verify": verify, "num_threads": 1})
    take_all(data.feed(config, steps=steps, read=read))
    half = len(data.rows)
    assert verified == [verify != "never"] * half + [verify == "always"] * half


# Several processes


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_the_sequences_of_a_step(num_processes: int, data: Data):
    config = make_config(**GEOMETRIC | {"batch_tokens": 300})

    def by_step(process: int, num_processes: int) -> list[list[bytes]]:
        """The features of each sequence, step by step."""
        steps: list[list[bytes]] = [[]]
        for found in take_all(data.feed(config, process=process, num_processes=num_processes)):
            for blocks in found.blocks:
                pieces = blocks.features_TD.view(torch.uint8).split(blocks.num_tokens)
                steps[-1] += [piece.numpy().tobytes() for piece in pieces]
            steps += [[]] if found.last else []
        return steps[:-1]

    shares = [by_step(process, num_processes) for process in range(num_processes)]
    whole = by_step(0, 1)
    assert [sorted(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)] == [*map(sorted, whole)]
    assert all(len(share) > 0 for step in shares for share in step)
    assert len(set(chain.from_iterable(whole))) == len(data.rows)


def test_a_process_without_a_sequence_gets_an_empty_pass_for_the_step(data: Data):
    config = make_config(**GEOMETRIC | {"batch_tokens": 1})
    steps = range(4)
    assert take_all(data.feed(config, steps=steps, process=1, num_processes=2)) == [Pass([], last=True)] * 4
    alone = passes_by_hand(data, config, steps)
    assert same_passes(take_all(data.feed(config, steps=steps, process=0, num_processes=2)), alone)


# Errors, and the end of the threads


def patch_draws(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Calls `before` before every draw, with the draw's number from 1 on."""
    count = 0

    def draw(*args: Any) -> SequenceBlocks | None:
        nonlocal count
        count += 1
        before(count)
        return draw_blocks(*args)

    monkeypatch.setattr(feed, "draw_blocks", draw)


@pytest.mark.parametrize("bad", [1, 2, 5])
def test_an_error_in_drawing_comes_after_the_passes_before_it(bad: int, data: Data, monkeypatch: pytest.MonkeyPatch):
    config = make_config(**GEOMETRIC | {"batch_tokens": 1})

    def fail(count: int) -> None:
        if count == bad:
            raise ArithmeticError(f"draw {count}")

    patch_draws(monkeypatch, fail)
    with data.feed(config) as opened:
        found = [opened.take() for _ in range(bad - 1)]
        with pytest.raises(ArithmeticError, match=f"draw {bad}"):
            opened.take()
    assert same_passes(found, passes_by_hand(data, config, range(bad - 1)))


def test_an_error_in_reading_comes_after_the_passes_before_it(data: Data, monkeypatch: pytest.MonkeyPatch):
    config = make_config(**GEOMETRIC | {"batch_tokens": 1})
    bad = data.rows[data.order(config).indices(3)[0]].seq_id
    expected = passes_by_hand(data, config, range(3))
    original = reader.read_states

    def read(states: OpenStates, row: SequenceRow, slot: reader.Slot, verify: bool) -> tuple[OpenPart, Tensor]:
        if row.seq_id == bad:
            raise CacheCorruptError(f"{bad} is damaged")
        return original(states, row, slot, verify)

    monkeypatch.setattr(reader, "read_states", read)
    with data.feed(config) as opened:
        found = [opened.take() for _ in range(3)]
        with pytest.raises(CacheCorruptError, match=f"{bad} is damaged"):
            opened.take()
    assert same_passes(found, expected)


@pytest.mark.parametrize("num_taken", [0, 1, 3])
def test_closing_early_ends_the_threads(num_taken: int, data: Data):
    config = make_config(**GEOMETRIC)
    opened = data.feed(config, steps=range(300))
    with opened:
        for _ in range(num_taken):
            opened.take()
        assert "vpd-feed" in feed_threads()
    assert feed_threads() == []


def test_an_error_of_the_consumer_ends_the_threads(data: Data):
    def consume() -> None:
        with data.feed(make_config(**GEOMETRIC), steps=range(300)) as opened:
            opened.take()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert feed_threads() == []


def test_closing_ends_threads_that_wait_for_a_place(data: Data, monkeypatch: pytest.MonkeyPatch):
    """The thread draws one pass more than the queue holds, and then waits for a free place."""
    config = make_config(**GEOMETRIC | {"batch_tokens": 1})
    full = threading.Event()
    counts: list[int] = []

    def note(count: int) -> None:
        counts.append(count)
        if count == feed.PASSES_AHEAD + 1:
            full.set()

    patch_draws(monkeypatch, note)
    with data.feed(config, steps=range(300)):
        assert full.wait(timeout=10)
    assert feed_threads() == []
    assert counts == [*range(1, feed.PASSES_AHEAD + 2)]


# Waiting


class Clock:
    """A clock that only tests move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        self.asked = threading.Semaphore(0)
        monkeypatch.setattr(feed, "time", SimpleNamespace(monotonic=self.monotonic))

    def monotonic(self) -> float:
        self.asked.release()
        return self.now


def test_the_time_that_a_slow_feed_takes_is_time_waited(data: Data, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)

    def slow(count: int) -> None:
        for _ in range(1 if count == 1 else 2):  # `take` has begun, and the one before it is over
            assert clock.asked.acquire(timeout=10)
        clock.now += count

    patch_draws(monkeypatch, slow)
    with data.feed(make_config(**GEOMETRIC | {"batch_tokens": 1}), steps=range(3)) as opened:
        assert opened.seconds_waited == 0
        for waited in (1, 1 + 2, 1 + 2 + 3):
            opened.take()
            assert opened.seconds_waited == waited


def test_a_pass_that_is_ready_takes_no_waiting_time(data: Data, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    ready = threading.Event()

    def ahead(count: int) -> None:
        if count <= feed.PASSES_AHEAD:
            clock.now += 100
        else:
            ready.set()

    patch_draws(monkeypatch, ahead)
    with data.feed(make_config(**GEOMETRIC | {"batch_tokens": 1})) as opened:
        assert ready.wait(timeout=10)
        for _ in range(feed.PASSES_AHEAD):
            opened.take()
        assert (opened.seconds_waited, clock.now) == (0, 100 * feed.PASSES_AHEAD)


def test_the_feed_of_a_gpu_works_on_that_gpu(monkeypatch: pytest.MonkeyPatch):
    """A new thread works on the first GPU, whichever GPU its process trains on."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("a stream of", device))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    third = torch.device("cuda", 2)
    with own_stream(third) as stream:
        assert (chosen, stream) == ([third], ("a stream of", third))
    with own_stream(torch.device("cpu")):
        assert chosen == [third]
