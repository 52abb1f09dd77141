"""The layer that multiplies by its merged weight, packed again, against the equations."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from bitsandbytes import functional as bnb
from support import relative_error
from torch import Tensor, nn

from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.merge_aware import (
    MergeAwareLinear,
    hash_of_codes,
    packed_sum,
    spread,
)
from qlora_kit.layers.quantize import Quantization, codes_by_kernel, in_blocks, recoded
from qlora_kit.layers.weight import FourBitWeight, FrozenWeight, Int8Weight

TOKENS, D, K, R, SCALING = 6, 64, 48, 4, 2.0
FORMATS = [
    Quantization(4),
    Quantization(4, "nf4", double_quant=False),
    Quantization(4, "fp4"),
    Quantization(8),
]


def frozen(quantization: Quantization, seed: int = 0) -> FrozenLinear:
    generator = torch.Generator().manual_seed(seed)
    layer = FrozenLinear(D, K, bias=True)
    layer.weight = quantization.freeze(torch.randn(K, D, generator=generator) * 0.1)
    layer.bias = torch.randn(K, generator=generator)
    return layer


def merge_aware(quantization: Quantization, size: float = 0.05) -> MergeAwareLinear:
    generator = torch.Generator().manual_seed(1)
    sizes: dict[str, Any] = {"rank": R, "scaling": SCALING, "generator": generator}
    layer = MergeAwareLinear(frozen(quantization), **sizes)
    with torch.no_grad():
        layer.lora_B.normal_(0, size, generator=generator)
    layer.renew()
    return layer


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def constants_of(weight: FrozenWeight) -> Tensor:
    """Return the constant of each weight (K, D)."""
    if isinstance(weight, Int8Weight):
        return weight.absmax.unsqueeze(1).expand(weight.shape)
    assert isinstance(weight, FourBitWeight)
    each = weight.absmax_values().repeat_interleave(weight.block_size)
    return each[: weight.shape[0] * weight.shape[1]].view(weight.shape)


def clamped(values: Tensor, weight: FrozenWeight) -> Tensor:
    most = constants_of(weight)
    return values.clamp(-most, most)


def packed_by_hand(weight: FrozenWeight, delta: Tensor) -> Tensor:
    """Return the nearest value to W + U + delta that the constants of W allow, for each weight."""
    values, most = clamped(spread(weight) + delta, weight), constants_of(weight)
    if not isinstance(weight, FourBitWeight):
        return (values / most * 127).round() * most / 127
    book = bnb.get_4bit_type(weight.quant_type, device="cpu")
    nearest = ((values / most).unsqueeze(-1) - book).abs().argmin(-1)
    return book[nearest] * most


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda each: each.describe())
def test_it_computes_the_equations(quantization: Quantization) -> None:
    layer = merge_aware(quantization)
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    base = layer.frozen.weight.dequantize(torch.float32)
    packed = packed_by_hand(layer.frozen.weight, SCALING * b @ a)
    assert relative_error(packed, base) > 0.02, "the delta changes codes"
    x, grad_y = some(TOKENS, D).requires_grad_(), some(TOKENS, K) + 1
    y = layer(x)
    y.backward(grad_y)
    assert relative_error(y, x @ packed.T + layer.frozen.bias) < 1e-6
    # The straight-through estimator: dŴ is taken for that of W + scaling B A.
    dense = grad_y.T @ x.detach()
    assert relative_error(x.grad, grad_y @ packed) < 1e-6
    assert relative_error(layer.lora_A.grad, SCALING * b.T @ dense) < 1e-5
    assert relative_error(layer.lora_B.grad, SCALING * dense @ a.T) < 1e-5


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda each: each.describe())
def test_the_merged_weight_follows_a_and_b_to_the_bit(quantization: Quantization) -> None:
    layer = merge_aware(quantization)
    before = hash_of_codes(layer.merged)
    base = hash_of_codes(layer.frozen.weight)
    kept = layer.lora_B.detach().clone()
    with torch.no_grad():
        layer.lora_B.mul_(3)
    layer.renew()
    assert hash_of_codes(layer.merged) != before
    with torch.no_grad():
        layer.lora_B.copy_(kept)
    layer.renew()
    assert hash_of_codes(layer.merged) == before
    assert hash_of_codes(layer.frozen.weight) == base, "the codes of the base stay"


@pytest.mark.parametrize("shape", [(48, 64), (70, 80), (64, 30), (5, 3), (130, 512)], ids=str)
@pytest.mark.parametrize("quantization", FORMATS, ids=lambda each: each.describe())
def test_each_weight_stays_in_its_cell(
    quantization: Quantization, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantization.freeze(some(*shape))
    base = whole.dequantize(torch.float32)
    moved = spread(whole)
    away = relative_error(clamped(moved, whole), base)
    assert away > (0.02 if quantization.bits == 4 else 1e-3)
    # fp4 has two codes of zero.
    assert torch.equal(recoded(whole, moved.clone()).dequantize(torch.float32), base)
    monkeypatch.setattr("qlora_kit.layers.merge_aware._CHUNK_OF_CPU", 1)
    assert torch.equal(spread(whole), moved), "cut into other chunks"


@pytest.mark.parametrize("shape", [(48, 64), (70, 80), (5, 3)], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_kernel_of_a_gpu_is_given_values_with_the_constants_that_are_there(
    quant_type: Literal["nf4", "fp4"], shape: tuple[int, int]
) -> None:
    # On a CPU bitsandbytes packs by the rule of its kernels; here it stands for them.
    whole = Quantization(4, quant_type).freeze(some(*shape))
    assert isinstance(whole, FourBitWeight)
    values = spread(whole) + 0.3
    expected = recoded(whole, values.clone()).dequantize(torch.float32)
    blocks = in_blocks(whole, values)
    codes = whole.with_codes(codes_by_kernel(values, blocks, quant_type, whole.block_size))
    assert torch.equal(codes.dequantize(torch.float32), expected)
    assert not torch.equal(expected, whole.dequantize(torch.float32))


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda each: each.describe())
def test_without_a_delta_the_codes_are_those_of_the_base(quantization: Quantization) -> None:
    layer = merge_aware(quantization, size=0.0)
    found, base = (each.dequantize(torch.float32) for each in (layer.merged, layer.frozen.weight))
    assert torch.equal(found, base)
    if quantization.quant_type == "nf4":  # fp4 has two codes of zero
        assert hash_of_codes(layer.merged) == hash_of_codes(layer.frozen.weight)


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda each: each.describe())
def test_a_large_delta_changes_no_constant(quantization: Quantization) -> None:
    layer = merge_aware(quantization, size=1.0)
    weight, base = layer.merged, layer.frozen.weight
    delta = SCALING * layer.lora_B.detach() @ layer.lora_A.detach()
    assert delta.abs().max() > constants_of(base).max()
    shared = {name: each for name, each in base.stored() if name != "codes"}
    assert all(each is shared[name] for name, each in weight.stored() if name != "codes")
    found = weight.dequantize(torch.float32)
    assert relative_error(found, packed_by_hand(base, delta)) < 1e-6
    largest = base.dequantize(torch.float32).abs() >= constants_of(base) * 0.999
    assert largest.any()
    assert torch.equal(found[largest], base.dequantize(torch.float32)[largest])


def test_a_delta_smaller_than_a_cell_is_kept_on_average() -> None:
    quantization = Quantization(4, double_quant=False)
    weight = quantization.freeze(torch.randn(512, 512, generator=torch.Generator().manual_seed(3)))
    a, b = torch.ones(1, 512), torch.full((512, 1), 0.02)  # cells are some 0.2 wide
    base = weight.dequantize(torch.float32)
    change = packed_sum(weight, a, b, 1.0).dequantize(torch.float32) - base
    assert change.mean() == pytest.approx(0.02, rel=0.2)
    assert (change.abs() > 0.05).float().mean() < 0.3, "few weights move, by a whole cell each"
    middle = quantization.freeze(base + b @ a).dequantize(torch.float32) - base
    assert middle.mean() < 0.01, "from the middles of the cells most of the delta is lost"


def test_a_merged_weight_that_is_kept_unpacked_is_renewed() -> None:
    layer = merge_aware(Quantization(4))
    layer.merged.keep_unpacked(torch.float32)
    with torch.no_grad():
        layer.lora_B.mul_(3)
    layer.renew()
    assert layer.merged.kept_dtype == torch.float32
    expected = layer.merged.dequantize(torch.float32)
    assert torch.equal(layer.merged.unpacked(torch.float32), expected)


def test_nothing_of_it_is_in_a_state_dict() -> None:
    layer = merge_aware(Quantization(4))
    assert {name.partition(".")[0] for name in layer.state_dict()} == {"frozen", "lora_A", "lora_B"}
    assert sum(isinstance(each, FrozenLinear) for each in layer.modules()) == 1


def test_a_base_in_blocks_of_another_size_keeps_them() -> None:
    layer = frozen(Quantization(4))
    codes, state = bnb.quantize_4bit(some(K, D), blocksize=128, quant_type="nf4")
    layer.weight = FourBitWeight(
        (K, D), codes, {"absmax": state.absmax}, quant_type="nf4", block_size=128
    )
    found = MergeAwareLinear(layer, rank=R, scaling=SCALING)
    assert hash_of_codes(found.merged) == hash_of_codes(layer.weight)
    with torch.no_grad():
        found.lora_B.fill_(0.05)
    found.renew()
    delta = SCALING * found.lora_B.detach() @ found.lora_A.detach()
    expected = packed_by_hand(layer.weight, delta)
    assert relative_error(expected, layer.weight.dequantize(torch.float32)) > 0.02
    assert relative_error(found.merged_weight(), expected) < 1e-6


def test_the_sum_changes_neither_the_base_nor_a_and_b() -> None:
    layer = merge_aware(Quantization(8))
    weight, a, b = layer.frozen.weight, layer.lora_A, layer.lora_B
    before = [each.clone() for each in (weight.dequantize(torch.float32), a, b)]
    packed_sum(weight, a, b, SCALING)
    after = [weight.dequantize(torch.float32), a, b]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert isinstance(a, nn.Parameter)
    assert a.grad is None
