"""What a run learns from: rows that are all at hand, or a stream of them.

Takes the samples that were read, the opened model and the options; yields `Learnt`, which answers
the questions that the two answer differently. Decides what is streamed, and refuses by name what a
stream cannot do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qlora_kit.config import TrainConfig
from qlora_kit.data.held_samples import HeldSamples
from qlora_kit.data.images import is_image_folder
from qlora_kit.data.samples import Samples, is_hub_id
from qlora_kit.data.shapes import Shape, ShapeOfAll
from qlora_kit.data.sources import check_weights, record_options
from qlora_kit.data.streamed_samples import SampleStream
from qlora_kit.data.streamed_sources import StreamedSources
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.events import Announce, Notice
from qlora_kit.model.names import find_model
from qlora_kit.opening.tasks import asked_task, classifies
from qlora_kit.recipe.counting import is_counted, job_of, tokenizes
from qlora_kit.recipe.mixed_streams import mixed_rows

if TYPE_CHECKING:
    from qlora_kit.data.batch import Row, TokenRows
    from qlora_kit.data.mixed_stream import MixedStream
    from qlora_kit.data.stream import StreamedRows
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.opening.model import Opened

_Options = TypeVar("_Options", bound=TrainConfig)
_Stream = SampleStream | HeldSamples | StreamedSources
_Read = SampleStream | StreamedSources

LARGE_BYTES = 4_000_000
"""text that is streamed by default: to tokenise it takes five to six seconds of a core"""
WHOLE_BYTES = 32_000_000
"""text that is shuffled whole by default: its samples wait in memory, in at most 64 MiB"""
_BUFFER = 10_000
_ONLY_OF_STREAMS = {"shuffle_buffer": (None, _BUFFER), "data_workers": (1,)}
_DEFAULT_FRACTION = TrainConfig.model_fields["validation_fraction"].default


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


# ---------------------------------------------------------------- what is streamed


def open_stream(config: TrainConfig, *, chooses: bool = False) -> _Read | None:
    """Open the training data as a stream, if the user asks for one or it pays.

    Args:
        config: the options of the run.
        chooses: whether large data are streamed where the user leaves it open.

    Raises:
        ConfigError: the data or another option does not go with a stream that is asked for.
        DataError: there is nothing of that name.
        HubError: the hub is out of reach.
    """
    if any(is_image_folder(Path(source.path)) for source in config.sources):
        if config.stream_data:
            raise ConfigError(
                "--stream-data: images are read from their files as they are needed anyway; "
                "expected text with it; leave it out"
            )
        return None
    if config.stream_data:
        return _asked_for(config)
    return _by_default(config) if chooses and config.stream_data is None else None


def tell_without_effect(config: TrainConfig, samples: Samples, announce: Announce) -> None:
    """Announce the options that have no effect, as the data are not streamed.

    Args:
        config: the options of the run.
        samples: the training data, or the first samples of a stream.
        announce: receives the notices.
    """
    stream = samples.stream
    if stream is not None and stream.whole is None:
        return
    # A resumed run names all of its options, those at their default too.
    for name, defaults in _ONLY_OF_STREAMS.items():
        has_workers = name == "data_workers" and stream is not None
        if getattr(config, name) not in defaults and not has_workers:
            flag = name.replace("_", "-")
            announce(Notice(f"--{flag} has no effect without --stream-data"))


def _opened(config: TrainConfig) -> _Read:
    if len(config.sources) > 1:
        return StreamedSources.of(config)
    return SampleStream(config.sources[0].path, record_options(config), config.task)


def _asked_for(config: TrainConfig) -> _Read:
    _check_options(config)
    if config.tokenize_first:
        raise ConfigError(
            "--tokenize-first: with --stream-data samples are tokenised as they are read; expected "
            "one of the two; leave the other out"
        )
    stream = _opened(config)
    if not stream.is_of_hub:
        head = stream.head()
        if Shape.IMAGE in [part.shape for part in (head.parts or (head,))]:
            raise ConfigError(
                f"--stream-data: {stream.data} names images, which are read from their files as "
                "they are needed anyway; expected text with it; leave it out"
            )
        return stream
    if len(config.sources) > 1 and not config.source_weights:
        raise ConfigError(
            f"--stream-data: {len(config.sources)} sources without weights, and one is a data set "
            "of the hub, whose size is not known before all of it is fetched; expected the share "
            "of each; pass --data-weights"
        )
    if config.max_steps is None:
        raise ConfigError(
            f"--stream-data: {_of_hub(stream)} is a data set of the hub, and to count its rows "
            "would be to fetch all of it; expected a number of steps; pass --max-steps"
        )
    if config.validation is None and config.validation_fraction not in (0, _DEFAULT_FRACTION):
        raise ConfigError(
            f"--validation-fraction {config.validation_fraction:g}: {_of_hub(stream)} is a data "
            "set of the hub, and a share of a stream of it is not known before all of it is "
            "fetched; expected --validation FILE with --stream-data; pass one, or "
            "--validation-fraction 0"
        )
    return stream


def _of_hub(stream: _Read) -> str:
    """Return the first data set of the hub among the sources of a stream."""
    parts = stream.parts if isinstance(stream, StreamedSources) else (stream,)
    return next(part.data for part in parts if part.is_of_hub)


def _check_options(config: TrainConfig) -> None:
    if config.data is None:
        raise ConfigError(
            "--stream-data: no --data; expected data that is larger than the memory, and the "
            "built-in data is small; pass --data, or leave --stream-data out"
        )
    check_weights(config)
    if config.task == "preference":
        raise ConfigError(
            "--stream-data: --task preference asks the reference of every pair before the first "
            "step, and a stream has no list of pairs; expected data that are read whole; leave "
            "--stream-data out"
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


def _by_default(config: TrainConfig) -> _Read | None:
    """Return the data as a stream, if they are large and a stream of them does all they would do.

    Only sizes, options and the first records decide, so that a run is streamed or not wherever it
    is started.

    Raises:
        DataError: there is nothing of that name.
        HubError, ModelError: the model is not there.
    """
    names = [source.path for source in config.sources]
    if not names or any(is_hub_id(name) and not os.path.exists(name) for name in names):
        return None
    try:
        _check_options(config)
        stream = _opened(config)
    except ConfigError:
        return None
    if config.tokenize_first or stream.text_bytes < LARGE_BYTES:
        return None
    if not _is_known(config, stream) or not has_positions(config):
        return None
    stream.why = (
        f"by default, as there are {stream.text_bytes / 1e6:,.0f} MB of text; --no-stream-data "
        "reads and checks all of it first"
    )
    return stream


def _is_known(config: TrainConfig, stream: _Read) -> bool:
    """Return whether the first samples tell that a stream does all that is wanted."""
    try:
        head = stream.head()
    except DataError:
        return False  # All faults are told together where all of the data is read.
    shapes = [part.shape for part in (head.parts or (head,))]
    return Shape.IMAGE not in shapes and starts_soon(config, shapes)


def starts_soon(config: TrainConfig, shapes: Sequence[ShapeOfAll]) -> bool:
    """Return whether training can begin without all data being tokenised.

    Args:
        config: the options of the run.
        shapes: of the samples of each source.
    """
    from qlora_kit.data.stream_count import reading_counts

    return all(reading_counts(config, shape) for shape in shapes) or not is_counted(
        config, holds_out=config.validation is None
    )


def has_positions(config: TrainConfig) -> bool:
    """Return whether the model has positions for every row that a stream may have."""
    from qlora_kit.model.fetch import fetch
    from qlora_kit.model.positions import positions_of
    from qlora_kit.opening.model import base_spec

    source = find_model(config.model)
    folder = fetch(source, random=True, revision=config.revision).folder
    positions = positions_of(base_spec(source, folder, config, asked_task()).architecture())
    return positions is None or config.max_length <= positions


def settled(
    config: _Options,
    samples: Samples,
    validation: Samples | None,
    announce: Announce,
    *,
    is_new: bool = True,
) -> _Options:
    """Return the options of a run with what they leave open of streams decided.

    A stream with a number of steps begins at once: where nothing but the default asks for held-out
    samples, none are counted and none held out.

    Args:
        config: the options of the run.
        samples: the training data, or the first samples of a stream.
        validation: the validation data, if there is any of its own.
        announce: receives a notice where nothing is held out.
        is_new: whether the run has no options of an earlier start, which are settled.
    """
    stream = samples.stream
    asks = "validation_fraction" in config.model_fields_set
    is_streamed = stream is not None and stream.whole is None
    config = config.model_copy(
        update={"stream_data": is_streamed, "tokenize_first": stream is None}
    )
    if stream is None or not (is_new and is_streamed):
        return config
    if stream.why or is_counted(config, holds_out=False):
        return config
    if validation is not None or not config.validation_fraction or (asks and not stream.is_of_hub):
        return config
    also = "" if stream.is_of_hub else ", and so does --validation-fraction, for which they are"
    announce(
        Notice(
            "no sample is held out: with --stream-data and --max-steps they are not counted; "
            f"--validation FILE measures while training{also}"
        )
    )
    return config.model_copy(update={"validation_fraction": 0.0})


# ---------------------------------------------------------------- the rows of a run


@contextmanager
def learning_from(
    samples: Samples, opened: Opened, tokenized: Tokenized, config: TrainConfig
) -> Iterator[Learnt]:
    """Yield the rows that a run learns from; processes that tokenise them end with the block.

    Args:
        samples: the training data, or the first samples of a stream.
        opened: the model.
        tokenized: the token rows of these samples.
        config: the options of the run.

    Raises:
        DataError: the data changed.
    """
    if samples.stream is None:
        yield Learnt.at_hand(samples, tokenized)
        return
    rows = _streamed_rows(samples, opened, tokenized, config)
    try:
        yield _of_stream(rows, samples.stream, tokenized, config)
    finally:
        rows.close()


def _of_stream(
    rows: StreamedRows | MixedStream, stream: _Stream, tokenized: Tokenized, config: TrainConfig
) -> Learnt:
    count = "rows not counted" if rows.in_pass is None else f"{rows.in_pass:,} rows"
    content = stream.content_hash
    if isinstance(stream, StreamedSources):
        # The chat template of a source decides its rows as well.
        both = [content, tokenized.origin["data"]]
        content = hashlib.sha256(json.dumps(both).encode()).hexdigest()
        count += "" if rows.in_pass is None else " an epoch"
    workers = f"{config.data_workers} process{'' if config.data_workers == 1 else 'es'}"
    how = f"by {workers} beside the training" if config.data_workers else "between the steps"
    buffer = _buffer_of(config, stream)
    order = (
        "in order" if buffer == 1 else f"drawn from {f'{buffer:,}' if buffer else 'all'} samples"
    )
    if buffer and buffer > 1 and isinstance(stream, StreamedSources):
        order += " of each source"
    identity = {**tokenized.origin, "data": content, "rows": content}
    why = f"; {stream.why}" if stream.why else ""
    if stream.whole is not None:
        described = f"{stream.data}, {count}, tokenised {how}{why}"
        return Learnt(rows, rows.in_pass, identity, described)
    described = f"{stream.data}, streamed, {count}"
    return Learnt(rows, rows.in_pass, identity, described, f"{order}, tokenised {how}{why}")


def _buffer_of(config: TrainConfig, stream: _Stream) -> int | None:
    """Return the most samples that the next one is drawn from; None for all.

    Sizes of files decide it, so a resumed run draws as it did.
    """
    if stream.whole is not None:
        return None
    if config.shuffle_buffer is not None:
        return config.shuffle_buffer
    return None if not stream.is_of_hub and stream.text_bytes <= WHOLE_BYTES else _BUFFER


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
) -> StreamedRows | MixedStream:
    from qlora_kit.data.stream import StreamedRows
    from qlora_kit.data.stream_count import PassOfSources

    longest = longest_rows(opened, tokenized, config)
    assert samples.stream is not None
    check, buffer = _token_check(opened, config), _buffer_of(config, samples.stream)
    counted = tokenized.stream_pass
    if isinstance(counted, PassOfSources):
        return mixed_rows(
            samples, opened, tokenized, config, buffer=buffer, longest=longest, check=check
        )
    assert not isinstance(samples.stream, StreamedSources)
    return StreamedRows(
        samples.stream,
        tokenizes([job_of(samples, opened, config)], config.data_workers),
        seed=config.seed,
        buffer=buffer,
        longest=longest,
        in_pass=counted.rows if counted else None,
        without=counted.numbers if counted else frozenset(),
        check=check,
    )


def longest_rows(opened: Opened, tokenized: Tokenized, config: TrainConfig) -> list[Row]:
    """Return rows as long as a row may be, as many as an optimiser step has.

    Args:
        opened: the model.
        tokenized: some token rows of the data.
        config: the options of the run.
    """
    from qlora_kit.data.stream import longest_row

    row = longest_row(tokenized, config.max_length, has_sources=opened.task.has_sources)
    return [row] * (config.batch_size * config.gradient_accumulation_steps)


def _token_check(opened: Opened, config: TrainConfig) -> Callable[[Row], None]:
    """Return what refuses a row with a token that the model has no embedding for."""
    embeddings = opened.embeddings(config)

    def check(row: Row) -> None:
        if embeddings is not None and max(row["input_ids"]) >= embeddings:
            raise opened.has_no_embedding(max(row["input_ids"]), embeddings)

    return check
