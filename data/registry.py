"""Named choices of one kind, such as samplers or codecs; whoever defines one registers it beside its definition."""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

from .errors import ConfigError

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry]):
    """Name -> entry, in the order of registration. Settings, help and documentation take their choices from here."""

    def __init__(self, kind: str):
        """
        Args:
            kind: what an entry is, for messages, such as "prefix sampler".
        """
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """
        Raises:
            ConfigError: the name is taken.
        """
        if name in self._entries:
            raise ConfigError(f"expected a new name for a {self.kind}, found {name}, which is taken. Choose another.")
        self._entries[name] = entry

    def describe(self) -> dict[str, str]:
        """Name -> what the entry does: the first sentence of the entry's docstring, on one line."""
        texts = {name: " ".join((inspect.getdoc(entry) or "").split()) for name, entry in self._entries.items()}
        return {name: re.split(r"(?<=\.) (?=[A-Z])", text, maxsplit=1)[0] for name, text in texts.items()}

    def __getitem__(self, name: str) -> Entry:
        """
        Raises:
            ConfigError: there is no such entry.
        """
        if name not in self._entries:
            raise ConfigError(f"expected a {self.kind} ({', '.join(self._entries)}), found {name!r}.")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
