"""The kernel of the loss, against log_softmax in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_kit.layers.kernels.cross_entropy import target_logprobs

# One token of the vocabulary, part of a tile, one tile, and tiles with a rest.
VOCABULARIES = [1, 317, 8192, 20_011]


def inputs(rows: int, vocabulary: int, spread: float = 5.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator) * spread
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[0], targets[-1] = 0, vocabulary - 1
    return logits, targets


def exact(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(target), and the gradient of its negative, in fp64."""
    logprobs = torch.log_softmax(logits.double(), dim=1)
    grad = logprobs.exp()
    grad[torch.arange(len(grad)), targets] -= 1
    return logprobs.gather(1, targets[:, None])[:, 0], grad


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_logprobs_and_gradient(vocabulary: int, scale: float) -> None:
    logits, targets = inputs(5, vocabulary)
    wanted, grad = exact(logits.double() * scale, targets)
    found = target_logprobs(logits, targets, scale=scale, gradient=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(logits.double(), grad, rtol=2e-5, atol=1e-7)


def test_a_buffer_with_more_columns_than_the_vocabulary() -> None:
    logits, targets = inputs(5, 317)
    wide = torch.full((5, 400), 9.0)
    wide[:, :317] = logits
    wanted, grad = exact(logits, targets)
    found = target_logprobs(wide[:, :317], targets, gradient=True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(wide[:, :317].double(), grad, rtol=2e-5, atol=1e-7)
    assert (wide[:, 317:] == 9).all()


def test_without_the_gradient_the_logits_stay() -> None:
    logits, targets = inputs(4, 9001)
    before = logits.clone()
    found = target_logprobs(logits, targets, gradient=False)
    torch.testing.assert_close(found.double(), exact(before, targets)[0], rtol=1e-6, atol=2e-6)
    assert torch.equal(logits, before)


def test_float16_logits_are_computed_in_fp32() -> None:
    logits, targets = inputs(4, 9001)
    logits = logits.half()
    wanted, grad = exact(logits, targets)
    found = target_logprobs(logits, targets, gradient=True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-6)
    # Half a unit of a number that is no subnormal, and half the smallest subnormal.
    torch.testing.assert_close(logits.double(), grad, rtol=2**-11 * 1.01, atol=2**-25 * 1.01)


def test_logits_rise_and_fall_over_many_tiles() -> None:
    """The largest logit so far changes in every tile, and then no more."""
    rising = torch.linspace(-200, 200, 30_000).expand(2, -1)
    logits = torch.stack([rising[0], rising[1].flip(0)])
    targets = torch.tensor([29_990, 12])
    wanted, grad = exact(logits, targets)
    found = target_logprobs(logits, targets, gradient=True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.double(), grad, rtol=5e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, which computes it here
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_is_heard(bad: float) -> None:
    logits, targets = inputs(3, 317)
    logits[1, 50] = bad
    found = target_logprobs(logits, targets, gradient=False)
    assert found.isfinite().tolist() == [True, False, True]


def test_no_rows() -> None:
    found = target_logprobs(torch.empty(0, 7), torch.empty(0, dtype=torch.int64), gradient=True)
    assert found.shape == (0,)
