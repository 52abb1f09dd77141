"""Convolutions that lie flat, and LoRA on them, compared with torch and with PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import relative_error
from torch import Tensor, nn

from qlora_kit.errors import ConfigError
from qlora_kit.layers.draws import Draws, drawn_from
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.projections import Projection
from qlora_kit.layers.weight import PlainWeight
from qlora_kit.layers.windows import Window, WindowedLinear
from qlora_kit.lora.targets import resolve_targets

RANK, SCALING = 4, 2.0
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "3 × 3": (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    "stride": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": (1, 0)}),
    "patches": (nn.Conv2d, {"kernel_size": 4, "stride": 4}),
    "points": (nn.Conv2d, {"kernel_size": 1, "bias": False}),
    "unequal sides": (nn.Conv2d, {"kernel_size": (1, 5), "padding": (0, 2)}),
    "one dimension": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "same": (nn.Conv1d, {"kernel_size": 5, "padding": "same"}),
}


def made(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    layer, numbers = KINDS[kind]
    return layer(8, 12, **{**numbers, **more})


def input_of(layer: Any, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sides = (12,) if isinstance(layer, nn.Conv1d) else (12, 8)
    return torch.randn(rows, layer.in_channels, *sides, generator=generator)


def frozen_of(layer: Any) -> FrozenLinear:
    frozen = FrozenLinear.of(WindowedLinear.like(layer))
    frozen.weight = PlainWeight(layer.weight.detach().flatten(1).clone())
    frozen.bias = None if layer.bias is None else layer.bias.detach().clone()
    return frozen


def lora_of(layer: Any, dropout: float = 0.0) -> LoRALinear:
    lora = LoRALinear(
        frozen_of(layer), rank=RANK, scaling=SCALING, dropout=dropout,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    with torch.no_grad():
        lora.lora_B.normal_(generator=torch.Generator().manual_seed(3))
    return lora


@pytest.mark.parametrize("more", [{}, {"groups": 4}, {"dilation": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_convolution_computes_the_bits_of_torchs(kind: str, more: dict[str, Any]) -> None:
    layer = made(kind, **more)
    x = input_of(layer)
    assert torch.equal(frozen_of(layer)(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_a_convolution_is_pefts(kind: str) -> None:
    layer = made(kind)
    ours = lora_of(layer)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = made(kind)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    config = LoraConfig(r=RANK, lora_alpha=RANK * SCALING, target_modules=["layer"])
    twin: Any = get_peft_model(Model(), config).base_model.model.layer
    a, b = twin.lora_A["default"].weight, twin.lora_B["default"].weight
    window = Window.of(layer)
    assert a.shape == (RANK, *window.kernel)
    assert b.shape == (12, RANK, *(1 for _ in window.size))
    a.data.copy_(ours.lora_A.view(a.shape))
    b.data.copy_(ours.lora_B.view(b.shape))
    results = []
    for module in (ours, twin):
        x = input_of(layer).requires_grad_()
        y = module(x)
        (y.sin().sum()).backward()
        results.append((y, x.grad))
    (y, grad), (their_y, their_grad) = results
    assert relative_error(y, their_y) < 1e-6
    assert relative_error(grad, their_grad) < 1e-5
    assert relative_error(ours.lora_A.grad, a.grad.flatten(1)) < 1e-5
    assert relative_error(ours.lora_B.grad, b.grad.flatten(1)) < 1e-5

    delta = twin.get_delta_weight("default") if kind != "points" else None
    if delta is not None:
        assert relative_error(ours.delta(), delta.flatten(1)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weight_computes_what_was_trained(kind: str) -> None:
    layer = made(kind)
    lora = lora_of(layer)
    x = input_of(layer)
    weight = lora.frozen.weight.dequantize(torch.float32) + lora.delta()
    merged = FrozenLinear.holding(weight.detach(), lora.frozen.bias, lora.frozen.window)
    assert relative_error(merged(x), lora(x)) < 1e-5


def test_a_fresh_layer_changes_no_bit() -> None:
    layer = made("3 × 3")
    lora = LoRALinear(frozen_of(layer), rank=2, scaling=1.0)
    assert torch.equal(lora(input_of(layer)), layer(input_of(layer)))


def test_a_bf16_input_is_multiplied_in_fp32_and_rounded_once() -> None:
    layer = made("3 × 3").bfloat16()
    lora = lora_of(layer)
    x = input_of(layer).bfloat16()
    y = lora(x)
    assert y.dtype == torch.bfloat16
    expected = layer(x).float() + SCALING * lora.frozen.window.low_rank(x, lora.lora_A, lora.lora_B)  # type: ignore[union-attr]
    assert torch.equal(y, expected.bfloat16())


def test_the_mask_of_a_sample_depends_on_no_other() -> None:
    layer = made("3 × 3")
    lora = lora_of(layer, dropout=0.5).train()
    x = input_of(layer, rows=3)
    with drawn_from(Draws(1, 2, (5, 6, 7), 4)):
        together = lora(x)
    with drawn_from(Draws(1, 2, (6,), 4)):
        alone = lora(x[1:2])
    assert torch.allclose(together[1:2], alone, atol=1e-6)
    assert not torch.allclose(together[1:2], lora.eval()(x[1:2]), atol=1e-2), "something is dropped"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"groups": 4}, "a convolution in 4 groups of channels, whose LoRA in PEFT's form mixes"),
        ({"dilation": 2}, "a dilated convolution, whose LoRA PEFT computes without the dilation"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(more: dict[str, Any], reason: str) -> None:
    found = {
        "net.odd": Projection("net.odd", WindowedLinear.like(made("3 × 3", **more)), None),
        "net.plain": Projection("net.plain", WindowedLinear.like(made("3 × 3")), None),
    }
    assert resolve_targets(found, ["all-conv"]) == ["net.plain"]
    with pytest.raises(ConfigError, match=reason):
        resolve_targets(found, ["odd"])
    with pytest.raises(ConfigError, match="all-linear"):
        resolve_targets(found, ["all-linear"])
