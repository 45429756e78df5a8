"""What each command does once its settings are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ..data.cache.cache import Cache
from ..data.cache.drafts import FirstDrafts
from ..data.cache.index import SequenceIndex
from ..data.cache.storage.files import write_text_durably
from ..data.cache.storage.local import LocalStorage
from ..data.cache.storage.mirror import MirroredStorage
from ..data.cache.storage.places import open_storage
from ..stages.draft.first_draft import FirstDrafting
from ..stages.drafter.checkpoint import check_fits, load_shape
from ..stages.evaluate.live import decode_prompts, single_responses
from ..stages.evaluate.replay import Replay
from ..stages.extract.estimate import check_space
from ..stages.extract.sink import ExtractReport
from ..stages.extract.target import load_target
from ..stages.holdout import held_out_share, is_held_out
from ..stages.train.checkpoints import find_drafter, list_checkpoints
from ..stages.train.plan import make_trainer
from .config import VpdConfig, config_yaml
from .extraction import ExtractJob, drafting_beside, has_room_beside, prepare, work_on
from .inspect import accept_length_histogram
from .progress import ProgressReport
from .ray_workers import RayResources, extract_on_ray
from .run_folder import RunFolder
from .signals import StopSignals
from .sweep import SweepRun, collect, evaluate_run, show_runs, train_all
from .training import check_trackers, run_trainers

DEFAULT_HOLDOUT = 0.05


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """The result on standard output: one JSON object for machines, or a text for people."""
    click.echo(json.dumps(result) if as_json else text)


def extract(
    target_name: str,
    prompt_files: tuple[str, ...],
    out: str,
    first_drafter: str | Path | None,
    config: VpdConfig,
    as_json: bool,
    ray: RayResources | None = None,
) -> ExtractReport:
    settings = config.extract
    if not as_json:
        click.echo(config_yaml(config, ["extract"]), err=True)
    drafter = find_drafter(first_drafter) if first_drafter is not None else None
    job = ExtractJob(target_name, prompt_files, out, settings)
    prepared = prepare(job)
    if drafter is not None:
        check_fits(load_shape(drafter), prepared.manifest, drafter)
    check_space(open_storage(out), prepared.plan, prepared.manifest, settings)
    drafting = FirstDrafting(drafter, config.draft, config.read) if drafter is not None else None
    with StopSignals(f"within {settings.stop_seconds:.0f} s, with the sequences in the engine") as signals:

        def must_stop() -> bool:
            return signals.received is not None

        beside = drafting if has_room_beside(elsewhere=ray is not None) else None
        with drafting_beside(out, beside, must_stop) if beside is not None else nullcontext():
            if ray is not None:
                report = extract_on_ray(job, prepared, ray, must_stop)
            else:
                with ProgressReport("extract", len(prepared.plan.conversations), "tokens") as progress:
                    report = work_on(prepared, progress.advance, must_stop, progress.begin)
    if drafting is not None and not report.num_left:
        draft_over(open_cache_for_reading(out, config), drafting)
    cache = Cache.open(out, allow_empty=True)
    result = {
        "cache": out,
        "num_sequences": len(cache),
        "num_tokens": cache.num_tokens,
        "num_bytes": cache.num_bytes,
        **report.to_json(),
    }
    emit(
        result,
        as_json,
        f"{out}: {len(cache)} sequences, {cache.num_tokens} tokens, {cache.num_bytes / 2**20:.1f} MiB "
        f"({report.num_written} written now, {report.num_present} there before; skipped: "
        f"{dict(report.skipped) or 'none'}). Of {report.num_checked} greedy choices compared, the stored states "
        f"confirm {report.num_checked - report.num_argmax_differing}.{describe_audit(report.audit)}",
    )
    if report.num_left:
        click.echo(f"vpd: stopped; {report.num_left} sequences are left, the same command continues.", err=True)
    return report


def describe_audit(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return (
        f" A second look at {found['num_sequences']} of them ({found['num_tokens']} tokens): worst relative error "
        f"{found['worst_relative_error']:.1e}, mean {found['mean_relative_error']:.1e}; "
        f"{found['argmax_agreement']:.2%} of the choices agree."
    )


def open_cache_for_reading(place: str, config: VpdConfig) -> Cache:
    """The cache at a place, through the local copies of its parts if the config names a folder for them."""
    storage = open_storage(place)
    if config.read.local_parts is not None and not isinstance(storage, LocalStorage):
        storage = MirroredStorage(storage, Path(config.read.local_parts), round(config.read.local_gib * 2**30))
    return Cache.open(storage)


def draft_over(cache: Cache, drafting: FirstDrafting) -> FirstDrafts:
    with ProgressReport("draft", len(cache), "anchors") as progress:
        return drafting.run(cache, progress.advance)


def draft(place: str, first_drafter: str | Path, config: VpdConfig, as_json: bool) -> None:
    cache = open_cache_for_reading(place, config)
    drafts = draft_over(cache, FirstDrafting(find_drafter(first_drafter), config.draft, config.read))
    histogram = accept_length_histogram(cache, drafts)
    num_anchors = sum(histogram.values())
    result = {"fingerprint": drafts.fingerprint, "num_anchors": num_anchors, "accept_lengths": histogram}
    shares = ", ".join(f"{length}: {count / num_anchors:.0%}" for length, count in histogram.items())
    text = f"first drafts {drafts.fingerprint}: {num_anchors} anchors; accept lengths {shares or 'none'}"
    emit(result, as_json, text)


def train(place: str, out: Path, config: VpdConfig, as_json: bool) -> None:
    cache = open_cache_for_reading(place, config)
    check_trackers(config.train)
    folder = RunFolder(out, config, cache)
    trainer = make_trainer(cache, out, config.drafter, config.train, config.read, config.eval)
    run_trainers([trainer], [folder], config, as_json)
    if trainer.accelerator.is_main_process:
        checkpoint = list_checkpoints(out)[-1]
        result = {"run": str(out), "step": trainer.step, "checkpoint": str(checkpoint)}
        emit(result, as_json, f"trained: {checkpoint}")


def sweep(place: str, runs: Sequence[SweepRun], together: int, as_json: bool) -> int:
    """Returns an exit code: 1 if a run has failed."""
    cache = open_cache_for_reading(place, runs[0].config)
    failures = train_all(cache, runs, together, as_json)
    finished = [run for run in runs if run.name not in failures]
    with ProgressReport("eval", len(finished)) as progress:
        for run in finished:
            evaluate_run(cache, run)
            progress.advance(note=run.name)
    return int(bool(failures))


def show_sweep(runs: Sequence[SweepRun], as_json: bool) -> None:
    results = collect(runs)
    if as_json:
        click.echo(json.dumps({"runs": results}))
    elif results:
        Console(highlight=False).print(show_runs(results))


def evaluate(
    place: str,
    first_drafter: str | Path,
    drafter: str | Path | None,
    target_name: str | None,
    out: Path | None,
    config: VpdConfig,
    as_json: bool,
) -> dict[str, Any]:
    cache = open_cache_for_reading(place, config)
    first = find_drafter(first_drafter)
    second = find_drafter(drafter) if drafter is not None else None
    share = config.eval.holdout
    if share is None:
        share = held_out_share([path for path in (first, second) if path is not None])
    if share is None:
        share = DEFAULT_HOLDOUT
    rows = cache.rows.take([i for i, seq_id in enumerate(cache.rows.strings("seq_id")) if is_held_out(seq_id, share)])
    replay = Replay(cache, first, second, config.eval, config.read)
    with ProgressReport("eval", len(rows[: config.eval.limit])) as progress:
        result = replay.run(rows, progress.advance).to_json()
    if target_name is not None:
        result["live"] = check_live(cache, target_name, (first, second or first), rows, config)
    if out is not None:
        write_text_durably(out, json.dumps(result, indent=2) + "\n")
    emit(result, as_json, describe_evaluation(result))
    return result


def check_live(
    cache: Cache, target_name: str, drafters: tuple[Path, Path], rows: SequenceIndex, config: VpdConfig
) -> dict[str, Any]:
    """Decodes some of the held-out prompts with the target, and replays the same."""
    chosen = single_responses(cache, rows, config.eval.live_prompts)
    with ProgressReport("decode", len(chosen)) as progress:
        live = decode_prompts(cache, load_target(target_name).folder, drafters, chosen, config.eval, progress.advance)
    replayed = Replay(cache, *drafters, config.eval, config.read).run(chosen)
    return {**asdict(live), "alpha": live.alpha, "replayed_alpha": replayed.alpha["d2sd"]}


def describe_evaluation(result: dict[str, Any]) -> str:
    """An evaluation for people: alpha of each setting with its interval, then what it was measured on."""
    lines = [
        f"alpha {name:16s} {alpha:.3f}  [{low:.3f}, {high:.3f}]"
        for (name, alpha), (low, high) in zip(result["alpha"].items(), result["interval"].values(), strict=True)
    ]
    lines.append(
        f"policy {result['policy']}, k {result['k']}, block size {result['block_size']}; {result['num_tokens']} tokens "
        f"of {result['num_responses']} responses in {result['num_sequences']} held-out sequences (95 % intervals over "
        f"sequences); skipped: {result['skipped'] or 'none'}"
    )
    if live := result.get("live"):
        lines.append(
            f"decoded with the target: {live['num_identical']} of {live['num_prompts']} responses are the cached ones, "
            f"token by token; alpha {live['alpha']:.4f}, replayed {live['replayed_alpha']:.4f}"
        )
    return "\n".join(lines)
