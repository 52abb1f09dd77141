"""What is trained of a head gets torch's gradients of the full logits, which the kit never has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import Tensor, nn

from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.head import Head, quantize_head
from qlora_kit.layers.head_terms import HeadTerm, LowRankTerm, RowsTerm, whole_head
from qlora_kit.layers.loss import (
    chunked_loss_sum,
    cross_entropy_sum,
    score_tokens,
    token_logprobs,
)
from qlora_kit.layers.quantize import Quantization
from qlora_kit.layers.trained import TrainedLinear
from qlora_kit.layers.weight import PlainWeight

N, D, V, R = 37, 24, 317, 3
FORMULAS = {"plain": (1.0, None), "scale": (0.3, None), "softcap": (1.7, 6.0)}
KINDS = ["low rank", "dropout", "whole", "whole with bias", "rows"]
CHUNKS = [5, 256]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Made:
    """A trained head, and its full logits written down by the formula, in the dtype of hidden."""

    head: Head
    logits: Callable[[Tensor, tuple[Tensor, ...]], Tensor]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        assert self.head.term is not None
        return self.head.term.parameters


def made(
    kind: str, formula: str = "plain", *, bits: Literal[4, 8, 16] = 16, bias: bool = False
) -> Made:
    scale, softcap = FORMULAS[formula]
    has_bias = bias or kind == "whole with bias"
    linear = FrozenLinear.holding(random(V, D, seed=1), random(V, seed=2) if has_bias else None)
    if bits != 16:
        linear = quantize_head(linear, Quantization(bits), torch.device("cpu"))
    frozen = linear.weight.dequantize(torch.float32).double()
    frozen_bias = torch.zeros(V).double() if linear.bias is None else linear.bias.double()
    term: HeadTerm
    if kind in ("low rank", "dropout"):
        kept = random(N, D, seed=7) > -0.5 if kind == "dropout" else None
        mask = 1.0 if kept is None else kept / 0.8
        a, b = nn.Parameter(random(R, D, seed=5)), nn.Parameter(random(V, R, seed=6))
        term = LowRankTerm(a, b, scaling=0.4, keep_probability=0.8, kept=kept)

        def products(h: Tensor, own: tuple[Tensor, ...]) -> Tensor:
            return h @ frozen.T + 0.4 * (h * mask) @ own[0].T @ own[1].T + frozen_bias

    elif kind == "rows":
        ids = torch.tensor([4, 316, 90])
        term = RowsTerm(ids, nn.Parameter(random(3, D, seed=8)))

        def products(h: Tensor, own: tuple[Tensor, ...]) -> Tensor:
            return h @ frozen.index_copy(0, ids, own[0]).T + frozen_bias

    else:
        weight = nn.Parameter(random(V, D, seed=9))
        linear, term = whole_head(weight, nn.Parameter(random(V, seed=2)) if has_bias else None)

        def products(h: Tensor, own: tuple[Tensor, ...]) -> Tensor:
            return h @ own[0].T + (own[1] if len(own) > 1 else 0.0)

    def logits(h: Tensor, own: tuple[Tensor, ...]) -> Tensor:
        z = products(h, own) * scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    return Made(Head(linear, scale, softcap, term), logits)


def tokens(dtype: torch.dtype = torch.float32, *, in_head_only: bool = False) -> list[Tensor]:
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))
    targets[:3] = torch.tensor([4, 316, 90])
    hidden = random(N, D, seed=4).to(dtype)
    return [hidden if in_head_only else hidden.requires_grad_(), targets]


def exact(head: Made, hidden: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return value and gradients, of the hidden states first, of a loss of full logits in fp64."""
    wide = [each.detach().double().requires_grad_() for each in (hidden, *head.parameters)]
    value = loss(head.logits(wide[0], tuple(wide[1:])))
    return [value, *torch.autograd.grad(value, wide)]


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(wanted)
    for own, exactly in zip(found, wanted, strict=True):
        assert own.shape == exactly.shape
        assert relative_error(own, exactly) <= tolerance


def weighted(targets: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
    def loss(logits: Tensor) -> Tensor:
        each = F.cross_entropy(logits, targets, reduction="none")
        return (each * weights.to(each.dtype)).sum()

    return loss


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("kind", KINDS)
def test_cross_entropy_has_the_gradients_of_torch(kind: str, formula: str, chunk: int) -> None:
    head, (hidden, targets) = made(kind, formula), tokens()
    weights = 1 + random(N, seed=11).abs()
    for factors in (None, weights):
        value = cross_entropy_sum(hidden, targets, head.head, chunk, factors)
        found = [value, *torch.autograd.grad(value / 3, [hidden, *head.parameters])]
        ones = torch.ones(N) if factors is None else factors
        value, *grads = exact(head, hidden, weighted(targets, ones))
        assert_close(found, [value, *(grad / 3 for grad in grads)])


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_have_the_gradients_of_torch(kind: str, formula: str) -> None:
    head, (hidden, targets) = made(kind, formula), tokens()
    grad = random(N, seed=12)
    logprobs = token_logprobs(hidden, targets, head.head, 7)
    found = [logprobs @ grad, *torch.autograd.grad(logprobs, [hidden, *head.parameters], grad)]
    assert_close(found, exact(head, hidden, weighted(targets, -grad)))


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_custom_loss_has_the_gradients_of_torch(kind: str, formula: str) -> None:
    head, (hidden, targets) = made(kind, formula), tokens()

    def focal(logits: Tensor, labels: Tensor) -> Tensor:
        logp = logits.log_softmax(1).gather(1, labels.unsqueeze(1))
        return -((1 - logp.exp()).square() * logp).sum()

    value = chunked_loss_sum(hidden, targets, head.head, focal, 7)
    found = [value, *torch.autograd.grad(2 * value, [hidden, *head.parameters])]
    wanted = exact(head, hidden, lambda z: focal(z, targets))
    assert_close(found, [wanted[0], *(2 * grad for grad in wanted[1:])])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["low rank", "rows"])
def test_a_sliced_head_with_a_bias_is_trained_too(kind: str, bits: Literal[4, 8]) -> None:
    head, (hidden, targets) = made(kind, bits=bits, bias=True), tokens()
    value = cross_entropy_sum(hidden, targets, head.head, 7)
    found = [value, *torch.autograd.grad(value, [hidden, *head.parameters])]
    assert_close(found, exact(head, hidden, weighted(targets, torch.ones(N))))
    logits = head.head.logits(hidden)
    wide = tuple(each.double() for each in head.parameters)
    assert relative_error(logits, head.logits(hidden.double(), wide)) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_trained_where_nothing_below_it_is(kind: str) -> None:
    head, (hidden, targets) = made(kind), tokens(in_head_only=True)
    wanted = exact(head, hidden, weighted(targets, torch.ones(N)))[2:]
    for loss in (cross_entropy_sum, lambda *given: -token_logprobs(*given).sum()):
        value = loss(hidden, targets, head.head, 7)
        assert_close(list(torch.autograd.grad(value, head.parameters)), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_trained_head(kind: str) -> None:
    head, (hidden, targets) = made(kind, "softcap"), tokens()
    found = score_tokens(hidden, targets, head.head, 7)
    wide = tuple(each.detach().double() for each in head.parameters)
    logits = head.logits(hidden.detach().double(), wide)
    logprobs = logits.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    assert relative_error(found.logprobs, logprobs) <= 1e-6
    assert torch.equal(found.is_top, logits.argmax(1) == targets)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_give_gradients_in_fp32(kind: str, dtype: torch.dtype) -> None:
    head, (hidden, targets) = made(kind), tokens(dtype)
    if head.head.linear.weight.bits == 16 and not kind.startswith("whole"):
        weight = head.head.linear.weight.dequantize(dtype)
        head.head = replace(head.head, linear=FrozenLinear.holding(weight, None))
    value = cross_entropy_sum(hidden, targets, head.head, 7)
    found = torch.autograd.grad(value, [hidden, *head.parameters])
    assert [each.dtype for each in found] == [dtype, *(torch.float32 for _ in head.parameters)]
    wanted = exact(head, hidden, weighted(targets, torch.ones(N)))
    assert_close([value, *found], wanted, 8 * torch.finfo(dtype).eps)


def test_no_gradient_is_computed_where_none_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    head, (hidden, targets) = made("low rank"), tokens(in_head_only=True)
    monkeypatch.setattr(LowRankTerm, "backward", lambda *_: pytest.fail("nobody asked"))
    with torch.no_grad():
        cross_entropy_sum(hidden, targets, head.head, 7)


def test_gradients_of_a_frozen_parameter_may_be_left_out() -> None:
    head, (hidden, targets) = made("low rank"), tokens()
    wanted = torch.autograd.grad(
        cross_entropy_sum(hidden, targets, head.head, 7), [hidden, *head.parameters]
    )
    head.parameters[0].requires_grad_(False)
    value = cross_entropy_sum(hidden, targets, head.head, 7)
    assert_close([*torch.autograd.grad(value, [hidden, head.parameters[1]])], [*wanted[::2]], 0.0)
    head.parameters[1].requires_grad_(False)
    (of_hidden,) = torch.autograd.grad(cross_entropy_sum(hidden, targets, head.head, 7), hidden)
    assert torch.equal(of_hidden, wanted[0])


def test_the_loss_of_a_trained_head_has_one_backward() -> None:
    """Its gradients are scaled in place: a second backward would find them scaled already."""
    head, (hidden, targets) = made("low rank"), tokens()
    value = cross_entropy_sum(hidden, targets, head.head, 7)
    torch.autograd.grad(value, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        torch.autograd.grad(value, hidden)


def test_a_layer_that_is_trained_whole_is_the_weight_of_its_head() -> None:
    layer = TrainedLinear(FrozenLinear.holding(random(V, D, seed=1), None))
    linear, term = layer.head_parts()
    assert term.parameters == (layer.weight,)
    with torch.no_grad():
        layer.weight.add_(1)
    assert isinstance(linear.weight, PlainWeight)
    assert torch.equal(linear.weight.values, layer.weight)
