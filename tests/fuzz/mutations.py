"""Random damage: of bytes, of texts, and of values that JSON holds."""

import copy
import json
from random import Random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    -0.0,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "0",
    "null",
    "[]",
    "{}",
    "\x00",
    "\ud800",
    "ﬀ你好\u202e",
    "x" * 10_000,
    [],
    {},
    [None],
    [[]],
    {"": ""},
    {"role": "user"},
    "<|im_end|>",
    "[" * 3000,
)
"""Values that a key is rarely expected to hold."""
WORDS = (
    "{{ x }}",
    "{% if",
    "{% endif %}",
    "{% for m in messages %}",
    "{%",
    "}}",
    "m.content",
    "| tojson",
    "None",
    "\n",
)
"""What is put into templates."""
DEPTH = 1200


def mutate_bytes(random: Random, content: bytes) -> bytes:
    """Content with a bit flipped, bytes replaced, taken out or repeated, or an end missing."""
    if not content:
        return random.randbytes(random.randrange(1, 40))
    damaged = bytearray(content)
    position = random.randrange(len(damaged))
    size = min(len(damaged) - position, random.choice((1, 2, 8, 64, 1000)))
    match random.randrange(6):
        case 0:
            damaged[position] ^= 1 << random.randrange(8)
        case 1:
            damaged[position : position + size] = random.randbytes(size)
        case 2:
            del damaged[position : position + size]
        case 3:
            damaged[position:position] = damaged[position : position + size]
        case 4:
            del damaged[position:]
        case _:
            damaged[position : position + size] = bytes(size)
    return bytes(damaged)


def mutate_text(random: Random, text: str) -> str:
    """A template with a piece taken out, repeated, moved or put in."""
    start = random.randrange(len(text) + 1)
    end = min(len(text), start + random.choice((1, 3, 10, 40)))
    piece = text[start:end]
    match random.randrange(4):
        case 0:
            return text[:start] + text[end:]
        case 1:
            return text[:start] + piece + text[start:]
        case 2:
            rest = text[:start] + text[end:]
            place = random.randrange(len(rest) + 1)
            return rest[:place] + piece + rest[place:]
        case _:
            return text[:start] + random.choice(WORDS) + text[start:]


def mutate_value(random: Random, value: Any) -> Any:
    """A copy of a value with one of its parts replaced, renamed, taken out, repeated or nested deeply."""
    damaged = [copy.deepcopy(value)]
    container, key = random.choice(_places(damaged))
    found = container[key]
    match random.randrange(7):
        case 0 | 1:
            container[key] = copy.deepcopy(random.choice(ODD_VALUES))
        case 2 if isinstance(container, dict):
            del container[key]
        case 3 if isinstance(container, dict):
            container[_other_key(random, key)] = container.pop(key)
        case 4 if isinstance(found, str):
            container[key] = mutate_bytes(random, found.encode(errors="surrogatepass")).decode(errors="replace")
        case 4:
            container[key] = json.dumps(found, default=str)
        case 5 if isinstance(found, list) and found:
            found.insert(random.randrange(len(found)), copy.deepcopy(random.choice(found)))
        case 5 if isinstance(found, int | float):
            container[key] = random.choice((-found, found + 1, found * 1000, str(found)))
        case 6 if random.random() < 0.1:
            for _ in range(DEPTH):
                found = [found]
            container[key] = found
        case _:
            container[key] = [found]
    return damaged[0]


def _places(container: Any) -> list[tuple[Any, Any]]:
    """Every container and key at any depth."""
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    found = [(container, key) for key in keys]
    for key in keys:
        if isinstance(container[key], dict | list):
            found += _places(container[key])
    return found


def _other_key(random: Random, key: str) -> str:
    return random.choice((key.upper(), key + "s", key[:-1], "", "content", "system", "x" + key))


def dump_json(value: Any) -> bytes:
    """JSON as Python writes it: NaN by name, halves of surrogate pairs escaped; deep nesting is written by hand."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * DEPTH + b"0" + b"]" * DEPTH
