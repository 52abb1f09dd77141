"""Surveys the labels of token rows: how often each comes, what contradicts, what is in both parts.

Takes rows in arrays; returns frozen figures, with the names of labels and without any text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from qlora_kit.data.labels import Labels, is_shown
from qlora_kit.data.row_arrays import RowArrays, hash_of_ids
from qlora_kit.data.tag_schemes import OUTSIDE

# A class this many times as large as another is mostly right when it is always guessed.
_MOST_RATIO = 10
_MOST_LISTED = 5
_VALUE_BINS = 10


@dataclass(frozen=True)
class ClassCount:
    """The rows of one class."""

    name: str
    training: int
    validation: int | None
    weight: float


@dataclass(frozen=True)
class ClassFigures:
    """The classes of the rows, in the order of the head's outputs."""

    kind: str
    classes: tuple[ClassCount, ...]

    @property
    def counted(self) -> str:
        """What has a label: words, or rows."""
        return "words" if self.kind == "tags" else "rows"

    def warnings(self) -> Iterator[str]:
        """Yield a line where the classes are far from equally frequent.

        Classes that no row has were told when the rows were made.
        """
        # Most words are of no entity: that is no fault of the data.
        present = [
            each for each in self.classes
            if each.training and not (self.kind == "tags" and each.name == OUTSIDE)
        ]  # fmt: skip
        if not present:
            return
        largest = max(present, key=lambda each: each.training)
        smallest = min(present, key=lambda each: each.training)
        is_weighed = any(each.weight != 1 for each in self.classes)
        if largest.training >= _MOST_RATIO * smallest.training and not is_weighed:
            yield (
                f"labels out of balance: {self._in_words(largest, 'the largest')}, "
                f"{self._in_words(smallest, 'the smallest')}; add rows of the rare ones, or pass "
                "--class-weights balanced"
            )

    def _in_words(self, count: ClassCount, which: str) -> str:
        name = f", {count.name}," if is_shown(count.name) else ""
        what = self.counted.removesuffix("s") if count.training == 1 else self.counted
        return f"{which}{name} has {count.training:,} {what}"


@dataclass(frozen=True)
class ValueBin:
    """The number of rows with a value from `first` up to `last`."""

    first: float
    last: float
    rows: int


@dataclass(frozen=True)
class Values:
    """The values of the rows of one part."""

    smallest: float
    mean: float
    largest: float
    histogram: tuple[ValueBin, ...]


@dataclass(frozen=True)
class ValueFigures:
    """The values that are to be predicted."""

    kind: str
    training: Values
    validation: Values | None

    def warnings(self) -> Iterator[str]:
        """Yield a line where validation asks for what training never shows."""
        seen, asked = self.training, self.validation
        if asked and (asked.smallest < seen.smallest or asked.largest > seen.largest):
            yield (
                f"validation values beyond those of training: {asked.smallest:g} to "
                f"{asked.largest:g}, and in training {seen.smallest:g} to {seen.largest:g}; "
                "expected one range; add such rows to the training data"
            )


LabelFigures = ClassFigures | ValueFigures


def label_figures(labels: Labels, rows: RowArrays, measured: RowArrays | None) -> LabelFigures:
    """Return how often each label comes, or how values are spread.

    Args:
        labels: what the labels of the rows stand for.
        rows: of training.
        measured: of validation.
    """
    if labels.kind == "regression":
        return ValueFigures(
            labels.kind, _values(rows), None if measured is None else _values(measured)
        )
    counts = labels.counts(rows.labels.tolist())
    others = [None] * len(counts) if measured is None else labels.counts(measured.labels.tolist())
    parts = zip(labels.names, counts, others, labels.weights, strict=True)
    return ClassFigures(labels.kind, tuple(ClassCount(*part) for part in parts))


def _values(rows: RowArrays) -> Values:
    values = rows.labels
    counts, borders = numpy.histogram(values, _VALUE_BINS)
    edges = borders.tolist()
    bins = zip(edges, edges[1:], counts.tolist(), strict=False)
    return Values(
        float(values.min()),
        float(values.mean()),
        float(values.max()),
        tuple(ValueBin(*each) for each in bins),
    )


# ---------------------------------------------------------------- repeats


@dataclass(frozen=True)
class RepeatedTexts:
    """Token rows of a text that an earlier row has as well."""

    rows: int
    """number of rows that repeat a text, whatever their label"""
    of: int
    """number of rows that were compared"""
    contradicting: int
    """number of rows that repeat a text with another label than its first row has"""
    places: tuple[tuple[str, str], ...]
    """places of the first repeated rows, each with the place of the row that it repeats"""
    contradictions: tuple[tuple[str, str], ...]
    """likewise, of the first contradicting rows"""


_Known = dict[bytes, tuple[str, list[float]]]
"""the place and the labels of the first row of each text, by the hash of its ids"""


def repeated_texts(
    rows: RowArrays, measured: RowArrays | None
) -> tuple[RepeatedTexts, RepeatedTexts | None]:
    """Return the texts that repeat within the rows, and those of the measured rows among them."""
    known: _Known = {}
    within = _count_texts(rows, known, remember=True)
    return within, None if measured is None else _count_texts(measured, known, remember=False)


def _count_texts(rows: RowArrays, known: _Known, *, remember: bool) -> RepeatedTexts:
    """Compare rows with the known texts, by the ids that the model sees: after any cut."""
    repeated = contradicting = 0
    places: list[tuple[str, str]] = []
    contradictions: list[tuple[str, str]] = []
    for row in range(len(rows)):
        text, labels = hash_of_ids(rows.ids[rows.span(row)]), rows.labels_of(row)
        if text not in known:
            if remember:
                known[text] = rows.place(row), labels
            continue
        earlier, as_labelled = known[text]
        repeated += 1
        if len(places) < _MOST_LISTED:
            places.append((rows.place(row), earlier))
        if labels != as_labelled:
            contradicting += 1
            if len(contradictions) < _MOST_LISTED:
                contradictions.append((rows.place(row), earlier))
    return RepeatedTexts(repeated, len(rows), contradicting, tuple(places), tuple(contradictions))
