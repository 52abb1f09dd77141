"""From `--data` to token rows, for every command that reads training data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_kit.config import (
    TrainConfig,
)
from qlora_kit.data.samples import Samples
from qlora_kit.data.sources import check_same_labels, load_training, load_validation
from qlora_kit.errors import (
    ConfigError,
)
from qlora_kit.events import (
    Announce,
    Notice,
)
from qlora_kit.opening.model import open_tokenizer
from qlora_kit.opening.new_tokens import absent_tokens, check_takes_tokens
from qlora_kit.opening.tasks import (
    check_searchable,
    check_task,
    classifies,
    is_of_images,
    planned_task,
)
from qlora_kit.recipe.counting import HOLDS_OUT_ALL, counted_pass, learnt_pass
from qlora_kit.recipe.mixed_streams import tokenized_streams
from qlora_kit.recipe.streaming import check_longest, open_stream, tell_without_effect
from qlora_kit.recipe.tokenizing import tokenized_later
from qlora_kit.redact import redacted_values
from qlora_kit.train.best import LOSS, check_measured, loss_of_source

if TYPE_CHECKING:
    from qlora_kit.data.labels import Labels
    from qlora_kit.data.survey import Survey
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.opening.model import Opened
    from qlora_kit.train.packing import Packing


def read_data(
    config: TrainConfig, announce: Announce, *, chooses: bool = False
) -> tuple[Samples, Samples | None]:
    """Read the training data, and the validation data if there is a file of it.

    Of a stream only the first samples are read. Of data that are tokenised beside the training the
    first samples are returned as well, and the others wait in memory.

    Args:
        config: names the data.
        announce: receives notices about the data.
        chooses: whether large data are streamed, or tokenised beside the training, where the user
            leaves it open.
    """
    stream = open_stream(config, chooses=chooses)
    if stream is None:
        samples = tokenized_later(load_training(config), config, chooses=chooses)
    else:
        samples = stream.head()
    tell_without_effect(config, samples, announce)
    if config.data is None:
        announce(
            Notice(
                f"no --data: training on the built-in sample data ({len(samples.items)} spoken "
                "amounts to be written in figures)"
            )
        )
    validation = load_validation(config)
    for text in (*samples.notices, *(validation.notices if validation else ())):
        announce(Notice(text))
    return samples, validation


def token_rows(
    samples: Samples, validation: Samples | None, config: TrainConfig, announce: Announce
) -> tuple[Opened, Tokenized, Tokenized | None]:
    """Open the model, and tokenise and check the data.

    Args:
        samples: the training data.
        validation: the validation data; None to hold rows out of the training data.
        config: names the model, and says how text becomes tokens.
        announce: receives notices.

    Returns:
        The opened model, the training rows, and the validation rows if there are any.

    Raises:
        ConfigError: a row is too long for the model, no row is left to train on, or an option
            needs validation rows and there are none.
        ModelError: the tokenizer gives a token that the model does not have.
    """
    notices: Iterable[str]
    if config.task == "seq2seq":
        check_takes_tokens(config)
        opened = open_tokenizer(config, announce, config.adapter)
        notices = _notices_of_text(config, "a source is read as it is, and its target learnt whole")
    elif classifies(config.task):
        check_takes_tokens(config)
        labels = _labels(samples, config, announce)
        opened = open_tokenizer(config, announce).classifying(labels, announce)
        notices = _notices_of_text(config, "a labelled text is given to the model as it is")
        if is_of_images(opened.task):
            notices = (*notices, *_notices_of_images(opened, config))
    else:
        opened = open_tokenizer(
            config, announce, config.adapter, config.chat_template, config.new_tokens
        )
        if "preference" in (config.task, opened.task.name):
            opened = opened.continuing(planned_task(config))
        notices = () if opened.task.has_sources else _template_notices(opened, config)
    check_task(opened.task, config.task)
    opened.check_kind(config)
    check_searchable(opened.task, config)
    for text in notices:
        announce(Notice(text))
    if samples.stream is not None:
        check_longest(opened, config)
    rows, held_out = tokenize_data(samples, validation, opened, config, announce)
    opened.check_positions(config, rows)
    for text in absent_tokens(opened, rows):
        announce(Notice(text))
    _check_validation(config, held_out, announce)
    of_sources = [loss_of_source(each.name) for each in held_out.sources] if held_out else []
    check_measured(config.best_metric, (*opened.task.metrics, *of_sources))
    return opened, rows, held_out


def _template_notices(opened: Opened, config: TrainConfig) -> Iterator[str]:
    from qlora_kit.data.chat_template import spelled_out_end

    for source in config.sources:
        if source.chat_template is not None:
            yield (
                f"{source.path} has its own chat template, {source.chat_template}; the run's is "
                "saved with the adapter, and `generate` and `evaluate` use that"
            )
    if end := spelled_out_end(opened.tokenizer):
        yield (
            f"the chat template ends answers with {end!r}, which is no token of the "
            "tokenizer: it is spelled out, and the EOS token learnt after it; expected an end "
            "token; correct the template"
        )


def _notices_of_text(config: TrainConfig, why: str) -> Iterable[str]:
    """Options of text that is continued must not be silently without effect on other tasks."""
    for name in ("train_on", "chat_template"):
        # A resumed run names all of its options, those at their default too.
        is_default = getattr(config, name) == TrainConfig.model_fields[name].default
        if name in config.model_fields_set and not is_default:
            flag = name.replace("_", "-")
            yield f"--{flag} has no effect: {why}"
    if any(source.chat_template is not None for source in config.sources):
        yield f"the chat_template of a source has no effect: {why}"


def _notices_of_images(opened: Opened, config: TrainConfig) -> Iterator[str]:
    """Options of texts must not be silently without effect on images."""
    from qlora_kit.model.images import has_stages

    processor = opened.tokenizer
    yield (
        f"an image is read as {processor.height} × {processor.width} pixels of "
        f"{processor.channels} channels, and counts as {processor.tokens} tokens"
    )
    for name in ("max_length", "long_samples"):
        if getattr(config, name) != TrainConfig.model_fields[name].default:
            yield f"--{name.replace('_', '-')} has no effect: an image is not cut"
    is_asked = config.recompute and "recompute" in config.model_fields_set
    if is_asked and has_stages(opened.spec(config).architecture()):
        yield "--recompute has no effect: transformers runs no layer of this model again"


def tokenize_data(
    samples: Samples,
    validation: Samples | None,
    opened: Opened,
    config: TrainConfig,
    announce: Announce,
) -> tuple[Tokenized, Tokenized | None]:
    """Tokenise the data, hold out validation rows, and announce how many rows there are.

    Returns:
        The training rows, those of the first samples of a stream; and the validation rows if there
        are any.

    Raises:
        ConfigError: every row would be held out, or an epoch would have no row of a source.
    """
    from qlora_kit.data.joined_rows import mixed
    from qlora_kit.data.tokens import split_validation

    is_mixed_stream = samples.stream is not None and bool(samples.parts)
    rows = None if is_mixed_stream else _tokenized("data", samples, opened, config, announce)
    held_out = None
    if validation is not None:
        held_out = _tokenized("validation", validation, opened, config, announce)
    if rows is None:
        return tokenized_streams(samples, held_out, opened, config, announce)
    if samples.stream is not None:
        return _of_pass(samples, rows, held_out, opened, config, announce)
    if held_out is not None:
        return mixed(rows, config.source_weights), held_out
    kept, split = split_validation(rows, config.validation_fraction, config.seed)
    if not all(len(part.rows) for part in (kept.sources or [kept])):
        raise ConfigError(HOLDS_OUT_ALL)
    if split is not None:
        announce(Notice(f"validation: {len(split.rows)} rows held out of the data"))
        for text in _held_out_labels(rows, kept):
            announce(Notice(text))
    return mixed(kept, config.source_weights), split


def _of_pass(
    samples: Samples,
    rows: Tokenized,
    held_out: Tokenized | None,
    opened: Opened,
    config: TrainConfig,
    announce: Announce,
) -> tuple[Tokenized, Tokenized | None]:
    """Count a stream, and tokenise the samples that are held out of it, see `tokenize_data`."""
    from qlora_kit.data.tokens import tokenize, without_samples

    holds_out = held_out is None
    found = counted_pass(samples, opened, rows, config, announce, holds_out=holds_out)
    if found is not None and found.held_out is not None:
        held_out = tokenize(found.held_out, opened.tokenizer, config, makes=opened.task.makes)
        opened.check_positions(config, held_out)
        found, rows = learnt_pass(found, len(held_out.rows)), without_samples(rows, found.numbers)
        announce(Notice(f"validation: {len(held_out.rows)} rows held out of the data"))
    return replace(rows, stream_pass=found), held_out


def _tokenized(
    what: str, samples: Samples, opened: Opened, config: TrainConfig, announce: Announce
) -> Tokenized:
    """Tokenise the samples of one source or of several, and announce how many rows there are."""
    from qlora_kit.data.joined_rows import join, tokenize_sources
    from qlora_kit.data.tokens import tokenize

    tokenizer, makes = opened.tokenizer, opened.task.makes
    if not samples.parts:
        rows = tokenize(samples, tokenizer, config, makes=makes)
        looked_at = "" if samples.stream is None else "what is looked at before training, "
        announce(Notice(f"{what}: {looked_at}{rows.describe()}"))
        return rows
    parts = tokenize_sources(samples, tokenizer, config, makes)
    for part, made in zip(samples.parts, parts, strict=True):
        announce(Notice(f"{what}: {part.source}: {made.describe()}"))
    return join(samples, parts)


def _labels(samples: Samples, config: TrainConfig, announce: Announce) -> Labels:
    """Return the labels, which are those of the training samples, and announce them."""
    from qlora_kit.data.labels import (
        class_counts,
        doubtful,
        labels_of,
        missing_from,
        tags_in_words,
    )

    if samples.stream is not None and samples.stream.whole is not None:
        samples = samples.stream.whole
    labels = labels_of(samples, config)
    if not config.labels and labels.kind != "regression":
        check_same_labels(labels, samples)
    announce(Notice(f"labels: {labels.describe()}"))
    if labels.kind == "tags":
        announce(Notice(f"tags: {tags_in_words(labels, samples)}"))
    absent: Iterable[str] = ()
    if samples.stream is None:
        absent = missing_from(labels, class_counts(labels, samples), samples.source)
    for text in (*absent, *doubtful(labels)):
        announce(Notice(text))
    return labels


def _held_out_labels(rows: Tokenized, kept: Tokenized) -> Iterator[str]:
    """Yield a notice where all rows of a label were held out."""
    if rows.labels is None:
        return
    from qlora_kit.data.labels import held_out_whole

    yield from held_out_whole(rows.labels, rows.label_counts(), kept.label_counts())


def _check_validation(config: TrainConfig, held_out: Tokenized | None, announce: Announce) -> None:
    """Refuse or announce options that have no effect without validation rows."""
    if held_out is not None:
        return
    remedy = "give --validation FILE, or 200 rows or more with --validation-fraction above 0"
    if config.early_stopping_patience is not None:
        raise ConfigError(f"--early-stopping-patience: there are no validation rows; {remedy}")
    if config.eval_steps is not None:
        announce(Notice(f"--eval-steps has no effect: there are no validation rows; {remedy}"))
    if config.best_metric != LOSS:
        announce(Notice(f"--best-metric has no effect: there are no validation rows; {remedy}"))


def surveyed(
    samples: Samples,
    validation: Samples | None,
    rows: Tokenized,
    held_out: Tokenized | None,
    opened: Opened,
    config: TrainConfig,
    shown_rows: int,
    packing: Packing,
) -> Survey:
    """Survey the data, and take secrets out of the result.

    Args:
        samples: the training data.
        validation: the validation data, if there is a file of it.
        rows: the training rows.
        held_out: the validation rows, if there are any.
        opened: the model with its tokenizer.
        config: the options of the run.
        shown_rows: number of rows to show token by token.
        packing: whether the samples of a step are packed.
    """
    from qlora_kit.data.packing import PackedStep
    from qlora_kit.data.row_arrays import Part
    from qlora_kit.data.survey import survey

    own = rows.stream_pass.held_out if rows.stream_pass else None
    found = survey(
        Part(samples, rows),
        None if held_out is None else Part(validation or own or samples, held_out),
        opened.tokenizer,
        _for_survey(opened, config),
        seed=config.seed,
        shown_rows=shown_rows,
        has_sources=opened.task.has_sources,
    )
    # The first step of a stream is drawn from its shuffle buffer.
    shows_step = packing.is_on and samples.stream is None
    found = replace(
        found,
        packing=packing.described(config, rows.rows),
        packed=PackedStep.of(config, rows.rows, samples) if shows_step else None,
    )
    # The survey names files, and is shown on a page; a path may hold a secret.
    redacted: Survey = redacted_values(found)
    return redacted


def _for_survey(opened: Opened, config: TrainConfig) -> TrainConfig:
    """Return the options that rows were made by: images are as long as they are."""
    if not is_of_images(opened.task):
        return config
    return config.model_copy(update={"max_length": opened.tokenizer.tokens})
