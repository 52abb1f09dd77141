"""What a run has of each of several sources: the figures of its header, its survey and its outcome.

Takes the token rows of training and validation; returns `SourceFigures`. Changes neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora_kit.data.stream_count import PassOfSources

if TYPE_CHECKING:
    from qlora_kit.data.tokens import Counts, Tokenized


@dataclass(frozen=True)
class SourceFigures:
    """The figures of one of several sources.

    Attributes:
        name: a short name, as the log has it.
        source: the file, folder or hub id.
        training: what became of its rows that are learnt; of a stream, of the first of them.
        validation: what became of its rows that are measured, if it has any.
        token_rows: number of its token rows that are learnt; None where they are not counted.
        rows_an_epoch: number of rows that it has in an epoch; None where they are not counted.
        share: its share of the rows of an epoch, 0 to 1.
        epochs_to_see_all: number of epochs after which all of its rows have come; None where they
            are not counted.
        is_streamed: whether it is read while the run goes on.
    """

    name: str
    source: str
    training: Counts
    validation: Counts | None
    token_rows: int | None
    rows_an_epoch: int | None
    share: float
    epochs_to_see_all: float | None
    is_streamed: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            **vars(self),
            "training": self.training.as_json(),
            "validation": self.validation.as_json() if self.validation else None,
        }

    def described(self, epoch: int) -> str:
        """Say in one line what the source adds to an epoch of so many rows."""
        if self.token_rows is None or self.rows_an_epoch is None:
            parts = [f"{self.training.shape} rows, not counted", f"{self.share:.1%} of the rows"]
        else:
            weighed = f", {self.training.weight:,} {self.training.weighs.replace('_', ' ')}"
            rows = f"{self.token_rows:,} {self.training.shape} rows"
            parts = [
                rows if self.is_streamed else f"{rows}{weighed}",
                f"{self.rows_an_epoch:,} ({self.share:.1%}) of an epoch's {epoch:,} rows",
            ]
        if self.epochs_to_see_all is not None and self.epochs_to_see_all > 1:
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
    streamed = rows.stream_pass
    mixture = streamed.mixture if isinstance(streamed, PassOfSources) else rows.rows.mixture
    measured = {each.name: each.counts for each in held_out.sources} if held_out else {}
    for number, each in enumerate(rows.sources):
        counts = measured.get(each.name)
        figures = partial(
            SourceFigures,
            each.name,
            each.source,
            each.counts,
            counts if counts and counts.rows_kept else None,
            is_streamed=streamed is not None,
        )
        if isinstance(streamed, PassOfSources) and mixture is None:
            share = streamed.weights[number] / math.fsum(streamed.weights)
            yield figures(None, None, share, None)
            continue
        size = own = len(each.rows)
        total = rows.rows.rows_an_epoch
        if mixture is not None:
            size, own = mixture.sizes[number], mixture.rows_of_sources[number]
            total = mixture.rows
        yield figures(size, own, own / total, size / own)


def described_sources(figures: tuple[SourceFigures, ...]) -> tuple[tuple[str, str], ...]:
    """Return the sources for people: the name of each, and a line on it."""
    epoch = sum(each.rows_an_epoch or 0 for each in figures)
    return tuple((each.name, each.described(epoch)) for each in figures)
