"""From the options of a run to a loaded classifier with its rows, for programs.

Takes a configuration; returns `OpenedClassifier`. Holds no rows out: a caller chooses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.config import TrainConfig
from qlora_kit.data.sources import load_training
from qlora_kit.events import Announce, silent
from qlora_kit.opening.model import open_tokenizer
from qlora_kit.opening.tasks import classifies

if TYPE_CHECKING:
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.lora.spec import LoraSpec
    from qlora_kit.model.load import Base
    from qlora_kit.tasks import Task


@dataclass(frozen=True)
class OpenedClassifier:
    """A loaded classifier, its tokenizer, its task, the LoRA that trains it, and its rows."""

    base: Base
    tokenizer: Any
    task: Task
    lora: LoraSpec
    data: Tokenized


def open_classifier(config: TrainConfig, announce: Announce = silent) -> OpenedClassifier:
    """Read labelled texts, or tagged words, and load a base as a classifier of their labels.

    Args:
        config: names the model, the data, and how labels are understood; with the task `tag`, words
            are classified instead of texts.
        announce: receives notices and the loading progress.

    Raises:
        DataError: the data is not readable, or its labels do not go together.
        ConfigError: the options contradict each other or the data.
    """
    from qlora_kit.data.joined_rows import join, mixed, tokenize_sources
    from qlora_kit.data.labels import labels_of
    from qlora_kit.data.tokens import tokenize
    from qlora_kit.lora.spec import LoraSpec
    from qlora_kit.model.threads import choose_threads

    named = config.task if classifies(config.task) else "classify"
    samples = load_training(config.model_copy(update={"task": named}))
    opened = open_tokenizer(config, announce).classifying(labels_of(samples, config), announce)
    task = opened.task
    if samples.parts:
        parts = tokenize_sources(samples, opened.tokenizer, config, task.makes)
        data = mixed(join(samples, parts), config.source_weights)
    else:
        data = tokenize(samples, opened.tokenizer, config, makes=task.makes)
    opened.check_positions(config, data)
    lora = LoraSpec.of(config, task.peft_type, opened.spec(config).trained_whole())
    # A program decides on its own threads, unless it passes a number.
    threads = None if config.threads is None else choose_threads(config.threads)
    base = opened.load(config, announce, threads)
    return OpenedClassifier(base, opened.tokenizer, task, lora, data)
