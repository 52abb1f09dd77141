"""Models that read images: loaded as transformers loads them, and frozen whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from image_fixtures import NUMBERS, SIDE, loaded, pixels, save_model, save_processor, twin_of
from PIL import Image
from support import relative_error, run
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

import qlora_kit as qk
from qlora_kit.errors import ModelError
from qlora_kit.layers.batch_norm import FrozenBatchNorm2d
from qlora_kit.model.image_processor import default_processor, load_image_processor
from qlora_kit.model.images import positions_of_image


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("kind", NUMBERS)
def test_a_loaded_base_computes_what_transformers_computes(
    kind: str, bits: int, tmp_path: Path
) -> None:
    base = loaded(save_model(tmp_path, kind, classes=3), bits)
    twin = twin_of(tmp_path, base)
    x = pixels()
    with torch.no_grad():
        assert relative_error(base.model(pixel_values=x).logits, twin(pixel_values=x).logits) < 1e-5
    plain = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    same = torch.equal(plain(pixel_values=x).logits, twin(pixel_values=x).logits)
    has_linear = kind != "resnet"
    assert same is (bits == 16 or not has_linear), "linear layers alone are quantised"


def test_the_statistics_of_a_batch_norm_stay_as_they_are(tmp_path: Path) -> None:
    base = loaded(save_model(tmp_path, "resnet", classes=3))
    norms = [each for each in base.model.modules() if isinstance(each, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(each, FrozenBatchNorm2d) for each in norms)
    before = {name: each.clone() for name, each in base.model.named_buffers()}
    x = pixels()
    expected = base.model(pixel_values=x).logits
    base.model.train()
    assert torch.equal(base.model(pixel_values=x).logits, expected)
    assert all(torch.equal(each, before[name]) for name, each in base.model.named_buffers())


def test_random_weights_are_drawn_for_norms_with_statistics(tmp_path: Path) -> None:
    save_model(tmp_path, "resnet")
    spec = qk.BaseSpec(
        qk.find_model(str(tmp_path)), tmp_path, qk.Quantization(4), random=True,
        loads="AutoModelForImageClassification",
    )  # fmt: skip
    base = qk.load_base(spec, qk.choose_hardware("cpu"))
    norm = next(each for each in base.model.modules() if isinstance(each, nn.BatchNorm2d))
    assert norm.running_var is not None
    assert torch.equal(norm.running_var, torch.ones_like(norm.running_var))
    assert torch.isfinite(base.model(pixel_values=pixels()).logits).all()


@pytest.mark.parametrize("kind", ["vit", "convnext", "resnet"])
def test_the_processor_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind)
    processor = load_image_processor(tmp_path, AutoConfig.from_pretrained(tmp_path))
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    noise = numpy.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=numpy.uint8)
    image = Image.fromarray(noise)
    expected = theirs(images=image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(processor.pixels(image), expected.float())
    assert expected.shape == (3, processor.height, processor.width) == (3, SIDE, SIDE)


def test_grey_models_read_grey_images(tmp_path: Path) -> None:
    save_model(tmp_path, "vit", num_channels=1, classes=3)
    processor = load_image_processor(tmp_path, AutoConfig.from_pretrained(tmp_path))
    made = processor.pixels(Image.new("L", (9, 12), 255))
    assert made.shape == (1, SIDE, SIDE)
    assert torch.equal(made, torch.ones_like(made))
    assert loaded(tmp_path).model(pixel_values=made[None]).logits.shape == (1, 3)


@pytest.mark.parametrize(
    ("kind", "numbers", "tokens"),
    [
        ("vit", {"image_size": 224, "patch_size": 16}, 197),
        ("resnet", {}, 49),
        ("convnext", {}, 49),
    ],
)
def test_an_image_has_as_many_tokens_as_positions(
    kind: str, numbers: dict[str, Any], tokens: int
) -> None:
    config = AutoConfig.for_model(kind, **numbers)
    assert positions_of_image(config, 224, 224) == tokens
    assert default_processor(config).tokens == tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": 20}, "makes images of 20 × 20 pixels; expected 16 × 16 for every file"),
        ({"content": '{"size": {"height": 99999, "width": 3}}'}, "size is 99999; expected whole"),
        ({"content": '{"auto_map": {"AutoImageProcessor": "x.Y"}}'}, "needs code of its own"),
        ({"content": "[]"}, "expected a JSON object"),
        ({"content": '{"image_mean": [0.5]}'}, "expected the numbers of an image"),
        ({"content": None}, "no preprocessor_config.json"),
    ],
    ids=str,
)
def test_a_processor_that_does_not_fit_is_one_line(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_model(tmp_path, "vit")
    file = tmp_path / "preprocessor_config.json"
    if "side" in change:
        save_processor(tmp_path, side=change["side"])
    elif change["content"] is None:
        file.unlink()
    else:
        file.write_text(change["content"])
    with pytest.raises(ModelError) as raised:
        load_image_processor(tmp_path, AutoConfig.from_pretrained(tmp_path))
    assert message in raised.value.faults[0]
    assert len(raised.value.faults) == 1
    assert "\n" not in raised.value.faults[0]


def test_a_kernel_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "a", "vit", classes=3)
    save_model(tmp_path / "b", "vit", classes=3, patch_size=[2, 8])
    (tmp_path / "a/model.safetensors").rename(tmp_path / "b/model.safetensors")
    with pytest.raises(ModelError, match=r"projection.weight: shape \(64, 3, 4, 4\)"):
        loaded(tmp_path / "b")


def test_other_kinds_and_diffusion_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swin, pipeline = tmp_path / "swin", tmp_path / "pipeline"
    AutoConfig.for_model("swin").save_pretrained(swin)
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    for folder, message in (
        (swin, "swin: a model of images of a kind that is not trained here; expected one of vit"),
        (pipeline, "the folder of a diffusion pipeline, and diffusion models are not trained here"),
    ):
        code, _, err = run(
            "plan", "--task", "classify", "--model", str(folder), "--device", "cpu", capsys=capsys
        )
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
