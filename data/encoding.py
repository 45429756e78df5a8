"""Token ids of texts. Texts that are known beforehand are tokenized in one call, which uses all processors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from .template import Span


class TextEncoder:
    """A tokenizer whose result for a text does not depend on whether the text was announced."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._announced: dict[tuple[str, bool], tuple[list[int], list[Span]]] = {}

    def announce(self, rendered: Iterable[str], plain: Iterable[str] = ()) -> None:
        """Tokenizes texts that will be asked for, and forgets the texts that were announced before.

        Args:
            rendered: texts whose special tokens a template has written.
            plain: texts that get the tokenizer's special tokens.
        """
        self._announced = {}
        for texts, with_special in ((rendered, False), (plain, True)):
            if chosen := list(dict.fromkeys(texts)):
                encoding = self._call(chosen, with_special)
                offsets = encoding["offset_mapping"] if self._tokenizer.is_fast else [[]] * len(chosen)
                for text, *found in zip(chosen, encoding["input_ids"], offsets, strict=True):
                    self._announced[text, with_special] = found[0], found[1]

    def encode(self, text: str, with_special: bool = False) -> tuple[list[int], list[Span]]:
        """The token ids, and the characters of each token; a slow tokenizer does not tell the characters.

        Args:
            with_special: whether the tokenizer adds its special tokens.
        """
        if (text, with_special) in self._announced:
            return self._announced[text, with_special]
        encoding = self._call(text, with_special)
        return encoding["input_ids"], encoding["offset_mapping"] if self._tokenizer.is_fast else []

    def _call(self, texts: str | list[str], with_special: bool) -> Any:
        return self._tokenizer(
            texts, add_special_tokens=with_special, return_offsets_mapping=bool(self._tokenizer.is_fast)
        )
