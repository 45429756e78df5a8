"""Settings of the stages, one section each.

One field is the YAML key, the command-line flag and the documentation at once.
"""

from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from ..data.registry import Registry


def from_percentage(value: Any) -> Any:
    """`0.5%` as 0.005; anything else as it is."""
    if not (isinstance(value, str) and value.endswith("%")):
        return value
    try:
        return float(value[:-1]) / 100
    except ValueError:
        return value


@dataclass(frozen=True, eq=False)
class OneOf:
    """A field's value is the name of an entry of a registry: `Annotated[str, OneOf(CODECS)]`."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        if name not in self.registry:
            raise ValueError(" or ".join(map(repr, self.registry)))
        return name


Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
BlockSize = Annotated[int, Field(ge=2, le=255)]
Branches = Annotated[int, Field(ge=0, le=64)]
Nodes = Annotated[int, Field(ge=1, le=128)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, BeforeValidator(from_percentage), Field(ge=0, le=1)]
Ratio = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    hidden: ClassVar[bool] = False
    """Whether the section's settings have no flags; YAML and --set reach them all the same."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        types = plain_types(cls.model_fields[str(info.field_name)].annotation)
        values = value if isinstance(value, list | tuple) else [value]
        if bool not in types and any(isinstance(item, bool) for item in values):
            raise ValueError("a value other than true and false")
        return value


class ReadConfig(Section):
    """`read`: how a cache is read."""

    verify: Literal["first-epoch", "always", "never"] = "first-epoch"
    """When checksums are verified as training reads; all else always verifies them."""
    num_threads: Count = 2
    """Threads that read ahead; >= 1."""
    local_parts: str | None = None
    """Folder that keeps parts of a remote cache on the local disk; none = every read is a request."""
    local_gib: PositiveFloat = 100.0
    """Size of that folder, in GiB, beyond which the parts not used for longest are removed; > 0."""


def registry_of(field: FieldInfo) -> Registry[Any] | None:
    """The registry that a field takes names of, alone or in a list; None: it takes other values."""
    found = [each for each in (*field.metadata, *_nested_metadata(field.annotation)) if isinstance(each, OneOf)]
    return found[0].registry if found else None


def _nested_metadata(annotation: Any) -> list[Any]:
    """What `Annotated` says anywhere in a type."""
    own = list(getattr(annotation, "__metadata__", ()))
    return own + [each for member in get_args(annotation) for each in _nested_metadata(member)]


def plain_types(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, without `Annotated`: `Annotated[int, Ge(1)] | None` gives `(int, NoneType)`."""
    if get_origin(annotation) is Annotated:
        return plain_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(found for member in get_args(annotation) for found in plain_types(member))
    return (annotation,)
