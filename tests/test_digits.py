"""Real images: scikit-learn's handwritten digits, learnt by adapters on a model that knew half.

A tiny ViT is pretrained on the digits 0 to 4, in plain torch. Then the kit trains adapters and a
new head on all ten, and is measured on rows that neither has seen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
import pytest
import torch
from image_fixtures import save_processor
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from support import run
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

SIDE = 16
KNOWN = 5
pytestmark = pytest.mark.slow


def _images() -> tuple[numpy.ndarray, numpy.ndarray]:
    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype(numpy.uint8)
    return pixels, digits.target


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All digits as PNG files, a third of them in the part for tests."""
    folder = tmp_path_factory.mktemp("digits")
    pixels, labels = _images()
    parts = train_test_split(range(len(labels)), test_size=1 / 3, random_state=0, stratify=labels)
    for part, rows in zip(("train", "test"), parts, strict=True):
        for row in rows:
            file = folder / part / str(labels[row]) / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row]).save(file)
    return folder


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT that was trained on the first five digits of the training part."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        image_size=SIDE, patch_size=4, num_labels=KNOWN,
    )  # fmt: skip
    model = ViTForImageClassification(config).train()
    files = [file for label in range(KNOWN) for file in (data / "train" / str(label)).iterdir()]
    labels = torch.tensor([int(file.parent.name) for file in files])
    images = [Image.open(file).convert("RGB").resize((SIDE, SIDE), 2) for file in files]
    stacked = torch.tensor(numpy.stack([numpy.asarray(image) for image in images]))
    pixels = (stacked.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        for rows in torch.randperm(len(labels), generator=generator).split(32):
            loss = functional.cross_entropy(model(pixels[rows]).logits, labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    save_processor(folder, side=SIDE)
    return folder


@pytest.mark.parametrize("bits", ["4", "16"])
def test_adapters_learn_the_other_half_of_the_digits(
    bits: str, data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run"
    code, _, err = run(
        "train", "--task", "classify", "--model", str(model), "--data", str(data), "--bits", bits,
        "--targets", "all-linear,all-conv", "--rank", "8", "--batch-size", "32",
        "--gradient-accumulation-steps", "1", "--learning-rate", "5e-3", "--num-epochs", "20",
        "--no-rehearse", "--output", str(own), capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    code, out, err = run(
        "evaluate", "--adapter", str(own), "--data", str(data), "--json", capsys=capsys
    )
    assert code == 0, err
    found = json.loads(out)
    with capsys.disabled():
        line = f"digits, {bits} bits: accuracy {found['accuracy']:.2%} of {found['rows']} rows"
        sys.stdout.write(f"\n{line}\n")
    assert found["rows"] == 599
    assert found["accuracy"] > 0.95
    assert len(found["confusion"]) == 10
