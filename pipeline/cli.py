"""The `vpd` command: arguments to settings, settings to a stage, results to people or machines."""

from __future__ import annotations

import atexit
import errno
import functools
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..data.cache.codecs import CodecName
from ..data.errors import ConfigError, VpdError
from ..stages.config import ReadConfig
from ..stages.draft.config import DraftConfig
from ..stages.evaluate.config import EvalConfig
from ..stages.extract.config import EstimateConfig, ExtractConfig
from ..stages.extract.estimate import CODECS
from ..stages.train.config import DrafterSection, TrainConfig
from . import cache_commands, commands
from .config import VpdConfig, from_drafter_json, load_config, parse_assignment
from .launch import STOPPED, is_launched, launch
from .options import collect_overrides, config_options
from .ray_workers import RayResources
from .sweep import plan_runs, run_workers

Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)
PLACE_HELP = "a folder, or s3://, gs://, az://"
ALWAYS_VERIFIED = ["num_threads", "num_buffers", "local_parts", "local_gib"]
"""Settings of `read` for the commands that verify whatever they read."""
MACHINE_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG}
"""What the machine refuses, through no fault of the program."""


def bare_options(command: Command) -> Command:
    """Options of the commands that read no settings."""
    command = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")(command)


def common_options(command: Command) -> Command:
    """Options of every command."""
    for option in (
        bare_options,
        click.option(
            "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, such as train.lr=3e-4."
        ),
        click.option("--config", "source", metavar="NAME|FILE", help="A recipe's name, or a YAML file."),
    ):
        command = option(command)
    return command


prompts_argument = click.argument("prompts", nargs=-1, required=True)
engine_arg_option = click.option(
    "--engine-arg",
    "engine_args",
    multiple=True,
    metavar="NAME=VALUE",
    help="An argument of the engine, such as tensor_parallel_size=2.",
)


def of_engine(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The same as `--set` has it."""
    return tuple(f"extract.engine_args.{argument}" for argument in arguments)


def resolve(
    source: str | None, assignments: tuple[str, ...], flags: dict[str, Any], below: dict[str, Any] | None = None
) -> VpdConfig:
    """Settings by rising rank: defaults, recipe, `below` (a drafter's config.json), --set, flags."""
    explicit = dict(map(parse_assignment, assignments)) | collect_overrides(flags)
    return load_config(source, {**(below or {}), **explicit})


def reporting_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Prints an error that a user can act on as one paragraph: exit code 2 for settings, 1 for the rest."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except VpdError as error:
            if debug:
                raise
            click.echo(f"vpd: error: {error}", err=True)
            sys.exit(2 if isinstance(error, ConfigError) else 1)
        except OSError as error:
            if debug or error.errno not in MACHINE_ERRORS:
                raise
            where = error.filename or "a file (--debug shows where)"
            click.echo(f"vpd: error: {where}: {error.strerror}. Mend that, or choose another place.", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("vpd: interrupted; what was committed is kept, the same command continues.", err=True)
            sys.exit(130)

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vpd")
def main() -> None:
    """Trains the VP-Drafter of D2SD offline: states of the target once, any number of training runs after."""


@main.command()
@click.argument("target")
@click.option("--out", required=True, metavar="PLACE", help=f"The cache, new or to be continued: {PLACE_HELP}.")
@click.option("--first-drafter", help="A DFlash drafter: its drafts and boundaries go into the cache too.")
@prompts_argument
@engine_arg_option
@click.option("--ray", type=click.IntRange(1), metavar="N", help="Work with N workers on a Ray cluster.")
@click.option("--ray-gpus", type=click.FloatRange(0), default=1.0, show_default=True, help="GPUs that each takes.")
@click.option("--ray-cpus", type=click.FloatRange(0), default=1.0, show_default=True, help="CPUs that each takes.")
@common_options
@config_options(ExtractConfig, "extract")
@reporting_errors
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
    """Stage one: run TARGET (a folder or a hub id) over PROMPTS and store its hidden states."""
    resources = None if ray is None else RayResources(ray, ray_gpus, ray_cpus)
    config = resolve(source, assignments + of_engine(engine_args), flags)
    commands.extract(target, prompts, out, first_drafter, config, as_json, resources)


@main.command()
@click.argument("cache")
@click.option("--first-drafter", required=True, help="A DFlash drafter: a checkpoint, a run, or a hub id.")
@common_options
@config_options(DraftConfig, "draft")
@config_options(ReadConfig, "read", only=ALWAYS_VERIFIED)
@reporting_errors
def draft(
    cache: str, first_drafter: str, source: str | None, assignments: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """First drafts and rejection boundaries over CACHE, without the target."""
    commands.draft(cache, first_drafter, resolve(source, assignments, flags), as_json)


@main.command()
@click.argument("cache")
@click.option("--out", required=True, type=PATH, help="The run: a new folder, or one to continue.")
@click.option(
    "--drafter-config", type=PATH, help="A drafter's config.json in place of the drafter section; flags win over it."
)
@click.option(
    "--num-processes", default=1, show_default=True, type=click.IntRange(1), help="Processes on this machine."
)
@common_options
@config_options(DrafterSection, "drafter")
@config_options(TrainConfig, "train")
@config_options(ReadConfig, "read")
@reporting_errors
def train(
    cache: str,
    out: Path,
    drafter_config: Path | None,
    num_processes: int,
    source: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Stage two: train a drafter from CACHE, without the target."""
    if num_processes > 1 and not is_launched():
        sys.exit(launch(num_processes, sys.argv[1:]))
    if is_launched():
        # The group of processes ends up in reference cycles, and its threads must be gone when the interpreter ends.
        atexit.register(gc.collect)
    below = from_drafter_json(drafter_config) if drafter_config is not None else {}
    commands.train(cache, out, resolve(source, assignments, flags, below), as_json)


@main.command()
@click.argument("cache")
@click.option("--out", required=True, type=PATH, help="Folder of the runs, new or to be continued.")
@click.option(
    "--vary", multiple=True, required=True, metavar="KEY=[A,B]", help="Values of a setting; all combinations."
)
@click.option("--together", default=4, show_default=True, type=click.IntRange(1), help="Runs that share one pass.")
@click.option("--num-workers", default=1, show_default=True, type=click.IntRange(1), help="Processes, one GPU each.")
@click.option("--worker-index", type=click.IntRange(0), help="Do this worker's share alone, as on another machine.")
@common_options
@reporting_errors
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
) -> None:
    """Train a drafter from CACHE for every combination of settings; tell the acceptance length of each."""
    if is_launched():
        raise ConfigError(
            "vpd sweep: a launcher has started this as one of several processes, but a sweep's runs have one each. "
            "Start it once with --num-workers, or once on each machine with --worker-index."
        )
    shared = dict(map(parse_assignment, assignments))
    runs = plan_runs(out, vary, lambda settings: load_config(source, shared | settings))
    if num_workers > 1 and worker_index is None:
        code = run_workers(num_workers, sys.argv[1:])
    else:
        code = commands.sweep(cache, runs[worker_index or 0 :: num_workers], together, as_json)
    if worker_index is None and code not in STOPPED:
        commands.show_sweep(runs, as_json)
    sys.exit(code)


@main.command("eval")
@click.argument("cache")
@click.option("--first-drafter", required=True, help="The first drafter: a checkpoint, a run, or a hub id.")
@click.option("--drafter", help="The VP-Drafter: a checkpoint, a run, or a hub id.")
@click.option("--target", help="A folder or a hub id: also decode some held-out prompts with it, to check the replay.")
@click.option("--out", type=PATH, help="Also write the result to this file, as JSON.")
@common_options
@config_options(EvalConfig, "eval")
@config_options(ReadConfig, "read", only=ALWAYS_VERIFIED)
@reporting_errors
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
    """Acceptance length on held-out sequences of CACHE, by replay without the target."""
    commands.evaluate(cache, first_drafter, drafter, target, out, resolve(source, assignments, flags), as_json)


@main.command()
@click.argument("cache")
@click.option("--repair", is_flag=True, help="Put what is damaged into quarantine, and keep what is whole.")
@click.option("--num-threads", default=2, show_default=True, type=click.IntRange(1), help="Parts checked at once.")
@bare_options
@reporting_errors
def verify(cache: str, repair: bool, num_threads: int, as_json: bool) -> None:
    """Check every byte of CACHE against its records; exit code 1 if anything is wrong."""
    cache_commands.verify(cache, repair, num_threads, as_json)


@main.command()
@click.argument("cache")
@bare_options
@reporting_errors
def inspect(cache: str, as_json: bool) -> None:
    """What is in CACHE: target, layers, codec, lengths, sizes, first drafters, a sample."""
    cache_commands.inspect(cache, as_json)


@main.command()
@click.argument("cache")
@click.argument("out")
@click.option("--codec", required=True, type=click.Choice(CODECS), help="How the states of OUT are stored.")
@click.option("--part-mib", default=1024, show_default=True, type=click.IntRange(1), help="Size of a part, in MiB.")
@bare_options
@reporting_errors
def recode(cache: str, out: str, codec: CodecName, part_mib: int, as_json: bool) -> None:
    """Copy CACHE to OUT, new or to be continued, with another codec; first drafts included, without the target."""
    cache_commands.recode(cache, out, codec, part_mib, as_json)


@main.command()
@click.argument("caches", nargs=-1, required=True)
@click.option("--out", required=True, metavar="PLACE", help=f"The joined cache, new or to be added to: {PLACE_HELP}.")
@bare_options
@reporting_errors
def merge(caches: tuple[str, ...], out: str, as_json: bool) -> None:
    """Join CACHES of one origin, made on several machines; sequences that repeat are left out."""
    cache_commands.merge(caches, out, as_json)


@main.command()
@click.argument("target")
@prompts_argument
@engine_arg_option
@click.option("--out", default=".", metavar="PLACE", help="Where the cache will be: its free space is looked at.")
@common_options
@config_options(EstimateConfig, "estimate")
@config_options(ExtractConfig, "extract")
@reporting_errors
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
    """Before an extraction: tokens, bytes for each codec, hours, free space."""
    cache_commands.estimate(target, prompts, out, resolve(source, assignments + of_engine(engine_args), flags), as_json)


@main.command()
@click.argument("prompts", nargs=-1, required=True, type=PATH)
@click.option("--unseen", multiple=True, required=True, type=PATH, help="Prompts of another kind, never trained on.")
@click.option("--out", default=Path("runs/study"), show_default=True, type=PATH, help="Folder of everything it makes.")
@click.option("--variants", default=1, show_default=True, type=click.IntRange(1, 5), help="Forms of a training prompt.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Arms trained at once.")
@click.option("--config", "source", default="study", show_default=True, help="A recipe's name, or a YAML file.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, such as train.lr=3e-4.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@reporting_errors
def study(
    prompts: tuple[Path, ...],
    unseen: tuple[Path, ...],
    out: Path,
    variants: int,
    workers: int,
    source: str,
    assignments: tuple[str, ...],
) -> None:
    """Samplers, anchors, objectives and branch policies compared on SmolLM2-135M-Instruct over PROMPTS."""
    from .study import Study, run_study

    run_study(Study(out, source, dict(map(parse_assignment, assignments))), prompts, unseen, variants, workers)


@main.command()
@click.option("--out", default=Path("runs/demo"), show_default=True, type=PATH, help="Folder of everything it makes.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@reporting_errors
def demo(out: Path) -> None:
    """The whole method on SmolLM2-135M-Instruct, on a CPU, in minutes."""
    from .demo import run_demo

    run_demo(out)


if __name__ == "__main__":
    main()
