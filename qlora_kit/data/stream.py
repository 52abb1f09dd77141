"""Token rows of a stream: samples are drawn from a shuffle buffer and tokenised as they are needed.

Takes a `SampleStream`; gives the rows of one optimiser step after another. Where a pass stands is
two numbers, its `StreamPlace`: from there the same rows come again, bit for bit. The order depends
on the samples, the seed, the pass and the size of the buffer alone.
"""

from __future__ import annotations

import itertools
import pickle
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from qlora_kit.data.batch import Row, TokenRows
from qlora_kit.data.encode import IGNORED
from qlora_kit.data.held_samples import HeldSamples
from qlora_kit.data.labelled_rows import LABELS
from qlora_kit.data.shapes import Sample
from qlora_kit.data.stream_worker import Made, Tokenizes
from qlora_kit.data.streamed_samples import SampleStream
from qlora_kit.data.text_rows import SUPERVISED_TOKENS
from qlora_kit.data.tokens import Tokenized
from qlora_kit.errors import DataError

# Long samples must not fill the memory: of these the buffer holds fewer.
MOST_HELD_BYTES = 64 * 2**20
_CHUNK_SAMPLES = 32
_CHUNK_BYTES = 2**20
_MOST_CHUNKS_AHEAD = 64
_ROWS_AT_A_TIME = 32
_Held = TypeVar("_Held")


@dataclass(frozen=True)
class StreamPlace:
    """A place in the stream, between two optimiser steps.

    Attributes:
        sample: number of the sample, in the order they are drawn, that comes next.
        rows: token rows of this sample that are used already.
        is_last: whether no row of the pass is left.
        counts: what became of the samples of all passes up to here, by the names of `Counts`.
    """

    sample: int = 0
    rows: int = 0
    is_last: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)

    def next_pass(self) -> StreamPlace:
        """Return the beginning of the pass after this one."""
        return StreamPlace(counts=self.counts)


class Drawn(NamedTuple):
    """A sample, pickled, and its number in the order of the files."""

    number: int
    content: bytes


def drawn(
    samples: Iterable[Sample],
    seed: int | str,
    epoch: int,
    buffer: int | None,
    without: Collection[int] = frozenset(),
    held_bytes: int | None = None,
) -> Iterator[Drawn]:
    """Yield samples in the order of a pass: each is drawn from those that the buffer holds.

    Args:
        samples: in the order of the files.
        seed: the run's seed; of several sources, with the number of the source.
        epoch: number of the pass, counted from 0.
        buffer: most samples that are held, None: any number; fewer where these take more than
            `held_bytes`.
        without: numbers of samples that are left out.
        held_bytes: most bytes that are held, pickled; None: 64 MiB.
    """
    source = _source(seed, epoch)
    most_bytes = held_bytes or MOST_HELD_BYTES
    held: list[Drawn] = []
    size = 0
    for number, sample in enumerate(samples):
        if number in without:
            continue
        new = Drawn(number, pickle.dumps(sample))
        while held and (len(held) == buffer or size + len(new.content) > most_bytes):
            one = _draw(held, source)
            size -= len(one.content)
            yield one
        held.append(new)
        size += len(new.content)
    while held:
        yield _draw(held, source)


def drawn_from_all(
    items: Sequence[Sample], seed: int | str, epoch: int, without: Collection[int] = frozenset()
) -> Iterator[Drawn]:
    """Yield samples that are in memory, each drawn from all that are left.

    The order is that of `drawn` with a buffer that has room for all of them.

    Args:
        items: in the order in which they were read.
        seed: see `drawn`.
        epoch: number of the pass, counted from 0.
        without: numbers of samples that are left out.
    """
    source = _source(seed, epoch)
    left = [number for number in range(len(items)) if number not in without]
    while left:
        number = _draw(left, source)
        yield Drawn(number, pickle.dumps(items[number]))


def _source(seed: int | str, epoch: int) -> random.Random:
    return random.Random(f"stream {seed} {epoch}")


def _draw(held: list[_Held], source: random.Random) -> _Held:
    chosen = source.randrange(len(held))
    held[chosen], held[-1] = held[-1], held[chosen]
    return held.pop()


class StreamedRows(TokenRows):
    """The token rows of a stream. At any time it holds the rows of one optimiser step.

    Before the first step it holds rows as long as a row may be, as many as a step has: a stream
    does not know its longest row, so memory is measured and planned for these.

    Args:
        samples: the stream, or samples in memory, each of which is drawn from all.
        tokenizes: makes the token rows, here or in other processes.
        seed: the run's seed; of several sources, with the number of the source.
        buffer: most samples that the next one is drawn from, see `drawn`.
        longest: the rows to hold before the first step.
        in_pass: token rows of a pass; None unless they were counted.
        without: numbers of the samples, in the order of the files, that are not learnt.
        held_bytes: most bytes of samples that the next one is drawn from; None: 64 MiB.
        check: called with every row that is to be learnt.

    Attributes:
        samples: the stream.
        in_pass: see above. Where samples were counted without being tokenised, a pass has fewer
            rows if the cut to the longest row leaves nothing to learn of some.
    """

    def __init__(
        self,
        samples: SampleStream | HeldSamples,
        tokenizes: Tokenizes,
        *,
        seed: int | str,
        buffer: int | None,
        longest: Sequence[Row],
        in_pass: int | None = None,
        without: Collection[int] = frozenset(),
        held_bytes: int | None = None,
        check: Callable[[Row], None] = lambda row: None,
    ) -> None:
        super().__init__(longest)
        self.samples = samples
        self._tokenizes = tokenizes
        self.in_pass = in_pass
        self._seed, self._buffer, self._without = seed, buffer, without
        self._held_bytes = held_bytes
        self._check = check

    def start(self, place: Any) -> StreamPlace:
        """Return the place to go on from; that of another kind of data is the beginning."""
        return place if isinstance(place, StreamPlace) else StreamPlace()

    def windows(self, epoch: int, start: StreamPlace, size: int) -> Iterator[StreamPlace]:
        """Hold the rows of one optimiser step after another; yield the place after each.

        Args:
            epoch: number of the pass, counted from 0.
            start: place in this pass to begin at.
            size: rows of a step; the last step of the pass may have fewer.

        Raises:
            DataError: see `SampleStream.samples` and `tokens.tokenize`; or no row is left.
            WorkerLost: a process that tokenises is gone.
        """
        counts = Counter(start.counts)
        held: list[Row] = []
        place = start
        for row, after in self.rows_from(epoch, start, counts, size):
            if len(held) == size:
                self._rows = held
                yield place
                held = []
            self._check(row)
            held.append(row)
            place = after
        if held:
            self._rows = held
            yield replace(place, is_last=True, counts=dict(counts))
        elif not start.sample and not start.rows:
            raise self.is_empty(counts)

    def is_empty(self, counts: Mapping[str, int]) -> DataError:
        """Return the error of a pass of which no row is left; `counts` tells of its samples."""
        return DataError(
            f"{self.samples.name}: no token row is left of {counts['rows_read']:,} samples; "
            "expected some to learn from; raise --max-length, or choose another --long-samples "
            "or --train-on"
        )

    def count(self) -> Counter[str]:
        """Return what becomes of all samples, and under "rows" the number of their rows."""
        found: Counter[str] = Counter()
        for made, _ in self._made(drawn(self.samples.samples(), self._seed, 0, buffer=1), 0):
            found.update(rows=made.table.num_rows, rows_read=len(made.tallies))
            for tally in made.tallies:
                found.update(tally)
        return found

    def close(self) -> None:
        """End the processes that tokenise."""
        self._tokenizes.close()

    # ------------------------------------------------------------ rows

    def rows_from(
        self, epoch: int, start: StreamPlace, counts: Counter[str], size: int
    ) -> Iterator[tuple[Row, StreamPlace]]:
        """Yield the rows of a pass from a place on, each with the place after it.

        Samples before that place are read and drawn, so that the buffer is what it was, and are not
        tokenised.

        Args:
            epoch: number of the pass.
            start: the place.
            counts: what became of the samples before; those after are added.
            size: rows of an optimiser step.
        """
        order = self._order(epoch)
        at = start.sample
        used = start.rows
        for made, chunk in self._made(itertools.islice(order, start.sample, None), size):
            rows = _rows_of_samples(made, chunk)
            for tally in made.tallies:
                of_sample = next(rows)
                # A sample of which rows are used was counted with the first of them.
                if not used:
                    counts.update(tally, rows_read=1)
                for number, row in enumerate(of_sample[used:], used + 1):
                    yield row, StreamPlace(at, number, counts=dict(counts))
                at, used = at + 1, 0

    def _order(self, epoch: int) -> Iterator[Drawn]:
        if isinstance(self.samples, HeldSamples):
            return drawn_from_all(self.samples.whole.items, self._seed, epoch, self._without)
        return drawn(
            self.samples.samples(), self._seed, epoch, self._buffer, self._without, self._held_bytes
        )

    def _made(self, order: Iterable[Drawn], size: int) -> Iterator[tuple[Made, Sequence[Drawn]]]:
        """Yield the token rows of chunks, in order; other processes are some chunks ahead."""
        processes = self._tokenizes.processes
        ahead = min(_MOST_CHUNKS_AHEAD, 2 * processes + 2 * size // _CHUNK_SAMPLES)
        waiting: deque[tuple[Callable[[], Made], Sequence[Drawn]]] = deque()
        for chunk in _chunks(order):
            waiting.append((self._tokenizes.ask([each.content for each in chunk]), chunk))
            if len(waiting) > (ahead if processes else 0):
                made, of = waiting.popleft()
                yield made(), of
        while waiting:
            made, of = waiting.popleft()
            yield made(), of


def _chunks(order: Iterable[Drawn]) -> Iterator[list[Drawn]]:
    chunk: list[Drawn] = []
    size = 0
    for each in order:
        chunk.append(each)
        size += len(each.content)
        if len(chunk) == _CHUNK_SAMPLES or size > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _rows_of_samples(made: Made, chunk: Sequence[Drawn]) -> Iterator[list[Row]]:
    """Yield the rows of each sample of a chunk; none of a sample that was dropped."""
    pieces = made.table.to_batches(max_chunksize=_ROWS_AT_A_TIME)
    rows = (row for piece in pieces for row in piece.to_pylist())
    groups = itertools.groupby(rows, key=lambda row: row["row"])
    index, group = next(groups, (len(chunk), None))
    for number, each in enumerate(chunk):
        if number < index or group is None:
            yield []
            continue
        yield [{**row, "row": each.number} for row in group]
        index, group = next(groups, (len(chunk), None))


def longest_row(tokenized: Tokenized, tokens: int, *, has_sources: bool) -> Row:
    """Return a row as long as a row may be, made of a real one by repeating it.

    Args:
        tokenized: some rows of the stream.
        tokens: most tokens of a row; where it has a source, of that and of its target.
        has_sources: whether rows are sources and targets.
    """
    row: dict[str, Any] = dict(tokenized.rows[0])
    weighs, size = tokenized.counts.weighs, len(row["input_ids"])
    whole = 2 * tokens if has_sources else tokens
    for name, values in row.items():
        of_tokens = isinstance(values, list) and len(values) == size
        if of_tokens and not (name == "labels" and weighs == LABELS):
            row[name] = list(itertools.islice(itertools.cycle(values), whole))
    ids = row["input_ids"]
    if has_sources:
        row["labels"] = [IGNORED] * tokens + ids[tokens:]
    elif weighs == SUPERVISED_TOKENS:
        row["labels"] = ids  # all that may be learnt is: that takes the most
    return row
