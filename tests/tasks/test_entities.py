"""Entities and their scores are seqeval's, whatever stands in a row of tags."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import accuracy_score
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support

from qlora_kit.data.tag_schemes import entities, has_scheme, scheme_of
from qlora_kit.tasks.scores import entity_figures

# Every prefix in every place: most rows have transitions that no scheme allows.
TAG = st.sampled_from(["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("X", "Y-Z"))])
PAIRS = st.lists(st.lists(st.tuples(TAG, TAG), min_size=1, max_size=12), min_size=1, max_size=6)


@given(tags=st.lists(TAG, max_size=20))
@settings(deadline=None, max_examples=300)
def test_the_entities_of_a_row_are_those_of_seqeval(tags: list[str]) -> None:
    found = [(kind, start, end - 1) for kind, start, end in entities(tags)]
    assert found == get_entities(tags)


@given(sentences=PAIRS)
@settings(deadline=None, max_examples=200)
def test_figures_equal_those_of_seqeval(sentences: list[list[tuple[str, str]]]) -> None:
    predicted = [[tag for tag, _ in sentence] for sentence in sentences]
    wanted = [[tag for _, tag in sentence] for sentence in sentences]
    found = entity_figures(predicted, wanted)
    micro = precision_recall_fscore_support(wanted, predicted, average="micro", zero_division=0)
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(micro[:3])
    assert found["token_accuracy"] == pytest.approx(accuracy_score(wanted, predicted))
    each = precision_recall_fscore_support(wanted, predicted, average=None, zero_division=0)
    rows = [
        tuple(row[name] for row in found["per_class"])
        for name in ("precision", "recall", "f1", "entities")
    ]
    for ours, theirs in zip(rows, each, strict=True):
        assert ours == pytest.approx(tuple(theirs))
    if not found["per_class"]:
        assert found["macro_f1"] == 0.0
        return
    macro = precision_recall_fscore_support(wanted, predicted, average="macro", zero_division=0)
    names = ("macro_precision", "macro_recall", "macro_f1")
    assert tuple(found[name] for name in names) == pytest.approx(macro[:3])


@given(tags=st.lists(st.sampled_from(["O", "B", "I"]), max_size=12))
@settings(deadline=None, max_examples=100)
def test_prefixes_alone_are_entities_of_one_type(tags: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = get_entities(tags)
    assert [(kind, start, end - 1) for kind, start, end in entities(tags)] == expected


def test_the_letters_of_other_schemes_mean_the_same() -> None:
    bioes = ["S-X", "B-X", "I-X", "E-X", "O", "S-Y", "S-Y"]
    for letters in ("USLEBBII", "WSEEBBMI"):
        renamed = dict(zip(letters[1::2], letters[::2], strict=True))
        other = [tag if tag == "O" else f"{renamed[tag[0]]}{tag[1:]}" for tag in bioes]
        assert entities(other) == entities(bioes)


@pytest.mark.parametrize(
    ("rows", "name", "unopened"),
    [
        (["B-X I-X O B-X B-X", "B-Y"], "BIO", 0),
        (["B-X I-X O", "O I-Y", "B-Y"], "BIO", 1),
        (["I-X I-X O I-Y", "I-X B-X I-X"], "IOB1", 0),
        (["I-X O", "I-Y"], "IOB1", 0),
        (["B-X E-X O S-Y"], "BIOES", 0),
        (["B-X L-X O U-Y", "L-X"], "BILOU", 1),
        (["B-X M-X E-X O W-Y"], "BMEWO", 0),
    ],
)
def test_a_scheme_is_recognised(rows: list[str], name: str, unopened: int) -> None:
    found = scheme_of([row.split() for row in rows])
    assert (found.name, found.unopened) == (name, unopened)
    assert set(found.types) <= {"X", "Y"}


@pytest.mark.parametrize(
    ("names", "marks"),
    [
        ("O B-X I-X", True), ("B-X", True), ("I-X O", True), ("O B I", True), ("B-X S-X E-X", True),
        ("NOUN VERB", False), ("O", False), ("S M L", False), ("B-X NOUN", False), ("0 1 2", False),
        ("S-X O", False), ("", False),
    ],
)  # fmt: skip
def test_which_tags_mark_entities(names: str, marks: Any) -> None:
    assert has_scheme(names.split()) is marks
