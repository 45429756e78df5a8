"""A table of the kinds of targets that extraction supports, tried with tiny random targets.

    python tests/targets.py [NAME ...] [--engine vllm|transformers]

Each kind goes through `vpd extract` in a separate process, which audits all sequences. The embedding that stage two
feeds to drafters is compared with what the target's own embedding module gives, and the logits likewise.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from support.kinds import KINDS, VISION_KINDS, save_kind
from support.quantized import FORMS, quantize
from support.tiny import as_flags, write_jsonl
from vpd.stages.drafter.target_pieces import TargetPieces
from vpd.stages.extract.engines import ENGINES
from vpd.stages.extract.target import load_target
from vpd.stages.extract.transformers_engine import load_model

PROMPTS = [{"prompt": f"what is the sum of {i} and {7 * i % 5}?"} for i in range(16)]
FLAGS = {"dtype": "float32", "layer_ids": "0,2,5", "max_new_tokens": 24, "max_len": 128, "part_mib": 1, "audit": "100%"}
VLLM_ARGS = "extract.engine_args={enforce_eager: true, kv_cache_memory_bytes: 268435456, max_num_seqs: 16}"
SECONDS = 300
DTYPES = {("Qwen3-Next", "vllm"): "bfloat16"}
"""Kind and engine -> the type in which they are tried, where it is not float32: the CPU's kernel has no other."""
QUANTIZED = {f"Qwen3, {form}": ("Qwen3", form) for form in FORMS}
"""Name in the table -> kind, and how its layers are quantized."""


@click.command()
@click.argument("names", nargs=-1)
@click.option("--engine", type=click.Choice([*ENGINES]), default="vllm", show_default=True)
def main(names: tuple[str, ...], engine: str) -> None:
    columns = (
        "extraction",
        "choices confirmed",
        "audit: worst error",
        "choices agree",
        "embedding ratio",
        "logit ratio",
    )
    table = Table("target", *columns)
    with TemporaryDirectory() as temporary:
        for name in names or [*KINDS, *VISION_KINDS, *QUANTIZED]:
            table.add_row(name, *try_kind(name, engine, Path(temporary) / name.replace(" ", "-")))
    Console(width=200).print(table)


def try_kind(name: str, engine: str, folder: Path) -> list[str]:
    """The cells of a kind's row, without its name."""
    folder.mkdir()
    kind, form = QUANTIZED.get(name, (name, None))
    target = save_kind(kind, folder / "target")
    if form is not None:
        quantize(target, form)
    prompts = write_jsonl(folder / "prompts.jsonl", PROMPTS)
    command = [sys.executable, "-m", "vpd.pipeline.cli", "extract", str(target), str(prompts), "--json"]
    dtype = DTYPES.get((name, engine), FLAGS["dtype"])
    flags = as_flags({**FLAGS, "dtype": dtype, "engine": engine, "out": folder / "cache"})
    settings = ["--set", VLLM_ARGS] if engine == "vllm" else []
    try:
        done = subprocess.run([*command, *flags, *settings], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [f"no end after {SECONDS} s"]
    if done.returncode:
        return [reason(done.stderr)]
    found: dict[str, Any] = json.loads(done.stdout)
    audit = found["audit"]
    confirmed = found["num_checked"] - found["num_argmax_differing"]
    return [
        f"{found['num_sequences']} sequences, {found['num_tokens']} tokens",
        f"{confirmed} of {found['num_checked']}",
        f"{audit['worst_relative_error']:.1e}",
        f"{audit['argmax_agreement']:.2%}",
        *ratios(target, folder / "cache/target"),
    ]


def ratios(target: Path, stored: Path) -> list[str]:
    """The target's embeddings and logits over those that stage two computes from the cache: least and largest."""
    pieces = TargetPieces.load(stored)
    model: Any = load_model(load_target(str(target)), "float32").eval()
    ids = torch.arange(20, 40)
    with torch.no_grad():
        out = model(ids[None], output_hidden_states=True)
        logits = out.hidden_states[-1][0] @ pieces.head_VH.T
        if (cap := pieces.logits_soft_cap) is not None:
            logits = cap * torch.tanh(logits / cap)
        found = [model.get_input_embeddings()(ids) / pieces.embed_VH[ids], out.logits[0] / logits]
    return [f"{float(ratio.quantile(0.01)):.3f} .. {float(ratio.quantile(0.99)):.3f}" for ratio in found]


def reason(error: str) -> str:
    """The engine's first error; without one, vpd's error message; without that, the last line."""
    lines = [line for line in error.splitlines() if line.strip()]
    raised = [line.partition("] ")[2] for line in lines if re.search(r"\] \w*Error: ", line)]
    reported = [line for line in lines if line.startswith("vpd: error:")]
    return (raised or reported or lines[-1:])[0][:120]


if __name__ == "__main__":
    main()
