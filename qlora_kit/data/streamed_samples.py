"""Samples that are read while they are needed, from files of any size, as often as asked.

Takes the value of `--data`; yields samples in the order of the files. Holds one record at a time,
and notices when a file is not what it was at the start. Never tokenises. Imports neither torch nor
transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from qlora_kit.config import RecordOptions
from qlora_kit.data.labelled_fields import TablesWithoutHeader
from qlora_kit.data.read import Record, check_regular, without_gzip
from qlora_kit.data.recognise import Recogniser, check_columns, check_format, to_samples
from qlora_kit.data.samples import Samples, Source, open_source
from qlora_kit.data.shapes import Sample
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.storage import file_hash
from qlora_kit.storage.faults import reason

# What is looked at before training: enough to see the usual row, and read in a moment.
HEAD_RECORDS = 1000
HEAD_CHARACTERS = 1_000_000
_RECORDS_BETWEEN_CHECKS = 1000
_PACKED, _PACKED_TIMES = (".gz", ".parquet"), 3


class _State(NamedTuple):
    """Size in bytes and time of the last change, in ns, of a file."""

    size: int
    changed: int


@dataclass
class SampleStream:
    """The samples of a file, a folder or a data set of the hub, read one after the other.

    Each pass opens the source anew. A pass ends with an error if a file is not as it was when the
    stream was opened.

    Attributes:
        data: the value of `--data`.
        options: how records are understood; whether records with a fault are left out.
        task: the task that the samples are for.
        skipped: records of the data that were left out for a fault, as far as it has been read.
        first_skipped: the fault of the first of them.
        why: the reason that the data are streamed, in words, where nobody asked for it.
        whole: all samples, where they are in memory, see `HeldSamples`: never here.
    """

    data: str
    options: RecordOptions
    task: str = "causal"
    skipped: int = field(default=0, init=False)
    first_skipped: str = field(default="", init=False)
    why: str = field(default="", init=False)
    whole: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_format(self.options, self.task)
        check_columns(self.options.columns, self.task)
        source = self._opened()
        self.name = source.name
        self.version = source.version
        for path in source.files:
            check_regular(path)
            _check_read_as_it_comes(path)
        self._states = {path: _state_of(path) for path in source.files}

    @property
    def is_of_hub(self) -> bool:
        """Whether it is a data set of the hub."""
        return not self._states

    @property
    def text_bytes(self) -> int:
        """Bytes of text of the files, roughly: packed ones count threefold."""
        return sum(
            state.size * (_PACKED_TIMES if path.suffix.lower() in _PACKED else 1)
            for path, state in self._states.items()
        )

    @cached_property
    def content_hash(self) -> str:
        """The SHA-256 of all that decides the samples: the files' bytes, and how they are read.

        The files are read once for it. Where a file lies, and when it was changed, is no part of
        it; neither is `skip_bad_lines`: before the first fault it changes nothing.

        Raises:
            DataError: a file changed meanwhile.
            StorageError: a file cannot be read.
        """
        files = [(state.size, file_hash(path)) for path, state in self._states.items()]
        self._check_unchanged()
        read = [self.options.format, [*self.options.columns.items()], self.version]
        return hashlib.sha256(json.dumps([files, read]).encode()).hexdigest()

    def samples(self) -> Iterator[Sample]:
        """Yield all samples, in the order of the files.

        Raises:
            DataError: a record has a fault, unless these are left out; a file changed since the
                stream was opened; or there is no sample.
            HubError: the hub is out of reach.
        """
        recogniser = Recogniser(self.options, task=self.task)
        count = skipped = 0
        for record in self._records():
            try:
                sample, _ = recogniser.sample(record)
            except DataError as error:
                if not self.options.skip_bad_lines:
                    raise
                # Each pass meets the same faults.
                skipped += 1
                self.skipped = max(self.skipped, skipped)
                self.first_skipped = self.first_skipped or error.faults[0]
                continue
            count += 1
            yield sample
        if not count:
            raise DataError(f"{self.name}: no usable record; expected at least one; add rows")

    def head(self) -> Samples:
        """Return the first samples, for all that looks at data before training; they are read once.

        Raises:
            DataError: they are not usable, see `to_samples`.
        """
        return self._head

    @cached_property
    def _head(self) -> Samples:
        tables = TablesWithoutHeader(self.options.columns)
        source = self._opened(tables)
        first = _First(source.records)
        found = to_samples(first, self.options, task=self.task)
        name = source.name if first.are_all else f"{source.name}, the first {first.count:,} records"
        return Samples(
            found.samples,
            found.shape,
            self.data if first.are_all else f"{self.data}, the first {first.count:,} records",
            (*tables.notices(), *found.notices(name)),
            found.skipped,
            source.names_of_classes(found.columns, self.task),
            stream=self,
        )

    # ------------------------------------------------------------ one pass

    def _opened(self, tables: TablesWithoutHeader | None = None) -> Source:
        tables = tables or TablesWithoutHeader(self.options.columns)
        names = tables.columns if self.task == "classify" else None
        return open_source(self.data, "train", names, self.task, streams=True)

    def _records(self) -> Iterator[Record]:
        source = self._opened()
        self._check_same(source)
        try:
            for number, record in enumerate(source.records):
                if number % _RECORDS_BETWEEN_CHECKS == 0 or isinstance(record.content, DataError):
                    self._check_unchanged()
                yield record
        except DataError:
            # What was cut off or written over reads like damaged data; the cause is told instead.
            self._check_unchanged()
            raise
        self._check_unchanged()

    def _check_same(self, source: Source) -> None:
        if source.version != self.version:
            raise DataError(
                f"{self.data}: the hub has another version than when the run began; expected one "
                "throughout; download the data set and name a file of it"
            )
        if source.files != (*self._states,):
            raise DataError(
                f"{self.data}: {len(source.files):,} files, and {len(self._states):,} when the run "
                "began, or others; expected the same throughout; restore the folder"
            )

    def _check_unchanged(self) -> None:
        for path, before in self._states.items():
            now = _state_of(path)
            if now == before:
                continue
            found = (
                "written to while it is read"
                if now.size == before.size
                else f"{before.size:,} bytes when it was opened, and {now.size:,} now"
            )
            raise DataError(
                f"{path}: {found}; expected a file that stays as it is; restore it and go on with "
                "--resume, or start a new run"
            )


class _First:
    """The first records of a source; says whether there were more."""

    def __init__(self, records: Iterator[Record]) -> None:
        self._records = records
        self.count = 0
        self.are_all = False

    def __iter__(self) -> Iterator[Record]:
        characters = 0
        for record in self._records:
            self.count += 1
            characters += len(str(record.content))
            yield record
            if self.count == HEAD_RECORDS or characters > HEAD_CHARACTERS:
                self.are_all = next(self._records, None) is None
                return
        self.are_all = True


def _state_of(path: Path) -> _State:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(
            f"{path}: {reason(error)}; expected a data file that stays there while it is read; "
            "restore it"
        ) from error
    return _State(found.st_size, found.st_mtime_ns)


def _check_read_as_it_comes(path: Path) -> None:
    """Refuse forms of files that are read whole before their first record is known."""
    suffix, is_packed = without_gzip(path).suffix.lower(), without_gzip(path) != path
    why = {
        ".json": "a .json file is one list, which is read whole",
        ".txt": "a .txt file is one text, which is read whole",
        ".parquet": "a packed parquet file is unpacked whole" if is_packed else "",
    }.get(suffix)
    if why:
        raise ConfigError(
            f"--stream-data: {path}: {why}; expected .jsonl, .parquet, .csv or .tsv; convert it, "
            "or leave --stream-data out"
        )
