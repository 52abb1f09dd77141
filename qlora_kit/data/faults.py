"""Words for faults of the data, and a collection of them, so that one run tells them all.

Takes one line a fault; raises a single `DataError`. Never decides what a fault is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qlora_kit.errors import DataError

MAX_FAULTS_SHOWN = 20
_LONGEST_NAME = 30
_MOST_NAMES = 6


class Faults:
    """Faults found so far; only the first `MAX_FAULTS_SHOWN` are kept, the rest are counted."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def add(self, *lines: str) -> None:
        """Note faults, one line each."""
        self.lines += lines[: MAX_FAULTS_SHOWN - len(self.lines)]
        self.count += len(lines)

    def raise_if_any(self) -> None:
        """End here if anything was found.

        Raises:
            DataError: with the faults, and "... and N more" where there were too many to show.
        """
        if not self.count:
            return
        hidden = self.count - len(self.lines)
        raise DataError(*self.lines, *([f"... and {hidden} more"] if hidden else []))


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value in plain words, such as "a list"."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else "a value")


def is_plain(name: Any) -> bool:
    """Return whether a name, dotted or not, may be repeated; a freer one may be sample text."""
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        return False
    return all(part.isidentifier() for part in name.split("."))


def list_names(names: Iterable[Any]) -> str:
    """Return names as `a, b and 2 more`; those that are not plain are only counted."""
    names = list(names)
    plain = [str(name) for name in names if is_plain(name)][:_MOST_NAMES]
    others = len(names) - len(plain)
    shown = ([", ".join(plain)] if plain else []) + ([f"{others} more"] if others else [])
    return " and ".join(shown)
