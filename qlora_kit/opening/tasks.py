"""The task of a command: what it was asked for, or what an adapter or a model was trained for.

Takes options and folders; returns a `Task`, or its name. No other room names a task.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.config import (
    TrainConfig,
)
from qlora_kit.errors import ConfigError
from qlora_kit.lora.files import (
    read_base_record,
    read_peft_config,
)
from qlora_kit.model.config_file import classifying_task, read_model_config
from qlora_kit.model.names import find_model

if TYPE_CHECKING:
    from qlora_kit.data.labels import Labels
    from qlora_kit.model.load import BaseSpec
    from qlora_kit.tasks import Task


_TWO_LABELS = ("0", "1")
_CLASSIFY = ("classify", "tag")


def asked_task() -> Task:
    """Return the task of every command. No other place names a task."""
    from qlora_kit.tasks import CAUSAL

    return CAUSAL


def classifies(task: str) -> bool:
    """Return whether the models of a task have a head that tells labels apart."""
    return task in _CLASSIFY


def planned_task(config: TrainConfig) -> Task:
    """Return the task of a run whose data are not read: with two labels, if none are named."""
    if not classifies(config.task):
        return asked_task()
    from qlora_kit.data.labels import Labels

    if config.task == "tag":
        return classifier(Labels("tags", config.labels or _TWO_LABELS), None)
    if config.label_kind == "regression":
        return classifier(Labels("regression"), None)
    names = config.labels or _TWO_LABELS
    labels = Labels("multi", names) if config.label_kind == "multi" else Labels("single", names)
    return classifier(labels, None)


def classifier(labels: Labels, pad_token_id: int | None) -> Task:
    """Return the task of texts, or of words, with these labels.

    Args:
        labels: their kind, names and weights.
        pad_token_id: token that fills short rows, by which decoders find the end of a text.
    """
    from qlora_kit.data.labelled_rows import LabelledRows
    from qlora_kit.data.tagged_rows import TaggedRows
    from qlora_kit.model.class_head import VALUE, ClassHead
    from qlora_kit.tasks.classify import classify
    from qlora_kit.tasks.tag import tag

    head = ClassHead(labels.kind, labels.names or (VALUE,), pad_token_id)
    weights = labels.weights if len(set(labels.weights)) > 1 else ()
    if labels.kind == "tags":
        return tag(head, TaggedRows(labels), weights)
    return classify(head, LabelledRows(labels), weights)


def stored_task(spec: BaseSpec, adapter: Path | None, pad_token_id: int | None) -> Task:
    """Return the task that an adapter, or else a model, was trained for."""
    from qlora_kit.data.labels import Labels
    from qlora_kit.lora.adapter import stored_labels
    from qlora_kit.model.class_head import ClassHead

    found = None if adapter is None else stored_labels(adapter)
    head = ClassHead.of(spec.architecture())
    if found is None and head is not None:
        found = head.kind, head.names
    if found is None:
        return asked_task()
    kind, names = found
    return classifier(Labels(kind, () if kind == "regression" else names), pad_token_id)


def stored_task_name(model: str, adapter: Path | None) -> str:
    """Return the name of the task that an adapter, or else a model, was trained for.

    Reads text files only, before torch is imported.

    Args:
        model: name, folder or hub id.
        adapter: folder of an adapter, or None.
    """
    if adapter is not None:
        record, config = read_base_record(adapter), read_peft_config(adapter)
        return (record and record.classifies) or config.classifies or "causal"
    folder = find_model(model).folder
    if folder is None or not (folder / "config.json").is_file():
        return "causal"
    named = read_model_config(folder / "config.json").get("architectures")
    return classifying_task(named) or "causal"


def check_generates(task: Task, asked: str) -> None:
    """Check that the models of a task write text.

    Raises:
        ConfigError: they do not, and `asked`, an option or a command, needs text.
    """
    if not task.generates:
        raise ConfigError(
            f"{asked}: a model of task {task.name} writes no text; expected one that does; use "
            "`qlora-kit evaluate`, which measures what it is for"
        )
