"""What a classifier does with each label: a table, a picture, and a file of both.

Takes the tables of an evaluation, see `tasks.scores`; draws and writes. Shows no text of the data
but the names of its labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.redact import redacted_values
from qlora_kit.report.plot import new_figure, png_of
from qlora_kit.storage import write_json

NAME = "labels.json"
_MOST_DRAWN = 40
_MOST_WRITTEN_IN = 12
_MOST_LISTED = 50
_LONGEST_NAME = 24
_COUNTED = ("rows", "words", "entities")


def write_labels(folder: Path, details: Mapping[str, Any]) -> None:
    """Write the tables of the last evaluation into a run folder.

    Raises:
        StorageError: the file could not be written.
    """
    write_json(folder / NAME, redacted_values(dict(details)))


def counted_of(details: Mapping[str, Any]) -> str:
    """Return the name of what was labelled: rows, words or entities."""
    first: Mapping[str, Any] = next(iter(details.get("per_class", ())), {})
    return next((name for name in _COUNTED if name in first), _COUNTED[0])


def label_rows(details: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Return a row a label: name, precision, recall, F1, and how often it is there."""
    counted = counted_of(details)
    return [
        (each["label"], f"{each['precision']:.3f}", f"{each['recall']:.3f}", f"{each['f1']:.3f}",
         f"{each[counted]:,}")
        for each in details.get("per_class", ())
    ]  # fmt: skip


def label_facts(details: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return a row a label for a terminal: its name, and its figures in one line."""
    return tuple(
        (name, f"precision {precision}  recall {recall}  F1 {f1}  {counted_of(details)} {count}")
        for name, precision, recall, f1, count in label_rows(details)[:_MOST_LISTED]
    )


def confusion_picture(details: Mapping[str, Any]) -> bytes | None:
    """Return a PNG of the confusion matrix; None where there is none, or too large a one.

    A row is a wanted label, a column a predicted one; colours are shares of the row.
    """
    counts: Sequence[Sequence[int]] = details.get("confusion", ())
    if not counts or len(counts) > _MOST_DRAWN:
        return None
    names = [_short(each["label"]) for each in details["per_class"]]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    size = 2.5 + 0.35 * len(names)
    figure, axes = new_figure(size + 1.5, size)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label in the data")
    if len(names) <= _MOST_WRITTEN_IN:
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                colour = "white" if shares[row][column] > 0.5 else "black"
                axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour)
    figure.colorbar(image, label="share of the label's rows")
    return png_of(figure)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
