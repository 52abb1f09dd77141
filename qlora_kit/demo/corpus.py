"""Generates the demo's text: the pretraining documents and the rows of the task.

The task turns spoken amounts into one written form: "forty-two dollars and five cents" into
"42.05 USD", "the third of May nineteen eighty-four" into "1984-05-03". The pretraining
documents use the same words and quantities in prose, in other written forms, and never show
the task's format. Everything is a function of a seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
_IRREGULAR = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
    "nine": "ninth", "twelve": "twelfth",
}  # fmt: skip
MONTHS = (
    "January February March April May June July August September October November December"
).split()
PARTS_OF_DAY = (("in the morning", "am", 0), ("in the evening", "pm", 12))
NAMES = "Ada Ben Clara David Elif Felix Grace Hugo Ines Jonas Kate Leo Maria Noah Olga Paul".split()
THINGS = (
    "apples bells boots boxes caps chairs clocks cups flags hats keys kites lamps tables".split()
)
PLACES = "Berlin Cairo Dublin Lima Lisbon London Oslo Paris Prague Rome Tokyo Vienna".split()

PROMPT = "Spoken: {text}\nWritten:"
FORBIDDEN = ("Spoken:", "Written:", " USD")


class Quantity(NamedTuple):
    """One quantity in its three forms."""

    spoken: str
    prose: str
    """as it is written in the pretraining text"""
    task: str
    """as the task wants it"""


# ---------------------------------------------------------------- quantities


def number_words(number: int) -> str:
    """Return a number from 0 to 9999 in words."""
    if number >= 1000:
        rest = number % 1000
        joint = " and " if 0 < rest < 100 else " "
        return f"{ONES[number // 1000]} thousand" + (joint + number_words(rest) if rest else "")
    if number >= 100:
        rest = number % 100
        return f"{ONES[number // 100]} hundred" + (f" and {number_words(rest)}" if rest else "")
    if number >= 20:
        return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")
    return ONES[number]


def ordinal_words(number: int) -> str:
    """Return "first", "twenty-second" and so on, up to 99."""
    head, dash, last = number_words(number).rpartition("-")
    if last.endswith("y"):
        return f"{head}{dash}{last[:-1]}ieth"
    return f"{head}{dash}{_IRREGULAR.get(last, last + 'th')}"


def year_words(year: int) -> str:
    """Return a year from 1910 to 1999 as it is read aloud."""
    return f"{number_words(year // 100)} {number_words(year % 100)}"


def count(rng: Random) -> Quantity:
    """Draw a count, of one to four digits alike often."""
    number = rng.randrange(10 ** rng.randint(1, 4))
    thing = rng.choice(THINGS)
    prose = f"{number:,} {thing}"
    return Quantity(f"{number_words(number)} {thing}", prose, f"{number} x {thing}")


def money(rng: Random) -> Quantity:
    """Draw an amount of money."""
    dollars, cents = rng.randint(2, 10 ** rng.randint(1, 3)), rng.choice((0, rng.randint(2, 99)))
    spoken = f"{number_words(dollars)} dollars"
    if cents:
        spoken += f" and {number_words(cents)} cents"
    return Quantity(spoken, f"${dollars}.{cents:02d}", f"{dollars}.{cents:02d} USD")


def date(rng: Random) -> Quantity:
    """Draw a date of the twentieth century."""
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1910, 1999)
    name = MONTHS[month - 1]
    spoken = f"the {ordinal_words(day)} of {name} {year_words(year)}"
    return Quantity(spoken, f"{day} {name} {year}", f"{year}-{month:02d}-{day:02d}")


def clock(rng: Random) -> Quantity:
    """Draw a time of day."""
    hour, minute = rng.randint(1, 11), rng.choice((0, rng.randint(1, 9), rng.randint(10, 59)))
    part, short, added = rng.choice(PARTS_OF_DAY)
    if not minute:
        spoken = f"{number_words(hour)} o'clock"
    else:
        spoken = f"{number_words(hour)} {'oh ' if minute < 10 else ''}{number_words(minute)}"
    prose = f"{hour}:{minute:02d} {short}"
    return Quantity(f"{spoken} {part}", prose, f"{hour + added:02d}:{minute:02d}")


QUANTITIES: tuple[Callable[[Random], Quantity], ...] = (count, money, date, clock)


# ---------------------------------------------------------------- pretraining text

# {s} spoken, {w} written in prose, {s2} {w2} another quantity, {n} a name, {p} a place.
_SENTENCES = (
    "How do you write {s}? You write {w}.",
    "How do you say {w}? You say {s}.",
    "{n} said {s}, and so the clerk noted {w}.",
    "The sign in {p} shows {w}. Read aloud, that is {s}.",
    "{n} heard {s} on the radio. In the paper it was {w}.",
    "First {n} wrote {w}, then {s}. Both mean the same.",
    "In figures {w}, in words {s}.",
    "In words {s}, in figures {w}.",
    "{s} is {w}, and {s2} is {w2}.",
    "{w} is {s}, and {w2} is {s2}.",
    "Was it {s} or {s2}? It was the second: {w2}.",
    "Was it {s} or {s2}? It was the first: {w}.",
    "{n} lives in {p}. {n} thinks of {s}, which is {w}.",
)


def sentence(rng: Random) -> str:
    """Return one sentence that has quantities in words and in figures."""
    kind = rng.choice(QUANTITIES)
    one, two = kind(rng), kind(rng)
    return rng.choice(_SENTENCES).format(
        s=one.spoken, w=one.prose, s2=two.spoken, w2=two.prose,
        n=rng.choice(NAMES), p=rng.choice(PLACES),
    )  # fmt: skip


def counting(rng: Random) -> str:
    """Return a few numbers in a row, in words or in figures."""
    start, step = rng.randrange(10 ** rng.randint(1, 4) - 5 * 1), rng.choice((1, 1, 2, 10))
    numbers = [min(9999, start + step * index) for index in range(5)]
    if rng.random() < 0.5:
        return ", ".join(map(str, numbers)) + "."
    return ", ".join(map(number_words, numbers)) + "."


def months(rng: Random) -> str:
    """Return which month of the year one is."""
    month = rng.randint(1, 12)
    spoken, name = ordinal_words(month), MONTHS[month - 1]
    if rng.random() < 0.5:
        return f"{name} is month {month:02d}, the {spoken} of the year."
    return f"Month {month:02d} of the year is {name}."


def hours(rng: Random) -> str:
    """Return a time on the dial of twelve and of twenty-four hours."""
    hour, (part, _, added) = rng.randint(1, 11), rng.choice(PARTS_OF_DAY)
    return f"{number_words(hour)} o'clock {part} is hour {hour + added:02d}."


def documents(seed: int) -> Iterator[str]:
    """Yield pretraining documents without end.

    Raises:
        ValueError: a document shows the task's format.
    """
    rng = Random(f"corpus {seed}")
    makers = (sentence, sentence, sentence, sentence, sentence, counting, months, hours)
    while True:
        text = rng.choice(makers)(rng)
        if any(word in text for word in FORBIDDEN):
            raise ValueError(f"the corpus shows the task's format: {text!r}")
        yield text


# ---------------------------------------------------------------- the task

_CARRIERS = (
    "{s}",
    "it says {s}",
    "please note {s}",
    "{n} said {s}",
    "I think it was {s}",
    "the answer is {s}",
    "write down {s} please",
    "we agreed on {s} in {p}",
    "{n} from {p} told me {s}",
    "make it {s} then",
)


def task_rows(
    seed: int, train: int, test: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and held-out rows; no prompt and no answer is in both.

    Args:
        seed: of all rows.
        train: number of training rows.
        test: number of held-out rows.
    """
    rng = Random(f"task {seed}")
    seen: set[str] = set()
    rows: list[dict[str, str]] = []
    while len(rows) < train + test:
        quantity = rng.choice(QUANTITIES)(rng)
        if quantity.task in seen:
            continue
        seen.add(quantity.task)
        text = rng.choice(_CARRIERS).format(
            s=quantity.spoken, n=rng.choice(NAMES), p=rng.choice(PLACES)
        )
        rows.append({"prompt": PROMPT.format(text=text), "completion": f" {quantity.task}"})
    return rows[:train], rows[train:]


def write_rows(rows: list[dict[str, str]], path: Path) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
