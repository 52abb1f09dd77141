"""The data of a run, from one source or from several: read, compared, and joined to one list.

Takes the options of a run; returns `Samples`, which keep those of each source as their `parts`.
Never weighs or orders samples, see `data.mixing`. Imports neither torch nor transformers.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from qlora_kit.config import DataSource, RecordOptions, TrainConfig
from qlora_kit.data.fields import Faults
from qlora_kit.data.labels import Labels, class_counts, is_shown
from qlora_kit.data.samples import Samples, Split, load_held_out, load_samples
from qlora_kit.data.shapes import LABELLED
from qlora_kit.errors import ConfigError, DataError

_MOST_NAMED = 3
_NOT_PLAIN = re.compile(r"[^\w.-]+")


def load_training(config: TrainConfig) -> Samples:
    """Load the training samples of a run, those of several sources joined.

    Raises:
        ConfigError: a source stands twice, or there is not a weight for each.
        DataError: a source is not usable, or the sources do not go together; faults of all of
            them are collected.
        HubError: see `load_samples`.
    """
    check_weights(config)
    if len(config.sources) < 2:
        return load_samples(_name(config), "train", record_options(config), task=config.task)
    check_apart(config.sources)
    return joined(_loaded(config, "train"))


def load_validation(config: TrainConfig) -> Samples | None:
    """Load the validation samples of a run: of its file, or else of the sources that have some.

    Returns:
        None where there are none, and rows may be held out of the training samples.

    Raises:
        DataError, HubError: see `load_training`.
    """
    is_one = len(config.sources) < 2
    if config.validation:
        options = record_options(config) if is_one else config
        return load_samples(config.validation, "validation", options, task=config.task)
    if is_one:
        return load_held_out(
            _name(config), record_options(config), config.task, streams=bool(config.stream_data)
        )
    parts = _loaded(config, "validation")
    if not parts:
        return None
    found = joined(parts)
    with_some = {part.source for part in parts}
    missing = [source.path for source in config.sources if source.path not in with_some]
    if not missing:
        return found
    text = (
        f"validation rows are those of {found.source}; nothing is measured on "
        f"{', '.join(missing)}, without a validation part"
    )
    return replace(found, notices=(*found.notices, text))


def source_names(parts: Sequence[Samples]) -> tuple[str, ...]:
    """Return a short name of each source, as logs and tables call it; no two are the same."""
    names = [_NOT_PLAIN.sub("_", Path(part.source).name) or "source" for part in parts]
    count = Counter(names)
    return tuple(
        name if count[name] == 1 else f"{name}-{number}" for number, name in enumerate(names, 1)
    )


def joined_names(names: Sequence[str]) -> str:
    """Return the sources in words: their names, or of many their number."""
    return ", ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)} sources"


# ---------------------------------------------------------------- one source


def _name(config: TrainConfig) -> str | None:
    """Return the name of the only source of a run; None for the sample data."""
    return config.sources[0].path if config.sources else None


def record_options(config: TrainConfig, number: int = 0) -> RecordOptions:
    """Return how the records of a source are read: as it says, and else as the run says."""
    if not config.sources:
        return config
    source = config.sources[number]
    own = source.model_fields_set & RecordOptions.model_fields.keys()
    return config.model_copy(update={name: getattr(source, name) for name in own})


def _loaded(config: TrainConfig, split: Split) -> list[Samples]:
    """Return the samples of each source, or of each source that has validation samples."""
    found, faults = [], Faults()
    for number, source in enumerate(config.sources):
        options = record_options(config, number)
        try:
            samples = (
                load_samples(source.path, split, options, task=config.task)
                if split == "train"
                else load_held_out(
                    source.path, options, config.task, streams=bool(config.stream_data)
                )
            )
        except DataError as error:
            faults.add(*error.faults)
            continue
        if samples is not None:
            found.append(replace(samples, chat_template=source.chat_template))
    faults.raise_if_any()
    return found


def check_weights(config: TrainConfig) -> None:
    """Check that there is a weight for each of several sources, or none.

    It is checked here because the sources may be those of the run that is resumed.

    Raises:
        ConfigError: there is not.
    """
    weights, sources = config.data_weights, len(config.sources)
    if not weights or (sources > 1 and len(weights) == sources):
        return
    found = f"--data-weights: found {','.join(f'{weight:g}' for weight in weights)}"
    if sources < 2:
        raise ConfigError(
            f"{found}, and {sources or 'no'} source of data; expected several to weigh; give "
            "--data for each, or leave the weights out"
        )
    raise ConfigError(
        f"{found}; expected {sources} numbers, one for each source of data; correct them"
    )


def check_apart(sources: Sequence[DataSource]) -> None:
    """Check that no source stands twice. The same file may be read in two ways, by other columns.

    Raises:
        ConfigError: one does.
    """
    known = set()
    for source in sources:
        exists = os.path.exists(source.path)
        own = source.model_copy(update={"weight": None, "path": ""}).model_dump_json()
        identity = os.path.realpath(source.path) if exists else source.path, own
        if identity in known:
            raise ConfigError(
                f"--data: {source.path} stands twice; expected each source once; leave one out, or "
                "let it come more often with --data-weights"
            )
        known.add(identity)


# ---------------------------------------------------------------- several sources


def joined(parts: Sequence[Samples]) -> Samples:
    """Join the samples of sources, in the order of the sources."""
    shapes = {part.shape for part in parts}
    if shapes & {*LABELLED}:
        _check_one_kind(parts)
    return Samples(
        items=[*chain.from_iterable(part.items for part in parts)],
        shape=parts[0].shape if len(shapes) == 1 else "mixed",
        source=joined_names([part.source for part in parts]),
        notices=tuple(chain.from_iterable(part.notices for part in parts)),
        skipped=sum(part.skipped for part in parts),
        class_names=next((part.class_names for part in parts if part.class_names), ()),
        parts=tuple(parts),
    )


def _check_one_kind(parts: Sequence[Samples]) -> None:
    """Check that labelled sources have one shape, and one meaning of a label's number.

    Raises:
        DataError: they have not.
    """
    first = parts[0]
    for part in parts:
        if part.shape is not first.shape:
            raise DataError(
                f"{part.source}: {part.shape} records, and {first.source} has {first.shape} "
                "records; expected one kind in all sources of labelled data; leave one out"
            )
    named = [part for part in parts if part.class_names]
    for part in named:
        if part.class_names != named[0].class_names:
            raise DataError(
                f"{part.source}: its labels are numbers of other classes than those of "
                f"{named[0].source}; expected the same classes in every source; write the labels "
                "as names"
            )


def check_same_labels(labels: Labels, samples: Samples) -> None:
    """Check that every source has samples of every label.

    Where one label means the same thing under two names, neither source would say so.

    Args:
        labels: the labels of all samples, whose names the user has not given.
        samples: the joined samples.

    Raises:
        DataError: a source has not a label that another has.
    """
    found = [_labels_in(part, labels) for part in samples.parts]
    known = set().union(*found)
    for part, own in zip(samples.parts, found, strict=True):
        missing = [name for name in labels.names if name in known - own]
        if missing:
            shown = [name for name in missing if is_shown(name)][:_MOST_NAMED]
            more = len(missing) - len(shown)
            which = ", ".join([*shown, *([f"{more:,} more"] if more else [])])
            raise DataError(
                f"{part.source}: no record has the label {which} of the other sources; expected "
                "the same labels in every source; write them alike, or name all of them with "
                "--labels where a source may lack some"
            )


def _labels_in(part: Samples, labels: Labels) -> set[str]:
    counts = class_counts(labels, part)
    return {name for name, count in zip(labels.names, counts, strict=True) if count}
