"""Classification of images: an image has one label, several, or a number.

Takes a loaded classifier of images and rows that name files; returns sums over rows, as for texts.
The pixels of a batch are read when the batch is made, and are in memory no longer than it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.data.batch import Indices, PaddedRows
from qlora_kit.data.image_files import LEAST_MARKS, decoded, hash_of, marks_of, read_bytes
from qlora_kit.data.image_rows import ImageRows
from qlora_kit.data.labels import Labels
from qlora_kit.errors import DataError
from qlora_kit.model.class_head import ClassHead
from qlora_kit.model.config_file import IMAGE_CLASSIFICATION
from qlora_kit.model.image_processor import ImageProcessor
from qlora_kit.tasks.classify import ClassifyObjective, classify, targets_of
from qlora_kit.tasks.task import Task


@dataclass(frozen=True)
class ImageBatch(PaddedRows):
    """One micro-batch of images, with the target of each."""

    pixel_values: Tensor
    """(B, C, H, W) fp32, in host memory until it is moved"""
    lengths: tuple[int, ...]
    """(B,) positions of each image in the model"""
    rows: Indices
    """index of the source sample of each row"""
    targets: Tensor
    """see `classify.LabelledBatch`"""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of a classifier's forward."""
        return {"pixel_values": self.pixel_values}

    @property
    def units(self) -> int:
        """Number of losses: one a row."""
        return len(self.rows)

    @property
    def weight(self) -> float:
        """The same: all of them count alike."""
        return self.units

    def to(self, device: torch.device | str) -> ImageBatch:
        """Return the batch on another device."""
        return replace(
            self,
            pixel_values=self.pixel_values.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class ImageObjective(ClassifyObjective):
    """Classification of images on a loaded base.

    Attributes:
        processor: turns an image into what the model reads.
    """

    processor: ImageProcessor | None = None

    @property
    def _reads(self) -> ImageProcessor:
        assert self.processor is not None, "bound by its task"
        return self.processor

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """See `Objective`; reads the files of the rows.

        Raises:
            DataError: a file is not the one that the run began with.
        """
        return batch_of(rows, self.classes, self._reads)

    def stand_in(
        self, rows: int, tokens: int, weight: int | None = None, answer_tokens: int | None = None
    ) -> Any:
        """See `Objective`: images are of one size, whatever `tokens` says."""
        reads = self._reads
        shape = (rows, reads.channels, reads.height, reads.width)
        targets, _ = self._stand_in_targets(rows, 1)
        pixels = torch.zeros(shape, device="cpu")
        return ImageBatch(pixels, (reads.tokens,) * rows, tuple(range(rows)), targets)

    def _logits(self, batch: Any) -> Tensor:
        pixels = batch.inputs["pixel_values"].to(self.base.hardware.dtype)
        logits: Tensor = self.base.model(pixel_values=pixels).logits
        return logits.float()


def batch_of(
    rows: Sequence[Mapping[str, Any]], classes: ClassHead, processor: ImageProcessor
) -> ImageBatch:
    """Return the batch of some rows, whose files it reads.

    Args:
        rows: with `image`, `input_ids`, `labels` and `row`.
        classes: meaning of the labels.
        processor: turns an image into what the model reads.

    Raises:
        DataError: a file is not the one that the rows were made of.
    """
    pixels = torch.stack([pixels_of(row, processor) for row in rows])
    targets = targets_of([row["labels"] for row in rows], classes)
    samples = tuple(int(row["row"]) for row in rows)
    return ImageBatch(pixels, (processor.tokens,) * len(rows), samples, targets)


def pixels_of(row: Mapping[str, Any], processor: ImageProcessor) -> Tensor:
    """Return the pixels of a row, (C, H, W) fp32.

    Raises:
        DataError: its file is not the one that the row was made of.
    """
    path = Path(row["image"])
    content = read_bytes(path)
    if marks_of(hash_of(content), LEAST_MARKS) != [*row["input_ids"]][:LEAST_MARKS]:
        raise DataError(
            f"{path}: is another image than when the run began; expected the same file; restore it"
        )
    return processor.pixels(decoded(content, path, processor.channels))


def classify_images(
    classes: ClassHead,
    labels: Labels,
    processor: ImageProcessor,
    class_weights: tuple[float, ...] = (),
) -> Task:
    """Return the task of images with these labels.

    Args:
        classes: the labels, as the head of the model knows them.
        labels: the same, as the data has them.
        processor: turns an image into what the model reads.
        class_weights: weight of each label in the loss; all the same if empty.
    """
    of_texts = classify(classes, ImageRows(labels), class_weights)
    objective = partial(ImageObjective, class_weights=class_weights, processor=processor)
    # PEFT has no name for this task; without one it loads the adapter onto any model.
    return replace(of_texts, loads=IMAGE_CLASSIFICATION, peft_type="", objective=objective)
