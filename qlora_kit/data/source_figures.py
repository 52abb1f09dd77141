"""What a run has of each of several sources: the figures of its header, its survey and its outcome.

Takes the token rows of training and validation; returns `SourceFigures`. Changes neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_kit.data.tokens import Counts, Tokenized


@dataclass(frozen=True)
class SourceFigures:
    """The figures of one of several sources.

    Attributes:
        name: a short name, as the log has it.
        source: the file, folder or hub id.
        training: what became of its rows that are learnt.
        validation: what became of its rows that are measured, if it has any.
        token_rows: number of its token rows that are learnt.
        rows_an_epoch: number of rows that it has in an epoch.
        share: its share of the rows of an epoch, 0 to 1.
        epochs_to_see_all: number of epochs after which all of its rows have come.
    """

    name: str
    source: str
    training: Counts
    validation: Counts | None
    token_rows: int
    rows_an_epoch: int
    share: float
    epochs_to_see_all: float

    def as_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            **vars(self),
            "training": self.training.as_json(),
            "validation": self.validation.as_json() if self.validation else None,
        }

    def described(self, epoch: int) -> str:
        """Say in one line what the source adds to an epoch of so many rows."""
        weighed = f"{self.training.weight:,} {self.training.weighs.replace('_', ' ')}"
        parts = [
            f"{self.token_rows:,} {self.training.shape} rows, {weighed}",
            f"{self.rows_an_epoch:,} ({self.share:.1%}) of an epoch's {epoch:,} rows",
        ]
        if self.epochs_to_see_all > 1:
            parts.append(f"all seen after {self.epochs_to_see_all:.3g} epochs")
        measured = self.validation.rows_kept if self.validation else 0
        parts.append(f"validation {measured:,} rows" if measured else "no validation rows")
        return "; ".join(parts)


def source_figures(rows: Tokenized, held_out: Tokenized | None) -> tuple[SourceFigures, ...]:
    """Return the figures of each source; none where there is one source.

    Args:
        rows: the training rows.
        held_out: the validation rows, if there are any.
    """
    return tuple(_figures(rows, held_out))


def _figures(rows: Tokenized, held_out: Tokenized | None) -> Iterator[SourceFigures]:
    mixture, total = rows.rows.mixture, rows.rows.rows_an_epoch
    measured = {each.name: each.counts for each in held_out.sources} if held_out else {}
    for number, each in enumerate(rows.sources):
        own = len(each.rows) if mixture is None else mixture.rows_of_sources[number]
        counts = measured.get(each.name)
        yield SourceFigures(
            each.name,
            each.source,
            each.counts,
            counts if counts and counts.rows_kept else None,
            token_rows=len(each.rows),
            rows_an_epoch=own,
            share=own / total,
            epochs_to_see_all=len(each.rows) / own,
        )


def described_sources(figures: tuple[SourceFigures, ...]) -> tuple[tuple[str, str], ...]:
    """Return the sources for people: the name of each, and a line on it."""
    epoch = sum(each.rows_an_epoch for each in figures)
    return tuple((each.name, each.described(epoch)) for each in figures)
