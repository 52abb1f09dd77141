"""Turns the values that people write for an option into the values they mean.

Takes the text of a flag or of a YAML file, or a value of Python; returns a value that the type of
the option accepts, or raises a `ValueError` that says what was expected. Knows no option.
"""

from __future__ import annotations

import datetime
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

_YES = ("true", "yes", "on")
_NO = ("false", "no", "off")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)
# Fewer bytes than these are a number whose unit was forgotten.
_LEAST_BYTES = 1_000_000
# No file system in use allows longer names. Paths may have 4,096 bytes; the difference is left for
# the names of files inside a folder.
_MOST_NAME_BYTES, _MOST_PATH_BYTES = 255, 3072
_OPENING, _CLOSING = "([{", ")]}"


def kinds_of(annotation: Any) -> frozenset[Any]:
    """Return the types that make up an annotation, each without its parameters.

    `list[int] | None` is made up of `list` and `NoneType`.
    """
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return frozenset().union(*map(kinds_of, typing.get_args(annotation)))
    if origin is typing.Annotated:
        return kinds_of(typing.get_args(annotation)[0])
    return frozenset([origin or annotation])


def as_meant(value: Any, kinds: frozenset[Any]) -> Any:
    """Return a value in the form that its option takes.

    Where one value is expected, a list of one item stands for the item. Where a name is expected,
    a number or a date stands for the name that is written so.

    Args:
        value: the value that was given.
        kinds: the types of the option, see `kinds_of`.

    Raises:
        ValueError: several values are given for one, a boolean for a number, or a text that is
            not valid text.
    """
    if isinstance(value, list | tuple) and tuple not in kinds:
        if len(value) > 1:
            raise ValueError("expected one value")
        value = value[0] if value else value
    if kinds & {int, float} and bool not in kinds:
        return parse_number(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float | datetime.date) and kinds & {str, Path}:
        return str(value)
    if isinstance(value, str):
        _check_text(value)
        if Path in kinds:
            _check_path(value)
    return value


def _check_text(text: str) -> None:
    try:
        is_text = "\0" not in text and bool(text.encode() or True)
    except UnicodeEncodeError:
        is_text = False
    if not is_text:
        raise ValueError("expected text, and this holds a NUL or half of a character")


def _check_path(text: str) -> None:
    if not text:
        raise ValueError("expected a path")
    longest = max(len(part.encode()) for part in text.split("/"))
    if longest > _MOST_NAME_BYTES or len(text.encode()) > _MOST_PATH_BYTES:
        raise ValueError(
            f"expected a path of at most {_MOST_PATH_BYTES:,} bytes, and {_MOST_NAME_BYTES} in a "
            "name of it"
        )


# ---------------------------------------------------------------- booleans


def switch(value: Any) -> bool | None:
    """Return whether a value says on or off; None where it says neither."""
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else ""
    return True if word in _YES else False if word in _NO else None


# ---------------------------------------------------------------- lists


def split_list(text: str) -> tuple[str, ...]:
    r"""Return the parts of a text between its commas; empty parts are left out.

    A comma inside brackets or braces, or after a backslash, does not divide: it belongs to a
    regular expression, such as `layers\.\d{1,2}\.q_proj`.
    """
    parts = (part.strip() for part in parts_between(text))
    return tuple(part for part in parts if part)


def parts_between(text: str, separator: str = ",") -> Iterator[str]:
    """Yield the parts of a text between its separators, empty ones too; see `split_list`."""
    depth, start, is_escaped = 0, 0, False
    for index, letter in enumerate(text):
        if is_escaped:
            is_escaped = False
            continue
        is_escaped = letter == "\\"
        depth = max(0, depth + (letter in _OPENING) - (letter in _CLOSING))
        if letter == separator and not depth:
            yield text[start:index]
            start = index + 1
    yield text[start:]


def parse_list(value: Any) -> Any:
    """Return the parts of a text, see `split_list`; any other value is returned as it is."""
    return split_list(value) if isinstance(value, str) else value


def check_tokens(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Return tokens as they are, if each can be one.

    Raises:
        ValueError: a token is empty or is white space, or stands twice.
    """
    for token in tokens:
        if not token.strip():
            raise ValueError("expected tokens such as <think>,</think>, none of them empty")
        if tokens.count(token) > 1:
            raise ValueError(
                f"expected each token once; {token} stands {tokens.count(token)} times"
            )
    return tokens


def parse_tokens(value: Any) -> Any:
    """Return the parts of a text between its commas, also empty ones; other values as they are."""
    is_list = isinstance(value, str) and value != ""
    return [part.strip() for part in value.split(",")] if is_list else parse_list(value)


def parse_init(value: Any) -> Any:
    """Return the name of a start as the kit has it; True, PEFT's word for its default, as that."""
    if switch(value) is True:
        return "kaiming"
    return value.replace("_", "-").lower() if isinstance(value, str) else value


def parse_numbers(value: Any) -> Any:
    """Return the pairs of `name=number,…` as a mapping; any other value as it is.

    Raises:
        ValueError: a part of the text is no such pair.
    """
    # A pattern may have an equals sign of its own: the number stands after the last.
    return _parse_pairs(value, r"(.+)=([^=]+)", "expected name=number")


def parse_balanced_or_numbers(value: Any) -> Any:
    """Return the word "balanced" as it is, and any other value as `parse_numbers` does.

    Raises:
        ValueError: a part of the text is no `name=number`.
    """
    return value if value == "balanced" else parse_numbers(value)


def parse_names(value: Any) -> Any:
    """Return the pairs of `name=value,…` as a mapping; any other value as it is.

    Raises:
        ValueError: a part of the text is no such pair.
    """
    return _parse_pairs(value, r"([^=]+)=([^=]+)", "expected field=column")


def _parse_pairs(value: Any, form: str, expected: str) -> Any:
    if not isinstance(value, str):
        return value
    pairs = [re.fullmatch(form, part) for part in split_list(value)]
    if not all(pairs):
        raise ValueError(f"{expected}, several separated by commas")
    found = {pair[1]: pair[2] for pair in pairs if pair is not None}
    if len(found) < len(pairs):
        raise ValueError("expected each name once")
    return found


def parse_sources(value: Any) -> Any:
    """Return several sources of data as mappings, and one source without options as its name.

    Raises:
        ValueError: the list is empty, or a part of it is neither a name nor a mapping.
    """
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list | tuple):
        return value
    if not items or not all(isinstance(item, str | Mapping | BaseModel) for item in items):
        raise ValueError("expected a file, folder or hub id, or a list of these")
    sources = [{"path": item} if isinstance(item, str) else item for item in items]
    only = sources[0] if len(sources) == 1 and isinstance(sources[0], Mapping) else {}
    return only["path"] if [*only] == ["path"] else sources


# ---------------------------------------------------------------- numbers and sizes


def parse_number(value: Any) -> Any:
    """Return a value unless it is true or false, which Python takes for 1 and 0.

    Raises:
        ValueError: the value is true or false.
    """
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def parse_digits(value: Any) -> Any:
    """Return a text of digits as a whole number; any other value as it is."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value) else value


def parse_device(value: Any) -> Any:
    """Return the name of a device as it is.

    Raises:
        ValueError: the value is a number, which another option means.
    """
    if re.fullmatch(r"\d+", str(value)):
        raise ValueError(f"expected auto, cpu or cuda; did you mean --devices {value}?")
    return value


def parse_devices(value: Any) -> Any:
    """Return a text of digits as a whole number; "auto", None and numbers as they are.

    Raises:
        ValueError: the value is the name of a device, which another option means.
    """
    if value in ("cpu", "cuda", "gpu"):
        raise ValueError(f"expected a number or auto; did you mean --device {value}?")
    return parse_digits(value)


def parse_loss(value: Any) -> Any:
    """Return the name of a preference loss from what peers call it; any other value as it is.

    Raises:
        ValueError: the value is a loss of peers that needs other data.
    """
    if value in ("kto", "kto_pair"):
        raise ValueError(
            "expected dpo, ipo or orpo: kto compares an answer with those of a whole step, and is "
            "not built; pair a good with a bad answer to each prompt, and pass dpo"
        )
    return "dpo" if value == "sigmoid" else value


def parse_size(value: Any) -> Any:
    """Return bytes from "4GB" (10⁹), "4GiB" (2³⁰), or a plain number of bytes.

    Raises:
        ValueError: the value is no number with a unit, nor a large number of bytes.
    """
    if isinstance(value, str) and re.fullmatch(r"\d{1,18}", value.strip()):
        value = int(value)
    if isinstance(value, int) and value >= _LEAST_BYTES:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("expected a number with a unit, such as 4GB or 500MB")
    step = 1024 if match[3] else 1000
    return int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " "))


def parse_size_or_auto(value: Any) -> Any:
    """Return "auto" and None as they are, and bytes from any value that `parse_size` takes."""
    return value if value in ("auto", None) else parse_size(value)


# ---------------------------------------------------------------- adapters of the hub

_SNAPSHOT = re.compile(r"models--(.+?)--(.+)/snapshots/([0-9a-f]{40})")


def pinned_name(folder: Path) -> str:
    """Return what records call an adapter: its folder, or `hub:owner/name@commit`.

    A folder in the hub's cache is a commit of a repository, and is found again by that name on
    any machine.
    """
    match = _SNAPSHOT.fullmatch("/".join(folder.parts[-3:]))
    return f"hub:{match[1]}/{match[2]}@{match[3]}" if match else str(folder)


# ---------------------------------------------------------------- habits of Hugging Face's trainer


def parse_resume(value: Any) -> Any:
    """Return None for nothing, and any other value as it is.

    Raises:
        ValueError: the value is a path that no file system allows.
    """
    if value in ("", "none"):
        return None
    if isinstance(value, str):
        _check_path(value)
    return value


def parse_steps(value: Any) -> Any:
    """Return None for -1, as Hugging Face's trainer means it; any other value as it is."""
    return None if value in (-1, "-1") else value


def parse_tracker(value: Any) -> Any:
    """Return "none" for nothing and for false, as Hugging Face's trainer means them."""
    return "none" if value is None or value == [] or switch(value) is False else value
