"""The `Modelfile` of Ollama: which file, how a conversation is written, where an answer ends.

Ollama has templates of its own, in the language of Go. One is made from what the Jinja template
writes: it is applied to short conversations, and the text between their contents is taken. The
result is compared with the Jinja template on a longer conversation, and left out if it differs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.data.chat_text import ChatWriter
from qlora_kit.data.shapes import Message
from qlora_kit.errors import DataError

_MOST_CONTEXT = 8192
_CONTENTS = ("Quartz", "Violet", "Walrus", "Jigsaw", "Kumquat", "Xylem")


@dataclass(frozen=True)
class Turns:
    """The texts that a chat template writes around the contents of a conversation.

    Attributes:
        start: before a conversation without a system message, such as a default one.
        system: before and after a system message; None where the template has no place for it.
        user: before and after what a user says; the latter begins the answer.
        answer_end: after an answer.
    """

    start: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    answer_end: str

    def write(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        """Return a conversation, as `in_go` writes it."""
        text = "" if roles[0] == "system" else self.start
        for role, content in zip(roles, contents, strict=True):
            if role == "system":
                before, after = self.system or ("", "")
            else:
                before, after = self.user if role == "user" else ("", self.answer_end)
            text += f"{before}{content}{after}"
        return text

    def in_go(self) -> str:
        """Return the template in the language of Go."""
        # Texts stand in Go's string literals, so no space or line break in them is lost.
        start = (
            f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_go(self.start)}{{{{ end }}}}'
            if self.start
            else ""
        )
        cases = [("user", *self.user), ("assistant", "", self.answer_end)]
        if self.system is not None:
            cases.insert(0, ("system", *self.system))
        branches = ""
        for number, (role, before, after) in enumerate(cases):
            word = "else if" if number else "if"
            branches += f'{{{{ {word} eq .Role "{role}" }}}}'
            branches += f"{_go(before)}{{{{ .Content }}}}{_go(after)}"
        return f"{start}{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}"


def _go(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def turns_of(tokenizer: Any, *, adds_bos: bool) -> Turns | None:
    """Return what a chat template writes; None if it does more than write around contents.

    Args:
        tokenizer: transformers' tokenizer.
        adds_bos: whether the token that begins a text is put before it anyway.
    """
    if not tokenizer.chat_template:
        return None
    try:
        return _turns(_Conversations(tokenizer, tokenizer.bos_token if adds_bos else ""))
    except (DataError, ValueError):
        return None


class _Conversations:
    """Conversations with known contents, as a chat template writes them.

    Args:
        tokenizer: transformers' tokenizer.
        bos: the text that is put before each of them anyway.
    """

    def __init__(self, tokenizer: Any, bos: str) -> None:
        self._writer, self._bos = ChatWriter(tokenizer), bos

    def written(self, roles: Sequence[str], *, is_whole: bool = False) -> str:
        """Return a conversation up to where the next answer begins, unless it `is_whole`."""
        messages = [Message(role, text) for role, text in zip(roles, _CONTENTS, strict=False)]
        text = self._writer.write(messages, "a short conversation", generation=not is_whole)
        return text.removeprefix(self._bos)

    def between(self, roles: Sequence[str], *, is_whole: bool = False) -> list[str]:
        """Return the texts before, between and after the contents of a conversation.

        Raises:
            ValueError: a content is not in the text.
        """
        rest, found = self.written(roles, is_whole=is_whole), []
        for content in _CONTENTS[: len(roles)]:
            before, content_found, rest = rest.partition(content)
            if not content_found:
                raise ValueError(content)
            found.append(before)
        return [*found, rest]

    def agree_with(self, turns: Turns, roles: Sequence[str]) -> bool:
        """Whether the turns write a conversation alike."""
        return turns.write(roles, _CONTENTS[: len(roles)]) == self.written(roles)


def _turns(conversations: _Conversations) -> Turns | None:
    first, after_user = conversations.between(["user"])
    _, before_answer, between, _ = conversations.between(["user", "assistant", "user"])
    *_, answer_end = conversations.between(["user", "assistant"], is_whole=True)
    # Some templates write an end after the last answer, and after no other.
    before_user = between.removeprefix(answer_end)
    if not first.endswith(before_user):
        return None
    found = Turns(
        start=first.removesuffix(before_user),
        system=None,
        user=(before_user, after_user),
        answer_end=between.removesuffix(before_user),
    )
    roles = ["user", "assistant", "user", "assistant", "user"]
    if before_answer != after_user or not conversations.agree_with(found, roles):
        return None
    try:
        before, after, *_ = conversations.between(["system", "user"])
    except (DataError, ValueError):
        return found
    if not after.endswith(before_user):
        return found
    system = (before, after.removesuffix(before_user))
    whole = Turns(found.start, system, found.user, found.answer_end)
    return whole if conversations.agree_with(whole, ["system", *roles]) else found


def modelfile(file: str, turns: Turns | None, stops: Sequence[str], context: int, raw: bool) -> str:
    """Return the text of a Modelfile.

    Args:
        file: name of the GGUF file, in the same folder.
        turns: how a conversation is written; None: not known.
        stops: texts of the tokens that end an answer.
        context: tokens that the model was made for.
        raw: whether the model has learnt texts as they are, without a template.
    """
    lines = [f"FROM ./{file}"]
    if raw:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif turns is None:
        lines.append(
            "# The chat template of this model is not one that could be written for Ollama; add a "
            "TEMPLATE."
        )
    else:
        lines.append(f'TEMPLATE """{turns.in_go()}"""')
        if turns.system is None:
            lines.append("# The chat template has no place of its own for a system message.")
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    # Ollama takes memory for the whole context at once.
    lines.append(f"PARAMETER num_ctx {min(context, _MOST_CONTEXT)}")
    return "\n".join(lines) + "\n"
