"""Divides conversations that are too long for a row, at the borders of their turns.

Takes a conversation; returns shorter ones, each with the token rows that the chat template makes of
it. A part has the system's turns and whole exchanges: what is asked, and all that is answered until
the user speaks again. Never cuts a turn, and never gives a turn to two parts but the system's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

from qlora_kit.data.encode import Encoder, Labelled
from qlora_kit.data.shapes import Conversation, Message, Sample
from qlora_kit.data.template import Renderer

Exchange = tuple[Message, ...]


class Excerpt(NamedTuple):
    """A part of a conversation, and its token rows: one, or several where a template asks for it.

    A part of one exchange may still be too long for a row.
    """

    conversation: Conversation
    rows: list[Labelled]


class Divider:
    """Divides conversations into parts whose rows are not too long.

    Parts are filled from the end: so the last answer has as many turns before it as there is room
    for, and only the first part, which lacks no turn before it, is short.

    Args:
        renderer: renders a conversation; its `train_on` says which answers are learnt.
        encoder: encodes the texts.
        max_length: tokens that a row may have.
    """

    def __init__(self, renderer: Renderer, encoder: Encoder, max_length: int) -> None:
        self._renderer, self._encoder, self._max_length = renderer, encoder, max_length

    def parts(self, sample: Conversation, tokens: int) -> list[Excerpt]:
        """Return the parts of a conversation, in order; each answer is learnt in one of them.

        Args:
            sample: the conversation.
            tokens: tokens of its longest row, by which its exchanges are measured roughly.

        Raises:
            DataError: the template refuses a part, see `Renderer.render`.
        """
        lead, exchanges = _exchanges(self._as_learnt(sample))
        sizes = _shares([lead, *exchanges], tokens)
        room = self._max_length - sizes[0]
        parts: list[Excerpt] = []
        while exchanges:
            # The exchange at i has the size at i + 1.
            sums = accumulate(reversed(sizes[1 : len(exchanges) + 1]))
            guess = sum(size <= room for size in sums)
            part, count = self._last(sample, lead, exchanges, guess)
            parts.append(part)
            del exchanges[-count:]
        return parts[::-1]

    def _last(
        self, sample: Conversation, lead: Exchange, exchanges: Sequence[Exchange], guess: int
    ) -> tuple[Excerpt, int]:
        """Return the last part, and how many exchanges it has: as many as fit, and at least one."""
        tried: dict[int, Excerpt] = {}

        def fits(count: int) -> bool:
            turns = sum(exchanges[-count:], lead)
            part = tried[count] = self._part(replace(sample, messages=turns))
            return all(row.length <= self._max_length for row in part.rows)

        count = _most(fits, guess, len(exchanges))
        return tried[count], count

    def divided(self, sample: Sample, tokens: int) -> Sequence[Sample]:
        """Return the parts of a sample without their rows; a pair or a text has one part."""
        if not isinstance(sample, Conversation):
            return [sample]
        return [part.conversation for part in self.parts(sample, tokens)]

    def _as_learnt(self, sample: Conversation) -> Conversation:
        """Mark what is not learnt, where only the last answer of the whole conversation is."""
        if self._renderer.train_on != "last-turn":
            return sample
        learnt = self._renderer.learnt_turns(sample)
        turns = (
            turn if number in learnt else replace(turn, is_learnt=False)
            for number, turn in enumerate(sample.messages)
        )
        return replace(sample, messages=tuple(turns))

    def _part(self, conversation: Conversation) -> Excerpt:
        rendered = self._renderer.render(conversation)
        return Excerpt(conversation, self._encoder.encode(rendered))


def _exchanges(sample: Conversation) -> tuple[Exchange, list[Exchange]]:
    """Return the system's turns at the start, and the exchanges after them.

    An exchange begins where the user speaks after an answer. A tool's turn stays with its call.
    """
    turns = sample.messages
    roles = [turn.role for turn in turns]
    lead = next(at for at, role in enumerate(roles) if role not in ("system", "developer"))
    borders = [
        at
        for at in range(lead + 1, len(turns))
        if roles[at] == "user" and roles[at - 1] == "assistant"
    ]
    spans = pairwise([lead, *borders, len(turns)])
    return turns[:lead], [turns[start:end] for start, end in spans]


def _shares(parts: Sequence[Exchange], tokens: int) -> list[float]:
    """Divide a number of tokens among parts, by the characters of their turns."""
    sizes = [sum(len(turn.content) for turn in part) + len(part) for part in parts]
    return [tokens * size / sum(sizes) for size in sizes]


def _most(fits: Callable[[int], bool], guess: int, most: int) -> int:
    """Return the largest count from 1 to `most` that fits, tried around a guess; 1 if none does."""
    count = min(max(guess, 1), most)
    if not fits(count):
        while count > 1:
            count -= 1
            if fits(count):
                break
        return count
    while count < most and fits(count + 1):
        count += 1
    return count
