"""LoRA layers of every architecture compute together, and its gradients stay the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_error
from t5_models import KINDS, save_t5, t5_adapter
from tiny_models import NAMES, fill_lora, load_folder, padded_batch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.projections import with_one_input
from qlora_kit.lora.attach import Adapter, attach, detach
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.model.head import head_of
from qlora_kit.step import groups as groups_module
from qlora_kit.step.groups import set_groups
from qlora_kit.step.recompute import set_recompute
from qlora_kit.tasks.causal import loss_sum


def adapter_on(folder: Path, *targets: str, bits: int = 16) -> Adapter:
    adapter = attach(load_folder(folder, bits), LoraSpec(rank=3, alpha=4.0, targets=targets))
    fill_lora(adapter, std=0.05)
    return adapter


def step(adapter: Adapter) -> tuple[float, dict[str, Tensor]]:
    model: Any = adapter.base.model.train()
    loss: Any = loss_sum(model, padded_batch(), head_of(model), chunk_tokens=5)
    loss.backward()
    grads = {}
    for name, parameter in adapter.parameters().items():
        assert parameter.grad is not None, name
        grads[name], parameter.grad = parameter.grad, None
    return loss.item(), grads


def calls_of(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of layers of each product."""
    from qlora_kit.layers import lora

    sizes: list[int] = []
    own = lora.products_of

    def counted(x: Tensor, layers: Any) -> Any:
        sizes.append(len(layers))
        return own(x, layers)

    monkeypatch.setattr(lora, "products_of", counted)
    return sizes


# Fused projections, and MLPs of experts or without a gate, have nothing in common.
GROUPS = {"phi-4-mini": 0, "gpt2": 0, "mixtral": 1, "gpt-oss": 1, "phi": 1, "qwen3-30b-a3b": 1}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_every_architecture_stay(
    folder_of: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_on(folder_of(name), "all-linear", bits=4)
    model = adapter.base.model
    set_recompute(model, True)
    loss, grads = step(adapter)
    names = list(model.state_dict())
    layers = model.config.num_hidden_layers
    wanted = layers * GROUPS.get(name, 2)
    assert set_groups(model) == wanted
    assert list(model.state_dict()) == names
    sizes = calls_of(adapter, monkeypatch)
    found, found_grads = step(adapter)
    assert sum(size > 1 for size in sizes) == 2 * wanted  # in forward and in recomputation
    assert sum(sizes) == 2 * len(adapter.layers)
    assert found == pytest.approx(loss, rel=1e-6)
    assert_equal(found_grads, grads)
    again, again_grads = step(adapter)
    assert again == found
    assert all(torch.equal(again_grads[each], found_grads[each]) for each in grads)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that gradients differ as little as the order of sums in fp32 lets them."""
    ours, theirs = (
        torch.cat([each[name].flatten() for name in expected]) for each in (found, expected)
    )
    assert relative_error(ours, theirs) <= 1e-5
    for name, grad in expected.items():
        assert relative_error(found[name], grad) <= 3e-5, name


def test_gradients_on_a_base_in_8_bits_stay(folder_of: Callable[[str], Path]) -> None:
    adapter = adapter_on(folder_of("qwen2.5-7b"), "all-linear", bits=8)
    loss, grads = step(adapter)
    assert set_groups(adapter.base.model) == 4
    found, found_grads = step(adapter)
    assert found == pytest.approx(loss, rel=1e-6)
    assert_equal(found_grads, grads)


def test_layers_without_lora_are_left_out(folder_of: Callable[[str], Path]) -> None:
    adapter = adapter_on(folder_of("tinyllama"), "q_proj", "v_proj", "up_proj")
    loss, grads = step(adapter)
    assert set_groups(adapter.base.model) == 2
    layer = adapter.base.model.base_model.layers[0]
    assert layer.self_attn.q_proj.partners == (layer.self_attn.v_proj,)
    found, found_grads = step(adapter)
    assert found == pytest.approx(loss, rel=1e-6)
    assert_equal(found_grads, grads)


def test_layers_of_another_rank_stay_alone(folder_of: Callable[[str], Path]) -> None:
    spec = LoraSpec(rank=3, targets=("attention",), rank_pattern={"k_proj": 2})
    adapter = attach(load_folder(folder_of("tinyllama")), spec)
    assert set_groups(adapter.base.model) == 0


def test_a_detached_model_has_no_groups(folder_of: Callable[[str], Path]) -> None:
    adapter = adapter_on(folder_of("tinyllama"), "attention")
    assert set_groups(adapter.base.model) == 2
    base = detach(adapter)
    assert set_groups(base.model) == 0
    assert not any(isinstance(module, LoRALinear) for module in base.model.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attention_to_the_other_half_keeps_its_queries_apart(tmp_path: Path, kind: str) -> None:
    model = t5_adapter(save_t5(tmp_path, kind)).base.model
    found = {tuple(path.rsplit(".", 1)[-1] for path in paths) for paths in with_one_input(model)}
    gated = set() if kind == "t5" else {("wi_0", "wi_1")}
    assert found == {("q", "k", "v"), ("k", "v"), *gated}
    assert set_groups(model) == 2 + 2 * 2 + (4 if gated else 0)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("bert", ("query", "key", "value")),
        ("distilbert", ("q_lin", "k_lin", "v_lin")),
        ("deberta-v2", ("query_proj", "key_proj", "value_proj")),
        ("opt", ("q_proj", "k_proj", "v_proj")),
        ("modernbert", None),
    ],
)
def test_names_of_other_families_are_known(kind: str, names: tuple[str, ...] | None) -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model(kind)
        model = AutoModel.from_config(config)
    found = [tuple(path.rsplit(".", 1)[-1] for path in paths) for paths in with_one_input(model)]
    assert found == ([names] * config.num_hidden_layers if names else [])
    assert groups_module.set_groups(model) == 0
