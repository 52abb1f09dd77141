"""`--columns`: fields of a record that have another name, or stand deeper in it.

Takes a record; returns it with the named fields in place. Knows which names to suggest for a
record of no known shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_kit.data.faults import is_plain, list_names
from qlora_kit.data.shapes import FIELD_NAMES, FIELDS
from qlora_kit.errors import ConfigError, DataError

# What others call the two sides of a record, and a text without sides; the likeliest first.
_ASKS = ("prompt", "question", "query", "instruction", "problem", "input", "source", "sentence")
_ANSWERS = ("completion", "answer", "response", "output", "solution", "target", "label", "summary")
# What an answer draws upon besides, as in the records of Dolly.
_CONTEXTS = ("context", "input", "passage", "document")
_TEXTS = ("text", "content", "document", "body", "sentence", "story", "code")
_DEEPEST = 3


def check_columns(columns: Mapping[str, str]) -> None:
    """Check that a shape has all of the fields that `--columns` names.

    Raises:
        ConfigError: none has.
    """
    unknown = [name for name in columns if name not in FIELD_NAMES]
    if unknown:
        raise ConfigError(
            f"--columns: no field {unknown[0]}; expected FIELD=COLUMN with a field of "
            f"{', '.join(sorted(FIELD_NAMES))}; correct it"
        )
    if not any(columns.keys() <= {*fields.all} for fields in FIELDS.values()):
        raise ConfigError(
            f"--columns: no format has {' and '.join(columns)} together; expected the fields of "
            "one format; leave some out"
        )


def apply_columns(
    record: Mapping[str, Any], columns: Mapping[str, str], where: str
) -> Mapping[str, Any]:
    """Return the record with each field of `columns` taken from the column it names.

    Args:
        record: as it was read.
        columns: field and column; dots lead into objects, as in `extra_info.answer`.
        where: place of the record.

    Raises:
        DataError: the record has no such column.
    """
    if not columns:
        return record
    return {**record, **{field: _look_up(record, path, where) for field, path in columns.items()}}


def _look_up(record: Mapping[str, Any], path: str, where: str) -> Any:
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
    """Return what to give `--columns` for a record, as far as names tell; "" where they do not."""
    paths = dict(_leaves(record)) if isinstance(record, dict) else {}
    asks, answers = _nearest(paths, _ASKS), _nearest(paths, _ANSWERS)
    others = {path: kind for path, kind in paths.items() if kind is str and path != asks}
    context = _nearest(others, _CONTEXTS)
    if asks in paths and paths[asks] is str and answers and context:
        return f"instruction={asks},input={context},output={answers}"
    if asks and answers:
        sides = ("prompt", "completion") if paths[asks] is list else ("question", "answer")
        return f"{sides[0]}={asks},{sides[1]}={answers}"
    text = _nearest(paths, _TEXTS)
    return f"text={text}" if text else ""


def _nearest(paths: Mapping[str, type], names: tuple[str, ...]) -> str:
    """Return the path that ends in one of the names: the least deep, then the likeliest."""
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
