"""Scores equal the definitions of scikit-learn and SciPy, written here in another way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_kit.tasks.scores import class_figures, number_figures

ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)
NAMES = ("a", "b", "c", "d")
NUMBERS = st.integers(-20, 20).map(float)


def figures_of(rows: list[tuple[int, int]]) -> dict[str, object]:
    wanted, predicted = (torch.tensor(side) for side in zip(*rows, strict=True))
    return class_figures(predicted, wanted, NAMES)


@given(rows=ROWS)
def test_single_labels(rows: list[tuple[int, int]]) -> None:
    found = figures_of(rows)
    assert found["accuracy"] == pytest.approx(sum(w == p for w, p in rows) / len(rows))
    confusion = [[sum(pair == (w, p) for pair in rows) for p in range(4)] for w in range(4)]
    assert found["confusion"] == confusion
    scores = []
    for label in sorted({each for pair in rows for each in pair}):
        hits = confusion[label][label]
        given_, wanted = sum(row[label] for row in confusion), sum(confusion[label])
        precision = hits / given_ if given_ else 0.0
        recall = hits / wanted if wanted else 0.0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
        row = found["per_class"][label]  # type: ignore[index]
        assert (row["precision"], row["recall"]) == pytest.approx((precision, recall))
    # scikit-learn averages over the labels that are wanted or predicted.
    assert found["macro_f1"] == pytest.approx(sum(scores) / len(scores))


@given(rows=ROWS)
def test_single_labels_equal_scikit_learn(rows: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    found = figures_of(rows)
    wanted, predicted = zip(*rows, strict=True)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(wanted, predicted))
    expected = metrics.f1_score(wanted, predicted, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected)
    matrix = metrics.confusion_matrix(wanted, predicted, labels=range(4))
    assert found["confusion"] == matrix.tolist()


def test_several_labels() -> None:
    wanted = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]])
    predicted = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0]])
    found = class_figures(predicted, wanted, ("x", "y", "z"))
    assert found["accuracy"] == 0.5, "all labels of a row must be right"
    assert [row["f1"] for row in found["per_class"]] == [0.5, 1.0, 1.0]
    assert found["macro_f1"] == pytest.approx(2.5 / 3)
    assert "confusion" not in found


@given(pairs=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=30))
def test_numbers(pairs: list[tuple[float, float]]) -> None:
    predicted, wanted = (list(side) for side in zip(*pairs, strict=True))
    found = number_figures(torch.tensor(predicted), torch.tensor(wanted))
    count = len(pairs)
    assert found["mae"] == pytest.approx(sum(abs(p - w) for p, w in pairs) / count)
    assert found["rmse"] == pytest.approx(math.sqrt(sum((p - w) ** 2 for p, w in pairs) / count))
    assert found["pearson"] == pytest.approx(correlation(predicted, wanted), abs=1e-9)
    ranked = correlation(ranks(predicted), ranks(wanted))
    assert found["spearman"] == pytest.approx(ranked, abs=1e-9)


def correlation(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    both = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    scale = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    return both / scale if scale else 0.0


def ranks(values: list[float]) -> list[float]:
    """Return the mean place of each value among all, equal ones together."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]
