"""Recognises the shape of records by their fields, and turns the records into samples.

Takes `Record`s; returns `Recognised`: samples of one shape, with the notices about them. A field
may have another name, which the options give. Collects faults instead of ending at the first, or
leaves faulty records out and counts them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_kit.config import RecordOptions
from qlora_kit.data.convert import to_sample, unread_keys
from qlora_kit.data.fields import Faults, RowAdapters, is_plain, kind_of, list_names
from qlora_kit.data.labelled_fields import find_columns, knows_columns
from qlora_kit.data.preference_records import NoPreferenceError, to_preference
from qlora_kit.data.read import Record
from qlora_kit.data.shapes import (
    FIELDS,
    PREFERENCES,
    SHAPES,
    Conversation,
    LabelledImage,
    LabelledText,
    Pair,
    Preference,
    Sample,
    Shape,
    TaggedWords,
    loss_weights,
)
from qlora_kit.errors import ConfigError, DataError

_WITH_TURNS = ("messages", "conversations", "prompt", "completion")
_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")

# Names that data sets give to the two sides of a record, the likeliest first.
_ASKS = ("prompt", "question", "query", "instruction", "problem", "input", "source", "sentence")
_ANSWERS = ("completion", "answer", "response", "output", "solution", "target", "label", "summary")
_ANSWERS_OF_SQUAD = "answers.text"
# Names of the two answers of a record of preferences, the likeliest first.
_CHOSEN = ("chosen", "response_j", "preferred", "winner", "better", "answer_chosen")
_REJECTED = ("rejected", "response_k", "dispreferred", "loser", "worse", "answer_rejected")
# Names of a text that the question refers to, as in the records of Dolly.
_CONTEXTS = ("context", "input", "passage", "document")
# Names of a text without sides.
_TEXTS = ("text", "content", "document", "body", "sentence", "story", "code")
_DEEPEST = 3


@dataclass(frozen=True)
class Recognised:
    """The samples of one source, in order, and counts of what was noticed in its records."""

    shape: Shape
    samples: Sequence[Sample]
    fields: tuple[str, ...]
    """the fields that were read, in the order of the shape"""
    columns: Mapping[str, str]
    """fields that have another name in the data, with that name"""
    unread: tuple[str, ...]
    """fields of the records that are not used; a turn's field is written `messages.weight`"""
    skipped: int
    """number of records left out because of a fault"""
    first_skipped: str
    """the fault of the first record that was left out"""
    unlearnt: int
    """number of answers that are marked not to be learnt"""
    weighted: str
    """how many records and turns have a weight of their own, in words; "" where none has"""
    with_placeholder: int
    """number of samples that hold a placeholder such as `{{name}}`"""
    placeholders: tuple[str, ...]
    """the plain names in those placeholders"""
    with_several: int
    """number of samples with more than one right answer"""
    undecided: int = 0
    """number of records left out because they prefer no answer"""

    def notices(self, name: str) -> Iterator[str]:
        """Yield the notices that the user should read once, one line each.

        Args:
            name: name of the source.
        """
        count = len(self.samples)
        fields = ", ".join(
            field if column == field else f"{field} from {column}"
            for field in self.fields
            for column in [self.columns.get(field, field)]
        )
        unread = f"; not read: {list_names(self.unread)}" if self.unread else ""
        records = "record" if count == 1 else "records"
        yield f"{name}: {count:,} {self.shape} {records} ({fields}){unread}"
        if self.skipped:
            yield (
                f"{name}: {self.skipped:,} of {self.skipped + count:,} records skipped for a "
                f"fault; the first: {self.first_skipped}"
            )
        if self.undecided:
            yield (
                f"{name}: {self.undecided:,} of {self.undecided + count:,} records left out: they "
                "prefer no answer, as both are the same or have the same rating"
            )
        if self.unlearnt:
            answers = "1 answer is" if self.unlearnt == 1 else f"{self.unlearnt:,} answers are"
            yield (
                f"{name}: {answers} marked not to be learnt (weight, train), and left out of the "
                "loss"
            )
        if self.weighted:
            yield (
                f"{name}: {self.weighted} weighted (loss_weight); losses are divided by the sum of "
                "the weights"
            )
        if self.with_several:
            yield (
                f"{name}: {self.with_several:,} of {count:,} records have several answers; the "
                "first is learnt, and measuring accepts each"
            )
        if self.with_placeholder:
            names = ", ".join(f"{{{{{name}}}}}" for name in self.placeholders[:4])
            yield (
                f"{name}: {self.with_placeholder:,} of {count:,} records hold a placeholder "
                f"({names or 'of no plain name'}) that nothing fills in; replace it, or it is "
                "learnt"
            )


def recognise(
    record: Mapping[str, Any], options: RecordOptions | None = None, task: str = "causal"
) -> Shape | None:
    """Return the shape whose required fields a record has, or None.

    A null field counts as missing; it counts as present only where no shape is found otherwise.
    With `options.columns`, only shapes that have all of the named fields are considered.

    Args:
        record: its fields.
        options: a shape or columns that the user gives.
        task: the task whose shapes are considered, see `SHAPES`.
    """
    options = options or RecordOptions()
    if not _is_open(options, task):
        shape = Shape(options.format)
        return shape if _has(record, shape) else None
    wanted = options.columns.keys()
    known = [shape for shape in SHAPES[task] if wanted <= {*FIELDS[shape].all}]
    filled = {key: value for key, value in record.items() if value is not None}
    for fields in (filled, record):
        for shape in known:
            is_pair = shape is Shape.CHAT_PAIR and Shape.PAIR in known and not _has_turns(fields)
            if _has(fields, shape) and not is_pair:
                return shape
    return None


def _is_open(options: RecordOptions, task: str) -> bool:
    """Return whether a record may have any shape of the task: a format may stand for all."""
    return options.format in ("auto", task)


def _has(record: Mapping[str, Any], shape: Shape) -> bool:
    return record.keys() >= {*FIELDS[shape].required}


def _has_turns(record: Mapping[str, Any]) -> bool:
    return any(isinstance(record.get(key), list) for key in FIELDS[Shape.CHAT_PAIR].required)


def to_samples(
    records: Iterable[Record],
    options: RecordOptions | None = None,
    adapters: RowAdapters | None = None,
    task: str = "causal",
) -> Recognised:
    """Turn the records of one source into samples.

    Args:
        records: the records, see `read_records`.
        options: a shape or columns that the user gives, so that they need not be recognised; and
            whether records with a fault are left out.
        adapters: the adapters that a record may name; if None, no record is asked for one.
        task: the task whose shapes are considered, see `SHAPES`.

    Raises:
        DataError: all faults found, one a line, see `Faults`; or no sample is left.
    """
    work = _Recognition(options or RecordOptions(), adapters, task)
    try:
        for record in records:
            work.take(record)
    except DataError as error:
        # The source cannot be read any further; the faults found so far are reported with this one.
        work.faults.add(*error.faults)
    return work.result()


class Recogniser:
    """Turns the records of a source into samples; the first one decides what all of them are.

    Args:
        options: a shape or columns that the user gives.
        adapters: the adapters that a record may name; if None, no record is asked for one.
        task: the task whose shapes are considered, see `SHAPES`.

    Attributes:
        shape: the shape of the samples; None before the first.
        columns: fields that have another name in the data, with that name.
    """

    def __init__(
        self, options: RecordOptions, adapters: RowAdapters | None = None, task: str = "causal"
    ) -> None:
        self.options = options
        self.adapters = adapters
        self.task = task
        self.columns: Mapping[str, str] = options.columns
        self.shape: Shape | None = None
        self._found: Mapping[str, str] = {}
        self._first_place = ""

    def sample(self, record: Record) -> tuple[Sample, Mapping[str, Any]]:
        """Return the sample of a record, and the record with its fields under their own names.

        Raises:
            DataError: the record has a fault.
        """
        if isinstance(record.content, DataError):
            raise record.content
        if not isinstance(record.content, dict):
            raise DataError(
                f"{record.place}: {kind_of(record.content)}; expected an object with named "
                'fields; write the record as {"...": ...}'
            )
        fields = self._fields(record.content, record.place)
        shape = self._shape_of(fields, record)
        convert = to_preference if shape in PREFERENCES else to_sample
        sample: Sample = convert(shape, fields, record.place)
        if self.adapters is not None:
            sample = replace(sample, adapter=self.adapters.of(record.content, record.place))
        return sample, fields

    def ends_at(self, record: Record) -> bool:
        """Return whether a fault of this record leaves those after it without a shape."""
        return self.shape is None and not isinstance(record.content, DataError)

    def _fields(self, content: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Return a record with its fields under their own names as well."""
        given = self.options.columns
        named = {name: _look_up(content, path, place) for name, path in given.items()}
        if not knows_columns(self.task):
            return {**content, **named}
        if self.shape is None:
            self._found = find_columns(content, given, self.task)
            self.columns = {**given, **self._found}
        found = {name: content[path] for name, path in self._found.items() if path in content}
        # A column that is one field is not another as well, by its name.
        taken = {*self.columns.values()}
        others = {name: value for name, value in content.items() if name not in taken}
        return {**others, **named, **found}

    def _shape_of(self, fields: Mapping[str, Any], record: Record) -> Shape:
        shape = recognise(fields, self.options, self.task)
        if self.shape is None:
            if shape is None:
                raise DataError(_unknown(fields, record, self.options, self.task))
            self.shape, self._first_place = shape, record.place
            return shape
        if shape is self.shape:
            return shape
        if shape is not None:
            raise DataError(
                f"{record.place}: a record of shape {shape}; expected {self.shape} as in "
                f"{self._first_place}; keep one shape a file, or say which with "
                f"{'--columns' if knows_columns(self.task) else '--format'}"
            )
        missing = next(name for name in FIELDS[self.shape].required if name not in fields)
        missing = self.columns.get(missing, missing)
        raise DataError(
            f'{record.place}: no "{missing}"; expected it as in the {self.shape} record '
            f"{self._first_place}; give one, or pass --skip-bad-lines"
        )


class _Recognition:
    """One pass over all records of a source, with what is noticed in them."""

    def __init__(self, options: RecordOptions, adapters: RowAdapters | None, task: str) -> None:
        self.recogniser = Recogniser(options, adapters, task)
        self.skips = options.skip_bad_lines
        self.faults = Faults()
        self.samples: list[Sample] = []
        self.used: set[str] = set()
        self.unread: dict[str, None] = {}
        self.skipped = 0
        self.first_skipped = ""
        self.placeholders: dict[str, None] = {}
        self.with_placeholder = 0
        self.undecided = 0

    def take(self, record: Record) -> None:
        """Add the sample of a record, or its fault."""
        try:
            sample, fields = self.recogniser.sample(record)
        except NoPreferenceError:
            self.undecided += 1
        except DataError as error:
            if self.skips:
                self.skipped += 1
                self.first_skipped = self.first_skipped or error.faults[0]
                return
            if self.recogniser.ends_at(record):
                raise
            self.faults.add(*error.faults)
        else:
            self.samples.append(sample)
            self._note_fields(fields, record.content)
            self._note_placeholders(sample)

    def _note_fields(self, fields: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        assert self.recogniser.shape is not None, "a sample has been read"
        known = FIELDS[self.recogniser.shape].all
        self.used.update(name for name in known if fields.get(name) is not None)
        columns = self.recogniser.columns.values()
        read = {*known, *columns, *(path.partition(".")[0] for path in columns)}
        if self.recogniser.adapters is not None:
            read.add(self.recogniser.adapters.field)
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
        """Return the samples and counts.

        Raises:
            DataError: the faults; or no sample is left.
        """
        self.faults.raise_if_any()
        shape = self.recogniser.shape
        if shape is None or not self.samples:
            first = f", the first: {self.first_skipped}" if self.skipped else "; add rows"
            if self.undecided:
                first = f"; {self.undecided:,} prefer no answer: add some whose answers differ"
            raise DataError(f"the data: no usable record; expected at least one{first}")
        return Recognised(
            shape,
            self.samples,
            tuple(name for name in FIELDS[shape].all if name in self.used),
            self.recogniser.columns,
            tuple(sorted(self.unread)),
            self.skipped,
            self.first_skipped,
            sum(map(_unlearnt, self.samples)),
            _weighted(self.samples),
            self.with_placeholder,
            tuple(self.placeholders),
            sum(isinstance(each, Conversation) and bool(each.also_right) for each in self.samples),
            self.undecided,
        )


def _unread_in_turns(fields: Mapping[str, Any]) -> Iterator[str]:
    for field in _WITH_TURNS:
        turns = fields.get(field)
        for turn in turns if isinstance(turns, list) else ():
            # A field that the shape does not use may hold anything.
            if isinstance(turn, dict):
                yield from (f"{field}.{name}" for name in unread_keys(turn))


def _unlearnt(sample: Sample) -> int:
    if not isinstance(sample, Conversation):
        return 0
    return sum(not turn.is_learnt and turn.role == "assistant" for turn in sample.messages)


def _weighted(samples: Sequence[Sample]) -> str:
    """Return how many records and turns have a weight other than 1, in words."""
    weights = [loss_weights(sample) for sample in samples]
    counts = (
        (sum(of[:1] not in ((), (1.0,)) for of in weights), "record"),
        (sum(weight != 1 for of in weights for weight in of[1:]), "turn"),
    )
    found = [f"{count:,} {word}{'' if count == 1 else 's'}" for count, word in counts if count]
    is_one = len(found) == 1 and found[0].startswith("1 ")
    return f"{' and '.join(found)} {'is' if is_one else 'are'}" if found else ""


def _texts(sample: Sample) -> Iterator[str]:
    if isinstance(sample, Conversation):
        return (message.content for message in sample.messages)
    if isinstance(sample, Pair):
        return iter((sample.prompt, sample.completion))
    if isinstance(sample, LabelledText):
        return iter((sample.text, sample.second or ""))
    if isinstance(sample, TaggedWords):
        return iter(sample.words)
    if isinstance(sample, LabelledImage):
        return iter(())
    if isinstance(sample, Preference):
        return (text for side in sample.sides for text in _texts(side))
    return iter((sample.text,))


def _unknown(fields: Mapping[str, Any], record: Record, options: RecordOptions, task: str) -> str:
    """Return the error for a record of no known shape, with columns that would give it one."""
    found = f"keys {list_names(fields)}" if fields else "no keys"
    if not _is_open(options, task):
        needs = " + ".join(FIELDS[Shape(options.format)].required)
        return (
            f"{record.place}: {found}; expected {needs} of --format {options.format}; rename the "
            "fields, or name them with --columns"
        )
    known = ", ".join(dict.fromkeys(" + ".join(FIELDS[each].required) for each in SHAPES[task]))
    # The columns of labelled data have been looked for under every name that is known.
    suggest = _suggest_sides if task == "preference" else suggest_columns
    remedy = "" if knows_columns(task) else suggest(record.content)
    if task == "preference" and {"completion", "label"} <= fields.keys():
        return (
            f"{record.place}: one answer with a label, as KTO learns from; expected two answers to "
            'a prompt with --task preference, such as {"prompt": ..., "chosen": ..., "rejected": '
            "...}; put a good and a bad answer to one prompt together"
        )
    asks = (
        f", or pass --columns {remedy}" if remedy else ", or name them with --columns FIELD=COLUMN"
    )
    return f"{record.place}: {found}; expected one of: {known}; rename the fields{asks}"


# ---------------------------------------------------------------- columns


def check_columns(columns: Mapping[str, str], task: str = "causal") -> None:
    """Check that a task has a shape with all of the fields that `--columns` names.

    Raises:
        ConfigError: there is none.
    """
    shapes = [FIELDS[shape] for shape in SHAPES[task]]
    names = {name for fields in shapes for name in fields.all}
    unknown = [name for name in columns if name not in names]
    if unknown:
        raise ConfigError(
            f"--columns: no field {unknown[0]}; expected FIELD=COLUMN with a field of "
            f"{', '.join(sorted(names))}; correct it"
        )
    if not any(columns.keys() <= {*fields.all} for fields in shapes):
        raise ConfigError(
            f"--columns: no format has {' and '.join(columns)} together; expected the fields of "
            "one format; leave some out"
        )


def check_format(options: RecordOptions, task: str) -> None:
    """Check that the format that `--format` names is one of the task's.

    Raises:
        ConfigError: it is another task's.
    """
    if _is_open(options, task) or options.format in SHAPES[task]:
        return
    is_one = knows_columns(task) or task == "preference"
    has = task if is_one else ", ".join(SHAPES[task])
    raise ConfigError(
        f"--format {options.format}: no format of --task {task}; expected auto, {has}; pass one of "
        "these, or another --task"
    )


def _look_up(record: Mapping[str, Any], path: str, where: str) -> Any:
    """Return the value of a column; dots lead into objects, as in `extra_info.answer`."""
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            has = f"keys {list_names(record)}" if record else "no keys"
            raise DataError(
                f'{where}: no "{path}" but {has}; expected what --columns names; correct it, or '
                "pass --skip-bad-lines"
            )
        value = value[name]
    return value


def suggest_columns(record: Any) -> str:
    """Return a value for `--columns` that fits the names in a record; "" where none does."""
    paths = dict(_leaves(record)) if isinstance(record, dict) else {}
    asks, answers = _likeliest(paths, _ASKS), _likeliest(paths, _ANSWERS)
    if not answers and _ANSWERS_OF_SQUAD in paths:
        answers = _ANSWERS_OF_SQUAD
    others = {path: kind for path, kind in paths.items() if kind is str and path != asks}
    context = _likeliest(others, _CONTEXTS)
    if asks in paths and paths[asks] is str and answers and context:
        return f"instruction={asks},input={context},output={answers}"
    if asks and answers:
        sides = ("prompt", "completion") if paths[asks] is list else ("question", "answer")
        return f"{sides[0]}={asks},{sides[1]}={answers}"
    text = _likeliest(paths, _TEXTS)
    return f"text={text}" if text else ""


def _suggest_sides(record: Any) -> str:
    """Return a value for `--columns` by which a record has two answers; "" where none does."""
    paths = dict(_leaves(record)) if isinstance(record, dict) else {}
    found = (("prompt", _ASKS), ("chosen", _CHOSEN), ("rejected", _REJECTED))
    sides = {field: _likeliest(paths, names) for field, names in found}
    if not (sides["chosen"] and sides["rejected"]):
        return ""
    return ",".join(f"{field}={path}" for field, path in sides.items() if path)


def _likeliest(paths: Mapping[str, type], names: tuple[str, ...]) -> str:
    """Return the path that ends in one of the names: the least deep, of these the likeliest."""
    found = [path for path in paths if path.rpartition(".")[2] in names]
    return min(
        found,
        key=lambda path: (path.count("."), names.index(path.rpartition(".")[2])),
        default="",
    )


def _leaves(record: Mapping[str, Any], within: str = "", depth: int = 1) -> Iterator[Any]:
    for name, value in record.items():
        if not is_plain(name):
            continue
        if isinstance(value, str | list):
            yield within + name, type(value)
        elif isinstance(value, dict) and depth < _DEEPEST:
            yield from _leaves(value, f"{within}{name}.", depth + 1)
