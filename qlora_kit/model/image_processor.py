"""What turns an image into the numbers that a model reads: transformers' image processor.

Takes the folder of a model; returns an `ImageProcessor`, which stands where a model of text has its
tokenizer: in front of the model, and saved beside the adapter. It is transformers' own, computed
with Pillow and numpy, so that an image gives the same numbers here and wherever the model goes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qlora_kit.errors import ModelError
from qlora_kit.model.config_file import read_json_object
from qlora_kit.model.faults import model_errors
from qlora_kit.model.images import channels_of, positions_of_image, size_of

NAME = "preprocessor_config.json"
# The shapes of images that are tried when a processor is loaded.
_TRIED = ((31, 47), (61, 40))
_DEFAULT_SIDE = 224
_MOST_SIDE = 4096


class ImageProcessor:
    """Turns images into arrays of one size.

    Args:
        processor: transformers' image processor, with Pillow and numpy as its backend.
        architecture: the architecture of the model.

    Attributes:
        channels: 3 for images in colour, 1 for grey ones.
        height, width: pixels of an image as the model reads it.
        tokens: positions that an image has in the model, which are the tokens of its row.
        pad_token_id: 0: rows of images are of one length, and nothing is padded.
        chat_template: None.
        padding_side: as every tokenizer here has it.
    """

    pad_token_id = 0
    chat_template = None
    padding_side = "right"

    def __init__(self, processor: Any, architecture: PreTrainedConfig) -> None:
        self._processor = processor
        self.channels = channels_of(architecture)
        self.height, self.width = self._size(architecture)
        self.tokens = positions_of_image(architecture, self.height, self.width)

    def _size(self, architecture: PreTrainedConfig) -> tuple[int, int]:
        """Return the size of processed images, which must not depend on that of the file."""
        mode = "RGB" if self.channels == 3 else "L"
        sizes = {tuple(self.pixels(_blank(mode, *shape)).shape[1:]) for shape in _TRIED}
        needed = size_of(architecture)
        if len(sizes) != 1 or (needed is not None and sizes != {needed}):
            found = " or ".join(f"{height} × {width}" for height, width in sorted(sizes))
            wanted = "one size" if needed is None else f"{needed[0]} × {needed[1]}"
            raise ModelError(
                f"{NAME}: makes images of {found} pixels; expected {wanted} for every file; "
                "restore the file, or set do_resize and size in it"
            )
        height, width = sizes.pop()
        return height, width

    def pixels(self, image: Any) -> Tensor:
        """Return an image of Pillow, in the mode of `channels`, as the model reads it.

        Returns:
            (C, H, W) fp32.
        """
        made: Tensor = self._processor(images=image, return_tensors="pt")["pixel_values"]
        return made[0].to(torch.float32)

    def content_hash(self) -> str:
        """Return the SHA-256 of everything that decides the pixels."""
        content = json.dumps(self._processor.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json` into a folder."""
        self._processor.save_pretrained(folder)


def _blank(mode: str, width: int, height: int) -> Any:
    from PIL import Image

    return Image.new(mode, (width, height))


def load_image_processor(folder: Path, architecture: PreTrainedConfig) -> ImageProcessor:
    """Load and try the image processor of a model folder.

    Raises:
        ModelError: there is none, transformers does not have it without torchvision, or the images
            it makes have no size of their own or not that of the model.
    """
    from transformers import AutoImageProcessor

    path = folder / NAME
    if not path.is_file():
        raise ModelError(
            f"{folder}: no {NAME}; expected how the model's images are made; restore it, or save "
            "transformers' image processor of the model there"
        )
    content = read_json_object(path)
    if content.get("auto_map"):
        raise ModelError(
            f"{path}: needs code of its own, which the kit never runs; expected an image processor "
            "that transformers has; choose another model"
        )
    _check_sizes(path, content)
    with model_errors(path, "the numbers of an image processor of transformers; restore it"):
        processor = AutoImageProcessor.from_pretrained(
            folder, config=architecture, local_files_only=True, trust_remote_code=False,
            backend="pil",
        )  # fmt: skip
        return ImageProcessor(processor, architecture)


def default_processor(architecture: PreTrainedConfig) -> ImageProcessor:
    """Return a processor for an architecture without files, such as one that is planned for."""
    from transformers import ViTImageProcessorPil

    height, width = size_of(architecture) or (_DEFAULT_SIDE, _DEFAULT_SIDE)
    grey = {"image_mean": [0.5], "image_std": [0.5]} if channels_of(architecture) == 1 else {}
    processor = ViTImageProcessorPil(size={"height": height, "width": width}, **grey)
    return ImageProcessor(processor, architecture)


def _check_sizes(path: Path, content: dict[str, Any]) -> None:
    for name in ("size", "crop_size", "pad_size"):
        value = content.get(name)
        sides = value.values() if isinstance(value, dict) else [value]
        for side in sides:
            if side is not None and not (isinstance(side, int) and 1 <= side <= _MOST_SIDE):
                raise ModelError(
                    f"{path}: {name} is {str(side)[:40]}; expected whole numbers of pixels from 1 "
                    f"to {_MOST_SIDE:,}; restore it"
                )
