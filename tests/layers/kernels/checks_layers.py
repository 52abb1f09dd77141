"""The layers compute the same with the kernels as without, to the precision of their dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support import relative_error
from torch import Tensor, nn

from qlora_kit.layers import kernels
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.head import Head, quantize_head
from qlora_kit.layers.head_terms import HeadTerm, LowRankTerm, RowsTerm, whole_head
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.loss import cross_entropy_sum, score_tokens, token_logprobs
from qlora_kit.layers.mlp import TiledMLP
from qlora_kit.layers.quantize import Quantization
from qlora_kit.layers.weight import PlainWeight

N, D, V, WIDTH = 21, 24, 317, 40


@pytest.fixture(autouse=True)
def kernels_serve_here_and_not_afterwards() -> Iterator[None]:
    kernels.use(["gate"])
    assert kernels.serves("gate", torch.empty(0))
    yield
    kernels.use([])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- loss


def make_head(dtype: torch.dtype, scale: float = 1.0, sliced: bool = False) -> Head:
    linear = FrozenLinear(D, V, bias=False)
    linear.weight = PlainWeight(random(V, D, seed=1).to(dtype))
    if sliced:
        linear = quantize_head(linear, Quantization(8), torch.device("cpu"))
    return Head(linear, scale)


def states(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))
    return random(N, D, seed=4).to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cross_entropy(dtype: torch.dtype, scale: float, sliced: bool, is_weighted: bool) -> None:
    head = make_head(dtype, scale, sliced)
    hidden, targets = states(dtype)
    weights = random(N, seed=6).abs() if is_weighted else None
    found = []
    for names in ([], ["loss"]):
        kernels.use(names)
        total = cross_entropy_sum(hidden, targets, head, 8, weights)
        found.append((total, *torch.autograd.grad(total / 7, hidden)))
    eps = torch.finfo(dtype).eps
    (plain, plain_grad), (fused, fused_grad) = found
    assert relative_error(fused, plain) <= 1e-6
    assert fused_grad.dtype == dtype
    assert relative_error(fused_grad, plain_grad) <= 4 * eps


@pytest.mark.parametrize("kind", ["low rank", "whole", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cross_entropy_of_a_trained_head(dtype: torch.dtype, kind: str) -> None:
    head = make_head(dtype, 0.3)
    linear: FrozenLinear = head.linear
    term: HeadTerm
    if kind == "low rank":
        a, b = (random(*shape).requires_grad_() for shape in ((2, D), (V, 2)))
        term = LowRankTerm(a, b, 0.5)
    elif kind == "whole":
        linear, term = whole_head(nn.Parameter(random(V, D, seed=9)), None)
    else:
        term = RowsTerm(torch.tensor([3, 300]), random(2, D).requires_grad_())
    head = replace(head, linear=linear, term=term)
    hidden, targets = states(dtype)
    found = []
    for names in ([], ["loss"]):
        kernels.use(names)
        for total in (
            cross_entropy_sum(hidden, targets, head, 8),
            -token_logprobs(hidden, targets, head, 8).sum(),
        ):
            grads = torch.autograd.grad(total / 7, (hidden, *term.parameters))
            found.append((total, *grads))
    for fused, plain in zip(found[2:], found[:2], strict=True):
        for own, wanted in zip(fused, plain, strict=True):
            assert relative_error(own, wanted) <= 4 * torch.finfo(dtype).eps


def test_cross_entropy_is_more_exact_than_the_plain_code_in_float16() -> None:
    head = make_head(torch.float16)
    hidden, targets = states(torch.float16)
    wide = hidden.detach().double().requires_grad_()
    logits = wide @ head.linear.weight.dequantize(torch.float64).T
    (wanted,) = torch.autograd.grad(
        nn.functional.cross_entropy(logits, targets, reduction="sum"), wide
    )
    errors = []
    for names in ([], ["loss"]):
        kernels.use(names)
        (grad,) = torch.autograd.grad(cross_entropy_sum(hidden, targets, head, 8), hidden)
        errors.append(relative_error(grad, wanted))
    assert errors[1] <= 1.05 * errors[0]


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logprobs_and_scores(dtype: torch.dtype, scale: float) -> None:
    head = make_head(dtype, scale)
    hidden, targets = states(dtype)
    targets[::3] = (hidden @ head.linear.weight.dequantize(dtype).T).argmax(1)[::3]
    found = []
    for names in ([], ["loss"]):
        kernels.use(names)
        logprobs = token_logprobs(hidden, targets, head, 8)
        (grad,) = torch.autograd.grad((logprobs * random(N, seed=5)).sum(), hidden)
        found.append((logprobs, grad, *score_tokens(hidden, targets, head, 8)))
    (logprobs, grad, *scores), (fused_logprobs, fused_grad, *fused_scores) = found
    torch.testing.assert_close(fused_logprobs, logprobs, rtol=2e-6, atol=2e-6)
    assert relative_error(fused_grad, grad) <= 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(fused_scores, scores, rtol=2e-6, atol=2e-6)


# ---------------------------------------------------------------- MLP


class MLP(nn.Module):
    def __init__(self, fused: bool, activation: nn.Module, bits: int) -> None:
        super().__init__()
        inner = {"gate_up_proj": 2 * WIDTH} if fused else {"gate_proj": WIDTH, "up_proj": WIDTH}
        sizes = {name: (D, width) for name, width in inner.items()} | {"down_proj": (WIDTH, D)}
        for seed, (name, (into, out)) in enumerate(sizes.items()):
            layer = FrozenLinear(into, out, bias=False)
            layer.weight = Quantization(bits).freeze(random(out, into, seed=seed))  # type: ignore[arg-type]
            setattr(self, name, layer)
        self.act_fn = activation


def add_lora(mlp: nn.Module) -> None:
    for seed, (name, layer) in enumerate(list(mlp.named_children())):
        if isinstance(layer, FrozenLinear):
            generator = torch.Generator().manual_seed(seed)
            wrapped = LoRALinear(layer, rank=4, scaling=2.0, generator=generator)
            wrapped.lora_B.data.copy_(random(*wrapped.lora_B.shape, seed=20 + seed))
            setattr(mlp, name, wrapped)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU("tanh"), nn.ReLU()])
def test_tiled_mlp(activation: nn.Module, fused: bool, lora: bool) -> None:
    mlp = TiledMLP(MLP(fused, activation, 4), tile_tokens=8)
    if lora:
        add_lora(mlp)
    x = random(N, D, seed=9).requires_grad_()
    grad_y = random(N, D, seed=10)
    trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    found = []
    for names in ([], ["gate", "nf4"]):
        kernels.use(names)
        y = mlp(x)
        found.append((y, *torch.autograd.grad(y, [x, *trained], grad_y)))
    layers = 2 if fused else 3
    assert len(found[0]) == 2 + (2 * layers if lora else 0)
    for plain, with_kernel in zip(*found, strict=True):
        assert relative_error(with_kernel, plain) <= 2e-6
