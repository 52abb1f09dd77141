"""The chunked head and loss equals torch's loss of the full logits, which the kit never has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.head import Head
from qlora_kit.layers.loss import (
    chunked_loss_sum,
    cross_entropy_sum,
    score_tokens,
    token_logprobs,
)
from qlora_kit.layers.quantize import Quantization
from qlora_kit.layers.weight import PlainWeight

N, D, V = 131, 24, 317
CHUNKS = [1, 7, 256]
FORMULAS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 6.0},
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_head(
    *,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    weight: Tensor | None = None,
) -> Head:
    weight = random(V, D, seed=1) if weight is None else weight
    linear = FrozenLinear(weight.shape[1], weight.shape[0], bias=bias)
    linear.weight = PlainWeight(weight.to(dtype))
    if bias:
        linear.bias = random(weight.shape[0], seed=2)
    return Head(linear, scale, softcap)


def full_logits(hidden: Tensor, head: Head) -> Tensor:
    """Return all logits at once, in the dtype of `hidden`."""
    logits = hidden @ head.linear.weight.dequantize(hidden.dtype).T
    if head.linear.bias is not None:
        logits = logits + head.linear.bias.to(hidden.dtype)
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def tokens(dtype: torch.dtype = torch.float32, n: int = N, v: int = V) -> tuple[Tensor, Tensor]:
    targets = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(3))
    return random(n, D, seed=4).to(dtype).requires_grad_(), targets


def exact(hidden: Tensor, head: Head, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return value and gradient of a loss of the full logits, in fp64."""
    wide = hidden.detach().double().requires_grad_()
    value = loss(full_logits(wide, head))
    (grad,) = torch.autograd.grad(value, wide)
    return value, grad


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return result


# ---------------------------------------------------------------- cross-entropy


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("formula", FORMULAS)
def test_cross_entropy_equals_torch(formula: str, chunk: int) -> None:
    head = make_head(**FORMULAS[formula])
    hidden, targets = tokens()
    found = cross_entropy_sum(hidden, targets, head, chunk)
    (grad,) = torch.autograd.grad(found, hidden)
    value, wanted = exact(hidden, head, lambda z: F.cross_entropy(z, targets, reduction="sum"))
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert relative_error(found, value) <= 1e-6
    assert relative_error(grad, wanted) <= 2e-6


def weighted_loss(targets: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a loss of full logits, in their dtype: torch's own of each token, times its weight."""

    def loss(logits: Tensor) -> Tensor:
        return (F.cross_entropy(logits, targets, reduction="none") * weights.to(logits.dtype)).sum()

    return loss


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("formula", FORMULAS)
def test_weighted_cross_entropy_equals_torch(formula: str, chunk: int) -> None:
    head = make_head(**FORMULAS[formula])
    hidden, targets = tokens()
    weights = random(N, seed=5).abs()
    weights[::4] = 1.0
    weights[::7] = 3.0
    found = cross_entropy_sum(hidden, targets, head, chunk, weights)
    (grad,) = torch.autograd.grad(found / 3, hidden)
    value, wanted = exact(hidden, head, weighted_loss(targets, weights))
    assert relative_error(found, value) <= 1e-6
    assert relative_error(grad, wanted / 3) <= 2e-6


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_any_size_keep_the_gradient_within_16_bits(
    dtype: torch.dtype, size: float
) -> None:
    """Divided by the sum of weights, the gradient is the same however large they all are."""
    head = make_head(dtype=dtype)
    hidden, targets = tokens(dtype)
    weights = size * (1 + random(N, seed=5).abs())
    found = cross_entropy_sum(hidden, targets, head, 7, weights)
    (grad,) = torch.autograd.grad(found / float(weights.sum()), hidden)
    mean = weighted_loss(targets, weights.double() / weights.double().sum())
    _, wanted = exact(hidden, head, mean)
    assert relative_error(grad, wanted) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("formula", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_in_16_bits_is_as_exact_as_its_dtype(
    dtype: torch.dtype, formula: str
) -> None:
    head = make_head(**FORMULAS[formula], dtype=dtype)
    hidden, targets = tokens(dtype)
    found = cross_entropy_sum(hidden, targets, head, 7)
    (grad,) = torch.autograd.grad(found, hidden)
    value, wanted = exact(hidden, head, lambda z: F.cross_entropy(z, targets, reduction="sum"))
    eps = torch.finfo(dtype).eps
    assert grad.dtype == dtype
    # Each logit is rounded once, and their errors average out over V and N.
    assert relative_error(found, value) <= eps
    assert relative_error(grad, wanted) <= 3 * eps


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_16_bit_head_under_fp32_states_computes_in_fp32(stored: torch.dtype) -> None:
    head = make_head(dtype=stored)
    hidden, targets = tokens()
    found = cross_entropy_sum(hidden, targets, head, 7)
    value, _ = exact(hidden, head, lambda z: F.cross_entropy(z, targets, reduction="sum"))
    assert relative_error(found, value) <= 1e-6


def test_a_quantised_head_equals_its_unpacked_twin() -> None:
    head = make_head()
    packed = FrozenLinear(D, V, bias=False)
    packed.weight = Quantization(4).freeze(random(V, D, seed=1))
    head = Head(packed)
    hidden, targets = tokens()
    (grad,) = torch.autograd.grad(cross_entropy_sum(hidden, targets, head, 50), hidden)
    weight = packed.weight.dequantize(torch.float32)
    (wanted,) = torch.autograd.grad(
        cross_entropy_sum(hidden, targets, make_head(weight=weight), 50), hidden
    )
    assert torch.equal(grad, wanted)


def test_incoming_gradient_scales_the_gradient() -> None:
    head = make_head(**FORMULAS["all"])
    hidden, targets = tokens()
    (whole,) = torch.autograd.grad(cross_entropy_sum(hidden, targets, head), hidden)
    (mean,) = torch.autograd.grad(cross_entropy_sum(hidden, targets, head) / 77, hidden)
    torch.testing.assert_close(mean, whole / 77)


def test_a_mean_over_tokens_keeps_the_precision_of_bfloat16() -> None:
    head = make_head(dtype=torch.bfloat16)
    hidden, targets = tokens(torch.bfloat16)
    count = 361  # 1 / 361 lies halfway between two bfloat16 numbers, 0.25 % from either
    (grad,) = torch.autograd.grad(cross_entropy_sum(hidden, targets, head) / count, hidden)
    _, wanted = exact(hidden, head, lambda z: F.cross_entropy(z, targets, reduction="sum") / count)
    shrunk = (grad.double() * wanted).sum() / wanted.square().sum()
    assert abs(shrunk - 1) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    """Logits of ±10,000, with the target both at the top and at the bottom."""
    head = make_head(weight=torch.eye(D), dtype=dtype)
    hidden = torch.full((4, D), -1e4)
    hidden[:, 3] = 1e4
    hidden[2:] *= -1
    hidden = hidden.to(dtype).requires_grad_()
    targets = torch.tensor([3, 5, 3, 5])
    found = cross_entropy_sum(hidden, targets, head, 3)
    (grad,) = torch.autograd.grad(found, hidden)
    value, wanted = exact(hidden, head, lambda z: F.cross_entropy(z, targets, reduction="sum"))
    assert value > 3e4
    assert relative_error(found, value) <= 1e-6
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-3, atol=1e-3)


def test_float16_gradient_survives_a_vocabulary_beyond_its_range() -> None:
    v = 70_001  # equal logits: the sum of exponentials is v, above float16's 65,504
    head = make_head(weight=torch.full((v, 3), 0.01), dtype=torch.float16)
    hidden = torch.ones(2, 3, dtype=torch.float16, requires_grad=True)
    found = cross_entropy_sum(hidden, torch.tensor([0, v - 1]), head)
    (grad,) = torch.autograd.grad(found, hidden)
    assert found.item() == pytest.approx(2 * torch.log(torch.tensor(float(v))).item(), rel=1e-3)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() < 1e-3  # softmax − onehot times equal rows is zero


def test_no_tokens_give_a_zero_loss_and_gradient() -> None:
    head = make_head()
    hidden, targets = tokens(n=0)
    found = cross_entropy_sum(hidden, targets, head)
    (grad,) = torch.autograd.grad(found, hidden)
    assert found.item() == 0
    assert grad.shape == (0, D)


def test_without_gradients_the_value_is_the_same() -> None:
    head = make_head()
    hidden, targets = tokens()
    with torch.no_grad():
        plain = cross_entropy_sum(hidden, targets, head, 7)
    assert plain.item() == cross_entropy_sum(hidden, targets, head, 7).item()
    assert not plain.requires_grad


# ---------------------------------------------------------------- other losses


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    logprobs = F.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    return -((1 - logprobs.exp()) ** 2 * logprobs).sum()


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("formula", ["plain", "all"])
@pytest.mark.parametrize("loss", [focal, smoothed])
def test_a_custom_loss_equals_autograd_on_all_logits(
    loss: Callable[[Tensor, Tensor], Tensor], formula: str, chunk: int
) -> None:
    head = make_head(**FORMULAS[formula])
    hidden, targets = tokens()
    found = chunked_loss_sum(hidden, targets, head, loss, chunk)
    (grad,) = torch.autograd.grad(found / 3, hidden)
    value, wanted = exact(hidden, head, lambda z: loss(z, targets) / 3)
    assert relative_error(found / 3, value) <= 1e-6
    assert relative_error(grad, wanted) <= 2e-6


def test_a_custom_loss_sees_fp32_logits_chunk_by_chunk() -> None:
    seen = []

    def note(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append((logits.dtype, tuple(logits.shape), len(targets)))
        return logits.sum()

    hidden, targets = tokens(torch.bfloat16, n=16)
    chunked_loss_sum(hidden, targets, make_head(dtype=torch.bfloat16), note, 7)
    assert seen == [(torch.float32, (n, V), n) for n in (7, 7, 2)]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("formula", FORMULAS)
def test_token_logprobs_equal_log_softmax_under_any_token_weights(formula: str, chunk: int) -> None:
    head = make_head(**FORMULAS[formula])
    hidden, targets = tokens()
    weights = random(N, seed=5)
    found = token_logprobs(hidden, targets, head, chunk)
    (grad,) = torch.autograd.grad((found * weights).sum(), hidden)
    expected = F.log_softmax(full_logits(hidden.double(), head), -1)
    picked = expected.gather(1, targets[:, None])[:, 0]
    (wanted,) = torch.autograd.grad((picked * weights).sum(), hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), picked, rtol=2e-6, atol=2e-6)
    assert relative_error(grad, wanted) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_logprobs_in_16_bits_are_as_exact_as_their_dtype(dtype: torch.dtype) -> None:
    head = make_head(dtype=dtype)
    hidden, targets = tokens(dtype)
    weights = random(N, seed=5)
    found = token_logprobs(hidden, targets, head, 7)
    (grad,) = torch.autograd.grad((found * weights).sum(), hidden)
    _, wanted = exact(
        hidden,
        head,
        lambda z: (F.log_softmax(z, -1).gather(1, targets[:, None])[:, 0] * weights).sum(),
    )
    assert relative_error(grad, wanted) <= 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("formula", FORMULAS)
def test_scores_are_the_logprob_and_the_top_of_each_token(formula: str, chunk: int) -> None:
    head = make_head(**FORMULAS[formula])
    hidden, targets = tokens()
    logits = full_logits(hidden.detach().double(), head)
    targets[::3] = logits.argmax(1)[::3]
    found = score_tokens(hidden, targets, head, chunk)
    expected = F.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.logprobs.double(), expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(found.is_top, logits.argmax(1) == targets)
    assert 0 < found.is_top.sum() < N


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("formula", ["plain", "all"])
@pytest.mark.parametrize(
    "run",
    [
        lambda h, t, head: cross_entropy_sum(h, t, head, 7).backward(),
        lambda h, t, head: chunked_loss_sum(h, t, head, focal, 7).backward(),
        lambda h, t, head: token_logprobs(h, t, head, 7).sum().backward(),
        lambda h, t, head: score_tokens(h, t, head, 7),
    ],
    ids=["cross_entropy_sum", "chunked_loss_sum", "token_logprobs", "score_tokens"],
)
def test_no_more_logits_than_a_chunk_exist(run: Callable[..., Any], formula: str) -> None:
    v, chunk = 5000, 7
    head = make_head(**FORMULAS[formula], weight=random(v, 3, seed=1))
    hidden = random(400, 3, seed=4).requires_grad_()
    targets = torch.randint(0, v, (400,))
    with LargestTensor() as largest:
        full_logits(hidden, head)
    assert largest.numel == 400 * v  # so the tracker does see a full matrix
    with LargestTensor() as largest:
        run(hidden, targets, head)
    assert largest.numel == chunk * v


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_16_bit_head_is_never_upcast_as_a_whole(softcap: float | None) -> None:
    """fp32 activations, as on CPUs and old GPUs, on a head stored in bf16."""
    vocabulary, width = 20_000, 24
    weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = FrozenLinear(width, vocabulary, bias=False)
    linear.weight = PlainWeight(weight)
    hidden = torch.randn(9, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.arange(9) * 2000
    logits = hidden @ weight.float().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    with torch.profiler.profile(profile_memory=True) as record:
        loss = cross_entropy_sum(hidden, targets, Head(linear, softcap=softcap), chunk_tokens=4)
    (grad,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    largest = max(event.cpu_memory_usage for event in record.events())
    assert largest < 0.6 * vocabulary * width * 4
