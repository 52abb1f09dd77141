"""Counts a stream before training, and holds samples out of it to be measured on.

Takes the first samples of a stream, their token rows and the options; returns a `Pass`, or None
where nothing has to be counted. Counts are kept in the cache.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.config import TokenOptions, TrainConfig
from qlora_kit.data.held_samples import HeldSamples
from qlora_kit.data.samples import Samples
from qlora_kit.data.streamed_samples import SampleStream
from qlora_kit.errors import ConfigError, DataError, StorageError
from qlora_kit.events import Announce, Notice
from qlora_kit.storage import read_json, write_json

if TYPE_CHECKING:
    from qlora_kit.data.stream_count import Pass
    from qlora_kit.data.stream_worker import Job, Tokenizes
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.opening.model import Opened

MOST_HELD_OUT = 10_000
"""samples of a stream that are held out by default: more take memory, and measure no better"""
HOLDS_OUT_ALL = "--validation-fraction: holds out every row; expected some to train on"


def is_counted(config: TrainConfig, *, holds_out: bool) -> bool:
    """Return whether streams have to be counted: for steps or shares, or to hold samples out.

    Args:
        config: the options of the run.
        holds_out: whether the data has no validation part of its own.
    """
    has_shares = len(config.sources) < 2 or bool(config.source_weights)
    return (
        config.max_steps is None or not has_shares or (holds_out and config.validation_fraction > 0)
    )


def job_of(samples: Samples, opened: Opened, config: TrainConfig) -> Job:
    """Return how the samples of a stream become token rows.

    Args:
        samples: the first of them, of one source.
        opened: the model.
        config: the options of the run.
    """
    from qlora_kit.data.stream_worker import Job

    assert samples.stream is not None
    first = replace(samples.first(1), source=samples.stream.name, stream=None)
    names = TokenOptions.model_fields.keys()
    options = TokenOptions.model_validate(config.model_dump(include={*names}))
    tokenizer = opened.tokenizer
    if samples.chat_template is not None:
        # Choosing a template changes the tokenizer, and that of the run is for all other sources.
        tokenizer = deepcopy(tokenizer)
        options = options.model_copy(update={"chat_template": samples.chat_template})
    return Job(opened.task.makes, tokenizer, options, first)


def tokenizes(jobs: Sequence[Job], workers: int) -> Tokenizes:
    """Return what makes the token rows of streams, in other processes or, with none, in this."""
    from qlora_kit.data.stream_worker import Beside, Here

    return Beside(jobs[0], workers, jobs[1:]) if workers else Here(*jobs)


def counted_pass(
    samples: Samples,
    opened: Opened,
    tokenized: Tokenized,
    config: TrainConfig,
    announce: Announce,
    *,
    holds_out: bool,
) -> Pass | None:
    """Count a pass of a stream, and take the samples that are held out.

    Args:
        samples: the first samples of the stream.
        opened: the model.
        tokenized: the token rows of these samples.
        config: the options of the run.
        announce: receives the count.
        holds_out: whether the data has no validation part of its own.

    Returns:
        The pass, with the rows of the samples that are held out still among its rows; None where
        neither steps nor held-out samples have to be known, and for a data set of the hub, which
        would have to be fetched.

    Raises:
        ConfigError: all samples are held out.
        DataError: a record has a fault, or nothing is left to learn from.
    """
    from qlora_kit.data.tokens import MIN_ROWS_FOR_VALIDATION

    if not _has_count(samples, config, holds_out=holds_out):
        return None
    found = _found(samples, opened, tokenized, config, announce)
    fraction = _fraction(config, found["rows_read"]) if holds_out else 0.0
    return _pass(samples, found, fraction, MIN_ROWS_FOR_VALIDATION, config)


def counted_passes(
    parts: Sequence[Samples],
    opened: Opened,
    tokenized: Sequence[Tokenized],
    config: TrainConfig,
    announce: Announce,
    *,
    holds_out: bool,
) -> list[Pass] | None:
    """Count the passes of several streams, and take the samples that are held out of each.

    Args:
        parts: the first samples of each stream.
        opened: the model.
        tokenized: the token rows of these.
        config: the options of the run.
        announce: receives the counts.
        holds_out: whether no source has a validation part of its own.

    Returns:
        The passes, see `counted_pass`. None where they are not counted.

    Raises:
        ConfigError, DataError: see `counted_pass`.
    """
    from qlora_kit.data.tokens import MIN_ROWS_FOR_VALIDATION, MIN_ROWS_OF_A_SOURCE

    if not all(_has_count(part, config, holds_out=holds_out) for part in parts):
        return None
    found = [
        _found(part, opened, rows, config, announce, of=f"{part.source}: ")
        for part, rows in zip(parts, tokenized, strict=True)
    ]
    has_some = holds_out and sum(each["rows"] for each in found) >= MIN_ROWS_FOR_VALIDATION
    fraction = _fraction(config, sum(each["rows_read"] for each in found)) if has_some else 0.0
    return [
        _pass(part, each, fraction, MIN_ROWS_OF_A_SOURCE, config)
        for part, each in zip(parts, found, strict=True)
    ]


def _has_count(samples: Samples, config: TrainConfig, *, holds_out: bool) -> bool:
    stream = samples.stream
    return stream is not None and not stream.is_of_hub and is_counted(config, holds_out=holds_out)


def _pass(
    samples: Samples, found: Mapping[str, int], fraction: float, least: int, config: TrainConfig
) -> Pass:
    """Return the pass of a stream that was counted, with the samples that are held out of it.

    Args:
        samples: the first of its samples.
        found: the count.
        fraction: share of the samples to hold out.
        least: number of samples that there must be for it.
        config: the options of the run.

    Raises:
        ConfigError: all samples are held out.
    """
    from qlora_kit.data.stream_count import Pass, taken_out
    from qlora_kit.data.tokens import held_out_numbers

    count = found["rows_read"]
    numbers = frozenset(held_out_numbers(count, fraction, config.seed, least))
    if not numbers:
        return Pass(found["rows"])
    if len(numbers) == count:
        raise ConfigError(HOLDS_OUT_ALL)
    assert isinstance(samples.stream, SampleStream | HeldSamples)
    return Pass(found["rows"], taken_out(samples.stream, numbers, samples), numbers)


def _fraction(config: TrainConfig, samples: int) -> float:
    """Return the share of the samples to hold out; the default one is of at most so many."""
    fraction = config.validation_fraction
    if fraction != TrainConfig.model_fields["validation_fraction"].default:
        return fraction
    return min(fraction, MOST_HELD_OUT / samples)


def learnt_pass(whole: Pass, held_out: int) -> Pass:
    """Return a pass without the rows of the samples that are held out, of which there are so many.

    Raises:
        ConfigError: no row is left.
    """
    rows = whole.rows - held_out
    if rows < 1:
        raise ConfigError(HOLDS_OUT_ALL)
    return replace(whole, rows=rows)


# ---------------------------------------------------------------- the count


def _found(
    samples: Samples,
    opened: Opened,
    tokenized: Tokenized,
    config: TrainConfig,
    announce: Announce,
    of: str = "",
) -> Counter[str]:
    """Return the count of all samples, from an earlier count of the same data if there is one.

    Args:
        samples: the first of them.
        opened: the model.
        tokenized: the token rows of these.
        config: the options of the run.
        announce: receives the count.
        of: the source, where there are several.
    """
    from qlora_kit.data.stream_count import count_read, reading_counts

    assert isinstance(samples.stream, SampleStream | HeldSamples)
    stream, reads = samples.stream, reading_counts(config, samples.shape)
    file = _file_of_count(stream, tokenized, reads=reads)
    found, how = _stored_count(file), "; counted before"
    if found is None:
        how = ""
        if reads:
            if stream.whole is None:
                announce(Notice(f"{stream.name}: reading all samples to count them"))
            found = count_read(stream, job_of(samples, opened, config))
        else:
            announce(
                Notice(
                    f"{stream.name}: counting the rows, which takes as long as tokenising all of "
                    "them, as length decides how many rows a sample has; --max-steps with "
                    "--validation-fraction 0 starts at once"
                )
            )
            found = _count_tokenized(samples, opened, config)
        _store_count(file, found)
    if not found["rows"]:
        raise DataError(
            f"{stream.name}: no token row is left of {found['rows_read']:,} samples; expected some "
            "to learn from; raise --max-length, or choose another --long-samples or --train-on"
        )
    if stream.skipped:
        how = f"; {stream.skipped:,} more skipped for a fault; the first: {stream.first_skipped}"
    counts = _described_read(found, samples) if reads else _described(found, tokenized)
    announce(Notice(f"data: {of}{counts}{how}"))
    return found


def _count_tokenized(samples: Samples, opened: Opened, config: TrainConfig) -> Counter[str]:
    from qlora_kit.data.stream import StreamedRows

    assert isinstance(samples.stream, SampleStream | HeldSamples)
    makes = tokenizes([job_of(samples, opened, config)], config.data_workers)
    rows = StreamedRows(samples.stream, makes, seed=config.seed, buffer=1, longest=[])
    with closing(rows):
        return rows.count()


def _described(found: Mapping[str, int], tokenized: Tokenized) -> str:
    from qlora_kit.data.tokens import Counts

    named = {name: count for name, count in found.items() if name != "rows"}
    return Counts(tokenized.counts.shape, tokenized.counts.weighs, **named).describe()


def _described_read(found: Mapping[str, int], samples: Samples) -> str:
    """Return in one line what reading has told."""
    parts = [f"{found['rows_read']:,} {samples.shape} rows"]
    if dropped := found["rows_dropped"]:
        parts.append(f"{dropped:,} of these with nothing to learn")
    if by_turn := found["rows_by_turn"]:
        parts.append(
            f"{by_turn:,} of these learnt turn by turn, each answer after its own prompt; "
            f"{found['rows']:,} token rows in all"
        )
    return "; ".join(parts)


def _file_of_count(
    stream: SampleStream | HeldSamples, tokenized: Tokenized, *, reads: bool
) -> Path:
    from qlora_kit.data.tokens import cache_folder

    how = "read" if reads else "tokenised"
    key = f"{stream.content_hash} {tokenized.fingerprint} {stream.options.skip_bad_lines} {how}"
    return cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.count.json"


def _stored_count(file: Path) -> Counter[str] | None:
    try:
        return Counter({str(name): int(count) for name, count in read_json(file).items()})
    except (DataError, StorageError, ValueError, TypeError, AttributeError):
        return None


def _store_count(file: Path, found: Mapping[str, int]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, dict(found))
    except (OSError, StorageError):
        # A cache that cannot be written costs time, not the run.
        return
