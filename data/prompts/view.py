"""A record as a form sees it: keys by their own names, values as JSON knows them, and a note of what was read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import PromptError
from .messages import REASONING, Message
from .reading import Reading, is_held, may_carry, texts_of
from .values import describe, plain

SWITCH_KEY = "enable_thinking"
"""Key that some templates take for a conversation."""


class RecordView(Mapping[str, Any]):
    """The keys of a record that have a value. Looking up a key notes that the key was read."""

    def __init__(self, record: Mapping[str, Any], reading: Reading):
        self.reading = reading
        self.rules: dict[str, None] = {}
        """Names of the rules that were applied, in their order."""
        self._record, self._values, self._used = record, {}, {}
        self.names: dict[str, str] = {}
        """Key -> its name in the data, for the keys that have a value."""
        for name, value in record.items():
            key = reading.key_of(name)
            is_absent = value is None or (isinstance(value, float) and value != value)
            if key is not None and not is_absent and (key not in self.names or name == key):
                self.names[key] = name

    def __getitem__(self, key: str) -> Any:
        if key not in self.names:
            raise KeyError(key)
        name = self.names[key]
        self._used[name] = None
        if key not in self._values:
            self._values[key] = plain(self._record[name], name)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def filled(self, *keys: str) -> str | None:
        """The first of these keys that has a text, a number or an object in it; looking does not count as reading."""
        return next((key for key in keys if key in self.names and not _is_blank(self._record[self.names[key]])), None)

    def peek(self, key: str) -> Any:
        """A value as the data has it; looking does not count as reading."""
        return self._record[self.names[key]]

    def note(self, rule: str) -> None:
        """Notes that a rule was applied."""
        self.rules[rule] = None

    @property
    def used(self) -> tuple[str, ...]:
        """Names in the data of the keys that were read."""
        return tuple(name for name in self._record if name in self._used)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The other names in the data."""
        return tuple(name for name in self._record if name not in self._used)

    def check_left_out(self, messages: tuple[Message, ...], text: str | None) -> None:
        """
        Raises:
            PromptError: a key that was not read may hold a part of the conversation, or switches the template.
        """
        switch = self.names.get(SWITCH_KEY)
        if switch is not None:
            raise PromptError(
                f"{switch!r} changes what the chat template writes. Say for all records --set "
                f"'extract.template_args={{{SWITCH_KEY}: {json.dumps(self.peek(SWITCH_KEY), default=str)[:40]}}}', and "
                f"leave the key out with --set 'extract.ignore=[{switch}]'"
            )
        suspects = [name for name in self.left_out if self.reading.key_of(name) is not None and may_carry(name)]
        if not any(texts_of(self._record[name]) for name in suspects):
            return
        parts = [part for message in messages for part in (message.extra.get(REASONING, ""), message.content)]
        contents = [part.strip() for part in (*parts, text or "") if part.strip()]
        for name in suspects:
            lost = next((each for each in texts_of(self._record[name]) if not is_held(each, contents)), None)
            if lost is not None:
                shown = name.encode(errors="replace").decode()
                raise PromptError(
                    f"{shown!r} could carry a part of the conversation, and the record is read from {list(self.used)} "
                    f"alone: {describe(lost)}. Say what it is with extract.columns, or leave it out with "
                    f"--set 'extract.ignore=[{shown}]'"
                )


def _is_blank(value: Any) -> bool:
    return (isinstance(value, str) and not value.strip()) or (isinstance(value, (list, dict)) and not value)
