"""A packed weight is unpacked to the values that were packed, whatever its width."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_kit.layers.quantize import Quantization

# Widths that are multiples of 64, of 16, and of neither; and sizes that end within a block.
SHAPES = [(8, 64), (8, 80), (16, 96), (64, 688), (64, 172), (3, 80), (5, 48), (9, 336), (11, 30)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bits_are_their_code_times_their_blocks_constant(
    shape: tuple[int, int], quant_type: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    original = torch.randn(shape)
    weight = Quantization(4, quant_type, double_quant=False).freeze(original)  # type: ignore[arg-type]
    codes = weight.codes.flatten()
    book = bnb.get_4bit_type(quant_type, device="cpu")
    values = book[torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()]
    constants = weight.absmax.repeat_interleave(64)[: original.numel()]
    expected = (values[: original.numel()] * constants).view(shape)
    assert torch.equal(weight.dequantize(dtype), expected.to(dtype))
    assert (expected - original).norm() / original.norm() < 0.15
