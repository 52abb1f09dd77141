"""Loads the samples a run learns from, or is measured on: the door to the data.

Takes what `--data` was given; returns `Samples`, all of one shape, with what there is to tell
about them. Never tokenises, and loads neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_kit.config import RecordOptions
from qlora_kit.data.columns import check_columns
from qlora_kit.data.faults import list_names
from qlora_kit.data.recognise import Recognised, to_samples
from qlora_kit.data.row_adapter import RowAdapters
from qlora_kit.data.shapes import Sample, Shape
from qlora_kit.data.sources import BUILT_IN, Split, has_split, open_source

__all__ = ["BUILT_IN", "Samples", "load_held_out", "load_samples"]


@dataclass(frozen=True)
class Samples:
    """Samples of one shape, in the order they were read."""

    items: Sequence[Sample]
    shape: Shape
    source: str
    """the file or hub id they came from, in words for the built-in ones"""
    notices: tuple[str, ...] = ()
    """what the user should read once: what was recognised, skipped, or looks wrong"""
    skipped: int = 0
    """records with a fault that were left out"""

    def first(self, count: int | None) -> Samples:
        """Return only the first `count` samples; all where it is None."""
        return replace(self, items=self.items[:count])

    def content_hash(self) -> str:
        """Return the SHA-256 of what is learnt: no part of it are a row's place and adapter."""
        digest = hashlib.sha256(self.shape.encode())
        for sample in self.items:
            # repr quotes strings, so no two contents run into one another.
            names = (name for name in sample.__slots__ if name not in ("place", "adapter"))
            content = [getattr(sample, name) for name in names]
            digest.update(repr(content).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def load_samples(
    data: str | Path | None,
    split: Split = "train",
    options: RecordOptions | None = None,
    adapters: RowAdapters | None = None,
) -> Samples:
    """Load what `--data` names.

    Args:
        data: a file, two line-aligned ones (`FILE+FILE`), a folder, a hub id (owner/name), or
            None for the built-in samples.
        split: which part of a folder, of the hub's data set or of the built-in samples.
        options: a shape or columns that are given rather than recognised, and whether records
            with a fault are left out.
        adapters: those a record may ask for; if None, no record is looked at for one.

    Raises:
        ConfigError: `options.columns` names a field that no shape has.
        DataError: no such file, or records that are not usable; see `open_source`, `to_samples`.
        HubError: the hub has no such data set, or is out of reach.
    """
    options = RecordOptions() if options is None or data is None else options
    check_columns(options.columns)
    source = open_source(data, split)
    found = to_samples(source.records, options, adapters)
    name = source.name if data is None else str(data)
    notices = () if data is None else tuple(_notices(source.name, found, options))
    return Samples(found.samples, found.shape, name, notices, found.skipped)


def load_held_out(data: str | Path | None, options: RecordOptions | None = None) -> Samples | None:
    """Load the validation samples that a folder or the hub's data set brings along, if any.

    Raises:
        DataError: they are not usable.
        HubError: the hub is out of reach.
    """
    return load_samples(data, "validation", options) if has_split(data, "validation") else None


def _notices(name: str, found: Recognised, options: RecordOptions) -> Iterator[str]:
    count = len(found.samples)
    fields = ", ".join(
        field if column == field else f"{field} from {column}"
        for field in found.fields
        for column in [options.columns.get(field, field)]
    )
    unread = f"; not read: {list_names(found.unread)}" if found.unread else ""
    records = "record" if count == 1 else "records"
    yield f"{name}: {count:,} {found.shape} {records} ({fields}){unread}"
    if found.skipped:
        yield (
            f"{name}: {found.skipped:,} of {found.skipped + count:,} records skipped for a fault; "
            f"the first: {found.first_skipped}"
        )
    if found.unlearnt:
        answers = "1 answer is" if found.unlearnt == 1 else f"{found.unlearnt:,} answers are"
        yield f"{name}: {answers} marked not to be learnt (weight, train), and left out of the loss"
    if found.with_placeholder:
        names = ", ".join(f"{{{{{name}}}}}" for name in found.placeholders[:4])
        yield (
            f"{name}: {found.with_placeholder:,} of {count:,} records hold a placeholder "
            f"({names or 'of no plain name'}) that nothing fills in; replace it, or it is learnt"
        )
