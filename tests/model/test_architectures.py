"""Every architecture in `configs/`, shrunk: logits, loss and gradients are transformers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_error
from tiny_models import NAMES, SIZES, fill_lora, load_folder, mask_of, padded_batch, tiny_numbers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlora_kit.data.batch import Batch, predicting_positions
from qlora_kit.errors import ModelError
from qlora_kit.layers.projections import base_prefix, projections
from qlora_kit.lora.attach import attach
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.model.architecture import (
    CAUSAL_LM,
    architecture_from,
    build_skeleton,
    read_architecture,
    unquantized_share,
)
from qlora_kit.model.class_head import SEQUENCE_CLASSIFICATION
from qlora_kit.model.head import head_of
from qlora_kit.model.names import known_models
from qlora_kit.step.groups import set_groups
from qlora_kit.tasks.causal import loss_sum


def plain_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_logits_at_16_bits_are_those_of_transformers(
    folder_of: Callable[[str], Path], name: str
) -> None:
    folder = folder_of(name)
    batch = padded_batch()
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask_of(batch)}
    with torch.no_grad():
        expected = plain_model(folder)(**inputs).logits
        found = load_folder(folder).model(**inputs).logits
    assert expected.std() > 0.01
    assert relative_error(found, expected) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_transformers(
    folder_of: Callable[[str], Path], name: str
) -> None:
    """The reference trains W + scaling · B A in full; its gradient gives those of A and B."""
    folder = folder_of(name)
    batch = padded_batch()
    adapter = attach(load_folder(folder), LoraSpec(rank=3, alpha=4.0, targets=("all-linear",)))
    fill_lora(adapter, std=0.05)
    model = adapter.base.model.train()
    set_groups(model)
    total = loss_sum(model, batch, head_of(model), chunk_tokens=5)
    total.backward()

    plain = plain_model(folder).train()
    # Of GPT-2's layers it is Wᵀ.
    turned = {path for path, layer in adapter.layers.items() if layer.frozen.is_transposed}
    weights = {path: plain.get_submodule(path).weight for path in adapter.layers}
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            delta = 4.0 / 3 * (layer.lora_B @ layer.lora_A)
            weights[path] += delta.T if path in turned else delta
    mean = plain(input_ids=batch.input_ids, attention_mask=mask_of(batch), labels=batch.labels).loss
    expected = mean * batch.weight
    expected.backward()

    assert abs(total.item() - expected.item()) <= 1e-5 * expected.item()
    for path, layer in adapter.layers.items():
        wide = weights[path].grad * (4.0 / 3)
        wide = wide.T if path in turned else wide
        assert wide.norm() > 0, path
        assert relative_error(layer.lora_A.grad, layer.lora_B.T @ wide) <= 1e-4, path
        assert relative_error(layer.lora_B.grad, wide @ layer.lora_A.T) <= 1e-4, path


@pytest.mark.parametrize("tokens", [13, 21, 40])
@pytest.mark.parametrize("name", NAMES)
def test_padding_needs_no_mask(
    folder_of: Callable[[str], Path], name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are shorter and longer than the window of 16, and than the 32 unscaled positions."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 96, (3, tokens), generator=generator)
    lengths = (tokens, tokens - 4, 5)
    labels = ids.clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    batch = Batch(ids, labels, lengths, (0, 1, 2), predicting_positions(labels))
    adapter = attach(load_folder(folder_of(name)), LoraSpec(rank=3, targets=("all-linear",)))
    fill_lora(adapter, std=0.05)
    model = adapter.base.model.train()
    own, masks = model.base_model.forward, []

    def masked(*inputs: Any, attention_mask: Any, **named: Any) -> Any:
        masks.append(attention_mask)
        return own(*inputs, attention_mask=mask_of(batch), **named)

    found = []
    for forward in (own, masked):
        monkeypatch.setattr(model.base_model, "forward", forward)
        # A mask may choose another kernel of attention, which sums in other blocks: 5e-7 at 40
        # tokens. That is no difference of what is computed, so both have the same kernel here.
        with sdpa_kernel(SDPBackend.MATH):
            loss = loss_sum(model, batch, head_of(model), chunk_tokens=5)
            loss.backward()
        grads = [parameter.grad for parameter in adapter.parameters().values()]
        found.append((loss.item(), torch.cat([grad.flatten() for grad in grads])))
        for parameter in adapter.parameters().values():
            parameter.grad = None
    (loss, grads), (expected, expected_grads) = found
    assert masks == [None]
    assert loss == pytest.approx(expected, rel=2e-7)
    assert expected_grads.norm() > 0
    assert relative_error(grads, expected_grads) <= 2e-7


@pytest.mark.parametrize(
    ("name", "scale", "softcap", "bias"),
    [
        ("gemma-2-9b", 1.0, 30.0, False),
        ("cohere", 0.0625, None, False),
        ("granite", 1 / 3, None, False),
        ("phi", 1.0, None, True),
        ("qwen2.5-7b", 1.0, None, False),
    ],
)
def test_head_formula_is_read_from_the_model(
    folder_of: Callable[[str], Path], name: str, scale: float, softcap: float | None, bias: bool
) -> None:
    head = head_of(load_folder(folder_of(name)).model)
    assert head.scale == pytest.approx(scale)
    assert head.softcap == softcap
    assert (head.linear.bias is not None) is bias


def test_an_unknown_logit_formula_is_refused(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("tinyllama")
    own = LlamaForCausalLM.forward

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = own(self, *args, **kwargs)
        outputs.logits = outputs.logits * 1.01
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", shifted)
    with pytest.raises(ModelError, match="llama: computes its logits in a way the kit does not"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("name", "tied"), [("phi-4-mini", True), ("qwen2-tied", True), ("tinyllama", False)]
)
@pytest.mark.parametrize("bits", [4, 16])
def test_a_tied_head_is_the_embedding_itself(
    folder_of: Callable[[str], Path], name: str, tied: bool, bits: int
) -> None:
    model = load_folder(folder_of(name), bits).model
    (head,) = model.get_output_embeddings().weight.buffers()
    assert (head.data_ptr() == model.get_input_embeddings().weight.data_ptr()) is tied


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("tinyllama", torch.bfloat16),
        ("gemma-2-9b", torch.bfloat16),
        ("phi-4-mini", torch.bfloat16),
        ("phi", torch.float16),
        ("gpt2", torch.float16),
        ("mixtral", torch.bfloat16),
        ("gpt-oss", torch.float16),
    ],
)
def test_a_16_bit_checkpoint_runs_in_float32(
    folder_of: Callable[[str], Path], tmp_path: Path, name: str, stored: torch.dtype
) -> None:
    plain = plain_model(folder_of(name)).to(stored)
    plain.save_pretrained(tmp_path)
    ids = padded_batch().input_ids
    with torch.no_grad():
        expected = plain_model(tmp_path)(input_ids=ids).logits
        base = load_folder(tmp_path)
        found = base.model(input_ids=ids).logits
    assert relative_error(found, expected) <= 1e-5
    assert base.model.get_input_embeddings().weight.dtype == stored  # not upcast in bulk


@pytest.mark.parametrize("name", NAMES)
def test_groups_cover_every_linear_layer(folder_of: Callable[[str], Path], name: str) -> None:
    skeleton = build_skeleton(read_architecture(folder_of(name)))
    groups = {path: each.group for path, each in projections(skeleton).items()}
    model_type = skeleton.config.model_type
    is_mixture = model_type in ("mixtral", "gpt_oss", "qwen3_moe")
    assert set(groups.values()) == {"attention", "experts" if is_mixture else "mlp"}
    assert all((group == "attention") == ("attn" in path) for path, group in groups.items())
    assert all(("mlp" in path) != ("attn" in path) for path in groups)
    assert not any("lm_head" in path for path in groups)
    # Of experts each has its own.
    layers = {"phi3": 4, "phi": 6, "gpt2": 4}
    assert len(groups) == 2 * (4 + 8 if is_mixture else layers.get(model_type, 7))


def test_fused_projections_are_one_layer(folder_of: Callable[[str], Path]) -> None:
    skeleton = build_skeleton(read_architecture(folder_of("phi-4-mini")))
    endings = {path.rsplit(".", 1)[-1] for path in projections(skeleton)}
    assert endings == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


# Encoder-decoders have layers of two kinds, and a test of their own.
_OF_ONE_KIND = [
    name for name, each in known_models().items() if each.settings.get("task") != "seq2seq"
]


@pytest.mark.parametrize("name", _OF_ONE_KIND)
def test_known_parameter_count_is_that_of_the_real_architecture(name: str) -> None:
    source = known_models()[name]
    numbers = {**source.architecture, "num_hidden_layers": 1}
    layers = source.architecture["num_hidden_layers"]
    counts = []
    is_encoder = source.settings.get("task") == "classify"
    for number in (1, 2):
        numbers["num_hidden_layers"] = number
        loads = SEQUENCE_CLASSIFICATION if is_encoder else CAUSAL_LM
        skeleton = build_skeleton(architecture_from(numbers), loads)
        # What is counted of an encoder is what its checkpoint has: no classifier's head.
        prefix = base_prefix(skeleton) if is_encoder else ""
        named = skeleton.named_parameters()
        counts.append(sum(each.numel() for name, each in named if name.startswith(prefix)))
    assert counts[0] + (layers - 1) * (counts[1] - counts[0]) == source.parameters


def test_building_leaves_the_known_numbers_alone() -> None:
    numbers = known_models()["llama-3.1-8b"].architecture
    before = copy.deepcopy(numbers)
    build_skeleton(architecture_from({**numbers, "num_hidden_layers": 1}))
    assert numbers == before


def test_a_model_of_layers_that_stay_unquantised_is_refused() -> None:
    experts = {"model_type": "jetmoe", **SIZES, "num_local_experts": 4}
    with pytest.raises(ModelError, match=r"jetmoe: .*stay unquantised \(largest: .*linear"):
        unquantized_share(build_skeleton(architecture_from(experts)))


def test_share_of_unquantised_weights_is_counted_without_embeddings() -> None:
    skeleton = build_skeleton(architecture_from(tiny_numbers("tinyllama")))
    linear = sum(each.in_features * each.out_features for each in projections(skeleton).values())
    norms = (2 * 2 + 1) * 64
    assert unquantized_share(skeleton) == pytest.approx(norms / (linear + norms))


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ModelError, match="no-such-model"):
        read_architecture(tmp_path)
    with pytest.raises(ModelError, match="no-such-model"):
        architecture_from({"model_type": "no-such-model"})
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_architecture(tmp_path / "nothing")
    vision = architecture_from({"model_type": "vit"})
    with pytest.raises(ModelError, match=r"vit: a model that reads images, asked to read text"):
        build_skeleton(vision)
