"""Scores of predictions against targets, over all rows together.

Takes integers or numbers; returns plain figures, equal to those of scikit-learn's functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_kit.data.tag_schemes import entities


def class_figures(
    predicted: Tensor, targets: Tensor, names: Sequence[str], counted: str = "rows"
) -> dict[str, Any]:
    """Return accuracy, macro-F1, a row for each label, and for single labels who is taken for whom.

    Args:
        predicted: labels, (N,) int64; or (N, K) of ones and zeros where a row may have several.
        targets: likewise.
        names: of the K labels.
        counted: the name of what is labelled.

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
        {"label": name, **_shares(hits[n], given[n], wanted[n]), counted: int(wanted[n])}
        for n, name in enumerate(names)
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


def entity_figures(
    predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Return what seqeval says of tags: an entity is right if its type and all its words are.

    Args:
        predicted: the tags of each sentence, which have a scheme.
        wanted: likewise.

    Returns:
        `precision`, `recall` and `f1` over all entities, `macro_precision`, `macro_recall` and
        `macro_f1` (means over the types that are there, predicted or wanted), `token_accuracy`,
        and `per_class`, a row for each type.
    """
    hits, given, there = Counter[str](), Counter[str](), Counter[str]()
    right = words = 0
    for found, right_ones in zip(predicted, wanted, strict=True):
        ours, theirs = set(entities(found)), set(entities(right_ones))
        given.update(each.type for each in ours)
        there.update(each.type for each in theirs)
        hits.update(each.type for each in ours & theirs)
        right += sum(one == other for one, other in zip(found, right_ones, strict=True))
        words += len(right_ones)
    types = sorted(given.keys() | there.keys())
    per_class = [
        {"label": kind, **_shares(hits[kind], given[kind], there[kind]), "entities": there[kind]}
        for kind in types
    ]
    macro = {
        f"macro_{name}": _share(sum(each[name] for each in per_class), len(per_class))
        for name in ("precision", "recall", "f1")
    }
    return {
        **_shares(hits.total(), given.total(), there.total()),
        **macro,
        "token_accuracy": _share(right, words),
        "per_class": per_class,
    }


def _shares(hits: Any, given: Any, wanted: Any) -> dict[str, Any]:
    """Return precision, recall and F1 of numbers of answers: right, given, and wanted ones."""
    return {
        "precision": _share(hits, given),
        "recall": _share(hits, wanted),
        "f1": _share(2 * hits, wanted + given),
    }


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
