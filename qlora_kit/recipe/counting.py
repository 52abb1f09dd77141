"""Counts a stream before training, and holds samples out of it to be measured on.

Takes the first samples of a stream, their token rows and the options; returns a `Pass`, or None
where nothing has to be counted. Counts are kept in the cache.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.config import TokenOptions, TrainConfig
from qlora_kit.data.samples import Samples
from qlora_kit.errors import ConfigError, DataError, StorageError
from qlora_kit.events import Announce, Notice
from qlora_kit.storage import read_json, write_json

if TYPE_CHECKING:
    from qlora_kit.data.stream_count import Pass
    from qlora_kit.data.stream_worker import Job, Tokenizes
    from qlora_kit.data.streamed_samples import SampleStream
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.opening.model import Opened

MOST_HELD_OUT = 10_000
"""samples of a stream that are held out by default: more take memory, and measure no better"""
_HOLDS_OUT_ALL = "--validation-fraction: holds out every row; expected some to train on"


def is_counted(config: TrainConfig, *, holds_out: bool) -> bool:
    """Return whether a stream has to be counted: to know its steps, or to hold samples out.

    Args:
        config: the options of the run.
        holds_out: whether the data has no validation part of its own.
    """
    return config.max_steps is None or (holds_out and config.validation_fraction > 0)


def job_of(samples: Samples, opened: Opened, config: TrainConfig) -> Job:
    """Return how the samples of a stream become token rows.

    Args:
        samples: the first of them.
        opened: the model.
        config: the options of the run.
    """
    from qlora_kit.data.stream_worker import Job

    assert samples.stream is not None
    first = replace(samples.first(1), source=samples.stream.name, stream=None)
    names = TokenOptions.model_fields.keys()
    options = TokenOptions.model_validate(config.model_dump(include={*names}))
    return Job(opened.task.makes, opened.tokenizer, options, first)


def tokenizes(job: Job, workers: int) -> Tokenizes:
    """Return what makes the token rows of a stream, in other processes or, with none, in this."""
    from qlora_kit.data.stream_worker import Beside, Here

    return Beside(job, workers) if workers else Here(job)


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
    from qlora_kit.data.stream_count import Pass, taken_out
    from qlora_kit.data.tokens import held_out_numbers

    stream = samples.stream
    if stream is None or stream.is_of_hub or not is_counted(config, holds_out=holds_out):
        return None
    found = _found(samples, opened, tokenized, config, announce)
    count = found["rows_read"]
    fraction = _fraction(config, count) if holds_out else 0.0
    numbers = frozenset(held_out_numbers(count, fraction, config.seed))
    if not numbers:
        return Pass(found["rows"])
    if len(numbers) == count:
        raise ConfigError(_HOLDS_OUT_ALL)
    return Pass(found["rows"], taken_out(stream, numbers, samples), numbers)


def _fraction(config: TrainConfig, samples: int) -> float:
    """Return the share of the samples to hold out; the default one is of at most so many."""
    fraction = config.validation_fraction
    if fraction != TrainConfig.model_fields["validation_fraction"].default:
        return fraction
    return min(fraction, MOST_HELD_OUT / samples)


def learnt_pass(whole: Pass, held_out: Tokenized) -> Pass:
    """Return a pass without the rows of the samples that are held out.

    Raises:
        ConfigError: no row is left.
    """
    rows = whole.rows - len(held_out.rows)
    if rows < 1:
        raise ConfigError(_HOLDS_OUT_ALL)
    return replace(whole, rows=rows)


# ---------------------------------------------------------------- the count


def _found(
    samples: Samples, opened: Opened, tokenized: Tokenized, config: TrainConfig, announce: Announce
) -> Counter[str]:
    """Return the count of all samples, from an earlier count of the same data if there is one."""
    from qlora_kit.data.stream_count import count_read, reading_counts

    assert samples.stream is not None
    stream, reads = samples.stream, reading_counts(config, samples.shape)
    file = _file_of_count(stream, tokenized, reads=reads)
    found, how = _stored_count(file), "; counted before"
    if found is None:
        how = ""
        if reads:
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
    announce(Notice(f"data: {counts}{how}"))
    return found


def _count_tokenized(samples: Samples, opened: Opened, config: TrainConfig) -> Counter[str]:
    from qlora_kit.data.stream import StreamedRows

    assert samples.stream is not None
    makes = tokenizes(job_of(samples, opened, config), config.data_workers)
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


def _file_of_count(stream: SampleStream, tokenized: Tokenized, *, reads: bool) -> Path:
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
