"""Writes turns as text, through the tokenizer's chat template.

Takes messages and tools; returns the text. A template is a stranger's program: transformers
renders it in a sandbox where it cannot change anything, and this module limits its time. A
template may refuse turns, which is an error; some templates leave turns, tools or calls out
without a word, and this module refuses such a text. Never says which characters are supervised,
and never tokenises a sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_kit.data.shapes import Message
from qlora_kit.errors import DataError, ModelError
from qlora_kit.time_limit import TimeUp, time_limit

SECONDS_A_RENDERING = 10.0

Tools = Sequence[Mapping[str, Any]]


def wants_bos(tokenizer: Any) -> bool:
    """Return whether every sample of this tokenizer begins with its BOS token, exactly once.

    True where a BOS token exists and one of these holds: the BOS is not also the end token; the
    tokenizer's own encoding puts it first; the chat template starts with it. So rows of Llama,
    Mistral, Gemma and DeepSeek begin with a BOS; rows of Qwen (no BOS) and GPT-2 (BOS = EOS) do
    not.
    """
    if not tokenizer.bos_token or tokenizer.bos_token_id is None:
        return False
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        return True
    if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return True
    if not tokenizer.chat_template:
        return False
    try:
        text = _render_turns(tokenizer, [{"role": "user", "content": "a"}], "a short conversation")
    except DataError:
        return False
    return text.startswith(tokenizer.bos_token)


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the tokens that may end a turn or a text: all special tokens but the BOS."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if token.special} | {*tokenizer.all_special_tokens}
    return special - {"", tokenizer.bos_token} | {str(tokenizer.eos_token)}


@dataclass(frozen=True, slots=True)
class _Spelling:
    """The form in which a template is given an assistant turn that calls tools.

    Templates differ in the form they take.
    """

    empty_content: bool
    """whether a turn that only calls tools has an empty content; otherwise it has no content"""
    arguments_as_text: bool
    """whether the arguments of a call are JSON text; otherwise they are an object"""


# The form that transformers documents comes first.
_SPELLINGS = (
    _Spelling(True, False), _Spelling(False, False), _Spelling(True, True), _Spelling(False, True),
)  # fmt: skip

# A template treats conversations of the same pattern alike. A pattern is: whether there are tools,
# and for each turn its role, whether it has content, and how many tools it calls.
_Pattern = tuple[bool, tuple[tuple[str, bool, int], ...]]


class ChatWriter:
    """Writes conversations with one tokenizer's chat template.

    Args:
        tokenizer: transformers' tokenizer, with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._spellings: dict[_Pattern, _Spelling] = {}

    def write(
        self,
        messages: Sequence[Message],
        place: str,
        tools: Tools = (),
        *,
        generation: bool = False,
    ) -> str:
        """Return the text of turns.

        Args:
            messages: the turns, in order; none where the assistant is to speak first.
            place: the place of the turns, for errors.
            tools: the tools that may be called, as in `Conversation.tools`.
            generation: end the text with the opening of the assistant's next turn.

        Raises:
            DataError: the template refuses the turns, or leaves some of them out.
            ModelError: the template takes longer than `SECONDS_A_RENDERING`.
        """
        if not messages:
            return self._opening(place, tools)
        turns = tuple((m.role, bool(m.content), len(m.tool_calls)) for m in messages)
        pattern = (bool(tools), turns)
        spelling = self._spellings.get(pattern)
        if spelling is None:
            spelling = self._spelling_for(messages, place, tools, pattern)
        return self._render(messages, place, tools, spelling, generation)

    def _opening(self, place: str, tools: Tools) -> str:
        """Return the prompt of an answer that comes before any other turn.

        Most templates fail on an empty list of turns. So the template renders the answer alone,
        and the prompt is the text before the answer, up to the end of the generation prompt.
        """
        answer, question = Message("assistant", _marker(1)), Message("user", _marker(2))
        plain = _SPELLINGS[0]
        before = self._render([answer], place, tools, plain).partition(answer.content)[0]
        asked = self._render([question], place, tools, plain)
        prompt = self._render([question], place, tools, plain, generation=True)
        if not prompt.startswith(asked):
            # Some templates put an EOS after the last message, and after no other.
            asked = asked.removesuffix(str(self._tokenizer.eos_token))
        opening = prompt[len(asked) :] if prompt.startswith(asked) else ""
        if not opening:
            return before.rstrip()
        if opening in before:
            return before[: before.rindex(opening)] + opening
        # The generation prompt opens the reasoning as well; the text of an answer has no reasoning.
        shared = (i for i in range(len(before) + 1) if opening.startswith(before[i:]))
        return before[: next(shared)] + opening

    def _render(
        self,
        messages: Sequence[Message],
        place: str,
        tools: Tools,
        spelling: _Spelling,
        generation: bool = False,
    ) -> str:
        turns = [_as_turn(self._in_known_role(message), spelling) for message in messages]
        return _render_turns(self._tokenizer, turns, place, tools, generation)

    def _in_known_role(self, message: Message) -> Message:
        """Return a developer's turn as the system's, unless the template knows the developer.

        Templates that do not know the role write a name that no model has seen, or leave the turn
        out.
        """
        if message.role != "developer" or "developer" in str(self._tokenizer.chat_template):
            return message
        return replace(message, role="system")

    def _spelling_for(
        self, messages: Sequence[Message], place: str, tools: Tools, pattern: _Pattern
    ) -> _Spelling:
        """Find the spelling in which the template takes turns of this pattern.

        Markers stand in for the content of the turns. A marker that is missing in the text shows
        which part the template leaves out, whatever the turns say. Each pattern is tried once.

        Raises:
            DataError: the template refuses every spelling, or leaves a part out in each.
        """
        calls = any(message.tool_calls for message in messages)
        spellings = _SPELLINGS if calls else _SPELLINGS[:1]
        faults: list[DataError] = []
        # Templates that look into contents may refuse markers; then the turns themselves are tried.
        for marked in (True, False):
            for spelling in spellings:
                try:
                    self._check_complete(messages, place, tools, spelling, marked)
                except DataError as fault:
                    faults.append(fault)
                    continue
                if marked:
                    self._spellings[pattern] = spelling
                return spelling
            left_out = [fault for fault in faults if isinstance(fault, _LeftOut)]
            if left_out:
                raise left_out[0]
        raise faults[len(spellings)]

    def _check_complete(
        self,
        messages: Sequence[Message],
        place: str,
        tools: Tools,
        spelling: _Spelling,
        marked: bool,
    ) -> None:
        if marked:
            messages, tools = _with_markers(messages), _marked_tools(tools)
        text = self._render(messages, place, tools, spelling)
        found = _missing_part(messages, tools, text)
        if found:
            raise _LeftOut(
                f"{place}: the chat template leaves out {found}; expected all of the "
                "conversation in its text; remove it or use another template"
            )


class _LeftOut(DataError):  # noqa: N818 - caught by name here, a DataError to others
    """The template renders a conversation without a part of it."""


def _as_turn(message: Message, spelling: _Spelling) -> dict[str, Any]:
    """Return a message as templates expect it; a turn without calls has no "tool_calls"."""
    if not message.tool_calls:
        tool = {"tool_call_id": message.tool_call_id, "name": message.name}
        known = {key: value for key, value in tool.items() if value}
        return {"role": message.role, "content": message.content, **known}
    calls = [_as_call(call, spelling) for call in message.tool_calls]
    has_content = message.content or spelling.empty_content
    content = {"content": message.content} if has_content else {}
    return {"role": message.role, **content, "tool_calls": calls}


def _as_call(call: Mapping[str, Any], spelling: _Spelling) -> dict[str, Any]:
    function = dict(call["function"])
    if spelling.arguments_as_text and not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {**call, "function": function}


# ---------------------------------------------------------------- what a template leaves out


def _marker(number: int) -> str:
    # Letters and digits only: no template escapes them, and there is no white space to trim.
    return f"q{number}marker{number}q"


def _with_markers(messages: Sequence[Message]) -> list[Message]:
    marked = []
    for number, message in enumerate(messages, 1):
        calls = tuple(
            _marked_call(call, _marker(1000 * number + index))
            for index, call in enumerate(message.tool_calls)
        )
        content = _marker(number) if message.content else ""
        marked.append(replace(message, content=content, tool_calls=calls))
    return marked


def _marked_call(call: Mapping[str, Any], marker: str) -> dict[str, Any]:
    function = {"name": marker, "arguments": {"value": f"v{marker}"}}
    return {**call, "function": {**call["function"], **function}}


def _marked_tools(tools: Tools) -> list[dict[str, Any]]:
    return [
        {**tool, "function": {**tool["function"], "name": f"tool{_marker(number)}"}}
        for number, tool in enumerate(tools)
    ]


def _missing_part(messages: Sequence[Message], tools: Tools, text: str) -> str | None:
    """Return in words the first part of a conversation that its text lacks, or None."""
    holds = _search_in(text)
    for tool in tools:
        if not holds(str(tool["function"].get("name", ""))):
            return "the tools"
    for number, message in enumerate(messages, 1):
        if not holds(message.content):
            return f"turn {number} (the {message.role}'s)"
        for call in message.tool_calls:
            function = call["function"]
            arguments = function.get("arguments")
            values = [*arguments.values()] if isinstance(arguments, Mapping) else []
            texts = [function.get("name"), *(v for v in values if isinstance(v, str))]
            if not all(holds(str(part)) for part in texts):
                return f"the tool calls of turn {number}"
    return None


def _search_in(text: str) -> Callable[[str], bool]:
    spaceless = "".join(text.split())

    def holds(part: str) -> bool:
        if part.strip() in text:
            return True
        ways = (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
        return any("".join(way.split()) in spaceless for way in ways)

    return holds


# ---------------------------------------------------------------- the template itself


def _render_turns(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    place: str,
    tools: Tools = (),
    generation: bool = False,
) -> str:
    """Render turns with the tokenizer's template, within the limit of time."""
    try:
        with time_limit(SECONDS_A_RENDERING):
            text: str = tokenizer.apply_chat_template(
                list(turns),
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=generation,
            )
    except (TimeUp, MemoryError) as error:
        found = "takes too long" if isinstance(error, TimeUp) else "needs too much memory"
        # Not collected as the fault of one row: each further row would take as long again.
        raise ModelError(
            f"{place}: the chat template {found} for these turns; expected at most "
            f"{SECONDS_A_RENDERING:.0f} s; shorten the row or use another template"
        ) from error
    except Exception as error:
        # A template may raise anything, and so may the filters it calls.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"{place}: the chat template refuses these turns ({reason}); expected turns it "
            "can render; change them or use another template"
        ) from error
    return text
