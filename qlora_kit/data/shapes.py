"""The shapes of records, and the samples that records become.

`Conversation`, `Pair`, `Text`, `LabelledText`, `TaggedWords`, `LabelledImage` and `Preference` are
frozen, know
their place in the data, and can be sent to another process. Never reads or converts anything, and
imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

ROLES = ("system", "user", "assistant", "tool", "developer")
WEIGHT = "loss_weight"
"""the field of a record, or of a turn, that scales the loss of its tokens"""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is one of `ROLES`, and only an assistant calls tools.

    A call has the form that chat templates expect: `{"type": "function", "function": {"name":
    ..., "arguments": {...}}}`, with an `id` where the data has one.
    """

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str = ""
    """in a tool's turn: the call that it answers"""
    name: str = ""
    """in a tool's turn: the tool that speaks"""
    is_learnt: bool = True
    """in an assistant's turn: whether the data wants it to be learnt"""
    # Not in the repr: samples without weights keep the hash that they always had.
    loss_weight: float = field(default=1.0, repr=False)
    """in a turn that is learnt: the factor of its tokens' loss, above 0"""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns for a chat template; the last is the assistant's.

    `tools` are the tools it may call, each `{"type": "function", "function": {...}}`.
    """

    messages: tuple[Message, ...]
    place: str
    tools: tuple[Mapping[str, Any], ...] = ()
    adapter: str | None = None
    """the adapter that the row names, of several; None for the base alone"""
    also_right: tuple[str, ...] = ()
    """further answers to the last question, which measuring accepts; none of them is learnt"""
    loss_weight: float = 1.0
    """the factor of the loss of all that is learnt; 0: nothing is"""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and its completion, used as they are, without a template."""

    prompt: str
    completion: str
    place: str
    adapter: str | None = None
    loss_weight: float = 1.0
    """as in `Conversation`"""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, all of it to be learnt."""

    text: str
    place: str
    adapter: str | None = None
    loss_weight: float = 1.0
    """as in `Conversation`"""


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text, or a pair of texts, and what is to be said of it.

    `label` is as the data has it: the name or number of a class, a value, or the names of several
    classes; None where it is asked for.
    """

    text: str
    place: str
    second: str | None = None
    label: str | float | tuple[str, ...] | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class TaggedWords:
    """The words of a sentence, and the tag of each: a name, or a number in digits."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    place: str
    adapter: str | None = None

    @property
    def label(self) -> tuple[str, ...]:
        """What is to be said of the sentence: its tags."""
        return self.tags


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image, and what is to be said of it.

    `label` is as in `LabelledText`. `digest` is the hash of the bytes of the file, by which the
    image is known wherever the file lies; "" before the file is read.
    """

    file: str
    place: str
    label: str | float | tuple[str, ...] | None = None
    digest: str = ""
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt, and two answers to it, of which one is preferred to the other.

    All three are texts, used as they are; or all are turns for a chat template. Then the prompt is
    the turns that both have, and the last turn of each answer is the assistant's.
    """

    prompt: str | tuple[Message, ...]
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]
    place: str
    tools: tuple[Mapping[str, Any], ...] = ()
    adapter: str | None = None

    @property
    def sides(self) -> tuple[Conversation | Pair, Conversation | Pair]:
        """The prompt with the answer that is preferred, and with the other."""
        return self._side(self.chosen), self._side(self.rejected)

    def _side(self, answer: str | tuple[Message, ...]) -> Conversation | Pair:
        if isinstance(self.prompt, str):
            assert isinstance(answer, str)
            return Pair(self.prompt, answer, self.place)
        assert not isinstance(answer, str)
        before = (replace(turn, is_learnt=False) for turn in self.prompt)
        return Conversation((*before, *answer), self.place, self.tools)


Sample = Conversation | Pair | Text | LabelledText | TaggedWords | LabelledImage | Preference


def loss_weights(sample: Sample) -> tuple[float, ...]:
    """Return the weights that a sample has: its own, and that of each turn that is learnt."""
    if isinstance(sample, Conversation):
        turns = (turn.loss_weight for turn in sample.messages if turn.is_learnt)
        return (sample.loss_weight, *turns)
    return (sample.loss_weight,) if isinstance(sample, Pair | Text) else ()


class Shape(StrEnum):
    """The shape of a record. Recognition takes the first in this order whose fields are there.

    A task knows some of them only, see `SHAPES`.
    """

    CHAT = "chat"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    CHAT_PAIR = "chat-pair"
    PAIR = "pair"
    QA = "qa"
    TEXT = "text"
    CLASSIFY_PAIR = "classify-pair"
    CLASSIFY = "classify"
    TAG = "tag"
    IMAGE = "image"
    PREFERENCE_ALPACA = "preference-alpaca"
    PREFERENCE_QA = "preference-qa"
    PREFERENCE = "preference"
    PREFERENCE_SHAREGPT = "preference-sharegpt"
    PREFERENCE_CHAT = "preference-chat"
    PREFERENCE_RATED = "preference-rated"
    PREFERENCE_COMPLETIONS = "preference-completions"
    PREFERENCE_WHOLE = "preference-whole"


ShapeOfAll = Shape | Literal["mixed"]
"""The shape of all samples of a run: one, or "mixed" where its sources have not the same."""


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a shape, in the order in which users see them."""

    all: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """Return the fields by which the shape is recognised."""
        return tuple(name for name in self.all if name not in self.optional)


FIELDS: Mapping[Shape, Fields] = {
    Shape.CHAT: Fields(("system", "messages", "tools", WEIGHT), ("system", "tools", WEIGHT)),
    Shape.SHAREGPT: Fields(
        ("system", "conversations", "tools", WEIGHT), ("system", "tools", WEIGHT)
    ),
    Shape.ALPACA: Fields(
        ("system", "history", "instruction", "input", "output", WEIGHT),
        ("system", "history", "input", WEIGHT),
    ),
    Shape.CHAT_PAIR: Fields(
        ("system", "prompt", "completion", "tools", WEIGHT), ("system", "tools", WEIGHT)
    ),
    Shape.PAIR: Fields(("prompt", "completion", WEIGHT), (WEIGHT,)),
    Shape.QA: Fields(("system", "question", "answer", WEIGHT), ("system", WEIGHT)),
    Shape.TEXT: Fields(("text", WEIGHT), (WEIGHT,)),
    Shape.CLASSIFY_PAIR: Fields(("text_a", "text_b", "label")),
    Shape.CLASSIFY: Fields(("text", "label")),
    Shape.TAG: Fields(("tokens", "tags")),
    Shape.IMAGE: Fields(("image", "label")),
    Shape.PREFERENCE_ALPACA: Fields(
        ("system", "history", "instruction", "input", "chosen", "rejected"),
        ("system", "history", "input"),
    ),
    Shape.PREFERENCE_QA: Fields(("system", "question", "chosen", "rejected"), ("system",)),
    Shape.PREFERENCE: Fields(
        ("system", "prompt", "chosen", "rejected", "tools"), ("system", "tools")
    ),
    Shape.PREFERENCE_SHAREGPT: Fields(
        ("system", "conversations", "chosen", "rejected", "tools"), ("system", "tools")
    ),
    Shape.PREFERENCE_CHAT: Fields(
        ("system", "messages", "chosen", "rejected", "tools"), ("system", "tools")
    ),
    Shape.PREFERENCE_RATED: Fields(
        ("system", "prompt", "responses", "scores"), ("system", "scores")
    ),
    Shape.PREFERENCE_COMPLETIONS: Fields(
        ("system", "prompt", "completions", "scores"), ("system", "scores")
    ),
    Shape.PREFERENCE_WHOLE: Fields(("chosen", "rejected", "tools"), ("tools",)),
}
"""`chat-pair` is a `pair` whose prompt or completion is a list of turns, or is read as a turn."""

LABELLED = (Shape.CLASSIFY_PAIR, Shape.CLASSIFY, Shape.TAG, Shape.IMAGE)
PREFERENCES = tuple(shape for shape in Shape if shape.startswith("preference"))
_OF_TEXT = tuple(shape for shape in Shape if shape not in (*LABELLED, *PREFERENCES))
SHAPES: Mapping[str, tuple[Shape, ...]] = {
    "causal": _OF_TEXT,
    "classify": (Shape.CLASSIFY_PAIR, Shape.CLASSIFY, Shape.IMAGE),
    "tag": (Shape.TAG,),
    "seq2seq": tuple(shape for shape in _OF_TEXT if shape is not Shape.TEXT),
    "preference": PREFERENCES,
}
"""The shapes that a task knows, by its name. No shape is of two: a field means one thing to one."""
