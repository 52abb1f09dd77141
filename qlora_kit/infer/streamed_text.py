"""Turns tokens into text while they come.

Takes the ids of an answer, a few at a time; returns the text that they add. Never returns half a
character, and leaves special tokens out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A tokenizer decodes the bytes of an unfinished character as this.
_UNFINISHED = "\ufffd"


class StreamedText:
    """The text of an answer, told in pieces that together are its whole text.

    A piece is decoded together with the piece before it, because a token's text may depend on its
    neighbours: many tokenizers drop the space of the first word only.

    Args:
        tokenizer: transformers' tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Ids before the first number are told and needed no more; before the second they are told.
        self._context, self._told = 0, 0

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that is certain after these ids; "" while a character is unfinished."""
        self._ids += ids
        text = self._new_text()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._context, self._told = self._told, len(self._ids)
        return text

    def end(self) -> str:
        """Return what is left of the text, where the last character was never finished."""
        return self._new_text()

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._context : self._told])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class WithoutMargins:
    """Passes text on without the white space at its two ends, which only an end tells apart."""

    def __init__(self) -> None:
        self._has_begun = False
        self._held = ""

    def add(self, text: str) -> str:
        """Return the part of the text so far that is not at an end of it, and was not returned."""
        text = self._held + text
        if not self._has_begun:
            text = text.lstrip()
        self._has_begun = self._has_begun or bool(text)
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept
