"""Token ids as text, in runs of supervised and of other tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

CUT_CHARACTER = "\ufffd"
"""What a tokenizer decodes bytes to that are only a part of a character."""


def marked_runs(
    decode: Callable[[list[int]], str], token_ids: list[int], mask: Sequence[int]
) -> list[tuple[str, bool]]:
    """The text of the tokens as runs of (text, supervised).

    A run is what its tokens add to the text before them, since some tokenizers drop the first space of a text. A
    character that ends in the next run belongs to the next run.
    """
    starts = [i for i in range(len(token_ids)) if i == 0 or bool(mask[i]) != bool(mask[i - 1])]
    text = decode(token_ids)
    cuts = [*(len(decode(token_ids[:start]).rstrip(CUT_CHARACTER)) for start in starts), len(text)]
    return [(text[begin:end], bool(mask[i])) for i, (begin, end) in zip(starts, pairwise(cuts), strict=True)]
