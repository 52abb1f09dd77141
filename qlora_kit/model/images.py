"""Models that read images: which kinds there are, and how many positions an image has in them.

Takes architectures; returns numbers. Builds and reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from qlora_kit.errors import ModelError
from qlora_kit.model.config_file import IMAGE_KINDS

# A convolutional network halves the sides of an image between its stages. Its first layers divide
# them by four: ResNet's by a stride and a pooling, ConvNeXt's by its patches.
_STEM = 4
_CHANNELS = (1, 3)
_MOST_SIDE = 4096
_LEAST = 4


def reads_images(architecture: PreTrainedConfig) -> bool:
    """Whether a model reads images, and is of a kind that is trained here."""
    return architecture.model_type in IMAGE_KINDS


def check_known(architecture: PreTrainedConfig) -> None:
    """Check that a model that reads images is of a kind that is trained here.

    Raises:
        ModelError: it is of another kind, or reads images of other channels than colour or grey.
    """
    kind = architecture.model_type
    reads_text_too = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    known = ", ".join(IMAGE_KINDS)
    if kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES and not reads_text_too:
        if not reads_images(architecture):
            raise ModelError(
                f"{kind}: a model of images of a kind that is not trained here; expected one of "
                f"{known}; choose another model"
            )
        sides = (*_sides(architecture, "image_size"), *_sides(architecture, "patch_size"))
        if not all(isinstance(side, int) and 1 <= side <= _MOST_SIDE for side in sides):
            raise ModelError(
                f"{kind}: images or patches of {', '.join(map(str, sides))[:40]} pixels; expected "
                f"whole numbers up to {_MOST_SIDE:,}; restore config.json"
            )
        if channels_of(architecture) not in _CHANNELS:
            raise ModelError(
                f"{kind}: reads images of {channels_of(architecture)} channels; expected 3 "
                "(colour) or 1 (grey); choose another model"
            )


def channels_of(architecture: PreTrainedConfig) -> int:
    """Return the number of channels of an image."""
    return int(getattr(architecture, "num_channels", 3))


def has_stages(architecture: PreTrainedConfig) -> bool:
    """Whether a model is a convolutional network, whose layers are of several sizes."""
    return reads_images(architecture) and hasattr(architecture, "depths")


def layer_count(architecture: PreTrainedConfig) -> int:
    """Return the number of equal layers of a model; 1 where they are of several sizes."""
    if has_stages(architecture):
        return 1
    return int(architecture.get_text_config().num_hidden_layers)


def size_of(architecture: PreTrainedConfig) -> tuple[int, int] | None:
    """Return height and width of the images of a model; None where it takes any."""
    if has_stages(architecture):
        return None
    height, width = _pair(architecture.image_size)
    return height, width


def positions_of_image(architecture: PreTrainedConfig, height: int, width: int) -> int:
    """Return how many positions an image has in front of the head of a model.

    They are the tokens of a row, which has four at least. Of a ViT they are its patches and the
    class token; of a convolutional network the cells of its last map.
    """
    if has_stages(architecture):
        step = _STEM << (len(architecture.depths) - 1)
        return max(_LEAST, -(-height // step) * -(-width // step))
    rows, columns = _pair(architecture.patch_size)
    return max(_LEAST, (height // rows) * (width // columns) + 1)


def _sides(architecture: PreTrainedConfig, name: str) -> Sequence[Any]:
    size = getattr(architecture, name, 1)
    return size if isinstance(size, list | tuple) else (size,)


def _pair(size: Any) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size
