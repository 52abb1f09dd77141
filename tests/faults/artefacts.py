"""Hostile artefacts: each is opened by a process of its own, and none touches the canary."""

from __future__ import annotations

from functools import partial

from .children import finish, spread
from .hostile import attacks
from .runs import Sample
from .table import Row, row_of

_PROMISE = "hostile artefacts: refused in one line, no canary touched"


def artefacts(sample: Sample, count: int | None = None) -> Row:
    """Open every class of hostile artefact, or the first `count` of them."""
    names = list(attacks())[:count]
    results = spread(partial(_opened, sample), names, sample.folder / "artefacts")
    return row_of(_PROMISE, results, f"{len(names)} classes")


def _opened(sample: Sample, name: str) -> list[str]:
    folder = sample.folder / "artefacts" / name
    canary = folder / "canary" / "canary"
    canary.parent.mkdir(parents=True)
    (folder / "opened").mkdir()
    ended = finish(lambda: attacks()[name](folder / "opened", canary), folder / "streams")
    last = ended.errors.strip().splitlines()[-1:]
    return [f"{name}: {' '.join(last)}"] if ended.code else []
