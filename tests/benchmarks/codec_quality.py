"""What a codec costs: the same drafter trained from each, and its acceptance length by replay of the exact states.

    python tests/benchmarks/codec_quality.py CACHE OUT [--config RECIPE] [--steps N] [--seeds N] [--codec NAME]...

CACHE holds greedy answers, raw or lossless. Every codec's cache lies in OUT afterwards, and so do the figures, a
JSON file each. `mixed` is no codec of vpd: prompt states as int4, response states as fp8, stored raw to see what it
would cost.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from vpd.data.cache.cache import Cache
from vpd.data.cache.codecs import CODECS, measure_channels, whitened_cosine
from vpd.data.cache.maintenance.transfer import TransferReport, copy_target, recode
from vpd.data.cache.writer import StateWriter
from vpd.pipeline.config import load_config
from vpd.stages.evaluate.replay import Replay
from vpd.stages.holdout import is_held_out
from vpd.stages.train.checkpoints import find_drafter
from vpd.stages.train.loop import run_together
from vpd.stages.train.plan import make_trainer

FIGURES = {"cosine_mean": 5, "cosine_worst": 5, "loss": 3, "alpha": 3}
LAST_STEPS = 20
MIXED = "mixed"


def train_and_replay(source: Cache, cache: Cache, run: Path, recipe: str, steps: int, seed: int) -> dict[str, float]:
    """Trains a first drafter from `cache`; returns its loss over the last steps and its alpha on `source`."""
    config = load_config(recipe, {"train.objective": "dflash", "train.max_steps": steps, "train.seed": seed})
    losses: list[float] = []
    trainer = make_trainer(cache, run, config.drafter, config.train)
    run_together([trainer], lambda _, metrics: losses.append(metrics["loss"]))
    seq_ids = source.rows.strings("seq_id")
    held_out = [i for i, seq_id in enumerate(seq_ids) if is_held_out(seq_id, config.train.holdout)]
    result = Replay(source, find_drafter(run), None, config.eval).run(source.rows.take(held_out)).to_json()
    loss = float(np.mean(losses[-LAST_STEPS:] or [np.nan]))  # a run that is there already is replayed alone
    return {"loss": loss, "alpha": result["alpha"]["first"], "num_tokens": result["num_tokens"]}


def write_mixed(source: Cache, place: Path) -> tuple[float, list[float]]:
    """Writes the states as `mixed` would give them back; returns its share of the bytes and whitened cosines."""
    writer = StateWriter(Cache.create_or_open(place, source.manifest), 1 << 30, {})
    low, high = CODECS["int4"], CODECS["fp8"]
    share, cosines, scale_KH = 0.0, [], None
    for row in source.rows:
        sequence = source.read(row)
        original, split = sequence.hidden_TKH, row.prompt_len
        scale_KH = measure_channels(original) if scale_KH is None else scale_KH
        prompt, response = low.encode(original[:split], scale_KH), high.encode(original[split:])
        parts = [low.decode(torch.from_numpy(prompt), original.shape[2], scale_KH)]
        parts.append(high.decode(torch.from_numpy(response), original.shape[2]))
        share += (prompt.nbytes + response.nbytes) / (original.nbytes * len(source.rows))
        mixed_TKH = torch.cat(parts)
        cosines += whitened_cosine(original, mixed_TKH).flatten().tolist()
        writer.append(sequence.as_new(), mixed_TKH)
    writer.finish()
    copy_target(source.storage, writer.cache.storage)
    return share, cosines


def measure(source: Cache, out: Path, codec: str, recipe: str, steps: int, seeds: int) -> dict[str, Any]:
    """One row of the table."""
    started = time.monotonic()
    if codec == MIXED:
        share, cosines = write_mixed(source, out / codec)
        report = TransferReport(cosines=np.array(cosines))
        cache = Cache.open(out / codec)
    else:
        report = recode(source, out / codec, codec, 1 << 30)
        cache = Cache.open(out / codec)
        share = cache.num_bytes / source.num_bytes
    runs = [train_and_replay(source, cache, out / f"{codec}-{seed}", recipe, steps, seed) for seed in range(seeds)]
    return {
        "codec": codec,
        "share": share,
        "cosine_mean": report.cosine_mean,
        "cosine_worst": report.cosine_worst,
        "loss": float(np.mean([run["loss"] for run in runs])),
        "alpha": float(np.mean([run["alpha"] for run in runs])),
        "alphas": [run["alpha"] for run in runs],
        "num_tokens": runs[0]["num_tokens"],
        "seconds": time.monotonic() - started,
    }


@click.command()
@click.argument("cache")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--config", "recipe", default="smollm2-135m", show_default=True)
@click.option("--steps", default=200, show_default=True)
@click.option("--seeds", default=1, show_default=True)
@click.option("--codec", "codecs", multiple=True, type=click.Choice([*CODECS, MIXED]), default=[*CODECS, MIXED])
def main(cache: str, out: Path, recipe: str, steps: int, seeds: int, codecs: tuple[str, ...]) -> None:
    source = Cache.open(cache)
    console = Console(highlight=False)
    table = Table("codec", "bytes", *FIGURES)
    found: list[dict[str, Any]] = []
    for codec in codecs:
        entry = measure(source, out, codec, recipe, steps, seeds)
        found.append(entry)
        (out / f"{codec}.json").write_text(json.dumps(entry, indent=1) + "\n")
        figures = [f"{entry[name]:.{digits}f}" for name, digits in FIGURES.items()]
        table.add_row(codec, f"{entry['share']:.1%}", *figures)
        console.print(table)


if __name__ == "__main__":
    main()
