"""The rows that a merge is verified on: a few rows of the run's own data, or built-in prompts.

Takes token rows or a tokenizer; returns one padded batch of a bounded number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_kit.data.batch import collate
from qlora_kit.data.encode import CHOSEN_TOKENS, IGNORED, prompt_ids
from qlora_kit.data.preference_rows import sides_of
from qlora_kit.model.class_head import ClassHead, is_encoder
from qlora_kit.model.image_processor import ImageProcessor
from qlora_kit.model.load import BaseSpec
from qlora_kit.tasks.classify import collate_labelled, targets_of
from qlora_kit.tasks.images import ImageBatch, batch_of
from qlora_kit.tasks.seq2seq import collate_sources

_MOST_ROW_TOKENS = 256
_NOISES = 8
_PROMPTS = (
    "Once upon a time there was a small town by the sea, where everybody knew the baker.",
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def add(first, second):\n    return first + second\n\nprint(add(2, 3))",
    "Question: If a train leaves at noon and takes three hours, when does it arrive?\n"
    "Answer: It arrives at three o'clock in the afternoon.",
    "Dear Sir or Madam,\n\nI am writing to ask about the position that you advertised.",
    "Water boils at 100 degrees Celsius at sea level, and at less on a mountain.",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "1. Wash the rice. 2. Boil the water. 3. Add salt. 4. Let it stand for ten minutes.",
)


@dataclass(frozen=True)
class VerificationRows:
    """Rows that a merge is verified on.

    Attributes:
        batch: the rows, padded: a batch of the task.
        source: the source of the rows, in words.
        of_task: whether the rows are of the task that the adapter was trained for, so that a
            lower loss on them is better.
    """

    batch: Any
    source: str
    of_task: bool


def some_rows(
    rows: Iterable[Mapping[str, Any]],
    tokens: int,
    pad_token_id: int,
    source: str,
    base: BaseSpec | None = None,
    processor: ImageProcessor | None = None,
) -> VerificationRows:
    """Return the first rows of the task that together have `tokens` tokens.

    Args:
        rows: rows with `input_ids`, `labels` and `row`; at least one.
        tokens: the number of tokens after which no further row is taken.
        pad_token_id: pads shorter rows.
        source: the source of the rows, in words.
        base: the base, where the rows are labelled, or sources and targets; None: texts.
        processor: turns an image into what the model reads, where the rows are images.
    """
    taken: list[Mapping[str, Any]] = []
    count, of_task = 0, True
    for row in rows:
        # A preference may make both answers less likely, so the loss on one of them judges nothing.
        of_task = CHOSEN_TOKENS not in row
        taken.append(row if base else _cut_row(row))
        count += len(taken[-1]["input_ids"])
        if count >= tokens:
            break
    if processor is not None:
        assert base is not None, "a classifier"
        assert base.classes is not None, "a classifier"
        return VerificationRows(batch_of(taken, base.classes, processor), source, of_task)
    return VerificationRows(_batch(taken, pad_token_id, base), source, of_task)


def built_in_rows(tokenizer: Any, base: BaseSpec | None = None) -> VerificationRows:
    """Return built-in prompts. They belong to no task: they only show how far apart models are."""
    encoded = [prompt_ids(tokenizer, prompt) for prompt in _PROMPTS]
    if base is None:
        pairs = [(ids, ids) for ids in encoded]
    elif base.classes is not None:
        of_words = base.classes.kind == "tags"
        pairs = [(ids, [0] * (len(ids) if of_words else 1)) for ids in encoded]
    else:
        # Each is its own target, behind a source that is read.
        pairs = [(ids * 2, [IGNORED] * len(ids) + ids) for ids in encoded]
    rows = [
        {"input_ids": ids, "labels": labels, "row": row} for row, (ids, labels) in enumerate(pairs)
    ]
    batch = _batch(rows, tokenizer.pad_token_id, base)
    return VerificationRows(batch, "built-in prompts", False)


def built_in_images(processor: ImageProcessor, classes: ClassHead) -> VerificationRows:
    """Return noise in the place of images. It belongs to no task, see `built_in_rows`."""
    from PIL import Image

    shape = (processor.height, processor.width, 3)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (_NOISES, *shape), generator=generator, dtype=torch.uint8).numpy()
    mode = "RGB" if processor.channels == 3 else "L"
    images = [Image.fromarray(each).convert(mode) for each in noise]
    pixels = torch.stack([processor.pixels(image) for image in images])
    none = [[] if classes.kind == "multi" else [0.0]] * _NOISES
    lengths = (processor.tokens,) * _NOISES
    batch = ImageBatch(pixels, lengths, tuple(range(_NOISES)), targets_of(none, classes))
    return VerificationRows(batch, "images of noise", of_task=False)


def _batch(rows: Sequence[Mapping[str, Any]], pad_token_id: int, base: BaseSpec | None) -> Any:
    if base is None:
        return collate(rows, pad_token_id)
    architecture = base.architecture()
    if base.classes is None:
        return collate_sources(rows, pad_token_id, architecture.decoder_start_token_id)
    masks = is_encoder(architecture)
    return collate_labelled(rows, base.classes, pad_token_id, masks=masks)


def _cut_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Cut a row so that supervised tokens are left; where its start has none, keep its end.

    Of a pair of answers the chosen one is taken.
    """
    if CHOSEN_TOKENS in row:
        row, _ = sides_of(row)
    labels, most = list(row["labels"]), _MOST_ROW_TOKENS
    has_some = any(label != IGNORED for label in labels[1:most])
    part = slice(0, most) if has_some else slice(max(0, len(labels) - most), None)
    return {
        "input_ids": list(row["input_ids"])[part],
        "labels": labels[part],
        "row": row["row"],
    }
