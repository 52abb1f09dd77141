"""Scores equal those of scikit-learn's and SciPy's own functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from qlora_kit.tasks.scores import class_figures, number_figures

NAMES = ("a", "b", "c", "d")
ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)
_ROW_OF_SEVERAL = st.lists(st.integers(0, 1), min_size=3, max_size=3)
ROWS_OF_SEVERAL = st.lists(st.tuples(_ROW_OF_SEVERAL, _ROW_OF_SEVERAL), min_size=1, max_size=20)
NUMBERS = st.integers(-20, 20).map(float)


@given(rows=ROWS)
@example(rows=[(0, 0)])
@example(rows=[(0, 1), (1, 0)])
def test_single_labels(rows: list[tuple[int, int]]) -> None:
    wanted, predicted = zip(*rows, strict=True)
    found = class_figures(torch.tensor(predicted), torch.tensor(wanted), NAMES)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(wanted, predicted))
    # Without `labels` scikit-learn averages over the labels that are wanted or predicted.
    expected = metrics.f1_score(wanted, predicted, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected)
    matrix = metrics.confusion_matrix(wanted, predicted, labels=range(4))
    assert found["confusion"] == matrix.tolist()
    assert_per_class(found, wanted, predicted, NAMES)


@given(rows=ROWS_OF_SEVERAL)
@example(rows=[([0, 0, 0], [0, 0, 0])])
@example(rows=[([0, 0, 1], [0, 1, 0])])
def test_several_labels(rows: list[tuple[list[int], list[int]]]) -> None:
    wanted, predicted = (np.array(side) for side in zip(*rows, strict=True))
    found = class_figures(torch.tensor(predicted), torch.tensor(wanted), NAMES[:3])
    # Of several labels all must be right.
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(wanted, predicted))
    expected = metrics.f1_score(wanted, predicted, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected)
    assert "confusion" not in found
    assert_per_class(found, wanted, predicted, NAMES[:3])


def assert_per_class(found: dict, wanted: object, predicted: object, names: tuple) -> None:
    """Compare the table of labels; a share of nothing is 0 on both sides."""
    columns = metrics.precision_recall_fscore_support(
        wanted, predicted, labels=range(len(names)), average=None, zero_division=0
    )
    keys = ("precision", "recall", "f1", "rows")
    for key, column in zip(keys, columns, strict=True):
        assert [row[key] for row in found["per_class"]] == pytest.approx(list(column)), key
    assert [row["label"] for row in found["per_class"]] == list(names)


@given(pairs=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=30))
@example(pairs=[(1.0, 2.0), (1.0, 3.0)])
def test_numbers(pairs: list[tuple[float, float]]) -> None:
    predicted, wanted = (list(side) for side in zip(*pairs, strict=True))
    found = number_figures(torch.tensor(predicted), torch.tensor(wanted))
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(wanted, predicted))
    assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(wanted, predicted))
    # SciPy's correlation with what does not vary is NaN, with a warning; here it is 0.
    varies = len(set(predicted)) > 1 and len(set(wanted)) > 1
    expected = stats.pearsonr(predicted, wanted).statistic if varies else 0.0
    assert found["pearson"] == pytest.approx(expected, abs=1e-9)
    expected = stats.spearmanr(predicted, wanted).statistic if varies else 0.0
    assert found["spearman"] == pytest.approx(expected, abs=1e-9)
