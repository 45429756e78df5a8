"""The signatures of the `vpd` commands; `commands/` holds what they do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .command_line import VpdGroup, codecs, forms, remember_debug, resolve, settings

Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)
PLACE_HELP = "a folder, or s3://, gs://, az://"
ALWAYS_VERIFIED = ["num_threads", "local_parts", "local_gib"]
"""Settings of `read` for the commands that verify all that they read."""

prompts_argument = click.argument("prompts", nargs=-1, required=True)
engine_arg_option = click.option(
    "--engine-arg",
    "engine_args",
    multiple=True,
    metavar="NAME=VALUE",
    help="An argument of the engine, such as tensor_parallel_size=2.",
)
debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=remember_debug, help="Show the traceback of an error."
)


def bare_options(command: Command) -> Command:
    """Options of the commands that read no settings."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")(
        debug_option(command)
    )


def common_options(command: Command) -> Command:
    """Options of the commands that read settings."""
    for option in (
        bare_options,
        click.option(
            "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, such as train.lr=3e-4."
        ),
        click.option("--config", "source", metavar="NAME|FILE", help="A recipe's name, or a YAML file."),
    ):
        command = option(command)
    return command


def of_engine(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Values of `--engine-arg` in the form that `--set` takes."""
    return tuple(f"extract.engine_args.{argument}" for argument in arguments)


@click.group(cls=VpdGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vpd")
def main() -> None:
    """Train the VP-Drafter of D2SD offline: cache the target's states once, then train from the cache."""


@main.command(options=lambda: settings("extract"))
@click.argument("target")
@click.option("--out", required=True, metavar="PLACE", help=f"The cache, new or to be continued: {PLACE_HELP}.")
@click.option("--first-drafter", help="A checkpoint, run or hub id; its drafts go into the cache too.")
@prompts_argument
@engine_arg_option
@click.option("--ray", type=click.IntRange(1), metavar="N", help="Work with N workers on a Ray cluster.")
@click.option("--ray-gpus", type=click.FloatRange(0), default=1.0, show_default=True, help="GPUs of each worker.")
@click.option("--ray-cpus", type=click.FloatRange(0), default=1.0, show_default=True, help="CPUs of each worker.")
@common_options
def extract(
    target: str,
    prompts: tuple[str, ...],
    engine_args: tuple[str, ...],
    out: str,
    first_drafter: str | None,
    ray: int | None,
    ray_gpus: float,
    ray_cpus: float,
    source: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Stage one: run TARGET over PROMPTS, store its hidden states. TARGET is a folder or a hub id."""
    config = resolve(source, assignments + of_engine(engine_args), flags)
    from .commands.extract import run_extract
    from .ray_workers import RayResources

    resources = None if ray is None else RayResources(ray, ray_gpus, ray_cpus)
    run_extract(target, prompts, out, first_drafter, config, as_json, resources)


@main.command(options=lambda: settings("draft", read=ALWAYS_VERIFIED))
@click.argument("cache")
@click.option("--first-drafter", required=True, help="A DFlash drafter: a checkpoint, a run, or a hub id.")
@common_options
def draft(
    cache: str, first_drafter: str, source: str | None, assignments: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """Add first drafts and their boundaries to CACHE. This needs no target."""
    config = resolve(source, assignments, flags)
    from .commands.draft import run_draft

    run_draft(cache, first_drafter, config, as_json)


@main.command(options=lambda: settings("drafter", "train", "read"))
@click.argument("cache")
@click.option("--out", required=True, type=PATH, help="The run: a new folder, or one to continue.")
@click.option(
    "--drafter-config", type=PATH, help="A drafter's config.json in place of the drafter section; flags win over it."
)
@click.option(
    "--num-processes", default=1, show_default=True, type=click.IntRange(1), help="Processes on this machine."
)
@common_options
def train(
    cache: str,
    out: Path,
    drafter_config: Path | None,
    num_processes: int,
    source: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> int | None:
    """Stage two: train a drafter from CACHE, without the target."""
    config = resolve(source, assignments, flags, drafter_config)
    from .commands.train import run_train

    return run_train(cache, out, config, as_json, num_processes, drafter_config)


@main.command()
@click.argument("cache")
@click.option("--out", required=True, type=PATH, help="Folder of the runs, new or to be continued.")
@click.option(
    "--vary", multiple=True, required=True, metavar="KEY=[A,B]", help="Values of a setting; all combinations are run."
)
@click.option("--together", default=4, show_default=True, type=click.IntRange(1), help="Runs that share one pass.")
@click.option("--num-workers", default=1, show_default=True, type=click.IntRange(1), help="Processes, one GPU each.")
@click.option("--worker-index", type=click.IntRange(0), help="Do this worker's share alone, as on another machine.")
@common_options
def sweep(
    cache: str,
    out: Path,
    vary: tuple[str, ...],
    together: int,
    num_workers: int,
    worker_index: int | None,
    source: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
) -> int:
    """Train a drafter for each combination of settings. Shows the acceptance length of each drafter."""
    from .commands.sweep import run_sweep

    return run_sweep(cache, out, vary, source, assignments, together, num_workers, worker_index, as_json)


@main.command("eval", options=lambda: settings("eval", read=ALWAYS_VERIFIED))
@click.argument("cache")
@click.option("--first-drafter", required=True, help="The first drafter: a checkpoint, a run, or a hub id.")
@click.option("--drafter", help="The VP-Drafter: a checkpoint, a run, or a hub id.")
@click.option("--target", help="A folder or a hub id: also decode some held-out prompts with it, to check the replay.")
@click.option("--out", type=PATH, help="Also write the result to this file, as JSON.")
@common_options
def evaluate(
    cache: str,
    first_drafter: str,
    drafter: str | None,
    target: str | None,
    out: Path | None,
    source: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Measure the acceptance length on held-out answers of CACHE. This is a replay, without the target."""
    config = resolve(source, assignments, flags)
    from .commands.evaluate import run_evaluate

    run_evaluate(cache, first_drafter, drafter, target, out, config, as_json)


@main.command(options=forms)
@click.argument("run")
@click.argument("out", type=PATH)
@click.option("--target", help="The target's name for the model card, a hub id or a folder. As a rule the run's.")
@click.option("--report", type=PATH, help="A result of `vpd eval --out`, for the table of alpha in the model card.")
@bare_options
def export(run: str, out: Path, form: str, target: str | None, report: Path | None, as_json: bool) -> None:
    """Write the drafter RUN as OUT, a folder that serving engines load. RUN is a run, a checkpoint, or a hub id."""
    from .commands.export import run_export

    run_export(run, out, form, target, report, as_json)


@main.command()
@click.argument("cache")
@click.option("--repair", is_flag=True, help="Put what is damaged into quarantine, and keep what is whole.")
@click.option("--num-threads", default=2, show_default=True, type=click.IntRange(1), help="Parts checked at once.")
@bare_options
def verify(cache: str, repair: bool, num_threads: int, as_json: bool) -> int:
    """Check every byte of CACHE. The exit code is 1 if anything is wrong."""
    from .commands.verify import run_verify

    return run_verify(cache, repair, num_threads, as_json)


@main.command()
@click.argument("cache")
@bare_options
def inspect(cache: str, as_json: bool) -> None:
    """Show what CACHE holds. The result has target, layers, codec, lengths, sizes, first drafters, a sample."""
    from .commands.inspect import run_inspect

    run_inspect(cache, as_json)


@main.command(options=codecs)
@click.argument("cache")
@click.argument("out")
@click.option("--part-mib", default=1024, show_default=True, type=click.IntRange(1), help="Size of a part, in MiB.")
@bare_options
def recode(cache: str, out: str, codec: str, part_mib: int, as_json: bool) -> None:
    """Copy CACHE to OUT with another codec. First drafts are copied too; OUT is new or to be continued."""
    from .commands.transfer import run_recode

    run_recode(cache, out, codec, part_mib, as_json)


@main.command()
@click.argument("caches", nargs=-1, required=True)
@click.option("--out", required=True, metavar="PLACE", help=f"The joined cache, new or to be added to: {PLACE_HELP}.")
@bare_options
def merge(caches: tuple[str, ...], out: str, as_json: bool) -> None:
    """Join CACHES of one origin. They may come from several machines; sequences that repeat are left out."""
    from .commands.transfer import run_merge

    run_merge(caches, out, as_json)


@main.command(options=lambda: settings("estimate", "extract"))
@click.argument("target")
@prompts_argument
@engine_arg_option
@click.option("--out", default=".", metavar="PLACE", help="Where the cache will be, for the free space there.")
@common_options
def estimate(
    target: str,
    prompts: tuple[str, ...],
    engine_args: tuple[str, ...],
    out: str,
    source: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Estimate an extraction. Shows tokens, bytes for each codec, hours and free space; writes no cache."""
    config = resolve(source, assignments + of_engine(engine_args), flags)
    from .commands.estimate import run_estimate

    run_estimate(target, prompts, out, config, as_json)


@main.command()
@click.option("--out", default=Path("runs/demo"), show_default=True, type=PATH, help="Folder of everything it makes.")
@debug_option
def demo(out: Path) -> None:
    """Run both stages on SmolLM2-135M-Instruct. On a CPU this takes minutes."""
    from .demo import run_demo

    run_demo(out)


if __name__ == "__main__":
    main()
