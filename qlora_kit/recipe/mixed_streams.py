"""Several streams of a run: their first samples tokenised, their rows counted, mixed and held out.

Takes the first samples of each source, the opened model and the options; returns token rows whose
`PassOfSources` says how the streams are mixed, and the `MixedStream` that a run learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_kit.config import TrainConfig
from qlora_kit.data.held_samples import HeldSamples
from qlora_kit.data.samples import Samples
from qlora_kit.data.sources import joined, source_names
from qlora_kit.data.streamed_samples import SampleStream
from qlora_kit.events import Announce, Notice
from qlora_kit.recipe.counting import counted_passes, job_of, learnt_pass, tokenizes

if TYPE_CHECKING:
    from qlora_kit.data.batch import Row
    from qlora_kit.data.mixed_stream import MixedStream
    from qlora_kit.data.stream_count import Pass
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.opening.model import Opened


def tokenized_streams(
    samples: Samples,
    held_out: Tokenized | None,
    opened: Opened,
    config: TrainConfig,
    announce: Announce,
) -> tuple[Tokenized, Tokenized | None]:
    """Tokenise the first samples of several streams, count the streams, and hold samples out.

    Args:
        samples: the first samples of each source, joined.
        held_out: the validation rows, if there are any of their own.
        opened: the model.
        config: the options of the run.
        announce: receives what became of the samples.

    Returns:
        The rows of the first samples, with the pass of the sources; and the validation rows.

    Raises:
        ConfigError: every row of a source would be held out, or an epoch would have none of it.
        DataError: see `tokenize_sources` and `counted_pass`.
    """
    from qlora_kit.data.joined_rows import join, tokenize_sources
    from qlora_kit.data.tokens import without_samples

    parts = tokenize_sources(samples, opened.tokenizer, config, opened.task.makes)
    for part, made in zip(samples.parts, parts, strict=True):
        text = f"data: what is looked at before training, {part.source}: {made.describe()}"
        announce(Notice(text))
    passes = counted_passes(
        samples.parts, opened, parts, config, announce, holds_out=held_out is None
    )
    own = None
    if passes is not None:
        own, measured = _held_out(samples, passes, opened, config)
        if measured is not None:
            opened.check_positions(config, measured)
            announce(Notice(f"validation: {len(measured.rows)} rows held out of the data"))
            passes = _learnt(passes, measured)
            parts = [
                without_samples(part, each.numbers)
                for part, each in zip(parts, passes, strict=True)
            ]
            held_out = measured
    return _mixed(join(samples, parts), passes, own, config), held_out


def _held_out(
    samples: Samples, passes: Sequence[Pass], opened: Opened, config: TrainConfig
) -> tuple[Samples | None, Tokenized | None]:
    """Return the samples that are held out of all sources, and their token rows."""
    from qlora_kit.data.joined_rows import join, tokenize_sources

    numbers = [number for number, each in enumerate(passes) if each.held_out is not None]
    if not numbers:
        return None, None
    # A source has the same name here as where its rows are learnt.
    chosen = [
        replace(each.held_out, source=part.source)
        for part, each in zip(samples.parts, passes, strict=True)
        if each.held_out is not None
    ]
    own = joined(chosen)
    found = join(own, tokenize_sources(own, opened.tokenizer, config, opened.task.makes))
    names = source_names(samples.parts)
    sources = tuple(
        replace(each, name=names[number])
        for number, each in zip(numbers, found.sources, strict=True)
    )
    return own, replace(found, sources=sources)


def _learnt(passes: Sequence[Pass], held_out: Tokenized) -> list[Pass]:
    """Return the passes without the rows that are held out."""
    rows = iter(held_out.sources)
    return [
        each if each.held_out is None else learnt_pass(each, len(next(rows).rows))
        for each in passes
    ]


def _mixed(
    tokenized: Tokenized,
    passes: Sequence[Pass] | None,
    held_out: Samples | None,
    config: TrainConfig,
) -> Tokenized:
    """Return the rows of the first samples, with the pass of the sources and mixed as they are."""
    from qlora_kit.data.joined_rows import mixture_of, with_mixture
    from qlora_kit.data.mixing import Mixture
    from qlora_kit.data.stream_count import PassOfSources

    weights, mixture = config.source_weights, None
    if passes is not None:
        sizes = tuple(each.rows for each in passes)
        # Without weights every row comes once an epoch.
        weights = weights or tuple(map(float, sizes))
        mixture = mixture_of(sizes, weights, [each.source for each in tokenized.sources])
    of_first = Mixture(tuple(len(each.rows) for each in tokenized.sources), weights)
    counted = tuple(passes) if passes is not None else (None,) * len(weights)
    return replace(
        # Where no epoch can be made of so few rows, they are looked at all the same.
        with_mixture(tokenized, of_first if all(of_first.rows_of_sources) else None),
        stream_pass=PassOfSources(counted, weights, mixture, held_out),
    )


def mixed_rows(
    samples: Samples,
    opened: Opened,
    tokenized: Tokenized,
    config: TrainConfig,
    *,
    buffer: int | None,
    longest: Sequence[Row],
    check: Callable[[Row], None],
) -> MixedStream:
    """Return the rows that a run on several streams learns from.

    Args:
        samples: the first samples of each source, joined.
        opened: the model.
        tokenized: their token rows, see `tokenized_streams`.
        config: the options of the run.
        buffer: most samples of a source that the next one is drawn from; None: all.
        longest: see `StreamedRows`.
        check: called with every row that is to be learnt.
    """
    from qlora_kit.data.mixed_stream import MixedStream
    from qlora_kit.data.stream import MOST_HELD_BYTES, StreamedRows
    from qlora_kit.data.stream_count import PassOfSources
    from qlora_kit.data.stream_worker import OfSource

    of_sources = tokenized.stream_pass
    assert isinstance(of_sources, PassOfSources)
    jobs = [job_of(part, opened, config) for part in samples.parts]
    makes = tokenizes(jobs, config.data_workers)
    parts = []
    for number, (part, counted) in enumerate(zip(samples.parts, of_sources.parts, strict=True)):
        assert isinstance(part.stream, SampleStream | HeldSamples)
        parts.append(
            StreamedRows(
                part.stream,
                OfSource(makes, number),
                # Two columns of one file must not come in the same order.
                seed=f"{config.seed} {number}",
                buffer=buffer,
                longest=[],
                without=counted.numbers if counted else frozenset(),
                # Together they take no more memory than one stream. Where all samples are drawn
                # from, they are few enough.
                held_bytes=buffer and MOST_HELD_BYTES // len(jobs),
            )
        )
    return MixedStream(
        parts,
        of_sources.weights,
        [each.name for each in tokenized.sources],
        longest=longest,
        in_pass=of_sources.rows,
        check=check,
    )
