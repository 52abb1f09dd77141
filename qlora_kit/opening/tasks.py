"""The task of a command: what it was asked for, or what an adapter or a model was trained for.

Takes options and folders; returns a `Task`, or its name. No other room names a task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.config import (
    PreferenceLoss,
    TrainConfig,
)
from qlora_kit.errors import ConfigError
from qlora_kit.lora.files import (
    read_base_record,
    read_peft_config,
)
from qlora_kit.model.config_file import (
    classifying_task,
    names_encoder_decoder,
    names_images,
    read_model_config,
)
from qlora_kit.model.names import find_model

if TYPE_CHECKING:
    from qlora_kit.data.labels import Labels
    from qlora_kit.model.class_head import ClassHead
    from qlora_kit.model.image_processor import ImageProcessor
    from qlora_kit.model.load import BaseSpec
    from qlora_kit.tasks import Task


_TWO_LABELS = ("0", "1")
_CLASSIFY = ("classify", "tag")


def asked_task() -> Task:
    """Return the task of every command. No other place names a task."""
    from qlora_kit.tasks import CAUSAL

    return CAUSAL


def sources_task() -> Task:
    """Return the task of every encoder-decoder."""
    from qlora_kit.tasks.seq2seq import SEQ2SEQ

    return SEQ2SEQ


def preferring_task(loss: PreferenceLoss, beta: float) -> Task:
    """Return the task of pairs of answers, compared by a loss."""
    from qlora_kit.tasks.preference import preference

    return preference(loss, beta)


def classifies(task: str) -> bool:
    """Return whether the models of a task have a head that tells labels apart."""
    return task in _CLASSIFY


def planned_task(config: TrainConfig, processor: ImageProcessor | None = None) -> Task:
    """Return the task of a run whose data are not read: with two labels, if none are named.

    Args:
        config: the options of the run.
        processor: that of a model of images; None of a model of text.
    """
    if config.task == "seq2seq":
        return sources_task()
    if config.task == "preference":
        return preferring_task(config.loss, config.beta)
    if not classifies(config.task):
        return asked_task()
    from qlora_kit.data.labels import Labels

    if config.task == "tag":
        return classifier(Labels("tags", config.labels or _TWO_LABELS), None)
    if config.label_kind == "regression":
        return classifier(Labels("regression"), None, processor)
    names = config.labels or _TWO_LABELS
    labels = Labels("multi", names) if config.label_kind == "multi" else Labels("single", names)
    return classifier(labels, None, processor)


def classifier(
    labels: Labels, pad_token_id: int | None, processor: ImageProcessor | None = None
) -> Task:
    """Return the task of texts, of words, or of images, with these labels.

    Args:
        labels: their kind, names and weights.
        pad_token_id: token that fills short rows, by which decoders find the end of a text.
        processor: what makes images into what a model reads; None of a model of text.
    """
    from qlora_kit.data.labelled_rows import LabelledRows
    from qlora_kit.data.tagged_rows import TaggedRows
    from qlora_kit.model.class_head import VALUE, ClassHead
    from qlora_kit.tasks.classify import classify
    from qlora_kit.tasks.tag import tag

    weights = labels.weights if len(set(labels.weights)) > 1 else ()
    if processor is not None:
        from qlora_kit.tasks.images import classify_images

        of_images = ClassHead(labels.kind, labels.names or (VALUE,))
        return classify_images(of_images, labels, processor, weights)
    head = ClassHead(labels.kind, labels.names or (VALUE,), pad_token_id)
    if labels.kind == "tags":
        return tag(head, TaggedRows(labels), weights)
    return classify(head, LabelledRows(labels), weights)


def compare_heads(
    model: str, stored: ClassHead | None, asked: ClassHead | None, *, of_images: bool = False
) -> Iterator[str]:
    """Compare the head that a model has with the one that its data asks for.

    Args:
        model: name of the model.
        stored: the model's own head; None where it has none yet.
        asked: the head that is wanted.
        of_images: whether it is a model of images, which may get a new head.

    Yields:
        A notice where equal outputs get other names.

    Raises:
        ConfigError: the heads have not the same shape, or one of them tags words.
    """
    if stored is None or asked is None:
        return
    if of_images and len(stored.names) != len(asked.names):
        yield (
            f"{model}: a classifier of {len(stored.names):,} other classes; its head is not taken, "
            f"and one for {len(asked.names):,} is trained anew"
        )
        return
    kinds = (stored.kind == "tags", asked.kind == "tags")
    if kinds[0] != kinds[1] or len(stored.names) != len(asked.names):
        has, needs = ("tags words" if tags else "labels texts" for tags in kinds)
        raise ConfigError(
            f"{model}: a classifier that {has} and has {len(stored.names):,} outputs, while the "
            f"data asks for one that {needs} with {len(asked.names):,}; expected the same of both; "
            "name the model it was trained from, or the labels it has with --labels"
        )
    if stored.names != asked.names and asked.kind != "regression":
        yield (
            f"{model}: a classifier whose outputs have other names than the labels of the data; "
            "training begins with what it has learnt, output by output; pass --labels in its order "
            "if the labels mean the same"
        )


def stored_task(
    spec: BaseSpec,
    adapter: Path | None,
    pad_token_id: int | None,
    processor: ImageProcessor | None = None,
) -> Task:
    """Return the task that an adapter, or else a model, was trained for."""
    from qlora_kit.data.labels import Labels
    from qlora_kit.lora.reading import stored_labels
    from qlora_kit.model.class_head import ClassHead
    from qlora_kit.model.encoder_decoder import is_encoder_decoder

    if is_encoder_decoder(spec.architecture()):
        return sources_task()
    record = None if adapter is None else read_base_record(adapter)
    if record is not None and record.preference_loss and record.preference_beta:
        return preferring_task(record.preference_loss, record.preference_beta)
    of_images = processor is not None
    found = None if adapter is None else stored_labels(adapter, of_images=of_images)
    head = ClassHead.of(spec.architecture())
    if found is None and head is not None:
        found = head.kind, head.names
    if found is None and processor is not None:
        found = "single", _TWO_LABELS  # until its labels are known
    if found is None:
        return asked_task()
    kind, names = found
    labels = Labels(kind, () if kind == "regression" else names)
    return classifier(labels, pad_token_id, processor)


def stored_task_name(model: str, adapter: Path | None) -> str:
    """Return the name of the task that an adapter, or else a model, was trained for.

    Reads text files only, before torch is imported.

    Args:
        model: name, folder or hub id.
        adapter: folder of an adapter, or None.
    """
    source = find_model(model)
    content = source.architecture or {}
    if source.folder is not None and (source.folder / "config.json").is_file():
        content = read_model_config(source.folder / "config.json")
    if names_encoder_decoder(content):
        return "seq2seq"
    if names_images(content):
        return "classify"
    if adapter is not None:
        record, config = read_base_record(adapter), read_peft_config(adapter)
        others = "seq2seq" if config.task_type == "SEQ_2_SEQ_LM" else "causal"
        if record is not None and record.preference_loss:
            others = "preference"
        return (record and record.classifies) or config.classifies or others
    named = None if source.folder is None else content.get("architectures")
    return classifying_task(named) or "causal"


def check_task(task: Task, asked: str) -> None:
    """Check that a model is one for the task that was asked for.

    Raises:
        ConfigError: it is an encoder-decoder and the task is another, or the other way round.
    """
    reads_apart = task.has_sources
    if reads_apart and asked != "seq2seq":
        raise ConfigError(
            f"--task {asked}: the model is an encoder-decoder, which reads one text and writes "
            "another; expected --task seq2seq; pass it, or choose another model"
        )
    if asked == "seq2seq" and not reads_apart:
        raise ConfigError(
            "--task seq2seq: the model has no encoder beside its decoder; expected an "
            "encoder-decoder such as T5; leave --task out, or choose another model"
        )


def check_searchable(task: Task, config: TrainConfig) -> None:
    """Check that no option counts the layers of an encoder-decoder, which are of two kinds.

    Raises:
        ConfigError: one does.
    """
    if is_of_images(task):
        _check_no_budget(config)
    if not task.has_sources:
        return
    for name in ("vram", "ram"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"--{name}: settings are not chosen for an encoder-decoder, whose layers are of "
                f"two kinds; expected no budget with --task seq2seq; leave --{name} out, and see "
                "with `qlora-kit plan` what a --batch-size takes"
            )
    if config.keep_layers:
        raise ConfigError(
            f"--keep-layers {config.keep_layers}: an encoder-decoder has layers of two kinds; "
            "expected 0 with --task seq2seq; leave it out, or pass --no-recompute to keep all"
        )


def is_of_images(task: Task) -> bool:
    """Whether the samples of a task are images."""
    from qlora_kit.model.config_file import IMAGE_CLASSIFICATION

    return task.loads == IMAGE_CLASSIFICATION


def _check_no_budget(config: TrainConfig) -> None:
    """Check that no option asks for settings to be chosen for a model of images.

    Raises:
        ConfigError: one does.
    """
    for name in ("vram", "ram"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"--{name}: settings are not chosen for a model of images; expected no budget; "
                f"leave --{name} out, and see with `qlora-kit plan` what a --batch-size takes"
            )


def check_one_adapter(task: Task, adapters: Mapping[str, Path]) -> None:
    """Check that there are not several adapters on an encoder-decoder.

    Raises:
        ConfigError: there are.
    """
    if task.has_sources and adapters:
        raise ConfigError(
            f"--adapters: {len(adapters)} adapters, and rows of one batch cannot have different "
            "ones on an encoder-decoder yet; expected one; pass --adapter, one after the other"
        )


def check_loss(config: TrainConfig) -> None:
    """Check that no option of pairs of answers is given for another task.

    Raises:
        ConfigError: one is.
    """
    if config.task == "preference":
        return
    for name in ("loss", "beta"):
        value = getattr(config, name)
        # A resumed run names all of its options, those at their default too.
        if value != TrainConfig.model_fields[name].default:
            raise ConfigError(
                f"--{name} {value}: compares two answers, and --task {config.task} has one of a "
                f"sample; expected --task preference; pass it, or leave --{name} out"
            )


def check_generates(task: Task, asked: str) -> None:
    """Check that the models of a task write text.

    Raises:
        ConfigError: they do not, and `asked`, an option or a command, needs text.
    """
    if not task.generates:
        raise ConfigError(
            f"{asked}: a model of task {task.name} writes no text; expected one that does; "
            "`qlora-kit evaluate` without it measures what the model is for"
        )
