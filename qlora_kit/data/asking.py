"""What a model is given to answer: the ids that generation begins with.

Takes a prompt, a text or turns; returns ids. Each task has its own way, which must be that of its
training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from qlora_kit.data.chat_text import Tools
from qlora_kit.data.encode import prompt_ids
from qlora_kit.data.shapes import Message
from qlora_kit.data.template import Renderer


class Asks(Protocol):
    """One way to turn prompts into ids."""

    def ids(self, prompt: str | Sequence[Message], place: str, tools: Tools = ()) -> list[int]:
        """Return the ids that generation begins with.

        Args:
            prompt: a text, used as it is, or the turns before an answer.
            place: the place of the prompt, for errors.
            tools: the tools that may be called.

        Raises:
            DataError: the turns cannot be given to the model.
        """
        ...


class TextAsker:
    """Returns the ids that an answer continues: turns go through the chat template.

    Args:
        tokenizer: transformers' tokenizer; its chat template is set by `choose_template`.
        max_length: not used: a prompt that is continued is never cut.
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None) -> None:
        self._tokenizer, self._renderer = tokenizer, Renderer(tokenizer)

    def ids(self, prompt: str | Sequence[Message], place: str, tools: Tools = ()) -> list[int]:
        """See `Asks`."""
        return prompt_ids(self._tokenizer, self._renderer.prompt_text(prompt, place, tools))
