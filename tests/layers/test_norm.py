"""The norm in one kernel computes what the models' own norms compute, and so does its gradient.

On a CPU the ops compute the plain formula; `test_gpu.py` compares the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import relative_error
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from qlora_kit.layers import kernels
from qlora_kit.layers.kernels.norm import FusedNorm, rms_norm
from qlora_kit.plan.ledger import Ledger
from qlora_kit.private_torch import FakeTensorMode

EPS = 1e-5
# Hidden states, and the heads of queries before they are transposed.
CASES: list[tuple[type[nn.Module], tuple[int, ...], bool]] = [
    (LlamaRMSNorm, (2, 5, 48), False),
    (Gemma2RMSNorm, (2, 5, 48), True),
    (Qwen3RMSNorm, (2, 5, 4, 16), False),
]


def own_norm(kind: type[nn.Module], width: int, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model's norm with a weight that is neither ones nor zeros."""
    norm = kind(width, eps=EPS).to(dtype).requires_grad_(False)
    norm.weight.data.add_(torch.randn(width, generator=torch.Generator().manual_seed(1)))
    return norm


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradient(forward: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = forward(x)
    (grad,) = torch.autograd.grad(y, x, drawn(tuple(y.shape), y.dtype, seed=2))
    return y.detach(), grad


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel serve on a CPU, as kernels do in Triton's interpreter."""
    monkeypatch.setattr(kernels, "_DEVICES", {"cpu"})
    monkeypatch.setattr(kernels, "_in_use", frozenset(["norm"]))


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(("kind", "shape", "adds_one"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_it_agrees_with_a_models_own_norm(
    kind: type[nn.Module],
    shape: tuple[int, ...],
    adds_one: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    norm = own_norm(kind, shape[-1], dtype)
    fused = FusedNorm(norm, EPS, adds_one=adds_one)
    own, own_grad = with_gradient(norm, drawn(shape, dtype))
    found, found_grad = with_gradient(fused, drawn(shape, dtype))
    assert found.dtype == found_grad.dtype == dtype
    assert relative_error(found, own) <= tolerance
    assert relative_error(found_grad, own_grad) <= tolerance


def test_one_more_than_the_weight_is_not_rounded_to_16_bits() -> None:
    """Gemma adds the one in fp32: in bfloat16 the sum would be off by far more than a rounding."""
    norm = own_norm(Gemma2RMSNorm, 512, torch.bfloat16)
    x = drawn((3, 512), torch.bfloat16)
    fused = FusedNorm(norm, EPS, adds_one=True)
    assert fused._one_more is not None
    exact = rms_norm(x.double(), norm.weight.double() + 1, EPS)
    found = rms_norm(x, fused._one_more, EPS)
    assert torch.equal(found, exact.to(torch.bfloat16))
    rounded = rms_norm(x, (norm.weight + 1), EPS)
    assert not torch.equal(rounded, exact.to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 2, 5)])
def test_its_gradient_is_that_of_the_formula_in_fp64(shape: tuple[int, ...]) -> None:
    x = drawn(shape, torch.float64).requires_grad_()
    weight = drawn(shape[-1:], torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, EPS), (x,))

    def formula(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight

    own, found = (with_gradient(f, x) for f in (formula, lambda x: rms_norm(x, weight, EPS)))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(own, found, strict=True))


def test_transposed_inputs_and_gradients_are_computed_alike() -> None:
    x, weight = drawn((2, 5, 4, 16)), drawn((16,), seed=1)

    def transposed(x: Tensor) -> Tensor:
        return rms_norm(x.transpose(1, 2), weight, EPS)

    own, own_grad = with_gradient(lambda x: rms_norm(x, weight, EPS).transpose(1, 2), x)
    found, found_grad = with_gradient(transposed, x)
    assert torch.equal(found, own)
    assert torch.equal(found_grad, own_grad)


def test_backward_keeps_the_input_and_one_number_a_token() -> None:
    kept: list[Tensor] = []
    x = drawn((2, 5, 48)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, drawn((48,)), EPS)
    assert [tuple(t.shape) for t in kept] == [(2, 5, 48), (2, 5, 1)]
    assert kept[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_say_what_they_return(dtype: torch.dtype) -> None:
    x, weight = drawn((2, 5, 48), dtype), drawn((48,), dtype)
    ops = torch.ops.qlora_kit
    torch.library.opcheck(ops.rms_norm, (x, weight, EPS))
    y, rstd = ops.rms_norm(x, weight, EPS)
    torch.library.opcheck(ops.rms_norm_backward, (y, x, weight, rstd))


def test_a_plan_sees_the_tensors_of_the_kernels_and_no_others() -> None:
    size = 4 * 1024 * 2  # 4 tokens of 1,024 numbers in 16 bits; one more token's worth of rstd
    with FakeTensorMode(), Ledger("meta") as ledger:
        x = torch.empty(1, 4, 1024, dtype=torch.bfloat16, device="meta").requires_grad_()
        weight = torch.empty(1024, dtype=torch.bfloat16, device="meta")
        before = ledger.live_bytes
        ledger.restart()
        y: Any = rms_norm(x, weight, EPS)
        assert ledger.live_bytes == ledger.peak().bytes == before + size + 512
        grad = torch.empty_like(y)
        before = ledger.live_bytes
        ledger.restart()
        torch.autograd.backward(y, grad)
        assert ledger.peak().bytes == before + size


def test_a_plan_sees_the_copy_of_an_input_that_is_not_contiguous() -> None:
    with FakeTensorMode(), Ledger("meta") as ledger:
        x = torch.empty(1, 4, 16, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        weight = torch.empty(64, dtype=torch.bfloat16, device="meta")
        before = ledger.live_bytes
        ledger.restart()
        y = rms_norm(x, weight, EPS)
        assert y.is_contiguous()
        assert ledger.peak().bytes == before + 2 * x.nbytes + 512
