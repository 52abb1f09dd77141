"""A conversation with a loaded model: its turns, and the answers to them.

Takes what a user says; returns answers, which are told in pieces while they come. Knows neither
terminal nor files. A turn that fails leaves the conversation as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from qlora_kit.data.asking import Asks
from qlora_kit.data.shapes import Message
from qlora_kit.data.template import opened_reasoning
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.infer.generate import Sampling, end_ids
from qlora_kit.infer.kept_cache import KeptCache
from qlora_kit.infer.streamed_text import StreamedText, WithoutMargins
from qlora_kit.model.load import Base

Ended = Literal["end token", "length", "context", "stopped"]
_PLACE = "the conversation"


@dataclass(frozen=True)
class Voice:
    """How one adapter is spoken to.

    Attributes:
        tokenizer: its tokenizer, with its chat template.
        asks: makes ids of turns, as its training did.
        is_raw: whether it learnt texts as they are: then each text is continued by itself.
    """

    tokenizer: Any
    asks: Asks
    is_raw: bool


@dataclass(frozen=True)
class Speakers:
    """The base and the adapters that can answer.

    Attributes:
        voices: how each is spoken to, by name; None is the base alone. The first answers first.
        choose: lets one of them compute from now on.
    """

    voices: Mapping[str | None, Voice]
    choose: Callable[[str | None], None]


@dataclass(frozen=True)
class Answer:
    """What came of one turn.

    Attributes:
        text: the answer, without white space at its ends.
        ended: why it ended.
        prompt_tokens: tokens of the conversation before it, as far as the model saw it.
        kept_tokens: how many of these were not computed again.
        new_tokens: tokens of the answer, with its end token.
        first_seconds: time to the first of them.
        seconds: time of all.
        cut: turns that the model saw before and sees no more, because the context is full.
    """

    text: str
    ended: Ended
    prompt_tokens: int
    kept_tokens: int
    new_tokens: int
    first_seconds: float
    seconds: float
    cut: int


class Chat:
    """A conversation. Only the last turns are seen that leave room for an answer.

    Args:
        base: the loaded model, with the adapters on it.
        speakers: who can answer; the first of them does.
        sampling: how answers are chosen; its seed counts for the whole conversation.
        context: tokens that the model sees at most, the answer among them; None: no limit.
    """

    def __init__(
        self, base: Base, speakers: Speakers, sampling: Sampling, context: int | None
    ) -> None:
        self._base, self._speakers = base, speakers
        self._sampling, self._context = sampling, context
        self._cache = KeptCache(base)
        self._turns: list[Message] = []
        self._system: str | None = None
        self._unseen = 0
        self.speaker = self._spoken_to_as = next(iter(speakers.voices))
        speakers.choose(self.speaker)
        torch.manual_seed(sampling.seed)

    # ------------------------------------------------------------ the turns

    @property
    def messages(self) -> tuple[Message, ...]:
        """All turns, those that are seen no more among them, after the system's."""
        return (*self._opening(), *self._turns)

    @property
    def system(self) -> str | None:
        """What the model is told first; None for nothing."""
        return self._system

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(name for name in self._speakers.voices if name is not None)

    @property
    def is_raw(self) -> bool:
        """Whether each text is continued by itself, without a template and without memory."""
        return self._voice.is_raw

    def set_system(self, text: str | None) -> None:
        """Set what the model is told first, in this conversation.

        Raises:
            DataError: the chat template has no place for it.
        """
        if text is not None:
            if self.is_raw:
                raise DataError(
                    "/system: no chat template is used, which would give it a place; expected a "
                    "model with one; write it before your text, or pass --chat-template"
                )
            self._voice.asks.ids((Message("system", text), Message("user", "a")), "/system")
        self._system, self._unseen = text, 0

    def undo(self) -> bool:
        """Take the last turn and its answer back; return whether there were any."""
        if not self._turns:
            return False
        del self._turns[-2:]
        self._unseen = 0
        return True

    def clear(self) -> None:
        """Forget all turns; what the model is told first stays."""
        self._turns, self._unseen = [], 0

    def use(self, name: str | None) -> None:
        """Let an adapter answer from now on, or with None the base alone.

        The base is spoken to as the adapter before it was, so that their answers can be compared.

        Raises:
            ConfigError: no adapter has this name, or it cannot be taken off.
        """
        if name is not None and name not in self._speakers.voices:
            known = ", ".join(self.names) or "none: there is no adapter"
            raise ConfigError(f"/adapter: no adapter is named {name!r}; expected {known}, or off")
        self._speakers.choose(name)
        if name != self.speaker:
            self._cache.forget()
        if name is not None or name in self._speakers.voices:
            self._spoken_to_as = name
        self.speaker = name

    @property
    def _voice(self) -> Voice:
        return self._speakers.voices[self._spoken_to_as]

    def _opening(self) -> tuple[Message, ...]:
        return () if self._system is None else (Message("system", self._system),)

    # ------------------------------------------------------------ an answer

    def say(
        self,
        text: str,
        tell: Callable[[str], None],
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Say something, and return the answer.

        Args:
            text: what the user says.
            tell: receives the answer in pieces.
            is_stopped: asked after each token whether to end the answer there. What was told until
                then stays in the conversation.

        Raises:
            DataError: the turns cannot be given to the model, or are too long for it.
            OutOfMemory: they do not fit in memory.
        """
        ids, unseen = self._prompt(text)
        sampling = self._room_after(ids)
        voice, clock = self._voice, _Clock()
        pieces, shown = StreamedText(voice.tokenizer), WithoutMargins()

        def on_ids(new: list[int]) -> None:
            clock.tick()
            # The end token has no text, and neither has what is held back.
            if piece := shown.add(pieces.add(new)):
                tell(piece)

        ends = end_ids(self._base, voice.tokenizer)
        pad = voice.tokenizer.pad_token_id
        found = self._cache.continued(ids, ends, sampling, pad, on_ids, is_stopped)
        if rest := shown.add(pieces.end()):
            tell(rest)
        content = voice.tokenizer.decode(found.ids, skip_special_tokens=True)
        has_ended = bool(found.ids) and found.ids[-1] in ends
        cut, self._unseen = unseen - self._unseen, unseen
        self._remember(text, content, ids, is_whole=has_ended or not is_stopped())
        return Answer(
            text=content.strip(),
            ended=self._why(has_ended, is_stopped(), sampling),
            prompt_tokens=len(ids),
            kept_tokens=found.kept,
            new_tokens=len(found.ids),
            first_seconds=clock.first,
            seconds=clock.last,
            cut=cut,
        )

    def _prompt(self, text: str) -> tuple[list[int], int]:
        """Return the ids to continue, and how many of the first turns they leave out."""
        asks = self._voice.asks
        if self.is_raw:
            return asks.ids(text, _PLACE), self._unseen
        unseen, said = self._unseen, Message("user", text)
        while True:
            seen = (*self._opening(), *self._turns[unseen:], said)
            ids = asks.ids(seen, _PLACE)
            if self._context is None or len(ids) + self._reserved() <= self._context:
                return ids, unseen
            if unseen >= len(self._turns):
                return ids, unseen
            unseen += 2

    def _reserved(self) -> int:
        """Return how many tokens are kept free for an answer: half of the context at most."""
        assert self._context is not None
        return min(self._sampling.max_new_tokens, self._context // 2)

    def _room_after(self, ids: Sequence[int]) -> Sampling:
        """Return the sampling of an answer that fits behind a prompt.

        Raises:
            DataError: no token does.
        """
        if self._context is None:
            return self._sampling
        room = self._context - len(ids)
        if room < 1:
            raise DataError(
                f"{_PLACE}: {len(ids)} tokens, and the model sees {self._context}; expected room "
                "for an answer; say it in fewer words"
            )
        return replace(self._sampling, max_new_tokens=min(room, self._sampling.max_new_tokens))

    def _remember(self, text: str, content: str, ids: Sequence[int], *, is_whole: bool) -> None:
        # An answer of which nothing came before it was stopped is no answer.
        if not is_whole and not content.strip():
            return
        prompt = self._voice.tokenizer.decode(ids[-_TAG_TOKENS:])
        # A template takes the reasoning out of earlier answers by its tags, of which the prompt has
        # the first.
        opened = "" if self.is_raw else opened_reasoning(prompt)
        self._turns += [Message("user", text), Message("assistant", opened + content)]

    def _why(self, has_ended: bool, is_stopped: bool, sampling: Sampling) -> Ended:
        if has_ended:
            return "end token"
        if is_stopped:
            return "stopped"
        is_short = sampling.max_new_tokens < self._sampling.max_new_tokens
        return "context" if is_short else "length"


# A tag such as <think> is one token or a few.
_TAG_TOKENS = 16


class _Clock:
    """The time to the first token and to the last, in seconds."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.first = self.last = 0.0

    def tick(self) -> None:
        self.last = time.perf_counter() - self._start
        self.first = self.first or self.last
