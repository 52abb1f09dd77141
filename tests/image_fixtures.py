"""Tiny random models that read images, and folders of small pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    ConvNextImageProcessorPil,
    ViTImageProcessorPil,
)

import qlora_kit as qk
from qlora_kit.model.class_head import ClassHead
from qlora_kit.model.config_file import IMAGE_CLASSIFICATION

SIDE = 16
_VIT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": 4, "initializer_range": 0.2,
}  # fmt: skip
_CONVNEXT = {
    "num_stages": 2, "hidden_sizes": [32, 64], "depths": [1, 2], "patch_size": 4,
    "image_size": SIDE, "layer_scale_init_value": 0.5, "initializer_range": 0.2,
}  # fmt: skip
NUMBERS: dict[str, dict[str, Any]] = {
    "vit": _VIT,
    "convnext": _CONVNEXT,
    "convnextv2": {key: value for key, value in _CONVNEXT.items() if "layer_scale" not in key},
    "resnet": {
        "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2],
        "layer_type": "bottleneck",
    },
}  # fmt: skip


def save_model(folder: Path, kind: str, *, classes: int | None = None, **numbers: Any) -> Path:
    """Save a tiny random model with its image processor: without a head, or with `classes`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**NUMBERS[kind], **numbers})
    if classes is None:
        model = AutoModel.from_config(config)
    else:
        config.num_labels = classes
        model = AutoModelForImageClassification.from_config(config)
    for name, buffer in model.named_buffers():
        # Statistics that differ from those that a norm begins with.
        if name.endswith("running_mean"):
            buffer.copy_(torch.rand_like(buffer) * 0.2 - 0.1)
        if name.endswith("running_var"):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    model.save_pretrained(folder)
    save_processor(folder, kind, grey=numbers.get("num_channels") == 1)
    return folder


def save_processor(
    folder: Path, kind: str = "vit", side: int = SIDE, *, grey: bool = False
) -> None:
    """Save the image processor of a kind of model."""
    numbers = {"image_mean": [0.5], "image_std": [0.5]} if grey else {}
    if kind == "vit":
        ViTImageProcessorPil(size={"height": side, "width": side}, **numbers).save_pretrained(
            folder
        )
    else:
        size = {"shortest_edge": side}
        ConvNextImageProcessorPil(size=size, crop_pct=0.875, **numbers).save_pretrained(folder)


def save_images(folder: Path, classes: dict[str, tuple[int, int, int]], each: int) -> Path:
    """Save noisy pictures of one colour a class, in class-named folders."""
    generator = numpy.random.default_rng(0)
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            noise = generator.integers(-40, 40, (SIDE + number % 3, SIDE, 3))
            pixels = (numpy.array(colour) + noise).clip(0, 255).astype(numpy.uint8)
            suffix = ("png", "jpg")[number % 2]
            Image.fromarray(pixels).save(folder / name / f"{number}.{suffix}")
    return folder


def loaded(folder: Path, bits: int = 16, classes: int = 3) -> qk.Base:
    """Load a base as a classifier of images."""
    head = ClassHead("single", tuple(f"class {number}" for number in range(classes)))
    source = qk.find_model(str(folder))
    spec = qk.BaseSpec(
        source, folder, qk.Quantization(bits), loads=IMAGE_CLASSIFICATION, classes=head
    )
    return qk.load_base(spec, qk.choose_hardware("cpu"))


def pixels(rows: int = 3, channels: int = 3) -> torch.Tensor:
    """Return some images as a model reads them."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, channels, SIDE, SIDE, generator=generator)


def twin_of(folder: Path, base: qk.Base) -> Any:
    """Return transformers' own model with the numbers of a loaded base, unpacked."""
    from qlora_kit.layers.frozen import FrozenLinear

    classes = base.spec.classes
    assert classes is not None
    twin = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=len(classes.names), ignore_mismatched_sizes=True, dtype=torch.float32
    )
    for path, layer in base.model.named_modules():
        if isinstance(layer, FrozenLinear):
            theirs = twin.get_submodule(path.removesuffix(".frozen"))
            weight = layer.weight.dequantize(torch.float32)
            theirs.weight.data.copy_(weight.view(theirs.weight.shape))
            if layer.bias is not None:
                theirs.bias.data.copy_(layer.bias)
    return twin.eval()
