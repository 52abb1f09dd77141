"""GPT-2's layers, whose files hold their weights transposed, are linear layers like all others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from merging import difference, plain, save, spec_of
from peft import PeftModel
from peft_twin import transformers_model
from safetensors.torch import load_file, save_file
from support import relative_error
from tiny_models import OTHERS, fill_lora, load_folder, save_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import qlora_kit as qk
from qlora_kit.errors import AdapterError
from qlora_kit.export.verify import verify_merge
from qlora_kit.model.names import ModelSource

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
C_PROJ = "transformer.h.1.attn.c_proj"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2; its widths are multiples of 64, which bitsandbytes' own layers need."""
    return save_model(tmp_path_factory.mktemp("gpt2"), {**OTHERS["gpt2"], "n_inner": 128})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def test_rows_that_end_with_padding_are_no_reason_to_advise_a_mask(
    gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 pads with its end token; no token sees the padding on its right."""
    advise = "warn_if_padding_and_no_attention_mask"
    monkeypatch.setattr(PreTrainedModel, advise, lambda *_: pytest.fail("it advises a mask"))
    logits(load_folder(gpt2, 16).model)


def adapter_on(folder: Path, bits: int) -> qk.Adapter:
    adapter = qk.attach(load_folder(folder, bits), qk.LoraSpec(rank=4, targets=("all-linear",)))
    fill_lora(adapter, std=0.05)
    return adapter


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.filterwarnings("error::UserWarning:peft.*")
def test_an_adapter_opens_in_peft_and_one_of_peft_here(
    gpt2: Path, tmp_path: Path, bits: int
) -> None:
    adapter = adapter_on(gpt2, bits)
    expected = logits(adapter.base.model)
    folder = save(adapter, tmp_path / "ours")
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    theirs = PeftModel.from_pretrained(transformers_model(gpt2, bits), folder)
    assert relative_error(logits(theirs.train(bits == 4)), expected) <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_folder(gpt2, bits)
    qk.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again.model), expected)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_merge_opens_in_plain_transformers(gpt2: Path, tmp_path: Path, bits: int) -> None:
    adapter = adapter_on(gpt2, bits)
    folder = save(adapter, tmp_path / "adapter")
    qk.merge_to(
        tmp_path / "merged", qk.read_adapter(folder), spec_of(gpt2, bits), make_tokenizer(),
        dtype=torch.float32, check=lambda merge, made: verify_merge(merge, made) and None,
    )  # fmt: skip
    merged = plain(tmp_path / "merged")
    assert type(merged.get_submodule(C_PROJ)).__name__ == "Conv1D"
    assert difference(adapter, merged) <= 1e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_checkpoint_opens_in_transformers(
    gpt2: Path, tmp_path: Path, bits: int
) -> None:
    expected = logits(load_folder(gpt2, bits).model)
    qk.quantize_to(tmp_path / "q", spec_of(gpt2, 16), qk.Quantization(bits), make_tokenizer())
    assert torch.equal(logits(load_folder(tmp_path / "q", bits).model), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    # In training mode bitsandbytes computes 4 bits exactly; its 8 bits round activations as well.
    bound = 0.05 if bits == 8 else 1e-5
    assert relative_error(logits(theirs.train()), expected) <= bound


def test_random_weights_are_those_of_a_checkpoint_of_this_kind() -> None:
    source = ModelSource("gpt2", architecture=OTHERS["gpt2"])
    spec = qk.BaseSpec(source, None, qk.Quantization(4), random=True)
    base = qk.load_base(spec, qk.choose_hardware("cpu"))
    assert base.model.get_submodule("transformer.h.0.attn.c_attn").weight.shape == (192, 64)
    assert logits(base.model).isfinite().all()


@pytest.mark.parametrize("name", [f"{C_PROJ}.weight", "transformer.h.1.mlp.c_fc.weight"])
def test_a_transposed_layer_saved_whole_is_refused(gpt2: Path, tmp_path: Path, name: str) -> None:
    """A square weight would fit as it is and transposed, and be wrong in one of the two."""
    folder = save(adapter_on(gpt2, 16), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    path = name.removesuffix(".weight")
    stored = load_file(gpt2 / "model.safetensors")[name]
    kept = {key: value for key, value in tensors.items() if f"{path}." not in key}
    save_file({**kept, f"base_model.model.{name}": stored}, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"modules_to_save": [path], "target_modules": ["c_attn"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=rf"{path}.* transposed"):
        qk.load_adapter(load_folder(gpt2), folder)
