"""`vpd eval`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...data.cache.cache import Cache
from ...data.cache.index import SequenceIndex
from ...data.cache.storage.files import write_text_durably
from ...data.errors import TargetError
from ...stages.drafter.checkpoint import CONFIG, drafter_fingerprint, load_shape, read_json
from ...stages.evaluate.live import decode_prompts, single_responses
from ...stages.evaluate.plan import plan_replay
from ...stages.evaluate.speed import compare_speeds, cost_model
from ...stages.extract.target import Target, load_target, target_facts
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
    model = cost_model(config.eval, read_json(cache.target_folder / CONFIG), load_shape(first))
    live_target = load_cached_target(cache, target, config) if target is not None else None
    rows = held_out_rows(cache, [each for each in (first, second) if each is not None], config.eval.holdout)
    plan = plan_replay(cache, rows, first, config.eval, config.read)
    with ProgressReport("eval", len(rows[: config.eval.limit])) as progress:
        result = plan.run(second, progress.advance).to_json()
    drafters = {"first": first} if second is None else {"first": first, "second": second}
    result["drafters"] = {name: drafter_fingerprint(folder) for name, folder in drafters.items()}
    if model is not None:
        result["speed"] = compare_speeds(model, config.eval, result["by_nodes"])
    if live_target is not None:
        result["live"] = check_live(cache, live_target, (first, second or first), rows, config)
    if out is not None:
        write_text_durably(out, json.dumps(result, indent=2) + "\n")
    emit(result, as_json, describe_evaluation(result))
    return result


def check_live(
    cache: Cache, target: Target, drafters: tuple[Path, Path], rows: SequenceIndex, config: VpdConfig
) -> dict[str, Any]:
    """Decodes some of the held-out prompts with the target, and replays the same prompts."""
    chosen = single_responses(cache, rows, config.eval.live_prompts)
    model = load_model(target, torch.float32)
    with ProgressReport("decode", len(chosen)) as progress:
        live = decode_prompts(cache, model, drafters, chosen, config.eval, progress.advance)
    replayed = plan_replay(cache, chosen, drafters[0], config.eval, config.read, brief=True).run(drafters[1])
    return {**asdict(live), "alpha": live.alpha, "replayed_alpha": replayed.alpha["d2sd"]}


def load_cached_target(cache: Cache, name: str, config: VpdConfig) -> Target:
    """The target whose states a cache holds, with its adapter.

    Raises:
        TargetError: the target can't be used, or the cache was made with other files.
    """
    target = load_target(name, config.extract.adapter, trust_remote_code=config.extract.trusts_target_code)
    if target.fingerprint() != cache.manifest.target_fingerprint:
        raise TargetError(
            f"expected the target of the cache, {cache.manifest.target}, found another config, other weights or "
            f"another adapter in {target_facts(target, '')['target']}. Give that target, and its adapter as "
            "--set extract.adapter=DIR."
        )
    return target


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
    lines += ["", *describe_nodes(result), *describe_slices(result), *describe_speed(result), ""]
    lines.append(
        f"{result['way']}, policy {result['policy']}, k {result['k']}, {result['nodes']} nodes, block size "
        f"{result['block_size']}; {result['num_tokens']} tokens "
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


def describe_nodes(result: dict[str, Any]) -> list[str]:
    """A table: alpha by verified nodes, a line for each way of decoding at the chosen policy and k."""
    rows: dict[tuple[str, str | None], dict[int, float]] = {}
    for each in result["by_nodes"]:
        chosen = each["policy"] in (None, result["policy"]) and each["k"] == (result["k"] if each["second"] else 0)
        if chosen and each["nodes"] is not None:
            rows.setdefault((each["way"], each["second"]), {})[each["nodes"]] = each["alpha"]
    budgets = sorted(next(iter(rows.values())))
    lines = [f"{'alpha by verified nodes':40s}" + "".join(f"{nodes:8d}" for nodes in budgets)]
    for (way, second), alphas in rows.items():
        name = way if second is None else f"{way} ({second}, k {result['k']})"
        lines.append(f"{name:40s}" + "".join(f"{alphas[nodes]:8.3f}" for nodes in budgets))
    return lines


def describe_slices(result: dict[str, Any]) -> list[str]:
    """A table: alpha by slice, where there are several slices of a kind."""
    several = [kind for kind, count in Counter(each["by"] for each in result["slices"]).items() if count > 1]
    names = list(result["alpha"])
    lines = [f"{'alpha by slice':40s}" + "".join(f"{name:>17s}" for name in names)] if several else []
    for each in (each for each in result["slices"] if each["by"] in several):
        alphas = (each["alpha"][name] for name in names)
        label = f"{each['by']} {each['slice']} ({each['num_sequences']} sequences)"
        lines.append(f"{label:40s}" + "".join(f"{'-' if x is None else format(x, '.3f'):>17s}" for x in alphas))
    return lines


def describe_speed(result: dict[str, Any]) -> list[str]:
    """For each batch size, the best way of decoding on a GPU, and the best one without a second drafter."""
    if "speed" not in result:
        return []
    speed = result["speed"]
    lines = [f"speed against plain decoding, {speed['gpu']}, target {speed['target']}, {speed['source']}"]
    for each in speed["by_batch"]:
        alone = next(row for row in each["ways"] if row["second"] is None)
        best = describe_way(each["ways"][0])
        lines.append(f"  batch {each['batch']:3d}: {best}; without a second drafter {describe_way(alone)}")
    return lines


def describe_way(row: dict[str, Any]) -> str:
    """`2.31 x with two-drafter tree (d2sd, k 4), 64 nodes`."""
    if row["speedup"] < 1:
        return "plain decoding"
    second = f" ({row['second']}, {row['policy']}, k {row['k']})" if row["second"] else ""
    nodes = "" if row["nodes"] is None else f", {row['nodes']} nodes"
    return f"{row['speedup']:.2f} x with {row['way']}{second}{nodes}"


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
