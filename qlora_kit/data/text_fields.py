"""The texts of a record: strings, whole characters, and not empty where something is learnt.

Takes a field of a record; returns its text unchanged, or raises a line that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qlora_kit.data.faults import kind_of
from qlora_kit.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")


def string(record: Mapping[str, Any], key: str, where: str, within: str = "") -> str:
    """Return a field that must be a string.

    Args:
        record: has the field.
        key: its name.
        where: place of the record.
        within: what part of it, such as "turn 3: ".

    Raises:
        DataError: it is not, or not of whole characters.
    """
    value = record[key]
    if not isinstance(value, str):
        raise DataError(
            f'{where}: {within}"{key}" is {kind_of(value)}; expected a string; '
            "write the text in quotes"
        )
    return clean(value, f'{where}: {within}"{key}"')


def filled(record: Mapping[str, Any], key: str, where: str, within: str = "") -> str:
    """Return a field that must have more than white space in it.

    Raises:
        DataError: it is not a string, or it is empty.
    """
    value = string(record, key, where, within)
    if not value.strip():
        raise DataError(
            f'{where}: {within}"{key}" is empty; expected text; fill it in or remove the record'
        )
    return value


def optional(record: Mapping[str, Any], key: str, where: str, within: str = "") -> str:
    """Return a field that may be missing or null: both are as good as empty.

    Raises:
        DataError: it is there and not a string.
    """
    return "" if record.get(key) is None else string(record, key, where, within)


def clean(text: str, what: str) -> str:
    """Return a text after a look at its characters.

    Raises:
        DataError: half of a surrogate pair, which no tokenizer takes.
    """
    if not text.isascii() and _SURROGATE.search(text):
        raise DataError(
            f"{what} has half of a surrogate pair; expected whole characters; "
            "write the character itself or both halves"
        )
    return text
