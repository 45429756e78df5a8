"""Runs the study: `python tests/studies/run.py gsm8k.jsonl --unseen humaneval.jsonl`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from study import Study, run_study
from vpd.data.errors import VpdError
from vpd.pipeline.config import parse_assignment

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("prompts", nargs=-1, required=True, type=PATH)
@click.option("--unseen", multiple=True, required=True, type=PATH, help="Prompts of another kind, never trained on.")
@click.option("--out", default=Path("runs/study"), show_default=True, type=PATH, help="Folder of all results.")
@click.option("--variants", default=1, show_default=True, type=click.IntRange(1, 5), help="Forms of a training prompt.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Arms trained at once.")
@click.option("--config", "recipe", default="study", help="study, study-gpu, or a YAML file.", show_default=True)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, such as train.lr=3e-4.")
def main(
    prompts: tuple[Path, ...],
    unseen: tuple[Path, ...],
    out: Path,
    variants: int,
    workers: int,
    recipe: str,
    assignments: tuple[str, ...],
) -> None:
    """Compares samplers, anchors, objectives and branch policies on SmolLM2-135M-Instruct over PROMPTS."""
    try:
        beside = Path(__file__).with_name(f"{recipe}.yaml")
        study = Study(out, beside if beside.is_file() else Path(recipe), dict(map(parse_assignment, assignments)))
        run_study(study, prompts, unseen, variants, workers)
    except VpdError as error:
        click.echo(f"study: error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
