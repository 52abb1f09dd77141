"""Labels: their kind and order, what a sample aims at, weights, and what is said of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.config import TaskOptions
from qlora_kit.data.labels import (
    MOST_LABELS,
    Labels,
    class_counts,
    doubtful,
    held_out_whole,
    labels_of,
    missing_from,
)
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import LabelledText, Shape
from qlora_kit.errors import ConfigError, DataError


def _samples(*labels: Any) -> Samples:
    items = [LabelledText("t", f"a.csv:{n}", label=label) for n, label in enumerate(labels, 1)]
    return Samples(items, Shape.CLASSIFY, "a.csv")


def _labels(*labels: Any, **options: Any) -> Labels:
    return labels_of(_samples(*labels), TaskOptions.model_validate(options))


def _targets(labels: Labels, *wanted: Any) -> list[list[float]]:
    return [labels.target(sample) for sample in _samples(*wanted).items]  # type: ignore[arg-type]


# ---------------------------------------------------------------- kind and order


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("pos", "neg", "pos"), ("neg", "pos")),
        ((2, 0, 1), ("0", "1", "2")),
        (("10", "9", "2"), ("2", "9", "10")),
        ((10, "9", 2), ("2", "9", "10")),
        (("1.0", 0.0, 1), ("0", "1")),
        ((5.0, 1.0), ("1", "5")),
        ((-1, 1), ("-1", "1")),
        (("01", "1"), ("01", "1")),
        (("true", "false"), ("false", "true")),
        (("b", 1), ("1", "b")),
        (("a|b", "a"), ("a", "a|b")),
    ],
)
def test_classes_are_in_the_order_of_their_numbers_or_names(
    labels: tuple[Any, ...], names: tuple[str, ...]
) -> None:
    found = _labels(*labels)
    assert (found.kind, found.names, found.outputs) == ("single", names, len(names))
    assert found.weights == (1.0,) * len(names)
    again = _labels(*reversed(labels))
    assert again == found, "the order of the rows does not count"
    places = [target for (target,) in _targets(found, *labels)]
    assert [names[int(place)] for place in places] == [found.name_of([each]) for each in places]


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ((0, 1, 1), "single"),
        (("0", "1"), "single"),
        ((0.5, 1), "regression"),
        (("0.5", "1"), "regression"),
        (("1e-3", "2"), "regression"),
        ((1.0, 2.0), "single"),
        ((("a",), ("a", "b")), "multi"),
        (((), ("a",)), "multi"),
        (("0.5", "high"), "single"),
    ],
)
def test_the_kind_is_that_of_the_data(labels: tuple[Any, ...], kind: str) -> None:
    assert _labels(*labels).kind == kind


def test_the_kind_may_be_asked_for() -> None:
    stars = _labels(1, 2, 5, label_kind="regression")
    assert (stars.kind, stars.names, stars.weights, stars.outputs) == ("regression", (), (), 1)
    assert _targets(stars, 3, "4.5", 1e-3) == [[3.0], [4.5], [0.001]]
    assert stars.name_of([0.25]) == "0.25"
    several = _labels("a|b", "b, c", "", 3, label_kind="multi")
    assert (several.kind, several.names) == ("multi", ("3", "a", "b", "c"))
    assert _targets(several, "c|a", "", ("b",), 3) == [[1, 3], [], [2], [0]]
    assert several.name_of([1, 3]) == "a, c"
    assert several.name_of([]) == "none"
    assert _labels("4.5", "3.5", labels="3.5,4.5").names == ("3.5", "4.5")
    assert _labels(0.5, 1, labels="0.5,1", label_kind="single").names == ("0.5", "1")
    assert _labels("x", "y", label_kind="single_label_classification").kind == "single"


@given(
    labels=st.lists(
        st.lists(st.sampled_from("abcd"), unique=True).map(tuple), min_size=2, max_size=9
    )
)
@settings(deadline=None)
def test_targets_of_several_labels_are_the_places_of_their_names(
    labels: list[tuple[str, ...]],
) -> None:
    if len({frozenset(each) for each in labels}) < 2:
        with pytest.raises(DataError, match=r"a\.csv: one label only"):
            _labels(*labels)
        return
    found = _labels(*labels)
    assert found.names == tuple(sorted({name for each in labels for name in each}))
    for label, target in zip(labels, _targets(found, *labels), strict=True):
        assert [found.names[int(place)] for place in target] == sorted(label)


# ---------------------------------------------------------------- names that are given


def test_names_give_the_order() -> None:
    found = _labels("pos", "neg", labels="pos,neg,other")
    assert found.names == ("pos", "neg", "other")
    assert _targets(found, "neg", "pos") == [[1], [0]]


def test_names_may_stand_for_numbers() -> None:
    found = _labels(0, 1, labels="negative,positive")
    assert _targets(found, 1, "0", "positive", 0.0) == [[1], [0], [1], [0]]
    lists = _labels(("0",), ("0", "1"), labels="joy,anger")
    assert _targets(lists, ("1",)) == [[1]]
    # Where names are numbers, a number is a name and no place.
    numbers = _labels(2, 1, labels="1,2")
    assert _targets(numbers, 1, 2) == [[0], [1]]
    with pytest.raises(DataError, match=r"a\.csv:1: the label 0 that is none of the 2 known ones"):
        _labels(0, 1, labels="1,2")


def test_the_first_unknown_label_is_named_with_the_number_of_others() -> None:
    known = _labels("x", "y")
    with pytest.raises(DataError) as caught:
        known.check(_samples("x", "z", "w", "y"))
    (line,) = caught.value.faults
    assert line == (
        "a.csv:2: the label z that is none of the 2 known ones; expected x, y; correct it, add it "
        "to the training data or to --labels, or remove the record (2 records have such a label)"
    )
    with pytest.raises(DataError, match=r'a\.csv:1: no "label"; expected one to learn or to com'):
        known.target(LabelledText("t", "a.csv:1"))


def test_ten_thousand_labels_are_the_most() -> None:
    assert len(_labels(*range(MOST_LABELS)).names) == MOST_LABELS
    with pytest.raises(DataError, match=r"10,001 different labels; expected 10,000 at most"):
        _labels(*range(MOST_LABELS + 1))
    assert _labels(*range(MOST_LABELS + 1), label_kind="regression").kind == "regression"
    with pytest.raises(ConfigError, match=r"--labels: 10,001 names; expected 10,000 names at mos"):
        _labels("a", "b", labels=tuple(map(str, range(MOST_LABELS + 1))))


# ---------------------------------------------------------------- weights and notices


@given(labels=st.lists(st.sampled_from("abcde"), min_size=2, max_size=40))
@settings(deadline=None)
def test_balanced_weights_make_all_classes_count_alike(labels: list[str]) -> None:
    counts = Counter(labels)
    if len(counts) < 2:
        return
    found = _labels(*labels, class_weights="balanced")
    for name, weight in zip(found.names, found.weights, strict=True):
        assert weight == pytest.approx(len(labels) / (len(counts) * counts[name]))
    assert class_counts(found, _samples(*labels)) == tuple(counts[name] for name in found.names)


def test_weights_are_of_the_labels_that_are_named() -> None:
    assert _labels("a", "b", class_weights="b=3").weights == (1.0, 3.0)
    assert _labels("a", "b", labels="c,b,a", class_weights="balanced").weights == (1.0, 1.0, 1.0)
    several = _labels(("a", "b"), ("a",), ("a",), (), class_weights="balanced")
    assert several.weights == pytest.approx((4 / (2 * 3), 4 / (2 * 1)))


def test_labels_without_rows_are_told() -> None:
    labels = Labels("single", ("a", "b", "§ §"), (1.0, 1.0, 1.0))
    assert not [*missing_from(labels, (1, 2, 3), "a.csv")]
    assert [*missing_from(labels, (1, 0, 0), "a.csv")] == [
        "labels that no row of a.csv has: 2 (b and 1 more); they are never learnt; add rows of "
        "them, or leave them out of --labels"
    ]
    assert not [*held_out_whole(labels, (1, 0, 3), (1, 0, 1))]
    (line,) = held_out_whole(labels, (1, 0, 3), (0, 0, 2))
    assert line.startswith("labels all of whose rows are held out: 1 (a); they are never learnt; ")


def test_names_that_look_like_a_slip_are_told() -> None:
    assert not [*doubtful(_labels("good", "bad", "none", "Zürich"))]
    spellings, absent = doubtful(_labels("Good", "good", "bad", "NaN", "§", "N/A"))
    assert spellings.startswith("labels that differ in capitals only: 2 (Good, good); each is a ")
    assert absent.startswith("labels that programs write where there is none: 2 (NaN and 1 more); ")


def test_labels_are_described_and_told_apart() -> None:
    single = _labels("a", "b")
    assert single.describe() == "one of 2 (a, b) each (--label-kind single)"
    weighed = _labels("a", "b", class_weights="a=2")
    assert weighed.describe() == "one of 2 (a, b) each, weighed (--label-kind single)"
    assert _labels(0, 1.5).describe().startswith("a number each, to be predicted (--label-kind r")
    many = _labels(("x y",), ("a",)).describe()
    assert many == "none, one or several of 2 (a and 1 more) each (--label-kind multi)"
    hashes = {
        each.content_hash()
        for each in (single, weighed, _labels("a", "c"), _labels(("a",), ("b",)), _labels(0, 0.5))
    }
    assert len(hashes) == 5
    assert _labels("b", "a", "a").content_hash() == single.content_hash()
