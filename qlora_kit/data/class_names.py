"""Finds the names of classes where a data set keeps them beside its numbers.

The `datasets` library stores a label as a number, and its name in the features of the data set: in
the schema of each parquet file, or in `dataset_info.json`. Takes files and features; returns names
by column, none where a file says nothing or nothing that makes sense. Never reads a record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.errors import DataError
from qlora_kit.storage import parse_json, read_json

ClassNames = Mapping[str, tuple[str, ...]]
"""names of the classes, in the order of their numbers, by column"""

_INFO = "dataset_info.json"
_KEY = b"huggingface"
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")


def names_in_file(path: Path) -> ClassNames:
    """Return the names that a parquet file has for its columns of classes."""
    if path.suffix.lower() != ".parquet":
        return {}
    import pyarrow
    from pyarrow import parquet

    try:
        stored = (parquet.read_schema(path).metadata or {}).get(_KEY, b"{}")
        content = parse_json(stored.decode("utf-8"), str(path))
    except (pyarrow.ArrowException, OSError, ValueError, DataError):
        # What is wrong with the file is told where its records are read.
        return {}
    return names_in_features(_inside(content, "info", "features"))


def names_in_folder(folder: Path, first: Path) -> ClassNames:
    """Return the names that a folder has for its data set.

    Args:
        folder: a folder of data files.
        first: one of these files, which may have the names itself.
    """
    if found := names_in_file(first):
        return found
    try:
        content = read_json(folder / _INFO) if (folder / _INFO).is_file() else {}
    except DataError:
        return {}
    return names_in_features(_inside(content, "features"))


def names_in_features(features: Any) -> ClassNames:
    """Return the names in features of `datasets`, in the form that they have in a file.

    Names that are whole numbers are left out: nobody could tell them from the numbers of classes.
    """
    if not isinstance(features, Mapping):
        return {}
    named = {column: _names(feature) for column, feature in features.items()}
    return {column: names for column, names in named.items() if names}


def _names(feature: Any) -> tuple[str, ...]:
    """Return the names of a class, or of a list of classes."""
    if isinstance(feature, Mapping) and feature.get("_type") in ("List", "LargeList", "Sequence"):
        feature = feature.get("feature")
    names = feature.get("names") if isinstance(feature, Mapping) else None
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        return ()
    is_once = len({*names}) == len(names) and all(each.strip() for each in names)
    return tuple(names) if is_once and not any(map(_WHOLE.fullmatch, names)) else ()


def _inside(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content
