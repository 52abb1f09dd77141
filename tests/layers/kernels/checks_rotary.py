"""The kernel that rotates queries and keys, against the plain formula in fp64."""

from __future__ import annotations

import pytest
import torch
from support import relative_error
from torch import Tensor

from qlora_kit.layers.kernels.rotary import rotate

# Heads of queries, heads of keys, width of a head, rotated part.
HEADS = {
    "as many keys": (4, 4, 16, 16),
    "grouped": (6, 2, 8, 8),
    "one key": (3, 1, 64, 64),
    "more than a tile": (34, 17, 6, 6),
    "odd half": (2, 1, 22, 22),
    "partial": (4, 2, 20, 8),
    "partial, odd": (3, 3, 13, 6),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what transformers' Llama computes."""
    rotated = cos.shape[-1]
    part, rest = x[..., :rotated], x[..., rotated:]
    first, second = part.chunk(2, dim=-1)
    turned = part * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)
    return torch.cat((turned, rest), -1)


def projected(rows: int, tokens: int, heads: int, width: int, seed: int, layout: str) -> Tensor:
    """Return (B, H, T, d) in one of the layouts that models have."""
    if layout == "heads first":
        return random(rows, heads, tokens, width, seed=seed)
    if layout == "tokens first":
        return random(rows, tokens, heads, width, seed=seed).transpose(1, 2)
    wide = random(rows, tokens, heads * width + 24, seed=seed)[..., 8 : 8 + heads * width]
    return wide.unflatten(-1, (heads, width)).transpose(1, 2)


def angles(rows: int, tokens: int, rotated: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin whose two halves differ, which a kernel must not take for equal."""
    angle = random(rows, tokens, rotated, seed=3) * 3
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "part of a wider layer"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_values_and_gradients(heads: tuple[int, int, int, int], layout: str) -> None:
    rows, tokens = 2, 3
    q_heads, k_heads, width, rotated = heads
    q = projected(rows, tokens, q_heads, width, 1, layout).requires_grad_()
    k = projected(rows, tokens, k_heads, width, 2, layout).requires_grad_()
    cos, sin = angles(rows, tokens, rotated)
    found = rotate(q, k, cos, sin)
    grads = [random(*part.shape, seed=7 + i) for i, part in enumerate(found)]
    found_back = torch.autograd.grad(found, (q, k), grads)
    for x, y, grad, back in zip((q, k), found, grads, found_back, strict=True):
        wide = x.detach().double().requires_grad_()
        wanted = plain(wide, cos.double(), sin.double())
        (wanted_back,) = torch.autograd.grad(wanted, wide, grad.double())
        assert relative_error(y, wanted) <= 1e-6
        assert relative_error(back, wanted_back) <= 1e-6
        assert y.shape == x.shape


def test_layouts_are_kept() -> None:
    q = projected(2, 5, 4, 16, 1, "tokens first")
    k = projected(2, 5, 2, 16, 2, "heads first")
    found_q, found_k = rotate(q, k, *angles(2, 5, 16))
    assert found_q.stride() == q.stride()
    assert found_k.stride() == k.stride()


def test_one_row_of_angles_serves_for_all_rows() -> None:
    q, k = (projected(3, 5, 2, 8, seed, "tokens first") for seed in (1, 2))
    cos, sin = angles(1, 5, 8)
    found = rotate(q, k, cos, sin)
    for x, y in zip((q, k), found, strict=True):
        assert relative_error(y, plain(x.double(), cos.double(), sin.double())) <= 1e-6


def test_an_expanded_row_of_angles() -> None:
    q, k = (projected(3, 5, 2, 8, seed, "tokens first") for seed in (1, 2))
    cos, sin = angles(1, 5, 8)
    one = rotate(q, k, cos, sin)
    found = rotate(q, k, cos.expand(3, -1, -1), sin.expand(3, -1, -1))
    assert all(torch.equal(a, b) for a, b in zip(one, found, strict=True))


def test_inputs_are_not_changed() -> None:
    q, k = (projected(2, 5, 2, 8, seed, "tokens first") for seed in (1, 2))
    before = q.clone(), k.clone()
    rotate(q, k, *angles(2, 5, 8))
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


def test_float16_is_rounded_once() -> None:
    q, k = (projected(2, 5, 2, 8, seed, "tokens first").half() for seed in (1, 2))
    cos, sin = (each.half() for each in angles(2, 5, 8))
    for x, y in zip((q, k), rotate(q, k, cos, sin), strict=True):
        wanted = plain(x.double(), cos.double(), sin.double())
        assert y.dtype == torch.float16
        assert (y.double() - wanted).abs().max() <= 0.5005 * 2**-10 * wanted.abs().max()
        assert relative_error(y, wanted) <= 3e-4


def test_only_the_angles_are_saved() -> None:
    q, k = (projected(2, 5, 2, 8, seed, "tokens first").requires_grad_() for seed in (1, 2))
    cos, sin = angles(2, 5, 8)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: saved.append(each.data_ptr()) or each, lambda each: each
    ):
        rotate(q, k, cos, sin)
    assert saved == [cos.data_ptr(), sin.data_ptr()]
