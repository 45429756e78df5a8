"""Modules that are imported at their first use, so that the command line starts without them."""

from importlib import import_module
from typing import Any


class LazyModule:
    """Stands for a module, and imports the module at the first look at one of its names.

    A file that is read at the command line's start, such as one that holds a registry, uses a heavy package so:

        if TYPE_CHECKING:
            import torch
        else:
            torch = LazyModule("torch")
    """

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(import_module(self._name), attribute)
        setattr(self, attribute, found)  # Later look-ups cost nothing, and torch.compile can follow them.
        return found
