"""PEFT and the kit read each other's adapters, and the kit merges adapters of both."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from merging import plain, spec_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import relative_error
from tiny_models import load_folder
from transformers import AutoModelForCausalLM

import qlora_kit as qk
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.export.verify import verify_merge

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2, "layers.0.self_attn.q_proj": 6},
                 "alpha_pattern": {"up_proj": 3}},
    "expression": {"target_modules": r".*\.(q_proj|down_proj)"},
    "some layers": {"layers_to_transform": [1]},
    "without some": {"exclude_modules": ["k_proj"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norm saved": {"modules_to_save": ["norm"]},
}  # fmt: skip


@torch.no_grad()
def peft_adapter(base: Path, folder: Path, **options: Any) -> tuple[Path, torch.Tensor]:
    """Save an adapter with PEFT, with a B that is not zero; return it and its logits."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    defaults = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM",
                "target_modules": ["q_proj", "k_proj", "down_proj", "up_proj"]}  # fmt: skip
    wrapped = get_peft_model(model, LoraConfig(**{**defaults, **options})).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    wrapped.save_pretrained(folder)
    return folder, wrapped(input_ids=IDS).logits


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_an_adapter_of_peft_computes_and_merges_as_in_peft(
    save_tiny: Callable[..., Path], tmp_path: Path, form: str, tied: bool
) -> None:
    base = save_tiny("tinyllama", tie_word_embeddings=tied)
    folder, expected = peft_adapter(base, tmp_path / "theirs", **FORMS[form])
    loaded = load_folder(base)
    before = logits(loaded.model)
    adapter = qk.load_adapter(loaded, folder)
    assert relative_error(logits(loaded.model), expected) <= 1e-5
    qk.merge_to(
        tmp_path / "merged", qk.read_adapter(folder), spec_of(base, 16), make_tokenizer(),
        dtype=torch.float32, check=lambda merge, made: verify_merge(merge, made) and None,
    )  # fmt: skip
    assert relative_error(logits(plain(tmp_path / "merged")), expected) <= 1e-5
    # And back: PEFT computes the same with the adapter that the kit writes.
    (tmp_path / "ours").mkdir()
    qk.save_adapter(adapter, tmp_path / "ours", qk.BaseRecord.of(loaded))
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    again = PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    assert relative_error(logits(again), expected) <= 1e-5
    assert torch.equal(logits(qk.detach(adapter).model), before), "detached, it is the base again"


@pytest.mark.parametrize("style", ["with the adapter's name", "without the prefix", "pickled"])
def test_every_style_of_keys_and_files_is_read(
    save_tiny: Callable[..., Path], tmp_path: Path, style: str
) -> None:
    folder, expected = peft_adapter(save_tiny(), tmp_path / "theirs")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if style == "pickled":
        file.unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    elif style == "without the prefix":
        save_file({k.removeprefix("base_model.model."): t for k, t in tensors.items()}, file)
    else:
        save_file({k.replace(".weight", ".default.weight"): t for k, t in tensors.items()}, file)
    loaded = load_folder(save_tiny())
    qk.load_adapter(loaded, folder)
    assert relative_error(logits(loaded.model), expected) <= 1e-5


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_a_pickled_adapter_runs_nothing(
    save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = peft_adapter(save_tiny(), tmp_path / "theirs")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(AdapterError, match="not a checkpoint of plain tensors"):
        qk.read_adapter(folder)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "change", "says"),
    [
        (
            {},
            lambda t: [t.pop(k) for k in list(t) if "layers.1.self_attn.k_proj" in k],
            r"targets model\.layers\.1\.self_attn\.k_proj, and its tensors are missing",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            lambda t: t.pop("base_model.model.lm_head.weight"),
            "modules_to_save names lm_head and there is no tensor of it",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(99, 64)}),
            r"its lm_head\.weight \(99, 64\) is of shape \(96, 64\) in the base \(tokens were add",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            lambda t: t["base_model.model.lm_head.weight"].fill_(float("nan")),
            r"lm_head\.weight holds NaN or infinity",
        ),
        (
            {},
            lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)}),
            r"unknown tensor base_model\.model\.model\.norm\.weight",
        ),
        (
            {},
            lambda t: t.update(
                {f"base_model.model.model.layers.9.mlp.up_proj.lora_{s}.weight": torch.ones(x)
                 for s, x in (("A", (4, 64)), ("B", (80, 4)))}
            ),
            r"layers\.9\.mlp\.up_proj .* is missing in",
        ),
    ],
)  # fmt: skip
def test_missing_and_surplus_tensors_are_named(
    save_tiny: Callable[..., Path],
    tmp_path: Path,
    options: dict[str, Any],
    change: Callable[[dict[str, torch.Tensor]], Any],
    says: str,
) -> None:
    folder, _ = peft_adapter(save_tiny(), tmp_path / "theirs", **options)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=says):
        qk.merge_to(
            tmp_path / "merged", qk.read_adapter(folder), spec_of(save_tiny(), 16), make_tokenizer()
        )
    with pytest.raises(AdapterError, match=says):
        qk.load_adapter(load_folder(save_tiny()), folder)
    assert not (tmp_path / "merged").exists()


# ---------------------------------------------------------------- quantised checkpoints


@pytest.mark.parametrize(
    "quantization",
    [
        qk.Quantization(4),
        qk.Quantization(4, double_quant=False),
        qk.Quantization(4, quant_type="fp4"),
        qk.Quantization(8),
    ],
)
def test_a_quantised_checkpoint_is_the_same_model_here_and_in_transformers(
    save_tiny: Callable[..., Path], tmp_path: Path, quantization: qk.Quantization
) -> None:
    # On AVX-512, bitsandbytes' own layers unpack widths that are no multiple of 64 wrongly.
    base = save_tiny("tinyllama", initializer_range=0.05, intermediate_size=128)
    target = tmp_path / "quantised"
    done = qk.quantize_to(target, spec_of(base, 16), quantization, make_tokenizer())
    assert done.bytes < done.original_bytes
    spec = qk.BaseSpec(qk.find_model(str(base)), base, quantization)
    expected = logits(qk.load_base(spec, qk.choose_hardware("cpu")).model)
    stored = qk.BaseSpec(qk.find_model(str(target)), target, quantization)
    ours = qk.load_base(stored, qk.choose_hardware("cpu")).model
    assert torch.equal(logits(ours), expected)
    theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    kind = type(theirs.model.layers[0].mlp.up_proj).__name__
    assert kind == ("Linear8bitLt" if quantization.bits == 8 else "Linear4bit")
    # In training mode bitsandbytes computes 4 bits exactly; its 8 bits round activations as well.
    bound = 0.05 if quantization.bits == 8 else 1e-5
    assert relative_error(logits(theirs.train()), expected) <= bound


def test_a_quantised_checkpoint_is_not_quantised_again(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    qk.quantize_to(tmp_path / "q", spec_of(save_tiny(), 16), qk.Quantization(4), make_tokenizer())
    with pytest.raises(ModelError, match="is quantised already; expected unquantised weights"):
        qk.quantize_to(tmp_path / "r", spec_of(tmp_path / "q"), qk.Quantization(8),
                       make_tokenizer())  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_merge_that_is_quantised_again_opens_in_transformers(
    save_tiny: Callable[..., Path], tmp_path: Path, bits: int
) -> None:
    folder = save_tiny("tinyllama", initializer_range=0.05, intermediate_size=128)
    base = qk.load_base(spec_of(folder, bits), qk.choose_hardware("cpu"))
    adapter = qk.attach(base, qk.LoraSpec(rank=4, targets=("all-linear",)))
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.normal_(0, 0.05, generator=torch.Generator().manual_seed(2))
    (tmp_path / "adapter").mkdir()
    qk.save_adapter(adapter, tmp_path / "adapter", qk.BaseRecord.of(base))
    expected = logits(base.model)
    qk.merge_to(
        tmp_path / "merged", qk.read_adapter(tmp_path / "adapter"), base.spec, make_tokenizer(),
        dtype=torch.float32, requantize=True,
        check=lambda merge, made: verify_merge(merge, made) and None,
    )  # fmt: skip
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    ours = load_folder(tmp_path / "merged", bits)
    # Quantising again is not exact; this test claims only that it gives no other model.
    assert relative_error(logits(ours.model), expected) < 0.5
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    bound = 0.05 if bits == 8 else 1e-5
    assert relative_error(logits(theirs.train()), logits(ours.model)) <= bound
