"""Images end to end, as a user runs it: train, resume, evaluate, generate, export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_fixtures import loaded, pixels, save_images, save_model, twin_of
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from support import as_if_killed_at, relative_error, run
from transformers import AutoImageProcessor, AutoModelForImageClassification

import qlora_kit as qk

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
STEPS = (
    "--task", "classify", "--batch-size", "4", "--gradient-accumulation-steps", "1",
    "--learning-rate", "0.01", "--rank", "4", "--targets", "all-conv",
)  # fmt: skip
TARGETS = {
    "vit": ("all-linear", "all-conv"),
    "convnext": ("all-linear", "all-conv"),
    "resnet": ("all-conv",),
}
KINDS = tuple(TARGETS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny random model of each kind, without a head."""
    folder = tmp_path_factory.mktemp("models")

    def model(kind: str) -> Path:
        return folder / kind if (folder / kind).is_dir() else save_model(folder / kind, kind)

    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_images(folder / "train", COLOURS, each=8)
    save_images(folder / "val", COLOURS, each=3)
    return folder


def trained(
    model: Path, data: Path, output: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> Path:
    code, _, err = run(
        "train", "--model", str(model), "--data", str(data), "--output", str(output), *STEPS,
        *more, capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    return output


@pytest.mark.parametrize(("kind", "bits"), [("vit", "4"), ("convnext", "8"), ("resnet", "16")])
def test_from_a_folder_to_a_merged_model(
    kind: str,
    bits: str,
    models: Callable[[str], Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = trained(
        models(kind), data, tmp_path / "run", capsys, "--bits", bits, "--max-steps", "16",
        "--best-metric", "accuracy", "--targets", ",".join(TARGETS[kind]),
    )  # fmt: skip
    record = json.loads((own / "qlora_kit.json").read_text())
    assert (record["labels"], record["label_kind"]) == (["blue", "green", "red"], "single")
    memory = json.loads((own / "memory.json").read_text())["rehearsal"]
    assert memory["difference"] is not None
    # Of so small a model the temporaries within torch's operations are a share.
    assert abs(memory["difference"]) < {"vit": 0.04, "convnext": 0.02, "resnet": 0.2}[kind]
    assert "data:image/png;base64," in (own / "data.html").read_text(encoding="utf-8")
    card = (own / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForImageClassification" in card
    assert "pipeline_tag: image-classification" in card

    code, out, err = run(
        "evaluate", "--adapter", str(own), "--data", str(data), "--json", capsys=capsys
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["accuracy"] == 1.0, "it learnt"
    assert found["rows"] == 9, "those of val/"
    assert found["confusion"] == [[3, 0, 0], [0, 3, 0], [0, 0, 3]]

    code, out, err = run(
        "generate", "--adapter", str(own), "--prompt", str(data / "val/red/1.jpg"), "--json",
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["label"] == "red"

    merged = tmp_path / "merged"
    code, out, err = run("export", str(own), "--to", str(merged), "--json", capsys=capsys)
    assert code == 0, err
    report = json.loads(out)["report"]
    written = next(each for each in report["variants"] if each["variant"] == "written")
    assert written["top1_agreement"] == 1.0
    assert written["logit_error"] < 2e-3
    assert report["rows"] == "validation rows of the run"
    code, out, _ = run(
        "evaluate", "--model", str(merged), "--bits", "16", "--data", str(data), "--json",
        capsys=capsys,
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["loss"] == pytest.approx(found["loss"], abs=2e-3)

    model = AutoModelForImageClassification.from_pretrained(merged, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(merged, backend="pil")
    image = Image.open(data / "val/green/0.png")
    logits = model(**processor(images=image, return_tensors="pt")).logits
    assert model.config.id2label[int(logits.argmax())] == "green"


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_that_of_peft(
    kind: str, bits: int, models: Callable[[str], Path], tmp_path: Path
) -> None:
    base = loaded(models(kind), bits)
    spec = qk.LoraSpec(
        rank=4, alpha=8, targets=TARGETS[kind], task_type="", whole=base.spec.trained_whole()
    )
    adapter = qk.attach(base, spec, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.normal_(0, 0.1, generator=generator)
    folder = tmp_path / "adapter"
    folder.mkdir()
    qk.save_adapter(adapter, folder, qk.BaseRecord.of(base))
    x = pixels()
    base.model.train()
    logits = base.model(pixel_values=x).logits
    logits.sin().sum().backward()

    twin = PeftModel.from_pretrained(twin_of(models(kind), base), folder, is_trainable=True)
    theirs = twin(pixel_values=x).logits
    assert relative_error(logits, theirs) < 1e-5
    theirs.sin().sum().backward()
    for path, layer in adapter.layers.items():
        module = twin.get_submodule(f"base_model.model.{path}")
        for side in ("A", "B"):
            grad = getattr(module, f"lora_{side}")["default"].weight.grad.flatten(1)
            assert grad.norm() > 0, path
            assert relative_error(getattr(layer, f"lora_{side}").grad, grad) < 1e-5, path

    qk.merge(adapter)
    with torch.no_grad():
        assert relative_error(base.model(pixel_values=x).logits, logits) < 1e-5
    merged = twin.merge_and_unload()
    with torch.no_grad():
        assert relative_error(merged(pixel_values=x).logits, logits) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_is_loaded(
    kind: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    base = loaded(models(kind))
    twin = twin_of(models(kind), base)
    names = {"vit": ["q_proj", "v_proj", "projection"], "convnext": ["pwconv1"]}
    config = LoraConfig(
        r=4, target_modules=names.get(kind, ["convolution"]), modules_to_save=["classifier"]
    )
    theirs: Any = get_peft_model(twin, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    theirs.save_pretrained(tmp_path)
    config_file = tmp_path / "adapter_config.json"
    config_file.write_text(config_file.read_text())
    adapter = qk.load_adapter(base, tmp_path)
    assert adapter.layers
    x = pixels()
    with torch.no_grad():
        found, expected = base.model(pixel_values=x).logits, theirs(pixel_values=x).logits
    assert relative_error(found, expected) < 1e-5


def test_a_resumed_run_has_the_bits_of_the_unbroken_one(
    models: Callable[[str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--lora-dropout", "0.1", "--max-steps", "6")
    whole = trained(models("vit"), data, tmp_path / "whole", capsys, *more)
    parts = tmp_path / "parts"
    trained(models("vit"), data, parts, capsys, *more, "--save-steps", "3")
    as_if_killed_at(parts, 3)
    code, _, err = run("train", "--output", str(parts), "--resume", capsys=capsys)
    assert code == 0, err
    ours, theirs = (load_file(each / "adapter_model.safetensors") for each in (parts, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_other_images_are_no_resume(
    models: Callable[[str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "data"
    shutil.copytree(data, moved)
    more = ("--max-steps", "4", "--save-steps", "2")
    own = trained(models("vit"), moved, tmp_path / "run", capsys, *more)
    as_if_killed_at(own, 2)
    Image.new("RGB", (9, 9)).save(moved / "train/red/0.png")
    code, _, err = run("train", "--output", str(own), "--resume", capsys=capsys)
    assert code == 2
    assert "the training data" in err
    shutil.copy(data / "train/red/0.png", moved / "train/red/0.png")
    code, _, err = run("train", "--output", str(own), "--resume", capsys=capsys)
    assert code == 0, err


def test_records_name_images_beside_them(
    models: Callable[[str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "train", tmp_path / "images")
    files = sorted((tmp_path / "images").rglob("*.*"))
    table = tmp_path / "all.csv"
    lines = [f"{each.relative_to(tmp_path)},{each.parent.name}" for each in files]
    table.write_text("\n".join(["file_name,label", *lines]))
    own = trained(models("vit"), table, tmp_path / "run", capsys, "--max-steps", "1")
    assert json.loads((own / "qlora_kit.json").read_text())["labels"] == ["blue", "green", "red"]
    several = tmp_path / "several.jsonl"
    rows = [
        {"image": str(each.relative_to(tmp_path)), "label": [each.parent.name, "colour"]}
        for each in files
    ]
    several.write_text("\n".join(map(json.dumps, rows)))
    own = trained(models("vit"), several, tmp_path / "multi", capsys, "--max-steps", "1")
    assert json.loads((own / "qlora_kit.json").read_text())["label_kind"] == "multi"


def test_a_head_of_other_classes_is_replaced(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", "vit", classes=5)
    code, out, err = run(
        "train", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "run"),
        *STEPS, "--max-steps", "8", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert "a classifier of 5 other classes; its head is not taken" in out
    code, out, err = run(
        "export", str(tmp_path / "run"), "--to", str(tmp_path / "merged"), "--requantize",
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    code, out, err = run(
        "evaluate", "--model", str(tmp_path / "merged"), "--data", str(data), "--json",
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["rows"] == 9


def test_what_training_would_be_is_told_without_it(
    models: Callable[[str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in KINDS:
        asked = ("--task", "classify", "--model", str(models(kind)), "--targets", "all-conv")
        code, out, err = run("plan", *asked, "--device", "cpu", "--json", capsys=capsys)
        assert code == 0, err
        assert json.loads(out)["predicted_peak_bytes"] > 0
        code, out, err = run("plan", *asked, "--device", "cuda", "--json", capsys=capsys)
        assert code == 0, err
    page = tmp_path / "data.html"
    code, out, err = run(
        "check", *asked, "--data", str(data), "--html", str(page), "--rows", "2", capsys=capsys
    )
    assert code == 0, err
    assert "16 × 16 pixels of 3 channels, and counts as 4 tokens" in out
    assert "RGB" in out
    assert "24 images in 3 folders, one a class" in out
    assert page.read_text(encoding="utf-8").count("<img") == 2


# ---------------------------------------------------------------- what goes wrong


def _truncated(folder: Path) -> None:
    file = folder / "red/1.jpg"
    file.write_bytes(file.read_bytes()[:-40])


def _cut_png(folder: Path) -> None:
    file = folder / "red/0.png"
    file.write_bytes(file.read_bytes()[:200])


def _bomb(folder: Path) -> None:
    Image.new("1", (12_000, 12_000)).save(folder / "red/0.png")


def _linked(folder: Path) -> None:
    (folder / "red/out.png").symlink_to("/etc/hostname")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a JPEG without its end": (_truncated, "red/1.jpg: "),
    "a PNG without its end": (_cut_png, "red/0.png: "),
    "a decompression bomb": (_bomb, "12,000 × 12,000 pixels; expected at most 89,478,485"),
    "an empty file": (lambda at: (at / "red/0.png").write_bytes(b""), "red/0.png: is empty"),
    "a text with another name": (
        lambda at: (at / "red/0.png").write_text("no image"),
        "red/0.png: no PNG or JPEG; expected a whole PNG or JPEG; replace it, or remove it",
    ),
    "a GIF with another name": (
        lambda at: Image.new("P", (8, 8)).save(at / "red/0.png", format="GIF"),
        "red/0.png: no PNG or JPEG",
    ),
    "a link out of the folder": (_linked, "red/out.png: a link to /etc/hostname, outside of"),
    "a single class": (
        lambda at: [shutil.rmtree(at / name) for name in ("green", "blue")],
        "one label only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_one_line(
    fault: str,
    models: Callable[[str], Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data / "train", folder)
    spoil, message = FAULTS[fault]
    spoil(folder)
    _refused(models("vit"), folder, tmp_path, capsys, message)


def _refused(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    message: str,
    *more: str,
) -> None:
    code, _, err = run(
        "train", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "run"),
        *STEPS, "--max-steps", "1", *more, capsys=capsys,
    )  # fmt: skip
    assert code == 2, err
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1
    assert "Traceback" not in err
    assert not [*(tmp_path / "run").glob("*")]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--targets", "dwconv"), "a convolution in 32 groups of channels"),
        (("--targets", "attention"), "--targets: 'attention' matches no linear layer"),
        (("--stream-data",), "--stream-data: images are read from their files as they are needed"),
        (("--vram", "8GB"), "--vram: settings are not chosen for a model of images"),
        (("--label-kind", "multi"), "--label-kind multi: each image lies in the folder of its"),
        (("--packing",), "--packing: --task classify computes a row as one sample"),
        (("--task", "causal"), "expected a train file in it"),
        (("--labels", "red,green"), "blue"),
    ],
)
def test_options_that_do_not_go_with_images_are_one_line(
    more: tuple[str, ...],
    message: str,
    models: Callable[[str], Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _refused(models("convnext"), data / "train", tmp_path, capsys, message, *more)


def test_data_and_model_must_fit(
    models: Callable[[str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\none,a\ntwo,b\n")
    vit = models("vit")
    _refused(vit, texts, tmp_path, capsys, "classify records, and the model reads images")
    for line, message in (
        ('{"image": "../x.png", "label": "a"}', "its image is outside of"),
        ('{"image": "missing.png", "label": "a"}', "missing.png"),
        ('{"image": 3, "label": "a"}', '"image"'),
    ):
        records = tmp_path / "records.jsonl"
        records.write_text(f"{line}\n")
        _refused(vit, records, tmp_path, capsys, message)
    code, _, err = run("evaluate", "--model", str(vit), "--data", str(data), capsys=capsys)
    assert code == 2
    assert "reads images and has no head that tells classes apart" in err
    code, _, err = run(
        "train", "--model", "demo", "--task", "classify", "--data", str(data), "--output",
        str(tmp_path / "run"), capsys=capsys,
    )  # fmt: skip
    assert code == 2
    assert "has images, and the model reads text" in err
    code, _, err = run(
        "generate", "--model", str(save_model(tmp_path / "five", "vit", classes=5)), "--prompt",
        "none.png", capsys=capsys,
    )  # fmt: skip
    assert code == 2
    assert "none.png" in err
