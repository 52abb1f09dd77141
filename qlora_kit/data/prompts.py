"""Reads the prompts of a file, to be continued or answered.

Takes a data file whose records have a `prompt`; returns `Prompt`s that know their place. Never
renders or tokenises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.data.faults import Faults, kind_of, list_names
from qlora_kit.data.messages import read_turns
from qlora_kit.data.read import Record, read_records
from qlora_kit.data.row_adapter import RowAdapters
from qlora_kit.data.shapes import Message
from qlora_kit.data.text_fields import filled
from qlora_kit.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """What is to be continued: a text, or the turns before an answer.

    Attributes:
        content: a text stands for the user's turn where there is a chat template.
        place: where it stands, for errors and answers.
        adapter: which of several it asks for; None for the base alone.
    """

    content: str | tuple[Message, ...]
    place: str
    adapter: str | None = None


def read_prompts(path: Path, adapters: RowAdapters | None = None) -> list[Prompt]:
    """Read a data file of prompts; other fields than `prompt` and the adapter are not read.

    Args:
        path: of any format that `read_records` knows, but plain text.
        adapters: those a record may ask for; if None, no record is looked at for one.

    Raises:
        DataError: the file is not readable, or records are no prompts: all of them, one a line.
    """
    prompts, faults = [], Faults()
    for record in read_records(path):
        try:
            prompts.append(_prompt(record, adapters))
        except DataError as error:
            faults.add(*error.faults)
    faults.raise_if_any()
    return prompts


def _prompt(record: Record, adapters: RowAdapters | None) -> Prompt:
    if isinstance(record.content, DataError):
        raise record.content
    if not isinstance(record.content, dict):
        raise DataError(
            f"{record.place}: {kind_of(record.content)}; expected an object with a prompt; write "
            'the record as {"prompt": ...}'
        )
    content = _content(record.content, record.place)
    adapter = adapters.of(record.content, record.place) if adapters else None
    return Prompt(content, record.place, adapter)


def _content(fields: Mapping[str, Any], where: str) -> str | tuple[Message, ...]:
    if "prompt" not in fields:
        found = f"keys {list_names(fields)}" if fields else "no keys"
        raise DataError(f'{where}: {found}; expected "prompt": a text or a list of turns; add it')
    if isinstance(fields["prompt"], list):
        return read_turns(fields["prompt"], "prompt", where)
    return filled(fields, "prompt", where)
