"""LoRA's products by bf16 parts: within 1e-5 of fp32, and no fp32 copy of x or of a gradient."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_kit.layers import kernels
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.kernels import split
from qlora_kit.layers.lora import LoRALinear, LowRank, SplitLowRank
from qlora_kit.layers.mlp import TiledMLP
from qlora_kit.layers.quantize import Quantization
from qlora_kit.plan.ledger import Ledger
from qlora_kit.private_torch import FakeTensorMode, TorchDispatchMode

D, K, N = 123, 77, 37  # odd, and none a multiple of a kernel's block
RANKS = [1, 8, 16, 64]
SCALING = 1.7
BFLOAT16_UNIT = 2**-8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the kernels serve on a CPU, where plain operations compute the same."""
    monkeypatch.setattr(kernels, "_DEVICES", {"cpu", "meta"})
    with served("lora"):
        yield


@contextmanager
def served(*names: str) -> Iterator[None]:
    before = kernels.in_use()
    kernels.use(names)
    try:
        yield
    finally:
        kernels.use(before)


def make_layer(d: int, k: int, rank: int, *, dropout: float = 0.0) -> LoRALinear:
    """A layer with a base in bf16 and a random A and B, of the sizes that training gives them."""
    frozen = FrozenLinear(d, k, bias=False)
    frozen.weight = Quantization(16).freeze((random(k, d) / d**0.5).bfloat16())
    layer = LoRALinear(frozen, rank=rank, scaling=SCALING, dropout=dropout)
    layer.lora_A.data = random(rank, d, seed=2) / d**0.5
    layer.lora_B.data = random(k, rank, seed=3) * 1e-3
    return layer


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("rank", RANKS)
def test_factors_are_stacked_as_high_and_low_parts(rank: int) -> None:
    a, b, products = random(rank, D), random(K, rank) * 1e-3, random(N, 2 * rank, seed=1)
    a_parts, b_parts = split.as_right_factors(a, b)
    high, low = parts_of(a)
    assert torch.equal(a_parts, torch.cat([high, high, low]))
    high, low = parts_of(b)
    assert torch.equal(b_parts, torch.cat([high, high, low], 1))
    high, low = parts_of((products[:, :rank] + products[:, rank:]) * SCALING)
    assert torch.equal(split.as_left_factor(products, SCALING), torch.cat([high, low, high], 1))


def parts_of(value: Tensor) -> tuple[Tensor, Tensor]:
    high = value.bfloat16()
    return high, (value - high.float()).bfloat16()


def test_no_rows_have_no_parts() -> None:
    assert split.as_left_factor(torch.empty(0, 6), 1.0).shape == (0, 9)


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", RANKS)
def test_a_term_stays_within_1e5_of_float64(rank: int, dropout: float) -> None:
    check_term(N, D, K, rank, dropout, "cpu")


def check_term(n: int, d: int, k: int, rank: int, dropout: float, device: str) -> None:
    layer = make_layer(d, k, rank)
    x = random(n, d, seed=4).bfloat16().to(device)
    grad_y = random(n, k, seed=5).bfloat16().to(device)
    kept = (random(n, d, seed=6) > -0.5).to(device) if dropout else None
    factors = SCALING, 1 - dropout
    a, b = layer.lora_A.detach().to(device), layer.lora_B.detach().to(device)
    exact = LowRank(a.double(), b.double(), kept, *factors)
    found = SplitLowRank.of(a, b, kept, *factors)

    h, exact_h = found.inner(x), exact.inner(x)
    assert relative_error(joined(h), exact_h * SCALING) < 1e-5
    grad_inner = found.inner_gradient(found.as_multiplied(grad_y))
    exact_grad_inner = exact.inner_gradient(grad_y.double())
    assert relative_error(joined(grad_inner), exact_grad_inner) < 1e-5
    grads = found.gradients(x, h, grad_y, grad_inner)
    exact_grads = exact.gradients(x, exact_h, grad_y.double(), exact_grad_inner)
    for one, other in zip(grads, exact_grads, strict=True):
        assert one.dtype == torch.float32
        assert one.is_contiguous()
        assert relative_error(one, other) < 1e-5

    y = random(n, k, seed=7).bfloat16().to(device)
    grad_x = random(n, d, seed=8).bfloat16().to(device)
    exact_y, exact_grad_x = y.double(), grad_x.double()
    found.add_to(y, h)
    found.add_input_gradient(grad_x, grad_inner)
    exact.add_to(exact_y, exact_h)
    exact.add_input_gradient(exact_grad_x, exact_grad_inner)
    assert_rounded_once(y, exact_y)
    assert_rounded_once(grad_x, exact_grad_x)


def joined(left: Tensor) -> Tensor:
    """The sum of the parts of a left factor."""
    high, low, again = left.double().chunk(3, 1)
    assert torch.equal(high, again)
    return high + low


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """Assert that bf16 values are at most one unit from the rounded exact values."""
    once = exact.bfloat16().double()
    # Where a sum nearly cancels, one unit of it is less than the error of its parts.
    limit = 2 * BFLOAT16_UNIT * once.abs() + 1e-5 * exact.abs().max()
    assert ((found.double() - once).abs() <= limit).all()
    assert (found.double() != once).float().mean() < 0.01


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("needs_input_gradient", [True, False])
@pytest.mark.usefixtures("on_cpu")
def test_a_layer_gives_the_gradients_of_float64(dropout: float, needs_input_gradient: bool) -> None:
    layer = make_layer(D, K, 16, dropout=dropout).train()
    x, grad_y = random(3, 5, D, seed=4).bfloat16(), random(3, 5, K, seed=5).bfloat16()
    torch.manual_seed(0)
    kept = layer.draw_kept(x)
    torch.manual_seed(0)
    x.requires_grad_(needs_input_gradient)
    y = layer(x)
    y.backward(grad_y)

    rows, rows_grad = x.detach().view(-1, D), grad_y.view(-1, K).double()
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    exact = LowRank(a.double(), b.double(), kept, SCALING, 1 - dropout)
    h, grad_inner = exact.inner(rows), exact.inner_gradient(rows_grad)
    grad_a, grad_b = exact.gradients(rows, h, rows_grad, grad_inner)
    assert relative_error(layer.lora_A.grad, grad_a) < 1e-5
    assert relative_error(layer.lora_B.grad, grad_b) < 1e-5
    weight = layer.frozen.weight
    exact_y = weight.product(rows).double()
    exact.add_to(exact_y, h)
    assert_rounded_once(y.detach().view(-1, K), exact_y)
    if needs_input_gradient:
        exact_grad_x = weight.product_back(grad_y.view(-1, K)).double()
        exact.add_input_gradient(exact_grad_x, grad_inner)
        assert_rounded_once(x.grad.view(-1, D), exact_grad_x)


@pytest.mark.usefixtures("on_cpu")
def test_a_fresh_layer_adds_nothing() -> None:
    layer = make_layer(D, K, 16)
    layer.lora_B.data.zero_()
    x = random(N, D).bfloat16()
    assert torch.equal(layer(x), layer.frozen(x))


@pytest.mark.usefixtures("on_cpu")
def test_a_recomputed_layer_gives_the_same_bits() -> None:
    layer = make_layer(D, K, 16)
    x, grad_y = random(N, D, seed=4).bfloat16(), random(N, K, seed=5).bfloat16()
    results = []
    for again in (False, True):
        layer.zero_grad()
        rows = x.clone().requires_grad_()
        y = checkpoint(layer, rows, use_reentrant=False) if again else layer(rows)
        y.backward(grad_y)
        results.append((y.detach(), rows.grad, layer.lora_A.grad, layer.lora_B.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.usefixtures("on_cpu")
def test_matrices_changed_in_place_are_split_anew() -> None:
    layer = make_layer(D, K, 16)
    x = random(N, D, seed=4).bfloat16()
    before = layer(x)
    layer.lora_B.data.mul_(1000)
    assert relative_error(layer(x), before) > 0.1
    layer.lora_B.data.div_(1000)
    assert relative_error(layer(x), before) < 0.01


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("x", "wide", "kind"),
    [
        (torch.bfloat16, torch.float32, SplitLowRank),
        (torch.float16, torch.float32, LowRank),
        (torch.float32, torch.float32, LowRank),
        (torch.bfloat16, torch.float64, LowRank),
    ],
)
def test_only_bf16_inputs_and_fp32_matrices_are_split(
    x: torch.dtype, wide: torch.dtype, kind: type[LowRank]
) -> None:
    layer, rows = make_layer(D, K, 4).to(wide), torch.empty(1, D, dtype=x)
    with torch.no_grad():
        assert type(layer.low_rank(rows, None)) is kind
        with served():
            assert type(layer.low_rank(rows, None)) is LowRank


# ---------------------------------------------------------------- tiled MLPs


class GatedMLP(nn.Module):
    def __init__(self, d: int, width: int, dropout: float) -> None:
        super().__init__()
        self.gate_proj = make_layer(d, width, 8, dropout=dropout)
        self.up_proj = make_layer(d, width, 8, dropout=dropout)
        self.down_proj = make_layer(width, d, 8, dropout=dropout)
        self.act_fn = nn.SiLU()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tile_tokens", [40, 15, 7])
def test_a_tiled_mlp_rounds_no_more_with_parts(tile_tokens: int, dropout: float) -> None:
    mlp = TiledMLP(GatedMLP(48, 160, dropout), tile_tokens).train()
    for layer in mlp.children():
        if isinstance(layer, LoRALinear):
            layer.lora_B.data.mul_(100)  # so that the terms are as large as the products with W
    x, grad_y = random(N, 48, seed=4), random(N, 48, seed=5)

    def run(dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        mlp.zero_grad()
        rows = x.bfloat16().to(dtype).requires_grad_()
        y = mlp(rows)
        y.backward(grad_y.bfloat16().to(dtype))
        return [y.detach(), rows.grad, *(p.grad.clone() for p in mlp.parameters())]

    by_parts, exact = run(torch.bfloat16), run(torch.float32)
    with served():
        plain = run(torch.bfloat16)
    for found, reference, wanted in zip(by_parts, plain, exact, strict=True):
        assert not torch.equal(found, reference)
        assert relative_error(found, wanted) <= 1.2 * relative_error(reference, wanted)


# ---------------------------------------------------------------- memory and work


class _Results(TorchDispatchMode):
    """Collects the dtype and the size of every result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen.append((result.dtype, result.numel()))
        return result


def step_on_meta(layer: LoRALinear, rows: int) -> None:
    layer.to("meta")
    x = torch.empty(rows, layer.frozen.in_features, dtype=torch.bfloat16, device="meta")
    layer(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize(("names", "is_copied"), [((), True), (("lora",), False)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nothing_is_copied_to_fp32(names: tuple[str, ...], is_copied: bool, dropout: float) -> None:
    with served(*names), _Results() as results:
        step_on_meta(make_layer(256, 256, 4, dropout=dropout).train(), 512)
    largest = max(size for dtype, size in results.seen if dtype == torch.float32)
    assert (largest >= 512 * 256) is is_copied


def test_the_plan_counts_the_products() -> None:
    def work(names: tuple[str, ...]) -> int:
        layer = make_layer(256, 128, 4)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with served(*names), fake, Ledger("meta") as ledger, ledger.counted() as counted:
            step_on_meta(layer, 512)
        return counted.flop

    # In each size two products of 2 R and one of 3 R, in place of three of R.
    more = (2 * 2 + 3 - 3) * 4
    assert work(("lora",)) - work(()) == 2 * 512 * (256 + 128) * more


# ---------------------------------------------------------------- Triton


_needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run_script(script: str, **environment: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]


# The interpreter cuts a number to bf16 instead of rounding it, so a high part may be one unit off.
_INTERPRETED = """
import torch
from qlora_kit.layers.kernels import split

for rank in (1, 3, 8, 16):
    torch.manual_seed(0)
    a, b, products = torch.randn(rank, 123), torch.randn(77, rank), torch.randn(37, 2 * rank)
    assert split._kernels_for(a) is not None
    a_parts, b_parts = split.as_right_factors(a, b)
    left = split.as_left_factor(products, 1.7)
    for value, parts, order in (
        (a, a_parts.view(3, rank, 123), (0, 1, 2)),
        (b, b_parts.view(77, 3, rank).transpose(0, 1), (0, 1, 2)),
        ((products[:, :rank] + products[:, rank:]) * 1.7, left.view(37, 3, rank).transpose(0, 1),
         (0, 2, 1)),
    ):
        high, again, low = (parts[i].float() for i in order)
        assert torch.equal(high, again)
        assert ((high - value).abs() <= 2**-7 * value.abs()).all()
        assert ((high + low - value).abs() <= 2**-14 * value.abs()).all()
"""

_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qlora_kit.layers.kernels import split_triton

for kernel, signature in (
    (split_triton.right_factors, "*fp32 *fp32 *bf16 *bf16 i32 i32 i32 i32 constexpr"),
    (split_triton.left_factor, "*fp32 *bf16 i32 i32 fp32 constexpr"),
):
    types = dict(zip(kernel.arg_names, signature.split(), strict=True))
    source = ASTSource(kernel, types, {"BLOCK": 1024})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("size", [(N, D, K), (2048, 4096, 1024), (8192, 4096, 11008)], ids=str)
def test_a_gpu_stays_within_1e5_of_float64(
    size: tuple[int, int, int], rank: int, dropout: float
) -> None:
    check_term(*size, rank, dropout, "cuda")


@pytest.mark.gpu
@_needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", RANKS)
def test_the_kernels_of_a_gpu_give_the_bits_of_plain_operations(rank: int) -> None:
    a, b, products = random(rank, D), random(K, rank) * 1e-3, random(N, 2 * rank, seed=1)
    found = split.as_right_factors(a.cuda(), b.cuda())
    for one, other in zip(found, split.as_right_factors(a, b), strict=True):
        assert torch.equal(one.cpu(), other)
    # With a power of two, nothing is rounded before the split.
    left = split.as_left_factor(products.cuda(), 2.0)
    assert torch.equal(left.cpu(), split.as_left_factor(products, 2.0))


@_needs_triton
def test_the_kernels_stack_the_same_parts() -> None:
    run_script(_INTERPRETED, TRITON_INTERPRET="1")


@_needs_triton
def test_the_kernels_compile_for_a_gpu() -> None:
    run_script(_COMPILED)
