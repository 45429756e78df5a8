"""The command line's side of the settings: one flag per field, named and explained by the field itself."""

import functools
import re
from collections.abc import Collection, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..stages.config import plain_types, registry_of


class ItemList(click.ParamType):
    """Items separated by commas, such as `1,9,17` or `paper,runner-up`."""

    def __init__(self, item: click.ParamType) -> None:
        self.item = item
        self.name = f"{item.name} list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        items = value.split(",") if isinstance(value, str) else value
        return [self.item.convert(item, param, ctx) for item in items]


def section_options(
    section_model: type[BaseModel], section: str, only: Collection[str] | None = None
) -> list[click.Parameter]:
    """One option per field of a section.

    The parameter of field `a.b` is `section__a__b`, and None unless the flag is given. Dict fields and hidden sections
    get no flag.

    Args:
        only: fields that get a flag; a nested section's name (`prefix`) stands for all its fields. None: all fields.
    """
    leaves = leaf_fields(section_model, with_hidden=False)
    fields = {key: field for key, field in leaves.items() if _click_type(field) is not None}
    if only is not None:
        unknown = [name for name in only if not any(_within(key, name) for key in fields)]
        if unknown:
            raise ValueError(f"{section} has no fields with flags named {', '.join(sorted(unknown))}")
        fields = {key: field for key, field in fields.items() if any(_within(key, name) for name in only)}
    return [_option(section, key, field) for key, field in fields.items()]


def collect_overrides(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of the flags that were given, from the arguments of a click command."""
    given = {name: value for name, value in kwargs.items() if "__" in name and value is not None}
    return {name.replace("__", "."): value for name, value in given.items()}


@functools.cache
def leaf_fields(model: type[BaseModel], with_hidden: bool = True) -> dict[str, FieldInfo]:
    """Dotted key -> field, for every field below `model` that is not itself a section.

    Args:
        with_hidden: whether the fields of hidden sections are among them.
    """
    leaves = {}
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            if with_hidden or not getattr(nested, "hidden", False):
                leaves |= {f"{name}.{key}": leaf for key, leaf in leaf_fields(nested, with_hidden).items()}
        else:
            leaves[name] = field
    return leaves


def takes_text(field: FieldInfo) -> bool:
    """Whether a field takes a string as its value."""
    return any(member is str or get_origin(member) is Literal for member in plain_types(field.annotation))


def from_text(text: str) -> Any:
    """A text from the command line, read as YAML; the text itself if it is not YAML."""
    try:
        return yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return text


class NumberOrShare(click.ParamType):
    """A number, or a percentage, which stays a text until the settings read it."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.endswith("%"):
            return value
        return click.FLOAT(value, param, ctx)


def _within(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _click_type(field: FieldInfo) -> click.ParamType | None:
    """How the command line reads a field; None: the field has no flag."""
    member = next(found for found in plain_types(field.annotation) if found is not NoneType)
    registry = registry_of(field)
    if get_origin(member) in (list, tuple):
        item = _plain_click_type(plain_types(get_args(member)[0])[0])
        item = item if registry is None else click.Choice([*registry])
        return None if item is None else ItemList(item)
    return click.Choice([*registry]) if registry is not None and member is str else _plain_click_type(member)


def _plain_click_type(kind: Any) -> click.ParamType | None:
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    return {bool: click.BOOL, int: click.INT, float: NumberOrShare(), str: click.STRING}.get(kind)


def _option(section: str, key: str, field: FieldInfo) -> click.Option:
    """The option of one field; `key` is its dotted name within the section."""
    name = key.replace(".", "-").replace("_", "-")
    kind = _click_type(field)
    flag = f"--{name}/--no-{name}" if kind is click.BOOL else f"--{name}"
    parameter = f"{section}.{key}".replace(".", "__")
    return click.Option([flag, parameter], type=kind, default=None, show_default=False, help=_help(field))


def _help(field: FieldInfo) -> str:
    """First sentence of the field's docstring, and its default."""
    paragraph = " ".join((field.description or "").partition("\n\n")[0].split())
    sentence = re.split(r"(?<=\.) (?=[A-Z])", paragraph, maxsplit=1)[0]
    default = field.get_default(call_default_factory=True)
    if isinstance(default, list | tuple):
        shown = ",".join(map(str, default))
    else:
        shown = str(default).lower() if default is None or isinstance(default, bool) else str(default)
    return f"{sentence} [default: {shown}]"
