"""Writes docs/settings.md from the classes of the settings and the flags of the commands: `make docs`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from vpd.data.registry import Registry
from vpd.pipeline.cli import main as vpd
from vpd.pipeline.config import VpdConfig
from vpd.stages.config import plain_types, registry_of

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
HEAD = """<!-- Made by `make docs` from the classes of the settings. Do not edit this page. -->

# Settings

A setting is one field with one name: a key in YAML, a flag of the commands that read it, and `--set KEY=VALUE`
everywhere. [Training](training.md#settings-and-recipes) says which of them wins. A share may be written as a
percentage: `--audit 25%`.
`none` stands for "not set".
"""


def render() -> str:
    """The page, as Markdown."""
    return "\n".join([HEAD, *_sections(VpdConfig, "")])


def _sections(model: type[BaseModel], section: str) -> Iterator[str]:
    """A section's table, then the sections below it."""
    nested = {name: field.annotation for name, field in model.model_fields.items() if _is_section(field)}
    own = {name: field for name, field in model.model_fields.items() if name not in nested}
    if own:
        yield f"{'##' if '.' not in section else '###'} {section}\n"
        yield f"{_first_paragraph(model.__doc__)} {_readers(section, own)}\n"
        yield "| setting | flag | default | meaning |\n|---|---|---|---|"
        for name, field in own.items():
            key = f"{section}.{name}"
            flag = next(iter(_flags(key).values()), "")
            yield f"| `{key}` | {flag and f'`{flag}`'} | {_default(field)} | {_meaning(field)} |"
        yield ""
        for name, field in own.items():
            if get_origin(field.annotation) is not dict:
                yield from _explained(f"{section}.{name}", registry_of(field))
    for name, below in nested.items():
        assert isinstance(below, type)
        yield from _sections(below, f"{section}.{name}".removeprefix("."))


def _explained(key: str, registry: Registry[Any] | None) -> Iterator[str]:
    """What each name of a registry stands for."""
    texts = {} if registry is None else registry.describe()
    if len({*texts.values()}) > 1:
        yield f"| `{key}` | meaning |\n|---|---|"
        yield from (f"| `{name}` | {_cell(text)} |" for name, text in texts.items())
        yield ""


def _cell(text: str | None) -> str:
    """A text on one line of a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


@functools.cache
def parameters(command: str) -> dict[str, click.Parameter]:
    """Name -> parameter of a command, those of its settings included."""
    found = vpd.commands[command]
    return {str(each.name): each for each in found.get_params(click.Context(found))}


def _flags(key: str) -> dict[str, str]:
    """Command -> flag of the setting, for the commands whose help shows one."""
    name = key.replace(".", "__")
    given = {command: parameters(command)[name] for command in vpd.commands if name in parameters(command)}
    return {command: option.opts[0] for command, option in given.items() if not getattr(option, "hidden", False)}


def _readers(section: str, fields: dict[str, FieldInfo]) -> str:
    """Which commands have flags for the section."""
    having = [_flags(f"{section}.{name}").keys() for name in fields]
    most = max((len([flags for flags in having if name in flags]) for name in vpd.commands), default=0)
    found = []
    for name in vpd.commands:
        number = len([flags for flags in having if name in flags])
        if number:
            found.append(f"`vpd {name}`{'' if number == most else ' (some of them)'}")
    return f"Flags of {', '.join(found)}." if found else "Set these in YAML or with `--set`."


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, str):
        return f"`{value}`"
    shown = [*value] if isinstance(value, tuple) else value
    text = yaml.safe_dump(shown, default_flow_style=True, sort_keys=False, width=1000)
    return f"`{text.strip().removesuffix('...').strip()}`"


def _meaning(field: FieldInfo) -> str:
    text = _cell(field.description)
    names = ", ".join(f"`{name}`" for name in choices(field))
    several = any(get_origin(member) in (list, dict) for member in plain_types(field.annotation))
    return f"{text} {'Any' if several else 'One'} of {names}." if names else text


def choices(field: FieldInfo) -> list[str]:
    """The names that the setting takes, alone or in a list."""
    registry = registry_of(field)
    if registry is not None:
        return [*registry]
    members = [member for member in plain_types(field.annotation) if member is not NoneType]
    items = [item for member in members if get_origin(member) is list for item in plain_types(get_args(member)[0])]
    return [str(choice) for each in (*members, *items) if get_origin(each) is Literal for choice in get_args(each)]


def _first_paragraph(text: str | None) -> str:
    """A class's docstring without the name of its section: "`draft`: first drafts." as "First drafts."."""
    paragraph = " ".join((text or "").partition("\n\n")[0].split())
    sentence = paragraph.partition(": ")[2] if paragraph.startswith("`") else paragraph
    return sentence[:1].upper() + sentence[1:]


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
