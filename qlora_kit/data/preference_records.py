"""Turns one record of preferences into a sample: a prompt, and two answers to it.

Takes the fields of a record of a known shape and its place; returns a `Preference`. Whatever form
the answers had (texts, turns, whole conversations, answers with ratings), they are texts behind a
text or turns behind turns. A record that prefers no answer is told apart from a faulty one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

from qlora_kit.data.convert import RecordFields, to_sample
from qlora_kit.data.fields import filled, kind_of, string
from qlora_kit.data.shapes import WEIGHT, Conversation, Preference, Sample, Shape
from qlora_kit.errors import DataError

# Names that data sets give to the text and to the rating of one of several answers.
_TEXTS = ("response", "text", "content", "completion", "answer", "output")
_RATINGS = ("score", "rating", "overall_score", "reward")
_WAYS = '{"prompt": ..., "chosen": ..., "rejected": ...}'


class NoPreferenceError(DataError):
    """A record of which no answer is preferred: both are the same, or have the same rating."""


def to_preference(shape: Shape, record: RecordFields, where: str) -> Preference:
    """Return the sample that a record holds.

    Args:
        shape: the shape of the record; the record has the required fields of it.
        record: the fields of the record.
        where: the place of the record, for the sample and for errors.

    Raises:
        NoPreferenceError: no answer is preferred.
        DataError: the content of a field does not fit the shape.
    """
    if record.get(WEIGHT) is not None:
        raise DataError(
            f'{where}: a "{WEIGHT}"; expected none beside two answers: pairs count alike with '
            "--task preference; remove the field"
        )
    sample = _CONVERT[shape](record, where)
    if sample.chosen == sample.rejected:
        raise NoPreferenceError(f"{where}: both answers are the same; expected two")
    return sample


# ---------------------------------------------------------------- pairs


def _from_prompt(record: RecordFields, where: str) -> Preference:
    """Answers behind a prompt: texts behind a text as they are; all else are turns."""
    prompt, answers = record["prompt"], _answers(record, where)
    of_turns = any(record.get(name) for name in ("system", "tools"))
    if isinstance(prompt, str) and isinstance(answers.chosen, str) and not of_turns:
        asked = string(record, "prompt", where)
        chosen, rejected = (filled(record, name, where) for name in answers._fields)
        return Preference(asked, chosen, rejected, where)
    return _of_turns(record, prompt, answers, where)


def _from_question(field: str, record: RecordFields, where: str) -> Preference:
    """Answers to a question, which is the user's turn."""
    return _of_turns(record, [_turn("user", record, field, where)], _answers(record, where), where)


def _from_turns(field: str, record: RecordFields, where: str) -> Preference:
    return _of_turns(record, record[field], _answers(record, where), where)


def _from_alpaca(record: RecordFields, where: str) -> Preference:
    answers = _answers(record, where)
    given = {name: _text_in(answer) for name, answer in answers._asdict().items()}
    texts = [filled(given, name, where) for name in given]
    chosen, rejected = (
        to_sample(Shape.ALPACA, {**record, "output": text}, where) for text in texts
    )
    return _apart(chosen, rejected, where)


def _from_whole(record: RecordFields, where: str) -> Preference:
    """Two whole conversations or texts, whose common beginning is the prompt."""
    answers = _answers(record, where)
    if not isinstance(answers.chosen, str):
        return _of_turns(record, [], answers, where)
    chosen, rejected = (filled(answers._asdict(), name, where) for name in answers._fields)
    same = _same_at_start(chosen, rejected)
    if same and chosen[same - 1] == " ":
        same -= 1  # a space belongs to the word behind it
    if not (chosen[same:].strip() and rejected[same:].strip()):
        raise NoPreferenceError(
            f"{where}: one text is the beginning of the other; expected two answers to one prompt; "
            "remove the record"
        )
    return Preference(chosen[:same], chosen[same:], rejected[same:], where)


class _Answers(NamedTuple):
    """Two answers: both texts, or both lists of turns."""

    chosen: Any
    rejected: Any


def _answers(record: RecordFields, where: str) -> _Answers:
    found = []
    for name in ("chosen", "rejected"):
        value = record[name]
        value = [value] if isinstance(value, Mapping) else value
        if not isinstance(value, str | list) or not value:
            what = f"is {'empty' if value in ('', []) else kind_of(value)}"
            raise DataError(
                f'{where}: "{name}" {what}; expected an answer: a text, a turn or a list of '
                "turns; fill it in, or pass --skip-bad-lines"
            )
        found.append(value)
    if isinstance(found[0], str) is not isinstance(found[1], str):
        raise DataError(
            f'{where}: "chosen" is {kind_of(found[0])} and "rejected" {kind_of(found[1])}; '
            "expected both of one kind; write both as texts or both as turns"
        )
    return _Answers(*found)


def _of_turns(record: RecordFields, prompt: Any, answers: _Answers, where: str) -> Preference:
    """Put both answers behind the prompt, and let the turns that both have be the prompt."""

    def conversation(answer: Any) -> Sample:
        turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        messages = {"messages": _behind(prompt, turns, record, where)}
        also = {name: record.get(name) for name in ("system", "tools")}
        return to_sample(Shape.CHAT, {**also, **messages}, where)

    return _apart(conversation(answers.chosen), conversation(answers.rejected), where)


def _behind(prompt: Any, turns: list[Any], record: RecordFields, where: str) -> list[Any]:
    """Return the turns of a prompt and an answer; the answer may be a whole conversation."""
    if isinstance(prompt, str):
        is_whole = isinstance(turns[0], Mapping) and not _is_assistants(turns[0])
        return turns if is_whole else [_turn("user", record, "prompt", where), *turns]
    if not isinstance(prompt, list):
        raise DataError(
            f"{where}: the prompt is {kind_of(prompt)}; expected a text or a list of turns; write "
            f"the record as {_WAYS}"
        )
    return turns if turns[: len(prompt)] == prompt else [*prompt, *turns]


def _is_assistants(turn: Mapping[str, Any]) -> bool:
    return turn.get("role", turn.get("from")) in ("assistant", "gpt", "function_call")


def _turn(role: str, record: RecordFields, field: str, where: str) -> dict[str, str]:
    return {"role": role, "content": filled(record, field, where)}


def _text_in(turns: Any) -> Any:
    """Return the text of an answer that is one turn; anything else as it is, to be refused."""
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], Mapping):
        return turns[0].get("content", turns[0].get("value"))
    return turns


def _apart(chosen: Sample, rejected: Sample, where: str) -> Preference:
    """Divide two conversations behind the turns that both have, but for the last of each."""
    assert isinstance(chosen, Conversation)
    assert isinstance(rejected, Conversation)
    same = _same_at_start(chosen.messages[:-1], rejected.messages[:-1])
    answers = chosen.messages[same:], rejected.messages[same:]
    if not same:
        raise DataError(
            f"{where}: the two conversations have no turn in common; expected one prompt and two "
            f"answers to it; correct the record, or write it as {_WAYS}"
        )
    for turn in (*answers[0], *answers[1]):
        if turn.loss_weight != 1 or (turn.role == "assistant" and not turn.is_learnt):
            raise DataError(
                f"{where}: a turn of an answer has a weight of its own; expected none with --task "
                "preference, where pairs count alike; take the mark away"
            )
    return Preference(chosen.messages[:same], *answers, where, chosen.tools)


def _same_at_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many items two sequences begin with alike."""
    both = takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False))
    return sum(1 for _ in both)


# ---------------------------------------------------------------- ratings


class _Rated(NamedTuple):
    answer: Any
    rating: float


def _from_ratings(field: str, record: RecordFields, where: str) -> Preference:
    """The best of several answers against the worst of them."""
    rated = [*_rated(field, record, where)]
    best, worst = (
        choose(rated, key=lambda each: each.rating) for choose in (max, min)
    )  # of equal ratings the first
    if best.rating == worst.rating:
        raise NoPreferenceError(
            f"{where}: all answers have the same rating; expected a best and a worst; remove the "
            "record"
        )
    pair = {"chosen": best.answer, "rejected": worst.answer}
    answers = _answers(pair, where)
    prompt = record["prompt"]
    if isinstance(prompt, str):
        prompt = [_turn("user", record, "prompt", where)]
    return _of_turns(record, prompt, answers, where)


def _rated(field: str, record: RecordFields, where: str) -> Iterator[_Rated]:
    answers, scores = record[field], record.get("scores")
    if not isinstance(answers, list) or len(answers) < 2:
        found = f"has {len(answers)}" if isinstance(answers, list) else f"is {kind_of(answers)}"
        raise DataError(
            f'{where}: "{field}" {found}; expected a list of two answers or more; correct it, or '
            "pass --skip-bad-lines"
        )
    if scores is not None and (not isinstance(scores, list) or len(scores) != len(answers)):
        found = f"{len(scores)} scores" if isinstance(scores, list) else kind_of(scores)
        raise DataError(
            f"{where}: {len(answers)} answers and {found}; expected a score for each; correct it, "
            "or pass --skip-bad-lines"
        )
    for number, answer in enumerate(answers):
        here = f"{where}: answer {number + 1}"
        if scores is not None:
            yield _Rated(_answer_in(answer, here), _number(scores[number], here))
        else:
            yield _Rated(_answer_in(answer, here), _number(_field_of(answer, _RATINGS), here))


def _answer_in(answer: Any, where: str) -> Any:
    found = _field_of(answer, _TEXTS) if isinstance(answer, Mapping) else answer
    if found is None:
        raise DataError(
            f"{where} has no text; expected one under {', '.join(_TEXTS[:4])}; rename its field, "
            "or pass --skip-bad-lines"
        )
    return found


def _field_of(answer: Any, names: Sequence[str]) -> Any:
    fields = answer if isinstance(answer, Mapping) else {}
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _number(value: Any, where: str) -> float:
    """Return a rating, which tables and some data sets hold as a text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        found = "no rating" if value is None else f"{kind_of(value)} for a rating"
        raise DataError(
            f"{where} has {found}; expected a number under score or rating, or a list of scores; "
            "correct it, or pass --skip-bad-lines"
        )
    return number


_CONVERT: Mapping[Shape, Callable[[RecordFields, str], Preference]] = {
    Shape.PREFERENCE: _from_prompt,
    Shape.PREFERENCE_QA: partial(_from_question, "question"),
    Shape.PREFERENCE_ALPACA: _from_alpaca,
    Shape.PREFERENCE_SHAREGPT: partial(_from_turns, "conversations"),
    Shape.PREFERENCE_CHAT: partial(_from_turns, "messages"),
    Shape.PREFERENCE_RATED: partial(_from_ratings, "responses"),
    Shape.PREFERENCE_COMPLETIONS: partial(_from_ratings, "completions"),
    Shape.PREFERENCE_WHOLE: _from_whole,
}
