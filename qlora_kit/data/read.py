"""Reads a data file into records, whatever its format.

Takes a path; yields `Line(file, line, record)` in file order. Never looks at what a record
means, and imports neither torch nor datasets.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from qlora_kit.errors import DataError
from qlora_kit.storage import Line, read_json, read_json_lines, read_lines

_COUNTED_BY_RECORD = (".json", ".parquet")


def read_records(path: Path) -> Iterator[Line]:
    """Yield the records of a data file; the suffix tells the format.

    `Line.line` counts from 1: lines of a text format (of a record over several lines, its
    first), records of .json and .parquet; `place` words the difference.

    Raises:
        DataError: the file is missing, a folder, of unknown format, damaged, or empty.
    """
    reader = _reader_for(path)
    found = False
    for line in reader(path):
        found = True
        yield line
    if not found:
        raise DataError(f"{path}: no records; expected at least one; add rows or name another file")


def place(line: Line) -> str:
    """Return where a record stands, as errors name it: `file:412` or `file record 412`."""
    separator = ":" if _counts_lines(line.file) else " record "
    return f"{line.file}{separator}{line.line}"


@lru_cache(maxsize=8)
def _counts_lines(file: str) -> bool:
    suffix = Path(file).suffix.lower()
    return suffix in _READERS and suffix not in _COUNTED_BY_RECORD


def is_data_file_name(path: Path) -> bool:
    """Return whether the suffix is one that `read_records` reads."""
    return path.suffix.lower() in _READERS


def _reader_for(path: Path) -> Callable[[Path], Iterator[Line]]:
    known = ", ".join(_READERS)
    if path.is_dir():
        raise DataError(f"{path}: a folder; expected one data file ({known}); name a file in it")
    if not path.exists():
        raise DataError(f"{path}: no such file; expected a data file ({known}); check the path")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        found = f'suffix "{path.suffix}"' if path.suffix else "no suffix"
        raise DataError(f"{path}: {found}; expected one of {known}; convert or rename the file")
    return reader


def _read_json_list(path: Path) -> Iterator[Line]:
    if not path.stat().st_size:
        return
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(
            f"{path}: {kind_of(content)} at the top; expected a list of records; "
            "wrap it in [ ], or save one record a line as .jsonl"
        )
    for number, record in enumerate(content, 1):
        yield Line(str(path), number, record)


def _read_text(path: Path) -> Iterator[Line]:
    text = "\n".join(line.record for line in read_lines(path))
    if text.strip():
        yield Line(str(path), 1, {"text": text})


def _read_csv(path: Path) -> Iterator[Line]:
    return _read_table(path, ",")


def _read_tsv(path: Path) -> Iterator[Line]:
    return _read_table(path, "\t")


def _read_table(path: Path, delimiter: str) -> Iterator[Line]:
    header: list[str] | None = None
    for file, number, fields in _read_fields(path, delimiter):
        if header is None:
            header = [name.strip() for name in fields]
            if "" in header or len(set(header)) < len(header):
                raise DataError(
                    f"{file}:{number}: a column without a name or a name twice; "
                    "expected the first line to name every column; correct it"
                )
        elif len(fields) != len(header):
            raise DataError(
                f"{file}:{number}: {len(fields)} fields; expected {len(header)} as in the "
                "first line; quote fields that hold a separator, a quote or a line end"
            )
        else:
            yield Line(file, number, dict(zip(header, fields, strict=True)))


def _read_fields(path: Path, delimiter: str) -> Iterator[Line]:
    # The module's default refuses fields over 128 KiB, which a long document passes.
    csv.field_size_limit(sys.maxsize)
    lines = (line.record + "\n" for line in read_lines(path))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}:{number}: not a readable row ({error}); expected quotes in pairs; "
                'write a quote inside a quoted field as ""'
            ) from error
        if fields is None:
            return
        if fields:
            yield Line(str(path), number, fields)


def _read_parquet(path: Path) -> Iterator[Line]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches())
            for number, record in enumerate(chain.from_iterable(batches), 1):
                yield Line(str(path), number, record)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: not a readable parquet file; expected one written whole; write it again"
        ) from error


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value in plain words, such as "a list"."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else "a value")


_READERS: dict[str, Callable[[Path], Iterator[Line]]] = {
    ".jsonl": read_json_lines,
    ".json": _read_json_list,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
