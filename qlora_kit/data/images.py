"""Labelled images: a folder of class-named folders, or records that name image files.

Takes the value of `--data`; returns `Samples` of `LabelledImage`. Reads every file once, for its
hash and for what it says of its size. Decodes nothing.

    pictures/cat/1.png                 all of it is one part
    pictures/train/cat/1.png           parts by name: train, validation (val, dev …), test
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from qlora_kit.data.fields import Faults
from qlora_kit.data.image_files import facts_of, hash_of, is_image_name, read_bytes
from qlora_kit.data.shapes import LabelledImage, Sample
from qlora_kit.errors import DataError
from qlora_kit.signals import safe_point
from qlora_kit.storage.confine import check_confined
from qlora_kit.storage.faults import reason


def is_image_folder(folder: Path) -> bool:
    """Whether a folder has folders with images in them, or parts with such folders."""
    if not os.path.isdir(folder):
        return False
    return any(_has_images(each, depth=2) for each in _folders(folder))


def folder_of_part(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the folder of a part of the data, by the first of its names; None if it has none.

    Args:
        folder: a folder of images.
        names: names of the part, such as "validation" and "val".
    """
    inside = {each.name: each for each in _folders(folder)}
    # A class may be called "test": a part has folders of its own.
    parts = (inside[name] for name in names if name in inside)
    return next((each for each in parts if is_image_folder(each)), None)


def images_in(folder: Path) -> tuple[list[LabelledImage], tuple[str, ...], tuple[str, ...]]:
    """Return the images of a folder of class-named folders, in the order of their names.

    Returns:
        The images, the names of the classes, and lines to be read once.

    Raises:
        DataError: a link leads out of the folder, or files are not readable images, one line each.
    """
    check_confined(folder, DataError)
    found: list[LabelledImage] = []
    names, notices, others = [], [], 0
    for each in _folders(folder):
        files = [*_files(each)]
        images = [path for path in files if is_image_name(path.name)]
        others += len(files) - len(images)
        if images:
            names.append(each.name)
        else:
            notices.append(f"{each}: no PNG or JPEG in it, so it is no class")
        found += [LabelledImage(str(path), str(path), each.name) for path in images]
    others += sum(not each.name.startswith(".") for each in folder.iterdir() if each.is_file())
    if others:
        notices.append(f"{folder}: {others:,} files that are no PNG or JPEG are not read")
    if not found:
        raise DataError(f"{folder}: no image; expected folders of PNG or JPEG files; name another")
    notices.insert(0, f"{folder}: {len(found):,} images in {len(names):,} folders, one a class")
    in_order = sorted(names, key=_by_number if all(map(str.isdecimal, names)) else _by_text)
    return [*_known(found)], tuple(in_order), tuple(notices)


def with_files(samples: Sequence[Sample], beside: Path) -> list[Sample]:
    """Return images whose records name them from the folder of the data file.

    Args:
        samples: labelled images as their records have them.
        beside: the data file.

    Raises:
        DataError: a file is missing, or outside of the folder; or is no readable image; a line
            for each.
    """
    home = Path(os.path.realpath(beside.parent))
    placed, faults = [], Faults()
    for sample in samples:
        assert isinstance(sample, LabelledImage)
        path = Path(os.path.realpath(home / sample.file))
        if not path.is_relative_to(home):
            faults.add(
                f"{sample.place}: its image is outside of {beside.parent}; expected a file beside "
                "the data, or in a folder there; put the data file above its images"
            )
            continue
        placed.append(replace(sample, file=str(path)))
    faults.raise_if_any()
    return [*_known(placed)]


def _known(images: Sequence[LabelledImage]) -> Iterator[LabelledImage]:
    """Yield images with the hashes of their files.

    Raises:
        DataError: files are missing or no images; a line for each.
    """
    faults = Faults()
    for image in images:
        safe_point()
        path = Path(image.file)
        try:
            content = read_bytes(path)
            facts_of(content, path)
        except DataError as error:
            is_record = image.place != image.file
            faults.add(
                *(f"{image.place}: {fault}" if is_record else fault for fault in error.faults)
            )
            continue
        yield replace(image, digest=hash_of(content))
    faults.raise_if_any()


# ---------------------------------------------------------------- folders


def _folders(folder: Path) -> list[Path]:
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"{folder}: {reason(error)}; expected a readable folder; check its rights"
        ) from error
    return [each for each in inside if each.is_dir() and not each.name.startswith(".")]


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of those in it, by name; hidden ones are left out."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        yield from (Path(path, name) for name in sorted(files) if not name.startswith("."))


def _has_images(folder: Path, depth: int) -> bool:
    if not depth:
        return False
    try:
        with os.scandir(folder) as entries:
            inside = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return False  # what is wrong with it is told where it is read
    if any(is_image_name(entry.name) and not entry.is_dir() for entry in inside):
        return True
    return any(entry.is_dir() and _has_images(Path(entry.path), depth - 1) for entry in inside)


def _by_number(name: str) -> tuple[int, str]:
    return int(name), name


def _by_text(name: str) -> tuple[int, str]:
    return 0, name
