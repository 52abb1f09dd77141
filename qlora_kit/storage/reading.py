"""The one reader of lines, and strict JSON.

Takes a file; yields `(file, line, record)` so that every error can name its line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qlora_kit.errors import DataError
from qlora_kit.storage.faults import reason


class Line(NamedTuple):
    """One record and where it stands: `file` as given, `line` counted from 1."""

    file: str
    line: int
    record: Any


def read_lines(path: Path) -> Iterator[Line]:
    r"""Yield the lines of a UTF-8 text file, without their line ends.

    Only "\n" (and "\r\n") ends a line: `str.splitlines` would also split at U+2028 and
    give later lines the wrong number.

    Raises:
        DataError: the file is missing, a folder, not readable or not UTF-8.
    """
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                yield Line(str(path), number, _decode(raw, path, number))
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}; expected a readable file") from error


def _decode(raw: bytes, path: Path, number: int) -> str:
    encoding = "utf-8-sig" if number == 1 else "utf-8"
    try:
        return raw.decode(encoding).removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error


def read_json_lines(path: Path) -> Iterator[Line]:
    """Yield the records of a JSON-lines file; blank lines are skipped but counted.

    Raises:
        DataError: a line is not valid JSON, see `parse_json`.
    """
    for file, number, text in read_lines(path):
        if text.strip():
            yield Line(file, number, parse_json(text, f"{file}:{number}"))


def read_json(path: Path) -> Any:
    """Read a JSON file whole.

    Raises:
        DataError: the file is missing or is not valid JSON.
    """
    return parse_json("\n".join(line.record for line in read_lines(path)), str(path))


def parse_json(text: str, where: str) -> Any:
    """Parse JSON strictly: no duplicate keys, no NaN or Infinity, no bottomless nesting.

    Raises:
        DataError: naming `where` and what was found.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply; flatten the record") from error
    except ValueError as error:
        found = str(error)
        if isinstance(error, json.JSONDecodeError):
            found = error.msg
            where = f"{where}:{error.lineno}" if "\n" in text else where
        raise DataError(f"{where}: not valid JSON ({found}); correct it") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'key "{twice}" stands twice')
    return record


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
