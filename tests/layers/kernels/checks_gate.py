"""The kernels of the MLP's gate, against autograd in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import Tensor, nn
from transformers.activations import ACT2FN

from qlora_kit.layers.kernels.gate import gated, gated_back, name_of

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
# Rows, width: one number, part of a tile, a whole tile, tiles and a rest.
SHAPES = [(1, 1), (3, 37), (2, 1024), (5, 2085)]


def inputs(shape: tuple[int, int], fused: bool) -> list[Tensor]:
    """Return gate, up and a gradient; gate and up may be the halves of one tensor."""
    rows, width = shape
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(rows, 2 * width, generator=generator) * 4
    halves = both.chunk(2, dim=-1) if fused else [x.contiguous() for x in both.chunk(2, dim=-1)]
    return [*halves, torch.randn(shape, generator=generator)]


def exact(activation: str, gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Return the product and the gradients of gate and up, in fp64."""
    wide = [x.double().clone().requires_grad_() for x in (gate, up)]
    product = ACTIVATIONS[activation](wide[0]) * wide[1]
    return product.detach(), *torch.autograd.grad(product, wide, grad.double())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_product_is_written_over_up(
    activation: str, shape: tuple[int, int], fused: bool
) -> None:
    gate, up, grad = inputs(shape, fused)
    wanted, *_ = exact(activation, gate, up, grad)
    before = gate.clone()
    found = gated(activation, gate, up)
    assert found is up
    assert relative_error(found, wanted) <= 1e-6
    assert torch.equal(gate, before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_and_product_are_written_over_the_inputs(
    activation: str, shape: tuple[int, int], fused: bool
) -> None:
    gate, up, grad = inputs(shape, fused)
    product, grad_gate, grad_up = exact(activation, gate, up, grad)
    found = gated_back(activation, gate, up, grad, with_product=True)
    assert [each.data_ptr() for each in found if each is not None] == [
        each.data_ptr() for each in (gate, up, grad)
    ]
    for ours, wanted in zip(found, (grad_gate, grad_up, product), strict=True):
        assert relative_error(ours, wanted) <= 1e-6


def test_without_the_product_the_gradient_stays() -> None:
    gate, up, grad = inputs((3, 37), fused=False)
    before = grad.clone()
    *_, product = gated_back("silu", gate, up, grad, with_product=False)
    assert product is None
    assert torch.equal(grad, before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_inputs_stay_finite(activation: str) -> None:
    gate = torch.tensor([[-1e4, -300.0, -88.0, 88.0, 300.0, 1e4]])
    up, grad = torch.full_like(gate, 2.0), torch.full_like(gate, 3.0)
    wanted = exact(activation, gate, up, grad)
    grad_gate, grad_up, product = gated_back(activation, gate, up, grad, with_product=True)
    for ours, exactly in zip((product, grad_gate, grad_up), wanted, strict=True):
        torch.testing.assert_close(ours.double(), exactly, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float16_is_rounded_once(activation: str) -> None:
    gate, up, grad = (x.half() for x in inputs((3, 37), fused=True))
    wanted = exact(activation, gate, up, grad)
    grad_gate, grad_up, product = gated_back(activation, gate, up, grad, with_product=True)
    for ours, exactly in zip((product, grad_gate, grad_up), wanted, strict=True):
        # Half a unit of a number that is no subnormal, and half the smallest subnormal.
        torch.testing.assert_close(ours.double(), exactly, rtol=2**-11 * 1.01, atol=2**-25)


def test_the_activations_of_transformers_are_known_by_name() -> None:
    assert name_of(ACT2FN["silu"]) == name_of(ACT2FN["swish"]) == name_of(nn.SiLU()) == "silu"
    assert name_of(ACT2FN["gelu_pytorch_tanh"]) == name_of(nn.GELU("tanh")) == "gelu_tanh"
    for other in ("gelu", "relu", "gelu_new", "quick_gelu"):
        assert name_of(ACT2FN[other]) is None
    assert name_of(nn.GELU()) is None
