"""Adapter files: they are written, read back, and refused by name if they have a fault."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import fill_lora, load_folder

from qlora_kit.errors import AdapterError
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.lora.attach import Adapter, attach, detach
from qlora_kit.lora.files import BaseRecord, read_base_record
from qlora_kit.lora.reading import read_adapter
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.lora.writing import save_adapter

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def adapter(save_tiny: Callable[..., Path]) -> Adapter:
    spec = LoraSpec(rank=4, alpha=8.0, dropout=0.05, targets=("attention",))
    adapter = attach(load_folder(save_tiny("tinyllama"), 4), spec)
    fill_lora(adapter)
    return adapter


@pytest.fixture
def saved(adapter: Adapter, tmp_path: Path) -> Path:
    save_adapter(adapter, tmp_path, BaseRecord.of(adapter.base, template_hash="abc"))
    return tmp_path


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_an_adapter_comes_back_bit_for_bit(adapter: Adapter, saved: Path) -> None:
    expected = {name: p.detach().clone() for name, p in adapter.parameters().items()}
    back = load_adapter(detach(adapter), saved)
    found = back.parameters()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].requires_grad for name in expected)
    assert back.spec.dropout == 0.05
    assert [layer.scaling for layer in back.layers.values()] == [2.0] * 8


def test_two_writings_are_the_same_bytes(adapter: Adapter, saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    save_adapter(adapter, again, BaseRecord.of(adapter.base, template_hash="abc"))
    names = sorted(path.name for path in again.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "qlora_kit.json"]
    assert all((again / name).read_bytes() == (saved / name).read_bytes() for name in names)
    mode = stat.S_IMODE((saved / "adapter_model.safetensors").stat().st_mode)
    assert mode == stat.S_IMODE((saved / "adapter_config.json").stat().st_mode)


def test_config_is_in_the_words_of_peft(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.05)
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_targets_of_single_layers_are_written_as_paths(adapter: Adapter, tmp_path: Path) -> None:
    base = detach(adapter)
    some = attach(base, LoraSpec(rank=2, targets=("model.layers.1.mlp.up_proj", "q_proj")))
    save_adapter(some, tmp_path, BaseRecord.of(base))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(some.layers)
    assert len(some.layers) == 3


def test_record_says_what_the_adapter_was_trained_on(adapter: Adapter, saved: Path) -> None:
    record = read_base_record(saved)
    assert record == BaseRecord.of(adapter.base, template_hash="abc")
    assert (record.bits, record.quant_type, record.double_quant) == (4, "nf4", True)
    assert (record.block_size, record.compute_dtype) == (64, "float32")
    assert record.digest == adapter.base.digest
    assert record.template_hash == "abc"
    assert record.versions.keys() == {"qlora-kit", "torch", "transformers", "bitsandbytes"}
    assert read_base_record(saved.parent) is None


def test_delta_on_disk_is_that_of_the_layer(adapter: Adapter, saved: Path) -> None:
    stored = read_adapter(saved)
    assert stored.tensors.keys() == adapter.layers.keys()
    for path, layer in adapter.layers.items():
        torch.testing.assert_close(stored.delta(path), layer.delta())
        assert stored.delta(path).norm() > 0


def test_16_bit_adapters_are_read_as_fp32(adapter: Adapter, saved: Path) -> None:
    change_tensors(saved, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    back = load_adapter(detach(adapter), saved)
    assert {p.dtype for p in back.parameters().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY.format("B")), r"layers\.0\.self_attn\.q_proj has only one of"),
        (
            lambda t: t.update({KEY.format("A"): torch.ones(3, 64)}),
            r"q_proj has A \(3, 64\).*rank 4",
        ),
        (lambda t: t[KEY.format("B")].fill_(float("nan")), "q_proj holds NaN or infinity"),
        (lambda t: t[KEY.format("A")][0].fill_(float("inf")), "q_proj holds NaN or infinity"),
        (
            lambda t: t.update({"base_model.model.model.other.weight": torch.ones(2)}),
            r"unknown tensor base_model\.model\.model\.other\.weight",
        ),
    ],
)
def test_tensors_that_are_no_whole_adapter_are_refused(
    saved: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    change_tensors(saved, change)
    with pytest.raises(AdapterError, match=message):
        read_adapter(saved)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("trainable_token_indices", [3]),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
    ],
)
def test_a_feature_the_kit_does_not_have_is_named(saved: Path, option: str, value: Any) -> None:
    change_config(saved, **{option: value})
    with pytest.raises(AdapterError, match=f"{option} is set"):
        read_adapter(saved)


def test_the_option_values_that_peft_writes_by_default_are_accepted(saved: Path) -> None:
    from peft import LoraConfig

    defaults = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict()
    defaults["target_modules"] = sorted(defaults["target_modules"])
    change_config(saved, **{name: value for name, value in defaults.items() if name != "peft_type"})
    assert read_adapter(saved).spec.rank == 4


def test_a_folder_without_an_adapter_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        read_adapter(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        read_adapter(empty)
    (saved / "adapter_model.safetensors").write_bytes(b"\0" * 30)
    with pytest.raises(AdapterError, match="not a complete safetensors file"):
        read_adapter(saved)
    change_config(saved, peft_type="IA3")
    with pytest.raises(AdapterError, match='expected "peft_type": "LORA"'):
        read_adapter(saved)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        read_adapter(saved)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        read_adapter(saved)


def test_a_damaged_record_is_refused(saved: Path) -> None:
    (saved / "qlora_kit.json").write_text('{"surplus": 1}')
    with pytest.raises(AdapterError, match=r"qlora_kit\.json: not a record of this kit"):
        read_adapter(saved)


def test_an_adapter_of_another_base_is_refused(
    adapter: Adapter, saved: Path, save_tiny: Callable[..., Path]
) -> None:
    other = load_folder(save_tiny("tinyllama", vocab_size=97), 4)
    with pytest.raises(AdapterError, match="trained on other weights"):
        load_adapter(other, saved)
    smaller = load_folder(save_tiny("tinyllama", hidden_size=32, head_dim=8), 4)
    with pytest.raises(AdapterError, match=r"k_proj \(32, 64\) is of shape \(16, 32\)"):
        load_adapter(smaller, saved)
    shallow = load_folder(save_tiny("tinyllama", num_hidden_layers=1), 4)
    with pytest.raises(AdapterError, match=r"layers\.1\..* is missing in"):
        load_adapter(shallow, saved)


def test_an_adapter_of_another_tool_needs_no_record(adapter: Adapter, saved: Path) -> None:
    (saved / "qlora_kit.json").unlink()
    assert read_adapter(saved).record is None
    assert len(load_adapter(detach(adapter), saved).layers) == 8
