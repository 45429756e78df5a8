"""Plug-ins: modules outside this project that add samplers, codecs and the like to its registries."""

from __future__ import annotations

import functools
import os
from importlib import import_module

from ..data.errors import ConfigError

GROUP = "vpd.plugins"
"""Group of the entry points that name plug-ins; an entry point's name is free."""
VARIABLE = "VPD_PLUGINS"
"""Environment variable with names of modules, separated by commas."""


@functools.cache
def load_plugins() -> None:
    """Imports all plug-ins; a module registers its entries while it is imported.

    Every process calls this before it reads settings or opens a cache. Later calls do nothing.

    Raises:
        ConfigError: a plug-in can't be imported.
    """
    from importlib.metadata import entry_points  # Its import takes as long as that of click.

    found = {entry.module: f"the entry point {entry.name} of {GROUP}" for entry in entry_points(group=GROUP)}
    found |= {name.strip(): VARIABLE for name in os.environ.get(VARIABLE, "").split(",") if name.strip()}
    for name, origin in found.items():
        try:
            import_module(name)
        except Exception as error:  # of whatever kind the module raises
            raise ConfigError(
                f"the plug-in {name}, which {origin} names, can't be imported: {type(error).__name__}: {error}. "
                f"Repair it, or take it out of {origin}."
            ) from error
