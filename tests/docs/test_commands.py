"""Every command in the README and in docs/ is one that the program takes."""

import re
from typing import Any

import pytest
import yaml
from pages import CHANGELOG, PAGES, ROOT, Line, command_lines
from vpd.pipeline.cli import main
from vpd.pipeline.config import load_config, parse_assignment
from vpd.pipeline.options import collect_overrides

LINES = [line for page in PAGES if page != CHANGELOG for line in command_lines(page)]
MODULE = "vpd.pipeline.cli"


def lines(*programs: str) -> pytest.MarkDecorator:
    chosen = [line for line in LINES if line.words[0] in programs]
    return pytest.mark.parametrize("line", chosen, ids=[line.id for line in chosen])


@lines("vpd", "srun", "torchrun")
def test_vpd_takes_the_command(line: Line) -> None:
    start = next(i for i, word in enumerate(line.words) if word in ("vpd", MODULE))
    name, *arguments = line.words[start + 1 :]
    assert name in main.commands
    given = main.commands[name].make_context(name, arguments).params
    source: str | None = given.get("source")
    flags: dict[str, Any] = dict(map(parse_assignment, given.get("assignments", ()))) | collect_overrides(given)
    flags |= dict(parse_assignment(f"extract.engine_args.{each}") for each in given.get("engine_args", ()))
    load_config(source, flags)
    for key, _, values in (each.partition("=") for each in given.get("vary", ())):
        for value in yaml.safe_load(values):
            load_config(source, flags | {key: value})


@lines("make")
def test_make_has_the_target(line: Line) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"\$\((\w+)\)", makefile)) | set(re.findall(r"foreach \w+,\$\((\w+)\)", makefile))
    for word in line.words[1:]:
        name, equals, _ = word.partition("=")
        assert name in (variables if equals else targets), word


def test_commands_were_found() -> None:
    assert {"vpd", "make", "srun", "torchrun"} <= {line.words[0] for line in LINES}
