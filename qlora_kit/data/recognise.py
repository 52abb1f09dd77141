"""Recognises what the records of a data file are by their fields, and makes them samples.

Takes `Record`s; returns `Recognised`: samples of one shape, and what to tell about them.
Collects faults instead of ending at the first, or leaves them out and counts them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_kit.config import RecordOptions
from qlora_kit.data.columns import apply_columns, suggest_columns
from qlora_kit.data.convert import to_sample
from qlora_kit.data.faults import Faults, is_plain, kind_of, list_names
from qlora_kit.data.messages import unread_keys
from qlora_kit.data.read import Record
from qlora_kit.data.row_adapter import RowAdapters
from qlora_kit.data.shapes import FIELDS, Conversation, Pair, Sample, Shape
from qlora_kit.errors import DataError

_WITH_TURNS = ("messages", "conversations", "prompt", "completion")
_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@dataclass(frozen=True)
class Recognised:
    """The samples of one source, in order, and what was seen on the way."""

    shape: Shape
    samples: Sequence[Sample]
    fields: tuple[str, ...]
    """those that were read, in the order of the shape"""
    unread: tuple[str, ...]
    """those that stand in records and are not used; a turn's as `messages.weight`"""
    skipped: int
    """records left out because of a fault"""
    first_skipped: str
    """the fault of the first of them"""
    unlearnt: int
    """answers that are marked not to be learnt"""
    with_placeholder: int
    """samples with something like `{{name}}` in them"""
    placeholders: tuple[str, ...]


def recognise(record: Mapping[str, Any], options: RecordOptions | None = None) -> Shape | None:
    """Return the shape whose required fields a record has, or None.

    A field that is null counts where no shape is found without it. With `options.columns` only
    shapes that have all of the named fields are looked for.
    """
    options = options or RecordOptions()
    if options.format != "auto":
        shape = Shape(options.format)
        return shape if _has(record, shape) else None
    wanted = options.columns.keys()
    known = [shape for shape in Shape if wanted <= {*FIELDS[shape].all}]
    filled = {key: value for key, value in record.items() if value is not None}
    for fields in (filled, record):
        for shape in known:
            is_pair = shape is Shape.CHAT_PAIR and Shape.PAIR in known and not _has_turns(fields)
            if _has(fields, shape) and not is_pair:
                return shape
    return None


def _has(record: Mapping[str, Any], shape: Shape) -> bool:
    return record.keys() >= {*FIELDS[shape].required}


def _has_turns(record: Mapping[str, Any]) -> bool:
    return any(isinstance(record.get(key), list) for key in FIELDS[Shape.CHAT_PAIR].required)


def to_samples(
    records: Iterable[Record],
    options: RecordOptions | None = None,
    adapters: RowAdapters | None = None,
) -> Recognised:
    """Turn the records of one source into samples.

    Args:
        records: see `read_records`.
        options: a shape or columns that are given rather than recognised, and whether records
            with a fault are left out.
        adapters: those a record may ask for; if None, no record is looked at for one.

    Raises:
        DataError: all faults found, one a line, see `Faults`; or nothing is left.
    """
    work = _Work(options or RecordOptions(), adapters)
    try:
        for record in records:
            work.take(record)
    except DataError as error:
        # The source cannot be read on from here; what was found before is told as well.
        work.faults.add(*error.faults)
    return work.result()


class _Work:
    """One pass over the records of a source."""

    def __init__(self, options: RecordOptions, adapters: RowAdapters | None) -> None:
        self.options = options
        self.adapters = adapters
        self.faults = Faults()
        self.samples: list[Sample] = []
        self.shape: Shape | None = None
        self.first_place = ""
        self.used: set[str] = set()
        self.unread: dict[str, None] = {}
        self.skipped: list[str] = []
        self.skips = 0
        self.placeholders: dict[str, None] = {}
        self.with_placeholder = 0

    def take(self, record: Record) -> None:
        """Add one record's sample, or its fault."""
        try:
            self.samples.append(self._sample(record))
        except DataError as error:
            if self.options.skip_bad_lines:
                self.skips += 1
                self.skipped = self.skipped or [error.faults[0]]
                return
            if self.shape is None and not isinstance(record.content, DataError):
                # Whatever comes after has no shape to be measured by.
                raise
            self.faults.add(*error.faults)
        else:
            self._note_placeholders(self.samples[-1])

    def _sample(self, record: Record) -> Sample:
        if isinstance(record.content, DataError):
            raise record.content
        if not isinstance(record.content, dict):
            raise DataError(
                f"{record.place}: {kind_of(record.content)}; expected an object with named "
                'fields; write the record as {"...": ...}'
            )
        fields = apply_columns(record.content, self.options.columns, record.place)
        shape = self._shape_of(fields, record)
        sample = to_sample(shape, fields, record.place)
        if self.adapters is not None:
            sample = replace(sample, adapter=self.adapters.of(record.content, record.place))
        self._note_fields(shape, fields, record.content)
        return sample

    def _shape_of(self, fields: Mapping[str, Any], record: Record) -> Shape:
        shape = recognise(fields, self.options)
        if self.shape is None:
            if shape is None:
                raise DataError(_unknown(fields, record, self.options))
            self.shape, self.first_place = shape, record.place
            return shape
        if shape is self.shape:
            return shape
        if shape is not None:
            raise DataError(
                f"{record.place}: a record of shape {shape}; expected {self.shape} as in "
                f"{self.first_place}; keep one shape a file, or say which with --format"
            )
        missing = next(name for name in FIELDS[self.shape].required if name not in fields)
        raise DataError(
            f'{record.place}: no "{missing}"; expected it as in the {self.shape} record '
            f"{self.first_place}; give one, or pass --skip-bad-lines"
        )

    def _note_fields(
        self, shape: Shape, fields: Mapping[str, Any], content: Mapping[str, Any]
    ) -> None:
        known = FIELDS[shape].all
        self.used.update(name for name in known if fields.get(name) is not None)
        columns = self.options.columns.values()
        read = {*known, *columns, *(path.partition(".")[0] for path in columns)}
        if self.adapters is not None:
            read.add(self.adapters.field)
        unread = [name for name in content if name not in read and content[name] is not None]
        self.unread.update(dict.fromkeys([*unread, *_unread_in_turns(fields)]))

    def _note_placeholders(self, sample: Sample) -> None:
        found = [
            name for text in _texts(sample) if "{{" in text for name in _PLACEHOLDER.findall(text)
        ]
        if found:
            self.with_placeholder += 1
            self.placeholders.update(dict.fromkeys(name for name in found if is_plain(name)))

    def result(self) -> Recognised:
        """Return what was recognised.

        Raises:
            DataError: the faults, or there is nothing left.
        """
        self.faults.raise_if_any()
        if self.shape is None or not self.samples:
            first = f", the first: {self.skipped[0]}" if self.skipped else "; add rows"
            raise DataError(f"the data: no usable record; expected at least one{first}")
        return Recognised(
            self.shape,
            self.samples,
            tuple(name for name in FIELDS[self.shape].all if name in self.used),
            tuple(sorted(self.unread)),
            self.skips,
            self.skipped[0] if self.skipped else "",
            sum(map(_unlearnt, self.samples)),
            self.with_placeholder,
            tuple(self.placeholders),
        )


def _unread_in_turns(fields: Mapping[str, Any]) -> Iterator[str]:
    for field in _WITH_TURNS:
        turns = fields.get(field)
        for turn in turns if isinstance(turns, list) else ():
            yield from (f"{field}.{name}" for name in unread_keys(turn))


def _unlearnt(sample: Sample) -> int:
    if not isinstance(sample, Conversation):
        return 0
    return sum(not turn.is_learnt and turn.role == "assistant" for turn in sample.messages)


def _texts(sample: Sample) -> Iterator[str]:
    if isinstance(sample, Conversation):
        return (message.content for message in sample.messages)
    if isinstance(sample, Pair):
        return iter((sample.prompt, sample.completion))
    return iter((sample.text,))


def _unknown(fields: Mapping[str, Any], record: Record, options: RecordOptions) -> str:
    """Say what a record has that is of no known shape, and what would make it one."""
    found = f"keys {list_names(fields)}" if fields else "no keys"
    if options.format != "auto":
        needs = " + ".join(FIELDS[Shape(options.format)].required)
        return (
            f"{record.place}: {found}; expected {needs} of --format {options.format}; rename the "
            "fields, or name them with --columns"
        )
    known = ", ".join(dict.fromkeys(" + ".join(each.required) for each in FIELDS.values()))
    remedy = suggest_columns(record.content)
    asks = (
        f", or pass --columns {remedy}" if remedy else ", or name them with --columns FIELD=COLUMN"
    )
    return f"{record.place}: {found}; expected one of: {known}; rename the fields{asks}"
