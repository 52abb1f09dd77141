"""Reads data files of every format into records.

Takes paths; yields `Record(place, content)` in file order. Never looks at the meaning of a record,
and imports neither torch nor datasets.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qlora_kit.data.columns import sentences
from qlora_kit.data.fields import is_plain
from qlora_kit.errors import DataError
from qlora_kit.storage import (
    Line,
    check_no_pointer,
    decode,
    parse_json,
    read_json_list,
    read_lines,
    read_raw_lines,
    read_text,
    read_whole,
)
from qlora_kit.storage.reading import MOST_LINE_BYTES

ALIGNED_FIELDS = ("question", "answer")

NamesOfColumns = Callable[[list[str], str], list[str] | None]
"""Names the columns of a table from the fields of its first line and its file; None: it is a header
that names them itself."""
_ROWS_AT_A_TIME = 1024
_PARQUET_BUFFER_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file, or the fault that stands in its place."""

    place: str
    """the name that errors give it: `file:412`, or `file record 412` where there are no lines"""
    content: Any
    """the parsed record; a `DataError` where only this record of the file cannot be read"""


def read_records(path: Path, names: NamesOfColumns | None = None) -> Iterator[Record]:
    """Yield the records of a data file. Its suffix tells the format; `.gz` may follow the suffix.

    Args:
        path: the file.
        names: names the columns of a .csv or .tsv that may have no header; if None, it has one.

    Raises:
        DataError: the file is missing, a folder, of unknown format, damaged, or empty.
    """
    check_regular(path)
    reader = _READERS.get(_suffix(path))
    if reader is None:
        found = f'suffix "{_suffix(path)}"' if _suffix(path) else "no suffix"
        raise DataError(
            f"{path}: {found}; expected one of {_known()}; convert or rename the file, or name "
            "two line-aligned ones as FILE+FILE"
        )
    yield from _some(reader(path, names), path)


def read_aligned(
    asked: Path, answered: Path, names: tuple[str, str] = ALIGNED_FIELDS
) -> Iterator[Record]:
    """Yield one record for each line of two aligned files.

    Args:
        asked: file of the first field.
        answered: file of the second field.
        names: of the two fields.

    Raises:
        DataError: a file is missing, damaged or empty, or the files have different numbers of
            lines.
    """
    for path in (asked, answered):
        check_regular(path)
    counts = [0, 0]
    for one, other in zip_longest(read_lines(asked), read_lines(answered)):
        counts = [counts[0] + (one is not None), counts[1] + (other is not None)]
        if counts[0] != counts[1]:
            continue  # counts on, because the error gives the number of lines of both
        for line in (one, other):
            _check_no_nul(line.record, f"{line.file}:{line.line}")
        fields = zip(names, (one.record, other.record), strict=True)
        yield Record(f"{asked}:{one.line}", dict(fields))
    if counts[0] != counts[1]:
        raise DataError(
            f"{asked}: {counts[0]} lines, and {counts[1]} in {answered}; expected line-aligned "
            "files; align them, one sample a line"
        )
    if not any(counts):
        raise _nothing_in(asked)


def read_columns(path: Path) -> Iterator[Record]:
    """Yield the sentences of a file that has a word and its tag on each line, whatever its suffix.

    Raises:
        DataError: the file is missing, a folder, damaged, or empty.
    """
    check_regular(path)
    yield from _some(_records_in_columns(path), path)


def first_fields(path: Path) -> list[str]:
    """Return the fields of the first line of a .tsv that has any; none of an empty one."""
    check_regular(path)
    return next((line.split("\t") for line in _text_lines(path) if line.strip()), [])


def is_data_file_name(path: Path) -> bool:
    """Return whether `read_records` reads a file of this name."""
    return _suffix(path) in _READERS


def without_gzip(path: Path) -> Path:
    """Return the name without the `.gz` at its end."""
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def _suffix(path: Path) -> str:
    return without_gzip(path).suffix.lower()


def check_regular(path: Path) -> None:
    """Check that a path names a file that can be read to its end.

    Raises:
        DataError: it names nothing, a folder, or what is no file.
    """
    # `os.path` answers no where `Path` raises, for example for a name that is too long.
    if os.path.isdir(path):
        raise DataError(f"{path}: a folder; expected one data file ({_known()}); name a file in it")
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file; expected a data file ({_known()}); check the path")
    # Reading from a pipe that nobody writes into would never end.
    if not os.path.isfile(path):
        raise DataError(f"{path}: not a regular file; expected a data file; save the data in one")


def _known() -> str:
    return ", ".join(_READERS) + ", each also as .gz"


def _some(records: Iterator[Record], path: Path) -> Iterator[Record]:
    """Yield the records of a file, of which there must be one or more."""
    record = None
    for record in records:
        yield record
    if record is None:
        raise _nothing_in(path)


def _nothing_in(path: Path) -> DataError:
    return DataError(f"{path}: no records; expected at least one; add rows or name another file")


# ---------------------------------------------------------------- JSON


def _records_in_json_lines(path: Path) -> Iterator[Record]:
    for line in read_raw_lines(path):
        where = f"{path}:{line.line}"
        try:
            text = decode(line)
            if text.strip():
                yield Record(where, parse_json(text, where))
        except DataError as error:
            yield Record(where, error)


def _records_in_json(path: Path) -> Iterator[Record]:
    try:
        for number, line in enumerate(read_json_list(path), 1):
            # A list may stand on one line, so the place gives the number of the record as well.
            yield Record(f"{path}:{line.line} (record {number})", line.record)
    except DataError as error:
        if "Extra data" not in str(error):
            raise
        raise DataError(
            f"{path}: more than one JSON value; expected one list of records; wrap them in [ ] "
            "with commas between, or name the file .jsonl if it has one record a line"
        ) from error


# ---------------------------------------------------------------- plain text


def _records_in_text(path: Path) -> Iterator[Record]:
    text = read_text(path)
    _check_no_nul(text, str(path))
    if text.strip():
        yield Record(f"{path}:1", {"text": text.removesuffix("\n")})


def _records_in_columns(path: Path) -> Iterator[Record]:
    for place, content in sentences(_checked_lines(path), is_conllu=_suffix(path) == ".conllu"):
        yield Record(place, content)


def _checked_lines(path: Path) -> Iterator[Line]:
    for line in read_lines(path):
        _check_no_nul(line.record, f"{path}:{line.line}")
        yield line


def _check_no_nul(text: str, where: str) -> None:
    if "\0" in text:
        # UTF-16 without its byte order mark is valid UTF-8 with a NUL beside every letter.
        raise DataError(
            f"{where}: has a NUL; expected UTF-8 text, and this is UTF-16 or no text at all; save "
            "it as UTF-8"
        )


# ---------------------------------------------------------------- tables


def _records_in_csv(path: Path, names: NamesOfColumns | None) -> Iterator[Record]:
    # Where the comma is the decimal mark, spreadsheets separate fields by semicolons.
    header = next((line for line in _text_lines(path) if line.strip()), "")
    return _records_in_table(path, ";" if ";" in header and "," not in header else ",", names)


def _records_in_tsv(path: Path, names: NamesOfColumns | None) -> Iterator[Record]:
    return _records_in_table(path, "\t", names)


def _records_in_table(path: Path, delimiter: str, names: NamesOfColumns | None) -> Iterator[Record]:
    header: list[str] | None = None
    for file, number, fields in _read_fields(path, delimiter):
        if header is None:
            header = names(fields, file) if names else None
            if header is None:
                header = [name.strip() for name in fields]
                _check_header(header, f"{file}:{number}")
                continue
        if len(fields) != len(header):
            fault = DataError(
                f"{file}:{number}: {len(fields)} fields; expected {len(header)} as in the "
                "first line; quote fields that hold a separator, a quote or a line end"
            )
            yield Record(f"{file}:{number}", fault)
        else:
            yield Record(f"{file}:{number}", dict(zip(header, fields, strict=True)))


def _check_header(names: list[str], where: str) -> None:
    if "" in names or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1 and is_plain(name)), None)
        found = f'"{twice}" twice' if twice else "a column without a name or a name twice"
        raise DataError(
            f"{where}: {found}; expected a name of its own for every column; correct it"
        )


def _read_fields(path: Path, delimiter: str) -> Iterator[Line]:
    # By default the csv module refuses fields over 128 KiB; a long document is longer.
    csv.field_size_limit(MOST_LINE_BYTES)
    reader = csv.reader(_text_lines(path), delimiter=delimiter, strict=True)
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


def _text_lines(path: Path) -> Iterator[str]:
    for line in _checked_lines(path):
        yield line.record + "\n"


# ---------------------------------------------------------------- parquet


def _records_in_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    check_no_pointer(path, DataError)
    is_plain_file = without_gzip(path) == path
    source = path if is_plain_file else io.BytesIO(read_whole(path))
    try:
        # By default a whole row group is held, and most writers make one group of a file.
        with parquet.ParquetFile(
            source,
            page_checksum_verification=True,
            pre_buffer=False,
            buffer_size=_PARQUET_BUFFER_BYTES,
        ) as file:
            _check_header(file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(_ROWS_AT_A_TIME):
                for record in batch.to_pylist():
                    number += 1
                    yield Record(f"{path} record {number}", without_nulls(record))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError) as error:
        raise DataError(
            f"{path}: not a readable parquet file; expected one written whole; write it again"
        ) from error


def without_nulls(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of a typed table without the nulls inside its fields.

    A typed table gives every object every key that any object has: a call of one tool gets the
    arguments of all other tools, as nulls. A null stands for a missing key.
    """
    return {
        name: _without_inner_nulls(value) if isinstance(value, dict | list) else value
        for name, value in record.items()
    }


def _without_inner_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_inner_nulls(inner) for key, inner in value.items() if inner is not None
        }
    return [_without_inner_nulls(inner) for inner in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path, NamesOfColumns | None], Iterator[Record]]] = {
    ".jsonl": lambda path, _: _records_in_json_lines(path),
    ".json": lambda path, _: _records_in_json(path),
    ".csv": _records_in_csv,
    ".tsv": _records_in_tsv,
    ".parquet": lambda path, _: _records_in_parquet(path),
    ".txt": lambda path, _: _records_in_text(path),
    ".conll": lambda path, _: _records_in_columns(path),
    ".conllu": lambda path, _: _records_in_columns(path),
}
