"""The entrance to the data: from the value of `--data` to samples, and from a file to prompts.

Takes a file, two line-aligned files, a folder or a data set of the hub; returns `Samples`, all of
one shape, with the notices about them. Never tokenises. Imports neither torch nor transformers,
and imports `datasets` only for a data set of the hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_kit.config import RecordOptions
from qlora_kit.data.class_names import (
    ClassNames,
    names_in_features,
    names_in_file,
    names_in_folder,
)
from qlora_kit.data.convert import read_turns
from qlora_kit.data.fields import Faults, RowAdapters, filled, kind_of, list_names
from qlora_kit.data.images import folder_of_part, images_in, is_image_folder, with_files
from qlora_kit.data.labelled_fields import TablesWithoutHeader, find_columns, knows_columns
from qlora_kit.data.read import (
    ALIGNED_FIELDS,
    NamesOfColumns,
    Record,
    first_fields,
    is_data_file_name,
    read_aligned,
    read_columns,
    read_records,
    without_gzip,
    without_nulls,
)
from qlora_kit.data.recognise import check_columns, check_format, to_samples
from qlora_kit.data.shapes import WEIGHT, Message, Sample, Shape, ShapeOfAll, loss_weights
from qlora_kit.errors import ConfigError, DataError, HubError
from qlora_kit.storage.faults import reason

if TYPE_CHECKING:
    from qlora_kit.data.held_samples import HeldSamples
    from qlora_kit.data.streamed_samples import SampleStream
    from qlora_kit.data.streamed_sources import StreamedSources

Split = Literal["train", "validation", "test"]

_DEMO = Path(__file__).parent.parent / "demo"
BUILT_IN: dict[Split, Path] = {"train": _DEMO / "train.jsonl", "test": _DEMO / "test.jsonl"}

# Names that people and hubs give to the splits of a data set; the first that is found is taken.
_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
# The splits that may be taken for a wanted one, in order. Measuring takes the test rows, or else
# the validation rows; never rows that are trained on.
_INSTEAD: dict[Split, tuple[Split, ...]] = {
    "train": ("train",),
    "validation": ("validation",),
    "test": ("test", "validation"),
}
# Of a sample: neither its place nor the adapter it names, nor answers that are only accepted. An
# image is known by the hash of its file.
# Weights are hashed apart, and only where there are some.
_NOT_LEARNT = ("place", "file", "adapter", "also_right", WEIGHT)
_FIELDS_OF_ALIGNED = {"classify": ("text", "label"), "tag": ("tokens", "tags")}
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class Samples:
    """Samples of one shape, in the order they were read; or those of several sources, joined."""

    items: Sequence[Sample]
    shape: ShapeOfAll
    source: str
    """the file or hub id that they came from; a phrase for the built-in samples"""
    notices: tuple[str, ...] = ()
    """lines the user should read once: what was recognised, what was skipped, what looks wrong"""
    skipped: int = 0
    """number of records left out because of a fault"""
    class_names: tuple[str, ...] = ()
    """names of the classes that the labels are the numbers of, where the data set has them"""
    parts: tuple[Samples, ...] = ()
    """the samples of each source, where several are joined, see `data.sources`"""
    chat_template: str | None = None
    """the chat template of this source, where it has another than the run"""
    stream: SampleStream | HeldSamples | StreamedSources | None = None
    """the stream that these are the first samples of; None where they are all there are"""

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The index of the first sample of each part."""
        return (0, *accumulate(len(part.items) for part in self.parts))[:-1]

    def part_of(self, index: int) -> int:
        """Return the number of the part that a sample is of; 0 where there are none."""
        return max(0, bisect_right(self.starts, index) - 1)

    def first(self, count: int | None) -> Samples:
        """Return the first `count` samples; all of them if it is None."""
        return replace(self, items=self.items[:count])

    def content_hash(self) -> str:
        """Return the SHA-256 of shape and what may be learnt of the contents."""
        digest = hashlib.sha256(self.shape.encode())
        for sample in self.items:
            digest.update(content_of(sample))
            weights = loss_weights(sample)
            if any(weight != 1 for weight in weights):
                digest.update(f"{WEIGHT} {weights}".encode())
        return digest.hexdigest()

    @property
    def text_bytes(self) -> int:
        """Bytes of text that may be learnt, roughly."""
        return sum(len(content_of(sample)) for sample in self.items)

    @property
    def is_weighted(self) -> bool:
        """Whether tokens that are learnt may count more or less than others."""
        return any(weight not in (0, 1) for each in self.items for weight in loss_weights(each))


def content_of(sample: Sample) -> bytes:
    """Return all that may be learnt of a sample, but its weights."""
    # repr quotes strings, so no two contents run into one another.
    names = (name for name in sample.__slots__ if name not in _NOT_LEARNT)
    return repr([getattr(sample, name) for name in names]).encode("utf-8", "surrogatepass")


def load_samples(
    data: str | Path | None,
    split: Split = "train",
    options: RecordOptions | None = None,
    adapters: RowAdapters | None = None,
    task: str = "causal",
    *,
    streams: bool = False,
) -> Samples:
    """Load the samples that `--data` names.

    Args:
        data: a file; two line-aligned files, `FILE+FILE`; a folder with one file a split; a hub
            id, `owner/name` or `owner/name:configuration`; None: the built-in samples.
        split: the split to load. A file has no splits: all of it is loaded.
        options: a shape or columns that the user gives, so that they need not be recognised; and
            whether records with a fault are left out.
        adapters: the adapters that a record may name; if None, no record is asked for one.
        task: the task that the samples are for: it decides what a record may be.
        streams: whether a data set of the hub is read as it comes, and not fetched first.

    Raises:
        ConfigError: `options` names a field or a format that the task has not, or the task needs
            data of its own.
        DataError: there is nothing of that name, there is no such split, or records are not
            usable, see `read_records` and `to_samples`.
        HubError: the hub has no such data set, or is out of reach.
    """
    options = options or RecordOptions()
    if data is None:
        return _built_in(split, adapters, task)
    check_format(options, task)
    check_columns(options.columns, task)
    if task == "classify" and is_image_folder(Path(data)):
        return _images(Path(data), split)
    tables = TablesWithoutHeader(options.columns)
    names_of = tables.columns if task == "classify" else None
    source = open_source(str(data), split, names_of, task, streams=streams)
    found = to_samples(source.records, options, adapters, task)
    notices = (*tables.notices(), *found.notices(source.name))
    names = source.names_of_classes(found.columns, task)
    if found.shape is Shape.IMAGE:
        found = replace(found, samples=_with_files(found.samples, source))
    return Samples(found.samples, found.shape, str(data), notices, found.skipped, names)


def _built_in(split: Split, adapters: RowAdapters | None, task: str) -> Samples:
    if task == "preference":
        raise ConfigError(
            "--data: none is given, and the built-in sample data prefers no answer; expected pairs "
            "of answers for --task preference; pass --data FILE"
        )
    if knows_columns(task):
        what = "tagged words" if task == "tag" else "labelled texts"
        raise ConfigError(
            f"--data: none is given, and the built-in sample data has no labels; expected {what} "
            f"for --task {task}; pass --data FILE"
        )
    found = to_samples(_built_in_records(BUILT_IN[split]), adapters=adapters)
    return Samples(found.samples, found.shape, "built-in sample data")


def open_source(
    name: str, split: Split, names: NamesOfColumns | None, task: str, *, streams: bool = False
) -> Source:
    """Return the records of what has this name.

    Args:
        name: see `load_samples`.
        split: see `load_samples`.
        names: names the columns of tables, see `read_records`.
        task: the task that the records are for.
        streams: whether a data set of the hub is read as it comes, and not fetched first.

    Raises:
        DataError: there is nothing of that name, or no such split.
        HubError: the hub has no such data set, or is out of reach.
    """
    path = Path(name)
    asked, plus, answered = name.partition("+")
    if os.path.isdir(path):
        return _in_folder(path, split, names, task)
    if not os.path.exists(path) and plus and os.path.isfile(asked):
        fields = _FIELDS_OF_ALIGNED.get(task, ALIGNED_FIELDS)
        files = (Path(asked), Path(answered))
        return Source(name, read_aligned(*files, fields), files=files)
    if not os.path.exists(path) and is_hub_id(name):
        return _on_hub(name, split, streams=streams)
    return Source(name, _records_of(path, names, task), names_in_file(path), (path,))


def _records_of(path: Path, names: NamesOfColumns | None, task: str) -> Iterator[Record]:
    """Return the records of a file; words in columns where the task tags words and it is no table.

    Files of CoNLL's kind are called anything: train.txt, dev.tsv, eng.testa.
    """
    suffix = without_gzip(path).suffix.lower()
    if task != "tag" or (is_data_file_name(path) and suffix not in (".txt", ".tsv")):
        return read_records(path, names)
    if suffix == ".tsv" and find_columns(
        dict.fromkeys(map(str.strip, first_fields(path))), {}, task
    ):
        return read_records(path, names)
    return read_columns(path)


def load_held_out(
    data: str | Path | None,
    options: RecordOptions | None = None,
    task: str = "causal",
    *,
    streams: bool = False,
) -> Samples | None:
    """Load the validation samples of a folder or of a data set of the hub; None without any.

    Takes what `load_samples` takes.

    Raises:
        DataError: the samples are not usable.
        HubError: the hub is out of reach.
    """
    if data is None:
        return None
    path = Path(data)
    if task == "classify" and is_image_folder(path):
        has_some = folder_of_part(path, _SPLIT_NAMES["validation"]) is not None
    elif os.path.isdir(path):
        has_some = bool(_split_files(path, "validation"))
    elif os.path.exists(path) or not is_hub_id(str(data)):
        has_some = False
    else:
        splits = _hub_stream(str(data))[0] if streams else _hub_splits(str(data))
        has_some = _name_of_split("validation", splits) is not None
    if not has_some:
        return None
    return load_samples(data, "validation", options, task=task, streams=streams)


@dataclass(frozen=True)
class Source:
    """Records, and the name of the file, folder or data set that they come from.

    Attributes:
        name: of the source.
        records: in order, once.
        class_names: names of classes that are stored beside the data, by column.
        files: the files of the records, in order; none of a data set of the hub.
        version: the version of a data set of the hub that is read as it comes; "" elsewhere.
    """

    name: str
    records: Iterator[Record]
    class_names: ClassNames = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    version: str = ""

    def names_of_classes(self, columns: Mapping[str, str], task: str) -> tuple[str, ...]:
        """Return the names of the classes that the labels are the numbers of, if there are any."""
        wanted = "tags" if task == "tag" else "label"
        return self.class_names.get(columns.get(wanted, wanted), ())


def _built_in_records(path: Path) -> Iterator[Record]:
    # A model card or a page must not say in which folder the package is installed.
    for record in read_records(path):
        yield replace(record, place=record.place.removeprefix(f"{path.parent}{os.sep}"))


# ---------------------------------------------------------------- folders


def _in_folder(folder: Path, split: Split, names: NamesOfColumns | None, task: str) -> Source:
    for part in _INSTEAD[split]:
        files = _split_files(folder, part)
        if files:
            _check_one_set(folder, part, files)
            name = str(files[0]) if len(files) == 1 else f"{folder} ({len(files)} files)"
            records = chain.from_iterable(_records_of(path, names, task) for path in files)
            return Source(name, records, names_in_folder(folder, files[0]), tuple(files))
    raise DataError(_no_split(folder, split))


def _split_files(folder: Path, split: Split) -> list[Path]:
    """Return the data files of a split, in the order of their shards."""
    files = [path for path in _files_of(folder) if is_data_file_name(path)]
    for name in _SPLIT_NAMES[split]:
        named = [path for path in files if _shard_of(path)[0] == name]
        if named:
            return named
    return []


def _files_of(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise DataError(
            f"{folder}: {reason(error)}; expected a readable folder; check its rights"
        ) from error


def _images(folder: Path, split: Split) -> Samples:
    """Return the images of a part of a folder; all of them, if it has no parts."""
    parts = {part: folder_of_part(folder, names) for part, names in _SPLIT_NAMES.items()}
    found = next((parts[part] for part in _INSTEAD[split] if parts[part]), None)
    if found is None and any(parts.values()):
        has = " and ".join(part for part, each in parts.items() if each)
        raise DataError(
            f"{folder}: images for {has}, and none for {split}; expected a folder {split}/ with "
            "folders of classes in it; name another, or make it"
        )
    images, names, notices = images_in(found or folder)
    return Samples(images, Shape.IMAGE, str(found or folder), notices, class_names=names)


def _with_files(samples: Sequence[Sample], source: Source) -> Sequence[Sample]:
    if len(source.files) != 1:
        raise DataError(
            f"{source.name}: images named in {len(source.files)} files; expected one file, beside "
            "its images; name it"
        )
    return with_files(samples, source.files[0])


def _shard_of(path: Path) -> tuple[str, int | None]:
    """Return the name of a file without suffixes and shard number, and its number of shards."""
    stem = without_gzip(path).stem
    match = _SHARD.fullmatch(stem)
    return (match[1], int(match[3])) if match else (stem, None)


def _check_one_set(folder: Path, split: Split, files: list[Path]) -> None:
    """Check that several files of a split are its shards, and that none is missing."""
    counts = {_shard_of(path)[1] for path in files}
    if counts == {None} and len(files) == 1:
        return
    if counts != {len(files)}:
        names = ", ".join(path.name for path in files[:4])
        raise DataError(
            f"{folder}: {len(files)} {split} files ({names}); expected one, or every shard of "
            "one; name the file, or complete the folder"
        )


def _no_split(folder: Path, split: Split) -> str:
    aligned = _aligned_files(folder, split)
    if aligned:
        one, other = aligned
        return (
            f"{folder}: {one.name} and {other.name} are line-aligned; expected to be told which "
            f"asks and which answers; pass --data {one}+{other}, or the other way round"
        )
    found = [part for part in _SPLIT_NAMES if _split_files(folder, part)]
    has = f"a folder with a {' and a '.join(found)} file" if found else "a folder"
    return (
        f"{folder}: {has}; expected a {split} file in it, such as {split}.jsonl; "
        "name a file in it, or rename one"
    )


def _aligned_files(folder: Path, split: Split) -> list[Path]:
    """Return the two files of a split whose suffixes are no format: `train.de`, `train.en`."""
    files = [
        path
        for path in _files_of(folder)
        if without_gzip(path).stem in _SPLIT_NAMES[split]
        and without_gzip(path).suffix
        and not is_data_file_name(path)
    ]
    return files if len(files) == 2 else []


# ---------------------------------------------------------------- the hub


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a hub id and is not the name of a data file."""
    return bool(_HUB_ID.fullmatch(name)) and not is_data_file_name(Path(name))


def _on_hub(name: str, split: Split, *, streams: bool = False) -> Source:
    splits, version = _hub_stream(name) if streams else (_hub_splits(name), "")
    for part in _INSTEAD[split]:
        found = _name_of_split(part, splits)
        if found is not None:
            rows = splits[found]
            features = getattr(rows, "features", None)
            names = names_in_features(features.to_dict() if features else {})
            records = _hub_records(f"{name} {found}", rows)
            return Source(f"{name} ({found})", records, names, version=version)
    raise DataError(
        f"{name}: no {split} split, only {list_names(splits)}; expected one; "
        "download the data set and name a file of it"
    )


def _name_of_split(split: Split, splits: Collection[str]) -> str | None:
    """Return the name that a data set of the hub gives to a split; None if it has no such split."""
    return next((name for name in _SPLIT_NAMES[split] if name in splits), None)


def _hub_splits(name: str) -> Mapping[str, Any]:
    with _hub_errors(name) as (datasets, asked):
        splits: Mapping[str, Any] = datasets.load_dataset(*asked)
    return splits


def _hub_stream(name: str) -> tuple[Mapping[str, Any], str]:
    """Return the splits of a data set that is read as it comes, and its version."""
    with _hub_errors(name) as (datasets, asked):
        builder = datasets.load_dataset_builder(*asked)
        # The hash is of the commit that the hub has now, or of the files.
        return builder.as_streaming_dataset(), f"{builder.config.name} {builder.hash}"


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[tuple[Any, tuple[str, str | None]]]:
    """Yield `datasets` and the id and configuration to ask it for; an error is one line."""
    import datasets

    # The hub client warns of every retry; the one line that matters is the error below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    match = _HUB_ID.fullmatch(name)
    assert match is not None
    try:
        yield datasets, (match[1], match[2])
    except Exception as error:
        # The hub client raises errors of many classes; the remedy is the same for all.
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(
            f"{name}: no such file, and not loadable from the hub ({why}); expected a data "
            "file or a hub id; check name, network and access"
        ) from error


def _hub_records(name: str, rows: Any) -> Iterator[Record]:
    number = 0
    try:
        for number, record in enumerate(rows, 1):
            yield Record(f"{name} record {number}", without_nulls(record))
    except Exception as error:
        # Decoding an image or a sound may raise anything.
        raise DataError(
            f"{name} record {number + 1}: cannot be decoded ({type(error).__name__}); expected "
            "text; choose another data set"
        ) from error
    if not number:
        raise DataError(f"{name}: no records; expected at least one; name another data set")


# ---------------------------------------------------------------- prompts


@dataclass(frozen=True)
class PromptRecord:
    """A prompt to continue: a text, or the turns before an answer.

    Attributes:
        content: the text or the turns; with a chat template, a text is the user's turn.
        place: the place of the prompt, for errors and answers.
        adapter: the adapter that the record names, of several; None for the base alone.
    """

    content: str | tuple[Message, ...]
    place: str
    adapter: str | None = None


def read_prompts(path: Path, adapters: RowAdapters | None = None) -> list[PromptRecord]:
    """Read a data file of prompts; no field but `prompt` and the adapter's is read.

    Args:
        path: a file of any format that `read_records` knows, but plain text.
        adapters: the adapters that a record may name; if None, no record is asked for one.

    Raises:
        DataError: the file is not readable; or some records are no prompts, one line for each.
    """
    prompts, faults = [], Faults()
    for record in read_records(path):
        try:
            prompts.append(_prompt(record, adapters))
        except DataError as error:
            faults.add(*error.faults)
    faults.raise_if_any()
    return prompts


def _prompt(record: Record, adapters: RowAdapters | None) -> PromptRecord:
    if isinstance(record.content, DataError):
        raise record.content
    if not isinstance(record.content, dict):
        raise DataError(
            f"{record.place}: {kind_of(record.content)}; expected an object with a prompt; write "
            'the record as {"prompt": ...}'
        )
    content = _prompt_content(record.content, record.place)
    adapter = adapters.of(record.content, record.place) if adapters else None
    return PromptRecord(content, record.place, adapter)


def _prompt_content(fields: Mapping[str, Any], where: str) -> str | tuple[Message, ...]:
    if "prompt" not in fields:
        found = f"keys {list_names(fields)}" if fields else "no keys"
        raise DataError(f'{where}: {found}; expected "prompt": a text or a list of turns; add it')
    if isinstance(fields["prompt"], list):
        return read_turns(fields["prompt"], "prompt", where)
    return filled(fields, "prompt", where)
