"""The text of an answer while its tokens come, one by one.

Takes ids; returns text that is certain: whole characters, and nothing that may be the beginning of
a stop text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A decoder writes this for bytes that do not make up a character yet.
_INCOMPLETE = "\ufffd"


class TextSoFar:
    """Decodes an answer without decoding all of it for each token.

    Args:
        tokenizer: the tokenizer of the answer.
        stops: texts before which the answer ends.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        # Ids from `_window` on are decoded, of which those before `_read` have been given. Some
        # decoders write an id by the one before it, so each is decoded behind those given last.
        self._window = self._read = 0
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Take the next id; return the text that has become certain, maybe none."""
        self._ids.append(token)
        before = self._decoded(self._window, self._read)
        now = self._decoded(self._window, len(self._ids))
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return self._certain(now[len(before) :])

    def rest(self) -> str:
        """Return what was held back, at the end of the answer."""
        if self.is_stopped:
            return ""
        before = self._decoded(self._window, self._read)
        last = self._decoded(self._window, len(self._ids))[len(before) :]
        given = self._certain(last)
        held, self._held = self._held, ""
        return given if self.is_stopped else given + held

    def _certain(self, more: str) -> str:
        """Return the held text with more behind it, up to a stop text or what may become one."""
        text = self._held + more
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_shared(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decoded(self, start: int, end: int) -> str:
        if start == end:
            return ""
        text: str = self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text


def _shared(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that a stop text begins with."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
