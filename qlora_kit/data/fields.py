"""The fields of a record: words for their values, checks of their texts, the adapter they name.

Takes a field of a record; returns its value unchanged, or raises one line that names the field.
`Faults` collects these lines, so that one run reports them all. Knows nothing of shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_kit.errors import DataError

MAX_FAULTS_SHOWN = 20
_LONGEST_NAME = 30
_MOST_NAMES = 6
_SURROGATE = re.compile("[\ud800-\udfff]")


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
        """Raise the faults, if there are any.

        Raises:
            DataError: the faults; "... and N more" stands last where there were too many to show.
        """
        if not self.count:
            return
        hidden = self.count - len(self.lines)
        raise DataError(*self.lines, *([f"... and {hidden} more"] if hidden else []))


# ---------------------------------------------------------------- words


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value in words, such as "a list"."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else "a value")


def is_plain(name: Any) -> bool:
    """Return whether an error may repeat a name: a short identifier, which may have dots.

    Any other name may be sample text.
    """
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        return False
    return all(part.isidentifier() for part in name.split("."))


def list_names(names: Iterable[Any]) -> str:
    """Return names as `a, b and 2 more`; names that are not plain are only counted."""
    names = list(names)
    plain = [str(name) for name in names if is_plain(name)][:_MOST_NAMES]
    others = len(names) - len(plain)
    shown = ([", ".join(plain)] if plain else []) + ([f"{others} more"] if others else [])
    return " and ".join(shown)


# ---------------------------------------------------------------- texts


def string(record: Mapping[str, Any], key: str, where: str) -> str:
    """Return a field that must be a string.

    Args:
        record: the record, which has the field.
        key: the name of the field.
        where: the place of the record, or of a part of it, such as `a.jsonl:4: turn 3`.

    Raises:
        DataError: the field is no string, or has half of a character in it.
    """
    value = record[key]
    if not isinstance(value, str):
        raise DataError(
            f'{where}: "{key}" is {kind_of(value)}; expected a string; write the text in quotes'
        )
    return clean(value, f'{where}: "{key}"')


def filled(record: Mapping[str, Any], key: str, where: str) -> str:
    """Return a field that must hold more than white space.

    Raises:
        DataError: the field is no string, or it is empty.
    """
    return not_empty(string(record, key, where), key, where)


def filled_list(record: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """Return the texts of a field that holds one or a list of them, each text once.

    Raises:
        DataError: the list is empty, or a text of it is no string or empty.
    """
    if not isinstance(record[key], list):
        return (filled(record, key, where),)
    if not record[key]:
        raise DataError(
            f'{where}: "{key}" is an empty list; expected one text or more; fill it in or remove '
            "the record"
        )
    texts = [
        filled({key: text}, key, f"{where}: text {n}") for n, text in enumerate(record[key], 1)
    ]
    return tuple(dict.fromkeys(texts))


def not_empty(text: str, key: str, where: str) -> str:
    """Return the text of a field; check that it holds more than white space.

    Raises:
        DataError: the text is empty, or all white space.
    """
    if not text.strip():
        raise DataError(
            f'{where}: "{key}" is empty; expected text; fill it in or remove the record'
        )
    return text


def optional(record: Mapping[str, Any], key: str, where: str) -> str:
    """Return a field that may be missing or null; both are returned as the empty text.

    Raises:
        DataError: the field is there and no string.
    """
    return "" if record.get(key) is None else string(record, key, where)


def clean(text: str, what: str) -> str:
    """Return a text; check that its characters are whole.

    Raises:
        DataError: the text has half of a surrogate pair, which no tokenizer takes.
    """
    if not text.isascii() and _SURROGATE.search(text):
        raise DataError(
            f"{what} has half of a surrogate pair; expected whole characters; "
            "write the character itself or both halves"
        )
    return text


# ---------------------------------------------------------------- adapters


@dataclass(frozen=True)
class RowAdapters:
    """The field by which a record names its adapter, and the adapters there are.

    Attributes:
        field: name of the field.
        names: names of the adapters.
    """

    field: str
    names: tuple[str, ...]

    def of(self, record: Mapping[str, Any], where: str) -> str | None:
        """Return the adapter of a record; None where the field is missing, null or empty.

        Args:
            record: the fields of the record.
            where: the place of the record, for errors.

        Raises:
            DataError: the field is no string, or names no adapter.
        """
        name = optional(record, self.field, where)
        if not name or name in self.names:
            return name or None
        found = f"no adapter is named {name!r}" if is_plain(name) else "names no adapter"
        raise DataError(
            f'{where}: "{self.field}": {found}; expected one of {", ".join(self.names)}, or none '
            "for the base alone; correct it, or give that adapter with --adapter NAME=FOLDER"
        )
