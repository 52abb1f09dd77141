"""Loads the samples a run learns from: a file, a data set of the hub, or the built-in ones.

Takes what `--data` was given; returns `Samples`, all of one shape. Never tokenises, and loads
neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_kit.data.read import is_data_file_name, read_records
from qlora_kit.data.shapes import Sample, Shape, to_samples
from qlora_kit.errors import DataError, HubError
from qlora_kit.storage import Line

_DEMO = Path(__file__).parent.parent / "demo"
BUILT_IN: dict[str, Path] = {"train": _DEMO / "train.jsonl", "test": _DEMO / "test.jsonl"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Samples:
    """Samples of one shape, in the order they were read."""

    items: Sequence[Sample]
    shape: Shape
    source: str
    """the file or hub id they came from, in words for the built-in ones"""

    def first(self, count: int | None) -> Samples:
        """Return only the first `count` samples; all where it is None."""
        return Samples(self.items[:count], self.shape, self.source)

    def content_hash(self) -> str:
        """Return the SHA-256 of the samples' content; where they stand does not count."""
        digest = hashlib.sha256(self.shape.encode())
        for sample in self.items:
            # repr quotes strings, so no two contents run into one another.
            content = [getattr(sample, name) for name in sample.__slots__ if name != "place"]
            digest.update(repr(content).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def load_samples(data: str | Path | None, split: Literal["train", "test"] = "train") -> Samples:
    """Load what `--data` names.

    Args:
        data: a file, a hub id (owner/name), or None for the built-in samples.
        split: which of the built-in samples.

    Raises:
        DataError: no such file, or records that are not usable; see `read_records`, `to_samples`.
        HubError: the hub has no such data set, or is out of reach.
    """
    path = BUILT_IN[split] if data is None else Path(data)
    from_hub = not path.exists() and _is_hub_id(str(data))
    lines = _read_hub(str(data)) if from_hub else read_records(path)
    shape, samples = to_samples(lines)
    # Where the package is installed is nobody's business in a model card.
    return Samples(samples, shape, "built-in sample data" if data is None else str(data))


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not is_data_file_name(Path(name))


def _read_hub(name: str) -> Iterator[Line]:
    import datasets

    # The hub client warns of every retry; the one line that matters is the error below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:
        # The hub client raises from many trees; whatever it is, the remedy is the same.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(
            f"{name}: no such file, and not loadable from the hub ({reason}); expected a data "
            "file or a hub id with a train split; check name, network and access"
        ) from error
    for number, record in enumerate(rows, 1):
        yield Line(name, number, record)
    if not len(rows):
        raise DataError(f"{name}: no records; expected at least one; name another data set")
