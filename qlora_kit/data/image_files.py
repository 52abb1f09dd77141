"""The only reader of image files: their bytes, their hash, and their pixels.

Takes a PNG or JPEG file, which may come from a stranger; returns its pixels in colour or in grey,
the same on every machine. Holds one file at a time. Imports Pillow where it is used.

What a file may hold, and what becomes of it:

| in the file | becomes |
|---|---|
| grey, 1 bit, a palette, CMYK | colour, or grey where the model reads grey |
| 16 bits a channel | 8 bits: the lower ones are dropped |
| transparency | dropped: the colours beneath it are taken, as transformers does |
| an orientation in its EXIF data | turned upright |
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from qlora_kit.errors import DataError, first_line, raised_as
from qlora_kit.storage.reading import read_whole

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")
MOST_PIXELS = 89_478_485
"""Pillow's own bound: a file of a few kilobytes can claim to be an image of gigabytes"""
LEAST_MARKS = 4
"""ids of a row that tell its image: 124 bits of the hash of the file"""
_REMEDY = "expected a whole PNG or JPEG; replace it, or remove it"
# Modes of Pillow whose values have 16 bits.
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I")


@dataclass(frozen=True)
class ImageFacts:
    """What a file says of its image: width, height, Pillow's mode, format, and bytes."""

    width: int
    height: int
    mode: str
    format: str
    bytes: int

    def describe(self) -> str:
        """Return one line for people."""
        return f"{self.width:,} × {self.height:,} {self.mode} {self.format}, {self.bytes:,} bytes"


def is_image_name(name: str) -> bool:
    """Whether a file is taken for an image by its name; its content is checked when it is read."""
    return name.lower().endswith(SUFFIXES)


def read_bytes(path: Path) -> bytes:
    """Return the content of an image file.

    Raises:
        DataError: it is missing, not readable or empty.
    """
    content = read_whole(path)
    if not content:
        raise DataError(f"{path}: is empty; {_REMEDY}")
    return content


def hash_of(content: bytes) -> str:
    """Return the hash of the bytes of a file, by which an image is known."""
    return xxhash.xxh3_128_hexdigest(content)


def marks_of(digest: str, count: int) -> list[int]:
    """Return the ids that stand for the positions of an image in a row, `count` of them.

    No model looks them up. They follow from the hash of the file, so two rows are alike where their
    images are, for whatever compares rows: repeats, a resumed run, a cache.
    """
    drawn = hashlib.shake_128(bytes.fromhex(digest)).digest(4 * count)
    words = (drawn[start : start + 4] for start in range(0, len(drawn), 4))
    return [int.from_bytes(word, "little") >> 1 for word in words]


def facts_of(content: bytes, path: Path) -> ImageFacts:
    """Return what a file says of its image, without decoding it.

    Raises:
        DataError: it is no PNG or JPEG, or has more than `MOST_PIXELS`.
    """
    with _opened(content, path) as image:
        return ImageFacts(*image.size, image.mode, str(image.format), len(content))


def decoded(content: bytes, path: Path, channels: int) -> Image:
    """Return the pixels of an image in Pillow's mode RGB, or L for a model that reads grey.

    Args:
        content: the bytes of the file.
        path: its path, for errors.
        channels: 3 or 1.

    Raises:
        DataError: it is no PNG or JPEG, has more than `MOST_PIXELS`, or is damaged.
    """
    from PIL import ImageOps

    with _opened(content, path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        return _converted(upright, "RGB" if channels == 3 else "L")


def thumbnail(content: bytes, path: Path, side: int) -> bytes:
    """Return an image as a PNG that is at most `side` pixels wide and high.

    Raises:
        DataError: see `decoded`.
    """
    small = decoded(content, path, 3)
    small.thumbnail((side, side))
    written = BytesIO()
    small.save(written, format="PNG")
    return written.getvalue()


@contextlib.contextmanager
def _opened(content: bytes, path: Path) -> Iterator[Image]:
    """Open an image; whatever Pillow raises in the block becomes one line."""
    import PIL.Image

    def line(error: Exception) -> str:
        is_other = isinstance(error, PIL.UnidentifiedImageError)
        return f"{path}: {'no PNG or JPEG' if is_other else first_line(error)}; {_REMEDY}"

    with warnings.catch_warnings(), raised_as(DataError, line):
        warnings.simplefilter("ignore")
        with PIL.Image.open(BytesIO(content), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise DataError(
                    f"{path}: {width:,} × {height:,} pixels; expected at most {MOST_PIXELS:,}; "
                    "make it smaller, or remove it"
                )
            yield image


def _converted(image: Image, mode: str) -> Image:
    import PIL.Image

    if image.mode in _WIDE:
        import numpy

        values = numpy.asarray(image).astype(numpy.int64).clip(0, 65535)
        image = PIL.Image.fromarray((values >> 8).astype(numpy.uint8))
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette may have transparent colours
    return image if image.mode == mode else image.convert(mode)
