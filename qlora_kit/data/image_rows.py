"""Rows of labelled images: each image is a row, with its labels and as many tokens as positions.

Takes samples, their labels and an image processor; yields rows that name a file and hold no pixels.
Every file is decoded once here, so that a damaged one is found before training; afterwards the
pixels are read when a batch needs them. Never makes two rows of a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import LongSamples, TokenOptions
from qlora_kit.data.encode import Labelled
from qlora_kit.data.fields import Faults
from qlora_kit.data.image_files import decoded, hash_of, marks_of, read_bytes
from qlora_kit.data.labelled_rows import LABELS, MakerOfLabels
from qlora_kit.data.labels import Labels
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import LabelledImage, Shape
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.signals import safe_point

if TYPE_CHECKING:
    from qlora_kit.model.image_processor import ImageProcessor


@dataclass(frozen=True)
class ImageRows:
    """Makes the maker of rows for images with these labels, see `tokens.MakesRows`."""

    labels: Labels

    def __call__(self, samples: Samples, tokenizer: Any, options: TokenOptions) -> ImageRowMaker:
        """Return the maker of the rows of some samples; `tokenizer` is an image processor.

        Raises:
            ConfigError: the data are no images.
            DataError: the label of a sample is not known.
        """
        if samples.shape is not Shape.IMAGE:
            raise ConfigError(
                f"--data: {samples.source} has {samples.shape} records, and the model reads "
                "images; expected a folder of class-named folders, or records with image and "
                "label; name one, or choose a model of text"
            )
        self.labels.check(samples)
        return ImageRowMaker(samples, self.labels, tokenizer)


class ImageRowMaker(MakerOfLabels):
    """Makes rows of labelled images, see `tokens.RowMaker`."""

    weighs = LABELS
    has_images = True
    """whether a row names the file of an image, which is never cut"""

    def __init__(self, samples: Samples, labels: Labels, processor: ImageProcessor) -> None:
        super().__init__(samples, labels, processor.content_hash())
        self._processor = processor
        files = "\n".join(self._sample(index).file for index in range(len(samples.items)))
        # A row names its file: rows in the cache are those of the same files only.
        self.settings = [processor.tokens, hashlib.sha256(files.encode()).hexdigest()]

    def _sample(self, index: int) -> LabelledImage:
        sample = self.samples.items[index]
        assert isinstance(sample, LabelledImage)
        return sample

    def rows(self, indices: Sequence[int], faults: Faults) -> Iterator[tuple[int, Labelled]]:
        """Yield the row of each image, whose file is decoded to see whether it is whole."""
        for index in indices:
            safe_point()
            sample = self._sample(index)
            try:
                content = read_image(sample.file, sample.digest)
                decoded(content, Path(sample.file), self._processor.channels)
            except DataError as error:
                faults.add(*error.faults)
                continue
            marks = marks_of(sample.digest, self._processor.tokens)
            target = self._known.target(sample)
            yield index, Labelled(marks, target, aligned=True, image=sample.file)

    def shorten(self, index: int, row: Labelled, how: LongSamples) -> list[Labelled]:
        """Return the row: an image is never cut."""
        return [row]

    def weight(self, labels: list[Any]) -> int:
        """Return 1: rows count alike, with however many labels."""
        return 1


def read_image(file: str, digest: str) -> bytes:
    """Return the content of a file, which must be the one that was hashed before.

    Raises:
        DataError: it is not readable, or was changed since.
    """
    path = Path(file)
    content = read_bytes(path)
    if hash_of(content) != digest:
        raise DataError(
            f"{path}: was changed while the command ran; expected the file as it was; start again"
        )
    return content
