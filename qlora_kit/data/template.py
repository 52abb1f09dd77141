"""Turns samples into text, and says which characters of the text are supervised.

Takes a tokenizer and samples; returns `Rendered`. Training and generation render their prompts
here and nowhere else, so the supervised text begins where the generation prompt ends. Never
tokenises a sample.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qlora_kit.data.chat_template import choose_template
from qlora_kit.data.chat_text import ChatWriter, Tools, special_tokens
from qlora_kit.data.shapes import Conversation, Message, Pair, Sample, Text
from qlora_kit.errors import DataError

Span = tuple[int, int]

# A generation prompt may end with one of these tags, which opens the reasoning of the answer.
_OPENED_REASONING = re.compile(r"<(think|thinking|reasoning)>\s*$")

# Tokens that end a turn in released models. Some templates write the end of a turn only when the
# next turn opens; there the text alone does not tell an end from an opening.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")


@dataclass(frozen=True, slots=True)
class Rendered:
    """One text to learn from. Most samples are rendered as one text, some as several."""

    text: str
    spans: tuple[Span, ...]
    """half-open character ranges that are supervised, in order, not overlapping"""
    answers: tuple[int, ...]
    """characters at which answers begin; the text before each is a generation prompt"""
    append_eos: bool
    """whether a supervised end token is added after the text"""
    weights: tuple[float, ...] = ()
    """factor of the loss of each span; () where all are 1"""


@dataclass(frozen=True, slots=True)
class _Turn:
    """A conversation up to one answer: its text, and the characters of the answer."""

    text: str
    start: int
    """the first character of the answer"""
    end: int
    """the character after the answer"""
    ended: bool
    """whether the answer ends with an end token"""
    weight: float
    """the factor of the loss of the answer"""


class Renderer:
    """Renders samples with the tokenizer's chat template.

    Args:
        tokenizer: transformers' tokenizer; its `chat_template` is set by `choose_template`.
        train_on: the text that is supervised: every answer, only the last answer of a
            conversation, or everything but the BOS token.
        chat_template: a built-in name or a file; None for the tokenizer's own.

    Raises:
        ConfigError, ModelError: the template is not usable, see `choose_template`.
    """

    def __init__(
        self,
        tokenizer: Any,
        train_on: Literal["completion", "last-turn", "all"] = "completion",
        chat_template: str | None = None,
    ) -> None:
        choose_template(tokenizer, chat_template)
        self.tokenizer = tokenizer
        self.train_on = train_on
        self._writer = ChatWriter(tokenizer)
        self._eos = str(tokenizer.eos_token)
        self._end_tokens = end_tokens(tokenizer)

    def render(self, sample: Sample) -> tuple[Rendered, ...]:
        """Render one sample.

        A conversation goes through the template; pairs and texts are used as they are. Some
        templates rewrite earlier turns, for example to leave their reasoning out. A conversation
        then becomes several texts, so each answer is learnt after the prompt that it would be
        generated from.

        Raises:
            DataError: the template refuses the turns, leaves some out, changes an answer, or
                does not open an answer with its generation prompt.
            ModelError: the template takes longer than `chat_text.SECONDS_A_RENDERING`.
        """
        if isinstance(sample, Conversation):
            return self._render_all(sample) if self.train_on == "all" else self._answers(sample)
        if isinstance(sample, Pair):
            start = len(sample.prompt)
            first = 0 if self.train_on == "all" else start
            return (_whole(sample, sample.prompt + sample.completion, first, (start,)),)
        assert isinstance(sample, Text)
        return (_whole(sample, sample.text),)

    def prompt_text(
        self, prompt: str | Sequence[Message], place: str = "the prompt", tools: Tools = ()
    ) -> str:
        """Return the text that generation continues.

        Args:
            prompt: raw text, returned as it is, or turns for the template.
            place: the place of the prompt, for errors.
            tools: the tools that may be called, as in `Conversation.tools`.

        Raises:
            DataError: the template refuses the turns or leaves some out.
        """
        if isinstance(prompt, str):
            return prompt
        return self._writer.write(prompt, place, tools, generation=True)

    def learnt_turns(self, sample: Conversation) -> list[int]:
        """Return the indices of the answers that are learnt: of all answers, or of the last.

        Raises:
            DataError: no turn is the assistant's.
        """
        numbers = [i for i, turn in enumerate(sample.messages) if turn.role == "assistant"]
        if not numbers:
            raise DataError(
                f"{sample.place}: no turn is the assistant's; expected one to learn from; add "
                "the answer or remove the record"
            )
        if not sample.loss_weight:
            return []
        numbers = numbers[-1:] if self.train_on == "last-turn" else numbers
        return [number for number in numbers if sample.messages[number].is_learnt]

    # ------------------------------------------------------------ everything

    def _render_all(self, sample: Conversation) -> tuple[Rendered, ...]:
        text = self._writer.write(sample.messages, sample.place, sample.tools)
        for number, message in enumerate(sample.messages, 1):
            if not message.is_learnt:
                raise DataError(
                    f"{sample.place}: turn {number} is marked not to be learnt; expected no such "
                    "turn with --train-on all; use --train-on completion, or take the mark away"
                )
            if message.role == "assistant" and not _holds(text, message.content):
                raise DataError(
                    f"{sample.place}: the chat template shortens the answer of turn {number}; "
                    "expected all of it in the text; use --train-on completion, which renders "
                    "each turn, or another template"
                )
            if message.loss_weight != 1:
                raise DataError(
                    f"{sample.place}: turn {number} has a loss_weight of its own; expected none "
                    "with --train-on all, which learns all turns alike; use --train-on completion, "
                    "or weigh the record"
                )
        ended = text.rstrip().endswith(self._end_tokens)
        return (_whole(sample, text, append_eos=not ended),)

    # ------------------------------------------------------------ answers

    def _answers(self, sample: Conversation) -> tuple[Rendered, ...]:
        """Render the conversation up to each answer; join texts that extend the one before.

        An answer that is not learnt is a part of the prompts of the answers after it.
        """
        numbers = self.learnt_turns(sample)
        if not numbers:
            # The row is counted as dropped, as every row without a supervised token is.
            text = self._writer.write(sample.messages, sample.place, sample.tools)
            return (Rendered(text, (), (), append_eos=False),)
        texts: list[list[_Turn]] = []
        for index in numbers:
            turn = self._up_to(sample, index)
            before = self._extended(texts[-1][-1], turn) if texts else None
            if before is None:
                texts.append([turn])
            else:
                texts[-1][-1:] = [before, turn]
        return tuple(self._rendered(turns) for turns in texts)

    def _rendered(self, turns: Sequence[_Turn]) -> Rendered:
        text, ended = turns[-1].text, turns[-1].ended
        spans = [(turn.start, turn.end) for turn in turns]
        if not ended:
            # The EOS is learnt right after the text, so the white space before it is learnt too.
            spans[-1] = (spans[-1][0], len(text))
        weights = tuple(turn.weight for turn in turns)
        return Rendered(
            text,
            tuple(spans),
            tuple(start for start, _ in spans),
            not ended,
            weights if {*weights} != {1.0} else (),
        )

    def _up_to(self, sample: Conversation, index: int) -> _Turn:
        """Render a conversation up to the answer at `index`, beginning with its prompt."""
        messages, answer = sample.messages, sample.messages[index]
        place = sample.place
        prompt = self._writer.write(messages[:index], place, sample.tools, generation=True)
        text = self._writer.write(messages[: index + 1], place, sample.tools)
        if not text.startswith(prompt):
            reopened = _after_opened_reasoning(prompt, text, answer.content)
            if reopened is None and index and messages[index - 1].role == "assistant":
                raise DataError(
                    f"{place}: turn {index + 1} is an answer right after another, which the chat "
                    "template has no prompt for; expected the user's turn between them; join the "
                    "two answers, or use another template"
                )
            if reopened is None:
                raise DataError(
                    f"{place}: the chat template does not open turn {index + 1} with its "
                    "generation prompt; expected the prompt to be a prefix of the answer's "
                    "text; use --train-on all or another template"
                )
            text = reopened
        opened = _OPENED_REASONING.search(prompt)
        if not _holds(text[opened.start() if opened else len(prompt) :], answer.content):
            raise DataError(
                f"{place}: the chat template changes the answer of turn {index + 1}; expected "
                "it as it is written; change the answer or use another template"
            )
        end = len(text.rstrip())
        weight = sample.loss_weight * answer.loss_weight
        return _Turn(text, len(prompt), end, text[:end].endswith(self._end_tokens), weight)

    def _extended(self, turn: _Turn, later: _Turn) -> _Turn | None:
        """Return an earlier answer as a later text has it; None where the text does not have it."""
        text = turn.text
        if not later.text.startswith(text):
            # Some templates put an EOS after the last message, and after no other.
            text = text.removesuffix(self._eos)
            if not later.text.startswith(text):
                return None
        if later.start < len(text):
            return None
        end = min(turn.end, len(text.rstrip()))
        if text[:end].endswith(self._end_tokens):
            return replace(turn, text=text, end=end, ended=True)
        # Some templates close a turn only when the next one opens.
        for token in (self._eos, *_TURN_ENDS):
            if token in self._end_tokens and later.text.startswith(token, len(text)):
                return replace(turn, text=text, end=len(text) + len(token), ended=True)
        return None


def _whole(
    sample: Sample,
    text: str,
    first: int = 0,
    answers: tuple[int, ...] = (),
    *,
    append_eos: bool = True,
) -> Rendered:
    """Return a text that is supervised from a character on; nowhere if its sample weighs 0."""
    assert isinstance(sample, Conversation | Pair | Text)
    weight = sample.loss_weight
    if not weight:
        return Rendered(text, (), answers, append_eos=False)
    weights = () if weight == 1 else (weight,)
    return Rendered(text, ((first, len(text)),), answers, append_eos, weights)


def _after_opened_reasoning(prompt: str, text: str, content: str) -> str | None:
    """Return the prompt and the answer after it, where the prompt opens the reasoning.

    Templates of reasoning models end their generation prompt with `<think>`, but write earlier
    turns without the tag and without the reasoning. Generation continues the prompt, so the
    text to learn continues it too: with the reasoning of the answer, or with the closing tag at
    once where the answer has no reasoning.

    Args:
        prompt: the generation prompt.
        text: the turns with the answer; the text does not begin with `prompt`.
        content: the answer as the data has it.

    Returns:
        The text; None where the prompt opens no reasoning, or `text` does not continue with the
        answer.
    """
    opened = _OPENED_REASONING.search(prompt)
    if opened is None or not text.startswith(prompt[: opened.start()]):
        return None
    opening, closing = f"<{opened[1]}>", f"</{opened[1]}>"
    rest = text[opened.start() :]
    shown = content.rpartition(closing)[2]
    visible = next(
        (way for way in (shown, shown.lstrip("\n"), shown.strip()) if rest.startswith(way)), None
    )
    if visible is None:
        return None
    if closing in content:
        reasoning = content[: len(content) - len(shown)].lstrip().removeprefix(opening)
        before = reasoning.lstrip("\n") if opened[0].endswith("\n") else reasoning
        # The template strips white space from the answer; here that space belongs to the reasoning.
        before += shown[: len(shown) - len(shown.lstrip())] if visible != shown else ""
    else:
        before = f"\n{closing}\n\n"
    return prompt + before + rest


def opened_reasoning(prompt: str) -> str:
    """Return the tag, with the space after it, by which a generation prompt opens a reasoning."""
    opened = _OPENED_REASONING.search(prompt)
    return opened[0] if opened else ""


def _holds(text: str, content: str) -> bool:
    """Whether a text has all of an answer; white space is ignored, because templates trim it."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())


# ---------------------------------------------------------------- what ends an answer


def end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of the tokens that may end an answer.

    They are the EOS, the token that the chat template ends an answer with, and the well-known end
    tokens that the tokenizer has.
    """
    known = {token for token in _TURN_ENDS if token in special_tokens(tokenizer)}
    return tuple(sorted(known | {str(tokenizer.eos_token), *_last_token_of_an_answer(tokenizer)}))


def _last_token_of_an_answer(tokenizer: Any) -> tuple[str, ...]:
    """Return the special token that the chat template ends a plain answer with; () without one."""
    if not tokenizer.chat_template:
        return ()
    turns = [Message("user", "a"), Message("assistant", "a")]
    try:
        text = ChatWriter(tokenizer).write(turns, "a short conversation").rstrip()
    except DataError:
        return ()
    return tuple(token for token in special_tokens(tokenizer) if text.endswith(token))


def end_token_ids(tokenizer: Any, configured: int | Sequence[int] | None = None) -> list[int]:
    """Return the ids of the tokens that end an answer, in order.

    They are the tokenizer's EOS, the ids that the model's configuration names, and the special
    token that the chat template ends an answer with, which is the token that training supervises.

    Args:
        tokenizer: transformers' tokenizer.
        configured: the `eos_token_id` of a configuration: one id, several or none.
    """
    named = [configured] if isinstance(configured, int) else (configured or [])
    last = tokenizer.convert_tokens_to_ids(list(_last_token_of_an_answer(tokenizer)))
    return sorted({tokenizer.eos_token_id, *named, *last})
