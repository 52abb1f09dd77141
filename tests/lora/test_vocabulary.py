"""LoRA on the output head and on the input embedding, against PEFT's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_twin import their_loss, transformers_model
from support import relative_error
from t5_models import save_t5, t5_spec
from tiny_models import (
    OTHERS,
    SIZES,
    fill_lora,
    load_folder,
    mask_of,
    padded_batch,
    save_model,
    tiny_numbers,
)
from torch import Tensor

from qlora_kit.data.batch import collate
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.layers.draws import Draws, drawn_from
from qlora_kit.layers.head import quantize_head
from qlora_kit.layers.quantize import Quantization
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.lora.attach import Adapter, attach, count_trainable, detach, merge
from qlora_kit.lora.files import BaseRecord
from qlora_kit.lora.reading import read_adapter
from qlora_kit.lora.several import load_adapters
from qlora_kit.lora.spec import LoraSpec, Variant
from qlora_kit.lora.writing import save_adapter
from qlora_kit.model.head import head_of
from qlora_kit.storage import load_tensors, save_tensors
from qlora_kit.tasks.causal import loss_sum

# PEFT warns of tied weights, and of the layers of GPT-2 that lie transposed.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

TOLERANCE = 1e-5
# Untied, tied, capped and scaled in the model, scaled in the embedding, and names of its own.
FAMILIES = {
    "untied": tiny_numbers("tinyllama"),
    "tied": OTHERS["qwen2-tied"],
    "capped": tiny_numbers("gemma-2-9b"),
    "scaled": {
        "model_type": "gemma3_text", **SIZES, "head_dim": 16, "query_pre_attn_scalar": 16,
        "sliding_window": 16,
    },
    "gpt2": OTHERS["gpt2"],
}  # fmt: skip


def spec_of(name: str, **more: Any) -> LoraSpec:
    table = "wte" if name == "gpt2" else "embed_tokens"
    inner = "c_attn" if name == "gpt2" else "q_proj"
    fields = {
        "rank": 4, "alpha": 8.0, "targets": (inner, "lm_head", table),
        "rank_pattern": {"lm_head": 3}, "alpha_pattern": {table: 6.0},
    }  # fmt: skip
    return LoraSpec(**{**fields, **more})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_model(tmp_path_factory.mktemp(name), FAMILIES[name])
        return made[name]

    return folder


def twin_of(folder: Path, adapter: Adapter) -> Any:
    """Return PEFT's model, with the A and B of `adapter`."""
    spec = adapter.spec
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets),
        rank_pattern=dict(spec.rank_pattern), alpha_pattern=dict(spec.alpha_pattern),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    twin = get_peft_model(transformers_model(folder, 16), config)
    for parameter, own in pairs_of(twin, adapter).values():
        parameter.data.copy_(own)
    return twin


def pairs_of(twin: Any, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Return PEFT's parameters and ours, turned as PEFT has them, by our names."""
    pairs = {}
    for path, layer in adapter.layers.items():
        theirs = twin.get_submodule(f"base_model.model.{path}")
        pairs[f"{path}.lora_A"] = theirs.lora_A["default"].weight, layer.lora_A
        pairs[f"{path}.lora_B"] = theirs.lora_B["default"].weight, layer.lora_B
    for path, table in adapter.embeddings.items():
        theirs = twin.get_submodule(f"base_model.model.{path}")
        pairs[f"{path}.lora_B"] = theirs.lora_embedding_A["default"], table.lora_B.T
        pairs[f"{path}.lora_A"] = theirs.lora_embedding_B["default"], table.lora_A.T
    return pairs


def logits_of(model: Any, batch: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=batch.input_ids, attention_mask=mask_of(batch)).logits
    return logits


def our_loss(adapter: Adapter, batch: Any) -> Tensor:
    model = adapter.base.model
    return loss_sum(model, batch, head_of(model), chunk_tokens=7) / batch.weight


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_gradients_and_files_are_those_of_peft(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder, batch = folders(name), padded_batch()
    base = load_folder(folder)
    plain = logits_of(base.model, batch)
    adapter = attach(base, spec_of(name))
    assert torch.equal(logits_of(base.model, batch), plain)  # B starts at zero
    assert adapter.trainable == count_trainable(base.spec.skeleton(), adapter.spec)
    fill_lora(adapter)
    twin = twin_of(folder, adapter)
    wanted = logits_of(twin, batch)
    assert relative_error(logits_of(base.model, batch), wanted) <= TOLERANCE
    assert relative_error(wanted, plain) > 1e-2

    ours, theirs = our_loss(adapter, batch), their_loss(twin, batch)
    assert relative_error(ours, theirs) <= TOLERANCE
    ours.backward()
    theirs.backward()
    parameters = adapter.parameters()
    for key, (theirs_of, _) in pairs_of(twin, adapter).items():
        grad = parameters[key].grad
        assert grad is not None
        turned = grad.T if key.rpartition(".")[0] in adapter.embeddings else grad
        assert theirs_of.grad is not None
        assert relative_error(turned, theirs_of.grad) <= TOLERANCE, key

    save_adapter(adapter, tmp_path, BaseRecord.of(base))
    opened = PeftModel.from_pretrained(transformers_model(folder, 16), tmp_path)
    assert relative_error(logits_of(opened, batch), wanted) <= TOLERANCE
    twin.save_pretrained(tmp_path / "theirs")
    again = load_adapter(load_folder(folder), tmp_path / "theirs")
    assert relative_error(logits_of(again.base.model, batch), wanted) <= TOLERANCE


def test_what_is_written_is_read_bit_for_bit(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = attach(load_folder(folders("untied")), spec_of("untied"))
    fill_lora(adapter)
    save_adapter(adapter, tmp_path, BaseRecord.of(adapter.base))
    again = load_adapter(load_folder(folders("untied")), tmp_path)
    for name, tensor in adapter.trained_tensors().items():
        assert torch.equal(again.trained_tensors()[name], tensor), name


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_taken_off_the_base_is_as_before_and_merged_it_computes_the_same(
    folders: Callable[[str], Path], name: str
) -> None:
    batch, base = padded_batch(), load_folder(folders(name))
    plain = logits_of(base.model, batch)
    adapter = attach(base, spec_of(name))
    fill_lora(adapter)
    trained = logits_of(base.model, batch)
    with adapter.disabled():
        assert torch.equal(logits_of(base.model, batch), plain)
    assert torch.equal(logits_of(base.model, batch), trained)
    assert torch.equal(logits_of(detach(adapter).model, batch), plain)
    adapter = attach(base, spec_of(name))
    fill_lora(adapter)
    assert relative_error(logits_of(merge(adapter).model, batch), trained) <= TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
def test_a_head_in_few_bits_carries_lora(folders: Callable[[str], Path], bits: Any) -> None:
    base = load_folder(folders("untied"))
    head = quantize_head(base.model.lm_head, Quantization(bits), torch.device("cpu"))
    base.model.set_submodule("lm_head", head)
    adapter = attach(base, LoraSpec(rank=4, targets=("lm_head",)))
    fill_lora(adapter)
    states = torch.randn(5, head.in_features, generator=torch.Generator().manual_seed(1))
    found = head_of(base.model).logits(states)
    wanted = head(states) + adapter.layers["lm_head"].scaling * (
        states @ adapter.layers["lm_head"].lora_A.T @ adapter.layers["lm_head"].lora_B.T
    )
    assert relative_error(found, wanted) <= TOLERANCE
    assert relative_error(base.model.lm_head(states), wanted) <= TOLERANCE


def test_several_adapters_on_one_base(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder, batch, logits = folders("tied"), padded_batch(), {}
    for seed, name in enumerate("ab"):
        adapter = attach(load_folder(folder), spec_of("tied"))
        fill_lora(adapter, seed=seed)
        (tmp_path / name).mkdir()
        save_adapter(adapter, tmp_path / name, BaseRecord.of(adapter.base))
        logits[name] = logits_of(adapter.base.model, batch)
    several = load_adapters(load_folder(folder), {name: tmp_path / name for name in "ab"})
    model = several.base.model
    for name in "ab":
        several.set_adapter(name)
        assert relative_error(logits_of(model, batch), logits[name]) <= TOLERANCE
        with torch.no_grad():
            found = loss_sum(model, batch, head_of(model))
        assert torch.isfinite(found)
    several.set_adapter(["b", "a"])
    mixed = logits_of(model, batch)
    for row, name in enumerate("ba"):
        assert relative_error(mixed[row], logits[name][row]) <= TOLERANCE
    with pytest.raises(ConfigError, match="measured one at a time"):
        head_of(model)
    plain = logits_of(load_folder(folder).model, batch)
    assert torch.equal(logits_of(several.detach().model, batch), plain)


def test_dropout_of_a_head_is_that_of_the_sample(folders: Callable[[str], Path]) -> None:
    """Neither other rows of a batch nor its cut change what is dropped."""
    adapter = attach(load_folder(folders("untied")), spec_of("untied", dropout=0.4))
    fill_lora(adapter)
    model = adapter.base.model.train()
    rows = [
        {"input_ids": [1, 41, 52, 63, 2], "labels": [-100, 41, 52, 63, 2], "row": 0},
        {"input_ids": [1, 9, 11, 2], "labels": [1, 9, 11, 2], "row": 1},
    ]

    def loss(chosen: list[int], step: int = 1) -> float:
        with drawn_from(Draws(7, step, tuple(chosen), 6)):
            batch = collate([rows[number] for number in chosen], 0)
            return loss_sum(model, batch, head_of(model), chunk_tokens=3).item()

    together = loss([0, 1])
    assert together == pytest.approx(loss([0]) + loss([1]), rel=1e-6)
    assert together != pytest.approx(loss([0, 1], step=2), rel=1e-6)


# ---------------------------------------------------------------- refusals


def test_the_tensors_that_peft_saves_of_its_base_must_be_those_of_the_base(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = attach(load_folder(folders("untied")), spec_of("untied"))
    fill_lora(adapter)
    save_adapter(adapter, tmp_path, BaseRecord.of(adapter.base))
    file = tmp_path / "adapter_model.safetensors"
    own = adapter.base.model.lm_head.frozen.weight.values.clone()
    tensors = load_tensors(file)
    save_tensors(file, {**tensors, "base_model.model.lm_head.base_layer.weight": own})
    assert [*read_adapter(tmp_path).of_base] == ["lm_head.weight"]
    load_adapter(load_folder(folders("untied")), tmp_path)
    save_tensors(file, {**tensors, "base_model.model.lm_head.base_layer.weight": own + 1})
    with pytest.raises(AdapterError, match=r"its lm_head\.weight .* is not that of the base"):
        load_adapter(load_folder(folders("untied")), tmp_path)


def test_the_embedding_of_an_encoder_decoder_is_refused_and_its_head_is_not(
    tmp_path: Path,
) -> None:
    skeleton = t5_spec(save_t5(tmp_path)).skeleton()
    with pytest.raises(ConfigError, match="encoder and decoder read, which carries no LoRA"):
        count_trainable(skeleton, LoraSpec(targets=("q", "shared")))
    assert count_trainable(skeleton, LoraSpec(targets=("lm_head",))) > 0


@pytest.mark.parametrize("field", ["dora", "learned_scale", "vblora", "merge_aware", "freeze_a"])
def test_a_variant_is_refused_by_name(folders: Callable[[str], Path], field: str) -> None:
    base = load_folder(folders("untied"))
    spec = spec_of("untied", variant=Variant(**{field: True}))
    with pytest.raises(
        ConfigError, match=f"--{field.replace('_', '-')}: not for (lm_head|model.embed)"
    ):
        attach(base, spec)
