"""The things that an option can decide of a run, and the lists of options that follow from them.

| decision | the option decides | a resumed run |
|---|---|---|
| a group of `--allow-change` | the results of a run, bit for bit | may change it on purpose |
| shape | the shapes of stored tensors | cannot change it |
| length | how long a run is | may be longer |
| memory | the memory of a step: it is a setting of the plan | may change it |
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from qlora_kit.config.options import Options

ChangeGroup = Literal[
    "task", "data", "tokenizer", "base", "batch", "seed", "lora", "schedule", "precision"
]
"""What `--allow-change` can name."""

Decision = Literal[ChangeGroup, "shape", "length", "memory"]

GROUPS: tuple[ChangeGroup, ...] = typing.get_args(ChangeGroup)


def declared(config_class: type[Options], name: str) -> dict[str, Any]:
    """Return everything an option declares besides its type, default and help, see `option`."""
    extra = config_class.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}


def that_decide(config_class: type[Options], *decisions: Decision) -> tuple[str, ...]:
    """Return the options that decide any of these things, in the order of declaration."""
    return tuple(
        name
        for name in config_class.model_fields
        if set(declared(config_class, name).get("decides", ())) & set(decisions)
    )


def compared(config_class: type[Options]) -> tuple[str, ...]:
    """Return the options whose own values tell one run from another, see `known_by_result`."""
    names = that_decide(config_class, "shape", *GROUPS)
    return tuple(name for name in names if not declared(config_class, name)["known_by_result"])


def by_heading(config_class: type[Options]) -> Iterator[tuple[str, list[str]]]:
    """Yield each group of a command's options, under the first sentence of the group's class."""
    left = dict.fromkeys(config_class.model_fields)
    for group in reversed(config_class.__mro__):
        own = inspect.get_annotations(group)
        if names := [name for name in left if name in own]:
            yield (group.__doc__ or "").partition(".")[0], names
            left = {name: None for name in left if name not in own}
