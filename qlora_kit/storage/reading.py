"""The only reader of files: lines, whole texts, strict JSON; gzipped where the name ends in .gz.

Takes a file; yields `(file, line, record)`, so that every error can name its line. Reads a
bounded number of bytes at a time, whatever size a file claims to have. Writes nothing.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qlora_kit.errors import DataError, raised_as, reason
from qlora_kit.storage.pointers import check_no_pointer

MOST_LINE_BYTES = 64 * 2**20
MOST_WHOLE_BYTES = 2**30
_GZIP = b"\x1f\x8b"


class Line(NamedTuple):
    """One record and its place: `file` as it was given, `line` counted from 1."""

    file: str
    line: int
    record: Any


# ---------------------------------------------------------------- bytes


def read_raw_lines(path: Path) -> Iterator[Line]:
    r"""Yield the lines of a file as bytes, without their line ends.

    Only "\n" (and "\r\n") ends a line: `str.splitlines` would also split at U+2028 and
    give later lines the wrong number.

    Raises:
        DataError: the file is missing, a folder, not readable, its compression is damaged, or a
            line is longer than `MOST_LINE_BYTES`.
    """
    with _opened(path) as stream:
        number = 0
        while raw := stream.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(raw) > MOST_LINE_BYTES:
                raise DataError(
                    f"{path}:{number}: a line of more than {MOST_LINE_BYTES / 2**20:.0f} MiB; "
                    "expected one record a line; split it"
                )
            yield Line(str(path), number, raw.removesuffix(b"\n").removesuffix(b"\r"))


def read_last_lines(path: Path, most_bytes: int) -> list[bytes]:
    """Return the last whole lines of a file, without their line ends.

    A line without an end is left out: its writer was killed, or has not yet written the rest.

    Args:
        path: the file.
        most_bytes: what is before the last so many bytes of the file is not read.

    Raises:
        DataError: as of `read_raw_lines`.
    """
    with _opened(path) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - most_bytes))
        lines = stream.read(most_bytes).split(b"\n")
    return lines[size > most_bytes : -1]


def read_whole(path: Path) -> bytes:
    """Read a file that is one document.

    Raises:
        DataError: as of `read_raw_lines`; or the file is longer than `MOST_WHOLE_BYTES`.
    """
    with _opened(path) as stream:
        content = stream.read(MOST_WHOLE_BYTES + 1)
    if len(content) > MOST_WHOLE_BYTES:
        raise DataError(
            f"{path}: more than {MOST_WHOLE_BYTES / 2**30:.0f} GiB in one document; expected "
            "less, as it is held in memory whole; split it, or save one record a line as .jsonl"
        )
    return content


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, through gzip where the name says so; an error is one line."""
    check_no_pointer(path, DataError)
    with (
        raised_as(DataError, lambda error: f"{path}: {_unreadable(error)}", of=_UNREADABLE),
        path.open("rb") as stream,
    ):
        if _is_gzip(path, stream.peek(2)[:2]):
            with gzip.GzipFile(fileobj=stream) as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            yield stream


_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)
_UNREADABLE = (*_DAMAGED, OSError)


def _unreadable(error: Exception) -> str:
    if isinstance(error, _DAMAGED):
        return "damaged gzip data; expected a file written whole; write or fetch it again"
    assert isinstance(error, OSError)
    return f"{reason(error)}; expected a readable file; check the path and its rights"


def _is_gzip(path: Path, start: bytes) -> bool:
    named = path.suffix.lower() == ".gz"
    if named and start and start != _GZIP:
        raise DataError(
            f"{path}: not gzip data; expected what .gz says; take .gz from the name, or gzip it"
        )
    if start == _GZIP and not named:
        raise DataError(f"{path}: gzip data; expected .gz at the end of the name; add it")
    return named


# ---------------------------------------------------------------- text


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a UTF-8 text file, as `read_raw_lines` divides them.

    Raises:
        DataError: as of `read_raw_lines`; or a line is not UTF-8.
    """
    for line in read_raw_lines(path):
        yield line._replace(record=decode(line))


def decode(line: Line) -> str:
    """Return the text of a raw line, without the byte order mark of the file.

    Raises:
        DataError: the line is not UTF-8.
    """
    return _decode_bytes(line.record, line.file, line.line)


def _decode_bytes(raw: bytes, file: str, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        number += raw.count(b"\n", 0, error.start)
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1)
        raise DataError(
            f"{file}:{number}: byte {column} is not UTF-8; expected UTF-8 text; save the file so"
        ) from error


def read_text(path: Path) -> str:
    r"""Read a whole UTF-8 text; its lines end in "\n", whatever they end in on the disk.

    Raises:
        DataError: as of `read_whole`; or the text is not UTF-8.
    """
    return _decode_bytes(read_whole(path), str(path), 1).replace("\r\n", "\n")


# ---------------------------------------------------------------- JSON


def read_json(path: Path) -> Any:
    """Read a whole JSON file.

    Raises:
        DataError: the file is missing or is not valid JSON.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """Parse JSON strictly: no duplicate keys, no NaN or Infinity, no bottomless nesting.

    Args:
        text: the whole JSON text.
        where: its place, for errors.

    Raises:
        DataError: the text is no such JSON; the error names `where` and the fault.
    """
    with _json_errors(where, text):
        return strict_json(text)


def strict_json(text: str | bytes, *, infinity: bool = False) -> Any:
    """Parse JSON in which no key stands twice.

    Args:
        text: the whole JSON text.
        infinity: accept NaN and Infinity, which JSON does not have but some programs write.

    Raises:
        ValueError: the text is no such JSON; the error says why.
        RecursionError: the JSON is nested too deeply.
    """
    constant = None if infinity else _refuse_constant
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=constant)


def read_json_list(path: Path) -> Iterator[Line]:
    """Yield the values of a JSON list, each with the line it begins on.

    A file that holds another JSON value yields that value.

    Raises:
        DataError: the file is missing or is not valid JSON; values before the fault are yielded.
    """
    text, file = read_text(path), str(path)
    start = _skip_blank(text, 0)
    if text.startswith("[", start):
        yield from _items(text, file, _skip_blank(text, start + 1))
    elif text.strip():
        yield Line(file, 1 + text.count(_END, 0, start), parse_json(text, file))


def _items(text: str, file: str, index: int) -> Iterator[Line]:
    """Yield the values of a list; `index` is the place of the first value, or of the list's end."""
    number = 1 + text.count(_END, 0, index)
    is_over = text.startswith("]", index)
    after = _skip_blank(text, index + is_over)
    while not is_over:
        with _json_errors(f"{file}:{number}", text, file):
            value, after = _STRICT.raw_decode(text, index)
        yield Line(file, number, value)
        after = _skip_blank(text, after)
        is_over = text.startswith("]", after)
        if not is_over and not text.startswith(",", after):
            raise DataError(
                f"{file}:{number + text.count(_END, index, after)}: not valid JSON (no comma after "
                "a value of the list); expected a comma or ]; correct it"
            )
        after = _skip_blank(text, after + 1)
        number, index = number + text.count(_END, index, after), after
    if after < len(text):
        raise DataError(
            f"{file}: not valid JSON (more after the list); expected one list; correct it"
        )


_END = "\n"
_BLANK = re.compile(r"[ \t\n\r]*")


def _skip_blank(text: str, index: int) -> int:
    match = _BLANK.match(text, index)
    return match.end() if match else index


def _json_errors(where: str, text: str, file: str = "") -> AbstractContextManager[None]:
    """Turn an error of the parser into one line.

    Args:
        where: the place of the text.
        text: the whole text; if it has several lines, the error names the faulty one.
        file: the name of the file, put before the number of that line; if empty, `where` is.
    """

    def line(error: Exception) -> str:
        if isinstance(error, RecursionError):
            return f"{where}: JSON nested too deeply; expected a record of few levels; flatten it"
        found, place = str(error), where
        if isinstance(error, json.JSONDecodeError):
            found = f"{error.msg} at column {error.colno}"
            place = f"{file or where}:{error.lineno}" if file or "\n" in text else where
        elif "integer string conversion" in found:
            found = "a number of thousands of digits"
        return f"{place}: not valid JSON ({found}); expected it whole; correct it"

    return raised_as(DataError, line, of=(RecursionError, ValueError))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        # A key may be sample text, which errors never repeat.
        named = f' "{twice}"' if twice.isidentifier() and len(twice) <= 30 else ""
        raise ValueError(f"key{named} stands twice")
    return record


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
