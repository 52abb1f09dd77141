"""Let a classifier of images label files, as `recipe.labelling` lets others label texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.data.image_files import decoded, hash_of, marks_of, read_bytes

if TYPE_CHECKING:
    from qlora_kit.data.batch import Row
    from qlora_kit.model.class_head import ClassHead
    from qlora_kit.model.image_processor import ImageProcessor


class ImageReader:
    """Reads each prompt as the name of an image file, see `labelling._Reader`.

    Args:
        classes: the labels.
        processor: turns an image into what the model reads.
        folder: the folder that names are read from.
        answer_of: the answer of a text, which is that of an image as well.
        in_words_of: an answer as one line.
    """

    def __init__(
        self,
        classes: ClassHead,
        processor: ImageProcessor,
        folder: Path,
        answer_of: Callable[[ClassHead, Sequence[float]], dict[str, Any]],
        in_words_of: Callable[[dict[str, Any]], str],
    ) -> None:
        self._classes, self._processor, self._folder = classes, processor, folder
        self._answer_of, self.in_words = answer_of, in_words_of

    def rows(self, texts: Sequence[str]) -> list[Row]:
        """Return a row for each file.

        Raises:
            DataError: a file is missing, or no whole PNG or JPEG.
        """
        return [self._row(self._folder / text, index) for index, text in enumerate(texts)]

    def _row(self, path: Path, index: int) -> Row:
        content = read_bytes(path)
        decoded(content, path, self._processor.channels)
        marks = marks_of(hash_of(content), self._processor.tokens)
        no_label: list[float] = [0.0] if self._classes.kind != "multi" else []
        return {"input_ids": marks, "labels": no_label, "row": index, "image": str(path)}

    def answer(self, index: int, values: Sequence[list[Any]]) -> dict[str, Any]:
        """Return the label of an image, and how likely each label is."""
        return self._answer_of(self._classes, values[0])
