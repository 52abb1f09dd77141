"""Scores of predictions against targets, over all rows together.

Takes integers or numbers; returns plain figures, equal to those of scikit-learn's functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def class_figures(predicted: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Return accuracy, macro-F1, a row for each label, and for single labels who is taken for whom.

    Args:
        predicted: labels, (N,) int64; or (N, K) of ones and zeros where a row may have several.
        targets: likewise.
        names: of the K labels.

    Returns:
        `accuracy` (of several labels all must be right), `macro_f1` (over the labels that are
        there, predicted or wanted), `per_class`, and `confusion` (K, K): a row a wanted label, a
        column a predicted one.
    """
    is_single = predicted.dim() == 1
    count = len(names)
    right = predicted == targets
    figures: dict[str, Any] = {
        "accuracy": _share((right if is_single else right.all(1)).sum(), len(targets))
    }
    if is_single:
        pairs = torch.bincount(targets * count + predicted, minlength=count * count)
        confusion = pairs.view(count, count)
        hits, wanted, given = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    else:
        hits, wanted, given = (predicted * targets).sum(0), targets.sum(0), predicted.sum(0)
    per_class = [
        {
            "label": name,
            "precision": _share(hits[number], given[number]),
            "recall": _share(hits[number], wanted[number]),
            "f1": _share(2 * hits[number], wanted[number] + given[number]),
            "rows": int(wanted[number]),
        }
        for number, name in enumerate(names)
    ]
    # Of several labels each is a column; a single one that nobody wants or gives is not there.
    there: list[Any] = [
        each["f1"]
        for number, each in enumerate(per_class)
        if not is_single or wanted[number] + given[number] > 0
    ]
    figures["macro_f1"] = sum(there) / len(there)
    figures["per_class"] = per_class
    if is_single:
        figures["confusion"] = confusion.tolist()
    return figures


def _share(part: Any, whole: Any) -> float:
    """Return a share; 0 of nothing."""
    return float(part) / float(whole) if whole else 0.0


def number_figures(predicted: Tensor, targets: Tensor) -> dict[str, float]:
    """Return how far predicted numbers (N,) are from those that are wanted, and how they agree.

    Returns:
        `rmse`, `mae`, `pearson` and `spearman`; a correlation with what does not vary is 0.
    """
    predicted, targets = predicted.double(), targets.double()
    errors = predicted - targets
    return {
        "rmse": float(errors.square().mean().sqrt()),
        "mae": float(errors.abs().mean()),
        "pearson": _correlation(predicted, targets),
        "spearman": _correlation(_ranks(predicted), _ranks(targets)),
    }


def _correlation(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = (x.norm() * y.norm()).item()
    return float(x @ y) / scale if scale else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each value; equal ones share the mean of theirs."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts.double() - 1) / 2)[inverse]
    return ranks
