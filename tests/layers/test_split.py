"""LoRA's products by bf16 parts: within 1e-5 of fp32, and no fp32 copy of x or of a gradient."""

from __future__ import annotations

import importlib.util
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
from qlora_kit.layers.lora import LoRALinear, term_of
from qlora_kit.layers.low_rank import LowRank, SplitLowRank
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


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("rank", RANKS)
def test_matrices_are_stacked_as_high_and_low_parts(rank: int, layers: int) -> None:
    a = [random(rank, D, seed=seed) for seed in range(layers)]
    b = [random(K + seed, rank, seed=seed) * 1e-3 for seed in range(layers)]
    a_parts, b_parts = split.split_matrices(a, b)
    assert torch.equal(a_parts, torch.cat(parts_of(torch.cat(a))))
    for found, value in zip(b_parts, b, strict=True):
        assert torch.equal(found, torch.cat(parts_of(value), 1))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("rank", RANKS)
def test_products_and_gradients_are_split_by_layer(rank: int, layers: int) -> None:
    values = [random(N, rank, seed=seed) for seed in range(layers)]
    lows = [value * 1e-2 for value in values]
    sums = [(value + low) * SCALING for value, low in zip(values, lows, strict=True)]
    found = split.split_products(torch.cat([*values, *lows], 1), layers, SCALING)
    assert torch.equal(found, torch.stack([torch.cat(parts_of(each), 1) for each in sums]))
    products = torch.stack([torch.cat(pair, 1) for pair in zip(values, lows, strict=True)])
    found = split.split_gradients(products, SCALING)
    assert torch.equal(found, torch.cat(parts_of(torch.cat(sums, 1)), 1))


def parts_of(value: Tensor) -> tuple[Tensor, Tensor]:
    high = value.bfloat16()
    return high, (value - high.float()).bfloat16()


def test_no_rows_have_no_parts() -> None:
    assert split.split_products(torch.empty(0, 6), 1, 1.0).shape == (1, 0, 6)
    split.add_product(torch.empty(0, 4), torch.empty(0, 6), torch.empty(6, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_is_added_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    left, right = random(512, 32), random(32, 256, seed=1)
    y = (random(512, 256, seed=2) * 8).to(dtype)
    found, exact = y.clone(), y.double() + left.double() @ right.double()
    split.add_product(found, torch.cat(parts_of(left), 1), torch.cat(parts_of(right)))
    assert relative_error(found, exact.to(dtype)) < (1e-5 if dtype == torch.float32 else 2e-4)
    # Rounded before the sum as well, it would miss the last unit of many numbers.
    twice = y + (left @ right).to(dtype)
    if dtype == torch.bfloat16:
        missed = [(each != exact.to(dtype)).float().mean() for each in (found, twice)]
        assert missed[0] < 0.01 < 0.05 < missed[1]


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize(("layers", "dropout"), [(1, 0.0), (1, 0.3), (3, 0.0)])
@pytest.mark.parametrize("rank", RANKS)
def test_a_term_stays_within_1e5_of_float64(rank: int, layers: int, dropout: float) -> None:
    check_term(N, D, K, rank, dropout, "cpu", layers)


def check_term(
    n: int, d: int, k: int, rank: int, dropout: float, device: str, layers: int = 1
) -> None:
    x = random(n, d, seed=4).bfloat16().to(device)
    grads_y = [random(n, k, seed=5 + each).bfloat16().to(device) for each in range(layers)]
    kept = (random(n, d, seed=6) > -0.5).to(device) if dropout else None
    a = tuple((random(rank, d, seed=2 + each) / d**0.5).to(device) for each in range(layers))
    b = tuple((random(k, rank, seed=3 + each) * 1e-3).to(device) for each in range(layers))
    wide = (tuple(each.double() for each in matrices) for matrices in (a, b))
    exact = LowRank(*wide, kept, SCALING, 1 - dropout)
    found = SplitLowRank.of(LowRank(a, b, kept, SCALING, 1 - dropout))

    h, exact_h = found.inner(x), exact.inner(x)
    for one, other in zip(h, exact_h.chunk(layers, 1), strict=True):
        assert relative_error(joined(one), other * SCALING) < 1e-5
    grads = found.gradients(x, h, grads_y)
    exact_grads = exact.gradients(x, exact_h, [each.double() for each in grads_y])
    assert relative_error(joined(grads.inner), exact_grads.inner) < 1e-5
    for ours, theirs in ((grads.a, exact_grads.a), (grads.b, exact_grads.b)):
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == torch.float32
            assert one.is_contiguous()
            assert relative_error(one, other) < 1e-5

    grad_x = random(n, d, seed=8).bfloat16().to(device)
    exact_grad_x = grad_x.double()
    found.add_input_gradient(grad_x, grads.inner)
    exact.add_input_gradient(exact_grad_x, exact_grads.inner)
    assert_rounded_once(grad_x, exact_grad_x)
    for layer in range(layers):
        y = random(n, k, seed=7).bfloat16().to(device)
        exact_y = y.double()
        found.add_to(y, h, layer)
        exact.add_to(exact_y, exact_h, layer)
        assert_rounded_once(y, exact_y)


def joined(parts: Tensor) -> Tensor:
    """The sum of high and low parts, which stand side by side."""
    high, low = parts.double().chunk(2, 1)
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
    exact = LowRank((a.double(),), (b.double(),), kept, SCALING, 1 - dropout)
    h = exact.inner(rows)
    grad_inner, (grad_a,), (grad_b,) = exact.gradients(rows, h, [rows_grad])
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
        assert type(term_of([layer], rows)) is kind
        with served():
            assert type(term_of([layer], rows)) is LowRank


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
    a, b = [random(rank, D), random(rank, D, seed=1)], [random(K, rank), random(9, rank, seed=1)]
    products = random(N, 4 * rank, seed=2)
    a_parts, b_parts = split.split_matrices([x.cuda() for x in a], [x.cuda() for x in b])
    expected_a, expected_b = split.split_matrices(a, b)
    for one, other in zip((a_parts, *b_parts), (expected_a, *expected_b), strict=True):
        assert torch.equal(one.cpu(), other)
    # With a power of two, nothing is rounded before the split.
    found = split.split_products(products.cuda(), 2, 2.0)
    assert torch.equal(found.cpu(), split.split_products(products, 2, 2.0))
