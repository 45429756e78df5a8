"""What the samplers of prefixes and of anchors have in common: how they are registered, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Generic, TypeVar

from ...data.registry import Registry

Function = TypeVar("Function", bound=Callable[..., object])


class Reads(IntEnum):
    """How much of the first drafts a sampler reads; each level includes those before."""

    NOTHING = 0
    BOUNDARIES = 1
    """Accept lengths."""
    CONFIDENCES = 2
    """The probabilities of the drafted tokens."""
    ALTERNATIVES = 3
    """All stored alternatives: tokens and probabilities."""


NOTHING, BOUNDARIES, CONFIDENCES, ALTERNATIVES = Reads


class Sampler(Generic[Function]):
    """A registered sampler; its docstring is the function's."""

    def __init__(self, function: Function, reads: Reads):
        self.function, self.reads, self.__doc__ = function, reads, function.__doc__


def registering(registry: Registry[Sampler[Function]], name: str, reads: Reads) -> Callable[[Function], Function]:
    """A decorator that puts a function into a registry of samplers and returns it unchanged."""

    def register(function: Function) -> Function:
        registry.add(name, Sampler(function, reads))
        return function

    return register
