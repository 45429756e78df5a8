"""`vpd eval`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...data.cache.cache import Cache
from ...data.cache.index import SequenceIndex
from ...data.cache.storage.files import write_text_durably
from ...stages.evaluate.live import decode_prompts, single_responses
from ...stages.evaluate.plan import plan_replay
from ...stages.extract.target import load_target
from ...stages.extract.transformers_engine import load_model
from ...stages.holdout import held_out_rows
from ...stages.train.checkpoints import find_drafter
from ...stages.trained_on import NO, UNKNOWN, YES
from ..config import VpdConfig
from ..output import emit
from ..progress import ProgressReport
from ..reading import open_for_reading


def run_evaluate(
    place: str,
    first_drafter: str | Path,
    drafter: str | Path | None,
    target: str | None,
    out: Path | None,
    config: VpdConfig,
    as_json: bool,
) -> dict[str, Any]:
    """Replays the held-out sequences; returns the report as JSON has it.

    Args:
        drafter: the second drafter; None: the first one alone.
        target: decodes some held-out prompts too, to check the replay.
    """
    cache = open_for_reading(place, config.read)
    first = find_drafter(first_drafter)
    second = find_drafter(drafter) if drafter is not None else None
    rows = held_out_rows(cache, [each for each in (first, second) if each is not None], config.eval.holdout)
    plan = plan_replay(cache, rows, first, config.eval, config.read)
    with ProgressReport("eval", len(rows[: config.eval.limit])) as progress:
        result = plan.run(second, progress.advance).to_json()
    if target is not None:
        result["live"] = check_live(cache, target, (first, second or first), rows, config)
    if out is not None:
        write_text_durably(out, json.dumps(result, indent=2) + "\n")
    emit(result, as_json, describe_evaluation(result))
    return result


def check_live(
    cache: Cache, target: str, drafters: tuple[Path, Path], rows: SequenceIndex, config: VpdConfig
) -> dict[str, Any]:
    """Decodes some of the held-out prompts with the target, and replays the same prompts."""
    chosen = single_responses(cache, rows, config.eval.live_prompts)
    model = load_model(load_target(target, trust_remote_code=config.extract.trusts_target_code), torch.float32)
    with ProgressReport("decode", len(chosen)) as progress:
        live = decode_prompts(cache, model, drafters, chosen, config.eval, progress.advance)
    replayed = plan_replay(cache, chosen, drafters[0], config.eval, config.read).run(drafters[1])
    return {**asdict(live), "alpha": live.alpha, "replayed_alpha": replayed.alpha["d2sd"]}


def describe_evaluation(result: dict[str, Any]) -> str:
    """Alpha of each way of decoding with its interval, then what alpha was measured on."""
    lines = [
        f"alpha {name:16s} {alpha:.3f}  [{low:.3f}, {high:.3f}]  mean of answers {of_answers:.3f}"
        for (name, alpha), (low, high), of_answers in zip(
            result["alpha"].items(), result["interval"].values(), result["alpha_mean_of_answers"].values(), strict=True
        )
    ]
    lines.append(
        "alpha is pooled over all cycles (Eq. 1 of the paper); the mean of answers, which public benchmarks print, "
        "counts every answer alike"
    )
    lines.append(
        f"policy {result['policy']}, k {result['k']}, block size {result['block_size']}; {result['num_tokens']} tokens "
        f"of {result['num_responses']} responses in {result['num_sequences']} {describe_holdout(result)} (95 % "
        f"intervals over sequences); skipped: {result['skipped'] or 'none'}"
    )
    lines += describe_overlap(result)
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    if live := result.get("live"):
        lines.append(
            f"decoded with the target: {live['num_identical']} of {live['num_prompts']} responses equal the cached "
            f"ones, token by token; alpha {live['alpha']:.4f}, replayed {live['replayed_alpha']:.4f}"
        )
    return "\n".join(lines)


def describe_holdout(result: dict[str, Any]) -> str:
    """`held-out sequences`, if no drafter is known or suspected to have been trained on one of them."""
    held_out = all(found[NO] == sum(found.values()) for found in result["trained_on"].values())
    return "held-out sequences" if held_out else "sequences"


def describe_overlap(result: dict[str, Any]) -> list[str]:
    """For each drafter: how many of the sequences it was trained on, and of how many nobody knows."""
    lines = []
    for drafter, found in result["trained_on"].items():
        num_sequences = sum(found.values())
        if found[YES]:
            lines.append(
                f"NOT held out: the {drafter} drafter was trained on {found[YES]} of the {num_sequences} sequences. "
                "Without --holdout, vpd eval takes those that the drafters' runs held out"
            )
        if found[UNKNOWN]:
            lines.append(
                f"unknown: whether the {drafter} drafter was trained on {found[UNKNOWN]} of the {num_sequences} "
                "sequences, since no record of its training covers them"
            )
    return lines
