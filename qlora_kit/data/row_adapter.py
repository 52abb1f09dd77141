"""Which adapter a record asks for, where several are on one base.

Takes the fields of a record; returns the adapter's name, or None for the base alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_kit.data.faults import is_plain
from qlora_kit.data.text_fields import optional
from qlora_kit.errors import DataError


@dataclass(frozen=True)
class RowAdapters:
    """Where a record names its adapter, and which there are.

    Attributes:
        field: of the record.
        names: of the adapters.
    """

    field: str
    names: tuple[str, ...]

    def of(self, record: Mapping[str, Any], where: str) -> str | None:
        """Return the adapter of a record; None where the field is missing, null or empty.

        Args:
            record: its fields.
            where: its place, for errors.

        Raises:
            DataError: the field is no string, or names no adapter.
        """
        name = optional(record, self.field, where)
        if not name or name in self.names:
            return name or None
        found = f"no adapter is named {name!r}" if is_plain(name) else "names no adapter"
        raise DataError(
            f'{where}: "{self.field}": {found}; expected one of {", ".join(self.names)}, or none '
            "for the base alone; correct it, or give that adapter with --adapter NAME=FOLDER"
        )
