"""An adapter that was trained merge-aware is exported as the very codes that were trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from merging import difference, plain, save
from safetensors.torch import load_file
from training import make_rows, options

import qlora_kit as qk
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.export.rows import some_rows
from qlora_kit.layers.merge_aware import hash_of_all, hash_of_codes
from qlora_kit.layers.quantize import read_quantized

F16 = torch.float16
FORMATS = [
    qk.Quantization(4),
    qk.Quantization(4, "fp4", double_quant=False),
    qk.Quantization(8),
]


def trained(
    folder: Path, quantization: qk.Quantization, targets: tuple[str, ...] = ("all-linear",)
) -> qk.Adapter:
    """Train a merge-aware adapter for two steps."""
    spec = qk.BaseSpec(qk.find_model(str(folder)), folder, quantization)
    base = qk.load_base(spec, qk.choose_hardware("cpu"))
    variant = qk.Variant(merge_aware=True)
    lora = qk.LoraSpec(rank=4, targets=targets, variant=variant)
    adapter = qk.attach(base, lora, seed=1)
    qk.train_adapter(adapter, make_rows(8), options(max_steps=2, learning_rate=2e-2))
    return adapter


def merged_to(target: Path, adapter: qk.Adapter, **changes: Any) -> Path:
    stored = qk.read_adapter(save(adapter, target.parent / "adapter"))
    qk.merge_to(target, stored, adapter.base.spec, make_tokenizer(), **changes)
    return target


def codes_in(folder: Path, adapter: qk.Adapter) -> str:
    """Return the hash of the codes in the files of an export."""
    tensors = load_file(folder / "model.safetensors")
    hashes = {}
    for path, layer in adapter.layers.items():
        of_layer = {k: v for k, v in tensors.items() if k.startswith(f"{path}.")}
        parts = {name.removeprefix(f"{path}."): each for name, each in of_layer.items()}
        hashes[path] = hash_of_codes(read_quantized(parts, layer.frozen.weight.shape))
    return hash_of_all(hashes)


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda each: each.describe())
def test_the_written_codes_are_those_that_were_trained(
    save_tiny: Callable[..., Path], tmp_path: Path, quantization: qk.Quantization
) -> None:
    adapter = trained(save_tiny(), quantization)
    layers = adapter.merge_aware.items()
    codes = hash_of_all({path: hash_of_codes(layer.merged) for path, layer in layers})
    base = hash_of_all({path: hash_of_codes(layer.frozen.weight) for path, layer in layers})
    target = merged_to(tmp_path / "merged", adapter, requantize=True)
    assert codes_in(target, adapter) == codes != base
    record = json.loads((tmp_path / "adapter/qlora_kit.json").read_text())
    assert record["trained_codes"] == codes


def test_plain_transformers_computes_what_was_trained(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    # These weights have a usual size: large weights amplify the rounding to float16.
    adapter = trained(save_tiny("tinyllama", initializer_range=0.05), qk.Quantization(4))
    adapter.base.model.eval()
    quantized = plain(merged_to(tmp_path / "4", adapter, requantize=True, dtype=torch.float32))
    assert type(quantized.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert difference(adapter, quantized) < 1e-5
    wide = merged_to(tmp_path / "32", adapter, dtype=torch.float32)
    assert difference(adapter, plain(wide)) < 1e-5
    assert difference(adapter, plain(merged_to(tmp_path / "16", adapter))) < 1e-3


def test_it_is_verified_and_the_report_says_what_is_recovered(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained(save_tiny(), qk.Quantization(4))
    reports = []
    rows = some_rows(make_rows(8), 64, 0, "rows of a test")
    for name, requantize in (("4", True), ("16", False)):
        merged_to(
            tmp_path / name, adapter, requantize=requantize, dtype=torch.float32,
            check=lambda merge, folder: reports.append(qk.verify_merge(merge, folder, rows)),
        )  # fmt: skip
    packed, wide = reports
    assert packed.variant("written").mean_kl < 1e-9
    assert packed.variant("base").mean_kl > 1e-4
    assert packed.codes_are_trained is True
    assert packed.as_json()["codes_are_trained"] is True
    assert packed.verdict.requantizing == "keeps"
    assert "are those that were trained, bit for bit" in packed.verdict.text[1]
    assert wide.variant("written").mean_kl < 1e-5
    assert "codes_are_trained" not in wide.as_json()
    assert "--requantize writes these" in wide.verdict.text[1]


def test_codes_that_were_not_trained_are_said(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained(save_tiny(), qk.Quantization(4))
    stored = qk.read_adapter(save(adapter, tmp_path / "adapter"))
    next(iter(stored.tensors.values()))[0].mul_(1.5)
    reports = []
    qk.merge_to(
        tmp_path / "merged", stored, adapter.base.spec, make_tokenizer(), requantize=True,
        check=lambda merge, folder: reports.append(qk.verify_merge(merge, folder)),
    )  # fmt: skip
    assert reports[0].codes_are_trained is False
    assert "others in places" in reports[0].verdict.text[1]


def test_layers_without_lora_keep_the_codes_of_the_base(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_tiny()
    adapter = trained(folder, qk.Quantization(4), targets=("q_proj",))
    spec = adapter.base.spec
    qk.quantize_to(tmp_path / "base", spec, qk.Quantization(4), make_tokenizer(), dtype=F16)
    target = merged_to(tmp_path / "merged", adapter, requantize=True)
    before = load_file(tmp_path / "base/model.safetensors")
    after = load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".q_proj." in name for name in changed)


def test_a_loaded_adapter_computes_what_was_trained(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained(save_tiny(), qk.Quantization(4))
    ids = torch.randint(3, 96, (2, 20))
    model = adapter.base.model.eval()
    expected = model(input_ids=ids).logits
    folder = save(adapter, tmp_path / "adapter")
    base = qk.detach(adapter)
    again = qk.load_adapter(base, folder)
    assert torch.equal(model(input_ids=ids).logits, expected)
    qk.merge(again)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_what_cannot_be_exported_or_shared_is_refused(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained(save_tiny(), qk.Quantization(4))
    with pytest.raises(ConfigError, match="--base original: the adapter was trained merge-aware"):
        merged_to(tmp_path / "merged", adapter, over="original")
    folder = save(adapter, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="was trained merge-aware, and multiplies"):
        qk.load_adapters(qk.detach(adapter), {"one": folder})
    spec = qk.BaseSpec(adapter.base.spec.source, adapter.base.spec.folder, qk.Quantization(16))
    wide = qk.load_base(spec, qk.choose_hardware("cpu"))
    with pytest.raises(ConfigError, match="found a base in 16 bits"):
        qk.load_adapter(wide, folder)
