"""Feeding training: what the feed gives at most, and how long a training loop waits for it."""

# T context tokens, D context features, V vocabulary, H hidden width
from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import torch
from report import Figure, interleave, median_ratio
from torch import Tensor
from vpd.data.cache.cache import Cache
from vpd.data.cache.index import SequenceIndex
from vpd.data.cache.reader import Request, read_ahead
from vpd.stages.config import ReadConfig
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.shape import DrafterShape
from vpd.stages.train.config import PrefixConfig, TrainConfig
from vpd.stages.train.feed import BlockPlan, Feed
from vpd.stages.train.objective import HeadRows, block_loss
from vpd.stages.train.order import DataOrder
from vpd.stages.train.samples import TrainingBlocks
from workload import MIB, Workload, write_cache

NAME = "feed"
ROUNDS, TRAINED_STEPS = 4, 12
READ = ReadConfig(verify="always")
TRAIN = TrainConfig(prefix=PrefixConfig(sampler="geometric"), num_anchors=64, batch_tokens=2000)
BLOCK_SIZE, MASK = 16, 3


def bench_feed(folder: Path, workload: Workload) -> list[Figure]:
    """The feed draws 64 blocks a sequence; training is on this machine's processor, with one layer."""
    cache = write_cache(folder / "cache", workload, 256 * MIB)
    rows = cache.rows
    order = DataOrder.of(rows, TRAIN.max_len, TRAIN.batch_tokens, TRAIN.seed)
    runs = {
        "reader": lambda: run_reader(cache, rows, order),
        "feed": lambda: run_feed(cache, rows, order),
    }
    seconds = interleave(runs, ROUNDS)
    num_tokens = sum(int(count) for count in rows.column("num_tokens"))
    waited = measure_wait(cache, rows, order, workload)

    def figure(name: str, value: float, unit: str, target: float | None = None) -> Figure:
        return Figure(
            benchmark=NAME, name=name, data=workload.name, value=value, unit=unit, target=target, less_is_better=True
        )

    return [
        figure("read, verified, drawn and packed", num_tokens / min(seconds["feed"]), "tokens/s"),
        figure("feed / reader alone, time", median_ratio(seconds["feed"], seconds["reader"]), "x"),
        figure("training's wait for data", waited * 100, "%", 5.0),
    ]


def run_reader(cache: Cache, rows: SequenceIndex, order: DataOrder) -> float:
    started = time.monotonic()
    requests = [Request(rows[index]) for step in range(order.steps_per_epoch) for index in order.indices(step)]
    with closing(read_ahead(cache.states, requests, READ.num_threads)) as sequences:
        for _ in sequences:
            pass
    return time.monotonic() - started


def make_feed(cache: Cache, rows: SequenceIndex, order: DataOrder, num_steps: int) -> Feed:
    plan = BlockPlan(TRAIN, None, BLOCK_SIZE, MASK)
    return Feed(cache, rows, order, [plan], READ, torch.device("cpu"), range(num_steps))


def run_feed(cache: Cache, rows: SequenceIndex, order: DataOrder) -> float:
    started = time.monotonic()
    with make_feed(cache, rows, order, order.steps_per_epoch) as feed:
        for _ in range(order.steps_per_epoch):
            while not feed.take().last:
                pass
    return time.monotonic() - started


def measure_wait(cache: Cache, rows: SequenceIndex, order: DataOrder, workload: Workload) -> float:
    """Share of the time after the first pass in which forward and backward wait for the next blocks."""
    shape = make_shape(workload, cache.manifest.vocab_size)
    drafter = Drafter(shape)
    drafter.init_weights(torch.Generator().manual_seed(0))
    table_VH = torch.randn(shape.vocab_size, shape.hidden_size, generator=torch.Generator().manual_seed(1))
    num_steps = min(TRAINED_STEPS, order.steps_per_epoch)
    with make_feed(cache, rows, order, num_steps) as feed:
        train_pass(drafter, table_VH, feed.take().blocks[0])
        started, before = time.monotonic(), feed.seconds_waited
        for _ in range(num_steps - 1):
            train_pass(drafter, table_VH, feed.take().blocks[0])
        return (feed.seconds_waited - before) / (time.monotonic() - started)


def train_pass(drafter: Drafter, table_VH: Tensor, blocks: TrainingBlocks) -> None:
    context = drafter.context(blocks.features_TD.float(), blocks.num_tokens)
    embedded_NGH = table_VH[blocks.block_ids_NG]
    states_PH = drafter(embedded_NGH, blocks.anchors_N, context, blocks.num_blocks, blocks.labels.predicted_P)
    block_loss(states_PH, blocks.labels, HeadRows(table_VH, None, None), TRAIN).loss_sum.backward()


def make_shape(workload: Workload, vocab_size: int) -> DrafterShape:
    """One layer as wide as the workload's states."""
    return DrafterShape(
        num_layers=1,
        hidden_size=workload.hidden_size,
        num_attention_heads=workload.hidden_size // 64,
        num_key_value_heads=workload.hidden_size // 64,
        head_dim=64,
        intermediate_size=2 * workload.hidden_size,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=4096,
        vocab_size=vocab_size,
        block_size=BLOCK_SIZE,
        mask_token_id=MASK,
        target_layer_ids=tuple(range(workload.num_layers)),
        num_target_layers=workload.num_layers,
    )
