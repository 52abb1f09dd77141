"""What a sweep varies: `--over KEY=a,b`, or the same in a file.

Takes the text of flags or the values of a file; returns pairs of a key and its values. Knows no
option: whether a key is one, and takes these values, is told where trials are made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from qlora_kit.config.values import parts_between

_FORM = "expected KEY=a,b, such as learning_rate=1e-4,3e-4"


class Over(BaseModel):
    """An option that a sweep varies, and the values to try, as they were written."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    key: str
    values: tuple[Any, ...]


def parse_over(value: Any) -> Any:
    """Return what is varied as `Over`s.

    Args:
        value: `KEY=a,b`, or a list of such texts, or a mapping of each key to its values.

    Raises:
        ValueError: a part is none of these, or has no values, or an empty one.
    """
    items = [value] if isinstance(value, str | Mapping | Over) else value
    if not isinstance(items, list | tuple):
        raise ValueError(_FORM)
    return tuple(over for item in items for over in _overs(item))


def _overs(item: Any) -> Iterator[Over]:
    if isinstance(item, Over):
        yield item
    elif isinstance(item, str):
        key, is_given, values = item.partition("=")
        if not (key.strip() and is_given):
            raise ValueError(_FORM)
        yield _over(key, values)
    elif isinstance(item, Mapping) and {*item} == {"key", "values"}:
        yield _over(item["key"], item["values"])
    elif isinstance(item, Mapping):
        for key, values in item.items():
            yield _over(key, values)
    else:
        raise ValueError(_FORM)


def _over(key: Any, values: Any) -> Over:
    name = str(key).strip().replace("-", "_")
    if isinstance(values, str):
        values = split_values(values)
    elif not isinstance(values, list | tuple):
        values = (values,)
    if not values or any(each is None or each in ("", [], {}) for each in values):
        raise ValueError(f"{name} has an empty value; expected values between commas")
    return Over(key=name, values=tuple(values))


def split_values(text: str) -> tuple[str, ...]:
    """Return the values in a text: between semicolons if it has any, else between commas.

    Inside brackets, or after a backslash, neither divides.
    """
    by_semicolon = [part.strip() for part in parts_between(text, ";")]
    if len(by_semicolon) > 1:
        return tuple(by_semicolon)
    return tuple(part.strip() for part in parts_between(text))
