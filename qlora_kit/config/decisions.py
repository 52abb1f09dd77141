"""What an option can decide of a run; the lists of options that follow from it.

| decision | of it follow |
|---|---|
| a group of `--allow-change` | the bits of a run; a resumed one may change it on purpose |
| shape | the shapes of what is stored; a run cannot change it |
| length | how long a run is; a resumed one may be longer |
| memory | what a step takes; it is a setting of the plan |
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from qlora_kit.config.options import Options

ChangeGroup = Literal["data", "tokenizer", "base", "batch", "seed", "lora", "schedule", "precision"]
"""What `--allow-change` can name."""

Decision = Literal[ChangeGroup, "shape", "length", "memory"]

GROUPS: tuple[ChangeGroup, ...] = typing.get_args(ChangeGroup)


def declared(config_class: type[Options], name: str) -> dict[str, Any]:
    """Return what an option says of itself besides its type, see `option`."""
    extra = config_class.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}


def that_decide(config_class: type[Options], *decisions: Decision) -> tuple[str, ...]:
    """Return the options that decide one of these, in the order of their declaration."""
    return tuple(
        name
        for name in config_class.model_fields
        if set(declared(config_class, name).get("decides", ())) & set(decisions)
    )


def compared(config_class: type[Options]) -> tuple[str, ...]:
    """Return the options whose values tell one run from another, as they are."""
    names = that_decide(config_class, "shape", *GROUPS)
    return tuple(name for name in names if not declared(config_class, name)["known_by_result"])


def by_heading(config_class: type[Options]) -> Iterator[tuple[str, list[str]]]:
    """Yield the options of each group of a command, under what its class says of it."""
    left = dict.fromkeys(config_class.model_fields)
    for group in reversed(config_class.__mro__):
        own = inspect.get_annotations(group)
        if names := [name for name in left if name in own]:
            yield (group.__doc__ or "").partition(".")[0], names
            left = {name: None for name in left if name not in own}
