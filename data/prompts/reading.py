"""How records are read: what their keys and roles are called, and which keys are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ..errors import ConfigError
from .roles import ROLES, canonical_role


def words_of(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


CARRYING_WORDS = words_of(
    """
    abstract analysis article articles assistant attachment attachments audio audios background bot chat chatbot
    choices chosen completion completions content contents context contexts conv conversation conversations convo
    convos convs cot ctx definition definitions deliberation demonstrations developer dialog dialogs dialogue
    dialogues document documentation documents evidence examples facts file files function functions gpt hint hints
    history human hypothesis image images input inputs instances instr instruct instruction instructions memory
    message messages monologue msg msgs observation observations option options output outputs paragraph paragraphs
    passage passages persona personas photo photos picture pictures preamble prefill premise problem prompt prompts
    queries query question questions rationale reasoning refusal reply request resp response responses scenario schema
    scratchpad sentence sentences speech starter story sys system table tables text texts think thinking thought
    thoughts tool tools trajectories trajectory turn turns user utterance utterances video videos
    """
)
"""Words of a key's name that say that the key may hold a part of the conversation."""
HARMLESS_FIRST = words_of(
    """
    avg expected gen generated gold golden ground has is max mean min n num orig original reference rejected skip total
    use
    """
)
"""First words of the names of keys that describe a record, or hold another answer than the one to learn from."""
HARMLESS_LAST = words_of(
    """
    at categories category choice class config configs count counts date difficulty domain dump embedding embeddings
    format hash id identifier ids idx index label labels lang language languages len length lengths level license
    logprobs mask masks meta metadata model models moderation name names order origin path paths quality rank rating
    ratings rejected reward rewards score scores sha source sources state stats status time timestamp tokens topic
    toxicity type types url urls uuid version
    """
)
"""Last words of such names."""
MEDIA_WORDS = words_of("audio audios image images photo photos picture pictures video videos")
PLACES = words_of("path paths url urls")
"""Last words of names that say where a picture or a sound is, which is as good as the thing."""
SWITCHES = frozenset(["", "on", "off", "yes", "no", "true", "false", "none", "null", "nan", "n/a", "{}", "[]"])
"""Texts that stand for a setting or for nothing."""
MIN_PASSAGE = 20
"""A text of so many letters is looked for inside of messages; a shorter one must be the whole of a message."""
MAX_KNOWN_NAMES = 4096
"""Names whose keys are remembered."""
NAMING_KEYS = frozenset(["role", "from", "author", "speaker", "type", "name", "id"])
"""Keys of a nested object that say what the object is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The settings that say how records are read."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Key of a record -> its name in the data, such as {"prompt": "question"}."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Role name in the data -> name in `ROLES`, for names that are not among them."""
    ignore: tuple[str, ...] = ()
    """Keys of the data that are left out, though they could carry conversation."""
    _keys: dict[str, str | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        for name, role in self.roles.items():
            if canonical_role(role) not in ROLES:
                raise ConfigError(f"extract.roles: expected {name} to be one of {', '.join(ROLES)}, found {role!r}.")

    def key_of(self, name: str) -> str | None:
        """The key of a record that a name in the data stands for; None if the name stands for nothing.

        The case of letters does not matter. A key that goes by another name is not looked for under its own.
        """
        if name not in self._keys:
            if len(self._keys) > MAX_KNOWN_NAMES:
                self._keys.clear()
            self._keys[name] = self._find_key(name)
        return self._keys[name]

    def _find_key(self, name: str) -> str | None:
        if name in self.ignore:
            return None
        renamed = next((key for key, other in self.columns.items() if other == name), None)
        if renamed is not None:
            return renamed
        key = re.sub(r"[\s-]+|(?<=[a-z])(?=[A-Z][a-z])", "_", name.strip()).lower()
        return None if key in self.columns else key

    def role_of(self, name: object) -> str | None:
        """The role that a name in the data stands for; None if the name is unknown."""
        if type(name) is int:  # a label of a table
            name = str(name)
        if not isinstance(name, str):
            return None
        return ROLES.get(canonical_role(self.roles.get(name, name)))


DEFAULT_READING = Reading()


@lru_cache(maxsize=4096)
def may_carry(name: str) -> bool:
    """Whether a key of this name may hold a part of the conversation."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    words = [word for word in words if not word.isdigit()]
    if words[-1:] == ["list"]:
        words.pop()
    if not CARRYING_WORDS.intersection(words):
        return False
    if words[-1] in PLACES and MEDIA_WORDS.intersection(words):
        return True
    return words[0] not in HARMLESS_FIRST and words[-1] not in HARMLESS_LAST


def texts_of(value: Any) -> list[str]:
    """The texts that a value holds at any depth, and the numbers in its lists and objects.

    Settings and what names a nested object are left out.
    """
    found: list[str] = []
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str) and each.strip().lower() not in SWITCHES:
            found.append(each.strip())
        elif isinstance(each, Mapping):
            waiting.extend(item for key, item in each.items() if key not in NAMING_KEYS)
        elif isinstance(each, (list, tuple)):
            waiting.extend(each)
        elif isinstance(each, bytes) and each:
            found.append(repr(each))
        elif isinstance(each, (bool, int, float)) and each is not value and each == each:
            found.append(str(each))
    return found


def is_held(text: str, contents: list[str]) -> bool:
    """Whether some of the contents hold a text, or the text holds all of several contents, one after the other."""
    if any([text == content or (len(text) >= MIN_PASSAGE and text in content) for content in contents]):
        return True
    end = 0
    for content in contents:
        found = text.find(content, end)
        if found < 0:
            return False
        end = found + len(content)
    return len(contents) > 1
