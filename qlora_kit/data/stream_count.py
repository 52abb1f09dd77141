"""Counts the rows of a stream before training, and takes samples out of it to be measured on.

Takes a `SampleStream` and how its samples become rows; returns numbers, and the samples. Reads
every sample; tokenises none.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_kit.config import TokenOptions
from qlora_kit.data.held_samples import HeldSamples
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import ShapeOfAll
from qlora_kit.data.stream_worker import Job
from qlora_kit.data.streamed_samples import SampleStream
from qlora_kit.data.tokens import treatment_of_long
from qlora_kit.time_limit import many_limits

if TYPE_CHECKING:
    from qlora_kit.data.mixing import Mixture

_SAMPLES_AT_A_TIME = 256


@dataclass(frozen=True)
class Pass:
    """What a pass of a stream has that was counted.

    Attributes:
        rows: number of token rows that are learnt.
        held_out: the samples that are measured on, if there are any.
        numbers: their numbers, in the order of the files.
    """

    rows: int
    held_out: Samples | None = None
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class PassOfSources:
    """What the passes of several streams have, and how they are mixed.

    Attributes:
        parts: the pass of each source; None where it was not counted.
        weights: the weight of each source.
        mixture: how their rows make up an epoch; None unless all were counted.
        held_out: the samples that are measured on, if there are any.
    """

    parts: tuple[Pass | None, ...]
    weights: tuple[float, ...]
    mixture: Mixture | None = None
    held_out: Samples | None = None

    @property
    def rows(self) -> int | None:
        """Number of token rows of an epoch; None where they are not counted."""
        return None if self.mixture is None else self.mixture.rows


def reading_counts(options: TokenOptions, shape: ShapeOfAll) -> bool:
    """Return whether the samples tell how many rows they become before they are tokenised.

    They do unless their length decides it: where long ones are split, or left out.

    Args:
        options: the treatment of samples that are too long.
        shape: of the samples.
    """
    return treatment_of_long(options, shape) in ("truncate", "error")


def count_read(samples: SampleStream | HeldSamples, job: Job) -> Counter[str]:
    """Count the rows of all samples by reading them.

    Args:
        samples: the stream.
        job: how its samples become rows.

    Returns:
        Under "rows_read" the number of samples, under "rows" that of their token rows, under
        "rows_dropped" the number of samples of which nothing is to be learnt, and under
        "rows_by_turn" that of chats learnt in several rows.

    Raises:
        DataError: a record has a fault, or a chat that is rendered does not fit its template.
    """
    maker = job.makes(job.first, job.tokenizer, job.options)
    found: Counter[str] = Counter(rows_read=0, rows=0, rows_dropped=0, rows_by_turn=0)
    reading = samples.samples()
    with many_limits():
        while items := [*itertools.islice(reading, _SAMPLES_AT_A_TIME)]:
            own = maker.on(replace(job.first, items=items))
            rows = [own.count(index) for index in range(len(items))]
            found.update(
                rows_read=len(items),
                rows=sum(rows),
                rows_dropped=rows.count(0),
                rows_by_turn=sum(count > 1 for count in rows),
            )
    return found


def taken_out(
    samples: SampleStream | HeldSamples, numbers: Collection[int], like: Samples
) -> Samples:
    """Return some samples of a stream; it is read up to the last of them.

    Args:
        samples: the stream.
        numbers: of the samples, in the order of the files.
        like: samples of the same shape.

    Raises:
        DataError: see `SampleStream.samples`.
    """
    reading = itertools.islice(samples.samples(), max(numbers) + 1)
    items = [sample for number, sample in enumerate(reading) if number in numbers]
    source = f"{samples.data}, what is held out"
    return replace(like, items=items, source=source, notices=(), stream=None)
