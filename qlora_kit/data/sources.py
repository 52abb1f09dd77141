"""From what `--data` names to records: a file, two line-aligned ones, a folder, the hub.

Takes a name and the split that is wanted; returns a `Source`. Never looks at what a record
means, and imports `datasets` for the hub only.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from qlora_kit.data.faults import list_names
from qlora_kit.data.read import (
    Record,
    is_data_file_name,
    read_aligned,
    read_records,
    without_gzip,
    without_nulls,
)
from qlora_kit.errors import DataError, HubError
from qlora_kit.storage.faults import reason

Split = Literal["train", "validation", "test"]

_DEMO = Path(__file__).parent.parent / "demo"
BUILT_IN: dict[Split, Path] = {"train": _DEMO / "train.jsonl", "test": _DEMO / "test.jsonl"}

# What people and hubs call the parts of a data set; of several, the first that is there.
_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
# Rows to measure are the test rows, else those meant for choosing; never those learnt from.
_INSTEAD: dict[Split, tuple[Split, ...]] = {
    "train": ("train",),
    "validation": ("validation",),
    "test": ("test", "validation"),
}
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class Source:
    """Records, and what to call where they come from."""

    name: str
    records: Iterator[Record]


def open_source(data: str | Path | None, split: Split) -> Source:
    """Return the records that `--data` names.

    Args:
        data: a file; two line-aligned ones, `FILE+FILE`; a folder with one file a split; a hub
            id, `owner/name` or `owner/name:configuration`; None: the built-in samples.
        split: which part of what has parts. A file is all of one part.

    Raises:
        DataError: nothing of that name, or no such split; see `read_records`.
        HubError: the hub has no such data set, or is out of reach.
    """
    if data is None:
        return Source("built-in sample data", _built_in(BUILT_IN[split]))
    path = Path(data)
    if os.path.isdir(path):
        return _in_folder(path, split)
    if not os.path.exists(path):
        asked, plus, answered = str(data).partition("+")
        if plus and os.path.isfile(asked):
            return Source(str(data), read_aligned(Path(asked), Path(answered)))
        if is_hub_id(str(data)):
            return _on_hub(str(data), split)
    return Source(str(data), read_records(path))


def has_split(data: str | Path | None, split: Split) -> bool:
    """Return whether what `--data` names has such a part; a file has no parts."""
    if data is None:
        return False
    path = Path(data)
    if os.path.isdir(path):
        return bool(_split_files(path, split))
    return (
        not os.path.exists(path)
        and is_hub_id(str(data))
        and _hub_part(str(data), split) is not None
    )


def _built_in(path: Path) -> Iterator[Record]:
    # Where the package is installed is nobody's business in a model card or a page.
    for record in read_records(path):
        yield replace(record, place=record.place.removeprefix(f"{path.parent}{os.sep}"))


# ---------------------------------------------------------------- folders


def _in_folder(folder: Path, split: Split) -> Source:
    for part in _INSTEAD[split]:
        files = _split_files(folder, part)
        if files:
            _check_one_set(folder, part, files)
            name = str(files[0]) if len(files) == 1 else f"{folder} ({len(files)} files)"
            return Source(name, chain.from_iterable(map(read_records, files)))
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


def _shard_of(path: Path) -> tuple[str, int | None]:
    """Return the name of a file without suffixes and shard number, and how many shards it has."""
    stem = without_gzip(path).stem
    match = _SHARD.fullmatch(stem)
    return (match[1], int(match[3])) if match else (stem, None)


def _check_one_set(folder: Path, split: Split, files: list[Path]) -> None:
    """Several files of a split must be its shards, all of them."""
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
    """Return two files of a split whose suffixes are no format: `train.de`, `train.en`."""
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
    """Return whether a name has the form of a hub id, and not that of a data file."""
    return bool(_HUB_ID.fullmatch(name)) and not is_data_file_name(Path(name))


def _on_hub(name: str, split: Split) -> Source:
    for part in _INSTEAD[split]:
        found = _hub_part(name, part)
        if found is not None:
            place = f"{name} {found}"
            return Source(f"{name} ({found})", _hub_records(place, _hub_splits(name)[found]))
    raise DataError(
        f"{name}: no {split} split, only {list_names(_hub_splits(name))}; expected one; "
        "download the data set and name a file of it"
    )


def _hub_part(name: str, split: Split) -> str | None:
    """Return what the hub's data set calls a split, if it has it."""
    splits = _hub_splits(name)
    return next((called for called in _SPLIT_NAMES[split] if called in splits), None)


def _hub_splits(name: str) -> Mapping[str, Any]:
    import datasets

    # The hub client warns of every retry; the one line that matters is the error below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    match = _HUB_ID.fullmatch(name)
    assert match is not None
    try:
        splits: Mapping[str, Any] = datasets.load_dataset(match[1], match[2])
    except Exception as error:
        # The hub client raises from many trees; whatever it is, the remedy is the same.
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(
            f"{name}: no such file, and not loadable from the hub ({why}); expected a data "
            "file or a hub id; check name, network and access"
        ) from error
    return splits


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
