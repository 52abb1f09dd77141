"""What a run learns from: rows that are all at hand, or a stream of them.

Takes the samples that were read, the opened model and the options; yields `Learnt`, which answers
the questions that the two answer differently. Refuses by name what a stream cannot do.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.config import TokenOptions, TrainConfig
from qlora_kit.data.samples import Samples
from qlora_kit.data.sources import check_weights, record_options
from qlora_kit.data.streamed_samples import SampleStream
from qlora_kit.errors import ConfigError, DataError, StorageError
from qlora_kit.events import Announce, Notice
from qlora_kit.opening.tasks import classifies
from qlora_kit.storage import read_json, write_json

if TYPE_CHECKING:
    from qlora_kit.data.batch import Row, TokenRows
    from qlora_kit.data.stream import StreamedRows
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.opening.model import Opened

_ONLY_OF_STREAMS = ("shuffle_buffer", "data_workers")


@dataclass(frozen=True)
class Learnt:
    """The rows that a run learns from.

    Attributes:
        rows: the token rows; of a stream, those that are at hand.
        in_epoch: number of rows of an epoch; None if they are not counted.
        identity: what must be equal for a resumed run to see the same rows, by name.
        described: the data in words.
        stream: how a stream is read, in words; None where all rows are at hand.
    """

    rows: TokenRows
    in_epoch: int | None
    identity: Mapping[str, str | None]
    described: str
    stream: str | None = None

    @classmethod
    def at_hand(cls, samples: Samples, tokenized: Tokenized) -> Learnt:
        """Return rows that are all at hand."""
        counts, rows = tokenized.counts, tokenized.rows
        described = (
            f"{samples.source}, {len(rows):,} rows, {counts.weight:,} "
            f"{counts.weighs.replace('_', ' ')}"
        )
        identity = {**tokenized.origin, "rows": rows.content_hash()}
        return cls(rows, rows.rows_an_epoch, identity, described)


# ---------------------------------------------------------------- what can be streamed


def open_stream(config: TrainConfig, announce: Announce) -> SampleStream | None:
    """Open the training data as a stream, if the user asks for one.

    Args:
        config: the options of the run.
        announce: receives notices of options that have no effect.

    Raises:
        ConfigError: the data or another option does not go with a stream.
        DataError: there is nothing of that name.
        HubError: the hub is out of reach.
    """
    if not config.stream_data:
        # A resumed run names all of its options, those at their default too.
        for name in _ONLY_OF_STREAMS:
            if getattr(config, name) != TrainConfig.model_fields[name].default:
                flag = name.replace("_", "-")
                announce(Notice(f"--{flag} has no effect without --stream-data"))
        return None
    _check_options(config)
    stream = SampleStream(config.sources[0].path, record_options(config), config.task)
    if stream.is_of_hub and config.max_steps is None:
        raise ConfigError(
            f"--stream-data: {stream.data} is a data set of the hub, and to count its rows would "
            "be to fetch all of it; expected a number of steps; pass --max-steps"
        )
    if config.validation is None and config.validation_fraction:
        announce(
            Notice(
                "--validation-fraction has no effect with --stream-data: no row of a stream is "
                "held out; --validation FILE measures while training"
            )
        )
    return stream


def _check_options(config: TrainConfig) -> None:
    if config.data is None:
        raise ConfigError(
            "--stream-data: no --data; expected data that is larger than the memory, and the "
            "built-in data is small; pass --data, or leave --stream-data out"
        )
    if len(config.sources) > 1:
        raise ConfigError(
            f"--stream-data: {len(config.sources)} sources; expected one, as "
            "streams are not mixed; pass one --data, or leave --stream-data out"
        )
    check_weights(config)
    default = TrainConfig.model_fields["validation_fraction"].default
    if config.validation is None and config.validation_fraction not in (0, default):
        raise ConfigError(
            f"--validation-fraction {config.validation_fraction:g}: a share of a stream is not "
            "known before its end; expected --validation FILE with --stream-data; pass one, or "
            "--validation-fraction 0"
        )
    if classifies(config.task) and not config.labels and config.label_kind != "regression":
        raise ConfigError(
            f"--stream-data: --task {config.task} without --labels; expected the names of all "
            "labels, as a stream does not know them before its end; pass --labels a,b,c"
        )
    if config.class_weights == "balanced":
        raise ConfigError(
            "--class-weights balanced: a stream does not know how frequent labels are; expected "
            "numbers with --stream-data; pass weights such as spam=3,other=1"
        )


# ---------------------------------------------------------------- the rows of a run


@contextmanager
def learning_from(
    samples: Samples, opened: Opened, tokenized: Tokenized, config: TrainConfig, announce: Announce
) -> Iterator[Learnt]:
    """Yield the rows that a run learns from; processes that tokenise them end with the block.

    Args:
        samples: the training data, or the first samples of a stream.
        opened: the model.
        tokenized: the token rows of these samples.
        config: the options of the run.
        announce: receives the count of the rows of a stream.

    Raises:
        ConfigError: a row of the stream may be too long for the model.
        DataError: the data changed, or, where it is counted, a record has a fault.
    """
    if samples.stream is None:
        yield Learnt.at_hand(samples, tokenized)
        return
    rows = _streamed_rows(samples, opened, tokenized, config)
    try:
        if config.max_steps is None:
            rows.in_pass = _counted(rows, samples, tokenized, announce)
        yield _of_stream(rows, samples.stream, tokenized, config)
    finally:
        rows.close()


def _of_stream(
    rows: StreamedRows, stream: SampleStream, tokenized: Tokenized, config: TrainConfig
) -> Learnt:
    count = "rows not counted" if rows.in_pass is None else f"{rows.in_pass:,} rows"
    workers = f"{config.data_workers} process{'' if config.data_workers == 1 else 'es'}"
    how = f"by {workers} beside the training" if config.data_workers else "between the steps"
    order = (
        f"drawn from {config.shuffle_buffer:,} samples" if config.shuffle_buffer > 1 else "in order"
    )
    return Learnt(
        rows,
        rows.in_pass,
        {**tokenized.origin, "data": stream.content_hash, "rows": stream.content_hash},
        f"{stream.data}, streamed, {count}",
        f"{order}, tokenised {how}",
    )


def check_longest(opened: Opened, config: TrainConfig) -> None:
    """Check that the model has positions for every row that a stream may have.

    Raises:
        ConfigError: it has not.
    """
    positions = opened.positions(config)
    if positions is not None and config.max_length > positions:
        raise ConfigError(
            f"--max-length {config.max_length}: a row of a stream may have as many tokens, and the "
            f"model has {positions} positions; pass --max-length {positions} or less"
        )


def _streamed_rows(
    samples: Samples, opened: Opened, tokenized: Tokenized, config: TrainConfig
) -> StreamedRows:
    from qlora_kit.data.stream import StreamedRows, longest_row
    from qlora_kit.data.stream_worker import Beside, Here, Job

    assert samples.stream is not None
    first = replace(samples.first(1), source=samples.stream.name, stream=None)
    names = TokenOptions.model_fields.keys()
    options = TokenOptions.model_validate(config.model_dump(include={*names}))
    job = Job(opened.task.makes, opened.tokenizer, options, first)
    longest = longest_row(tokenized, config.max_length, has_sources=opened.task.has_sources)
    return StreamedRows(
        samples.stream,
        Beside(job, config.data_workers) if config.data_workers else Here(job),
        seed=config.seed,
        buffer=config.shuffle_buffer,
        longest=[longest] * (config.batch_size * config.gradient_accumulation_steps),
        check=_token_check(opened, config),
    )


def _token_check(opened: Opened, config: TrainConfig) -> Callable[[Row], None]:
    """Return what refuses a row with a token that the model has no embedding for."""
    embeddings = opened.embeddings(config)

    def check(row: Row) -> None:
        if embeddings is not None and max(row["input_ids"]) >= embeddings:
            raise opened.has_no_embedding(max(row["input_ids"]), embeddings)

    return check


# ---------------------------------------------------------------- counting


def _counted(rows: StreamedRows, samples: Samples, tokenized: Tokenized, announce: Announce) -> int:
    """Return the number of rows of a pass, from an earlier count of the same data if there is one.

    A count reads and tokenises all of the data, so it finds every fault before training.
    """
    from qlora_kit.data.tokens import Counts, cache_folder

    stream = rows.samples
    key = f"{stream.content_hash} {tokenized.fingerprint} {stream.options.skip_bad_lines}"
    file = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.count.json"
    found = _stored_count(file)
    how = "; counted before"
    if found is None:
        announce(
            Notice(
                f"{stream.name}: counting the rows, which takes as long as tokenising all of them; "
                "--max-steps starts at once"
            )
        )
        found, how = rows.count(), ""
        _store_count(file, found)
    number = found.pop("rows")
    counts = Counts(samples.shape, tokenized.counts.weighs, **found)
    if not number:
        raise DataError(
            f"{stream.name}: no token row is left of {counts.rows_read:,} samples; expected some "
            "to learn from; raise --max-length, or choose another --long-samples or --train-on"
        )
    if stream.skipped:
        how = f"; {stream.skipped:,} more skipped for a fault; the first: {stream.first_skipped}"
    announce(Notice(f"data: {counts.describe()}{how}"))
    return number


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
