"""The text of an answer while its tokens come, up to a stop text.

Takes ids; returns text that is certain: whole characters, and nothing that may be the beginning of
a stop text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_kit.infer.streamed_text import StreamedText


class TextSoFar:
    """Decodes an answer without decoding all of it for each token.

    Args:
        tokenizer: the tokenizer of the answer.
        stops: texts before which the answer ends.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._text, self._stops = StreamedText(tokenizer), stops
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Take the next id; return the text that has become certain, maybe none."""
        more = self._text.add([token])
        return self._certain(more) if more else ""

    def rest(self) -> str:
        """Return what was held back, at the end of the answer."""
        if self.is_stopped:
            return ""
        given = self._certain(self._text.end())
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


def _shared(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that a stop text begins with."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
