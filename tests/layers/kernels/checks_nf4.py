"""The kernel that unpacks 4 bits returns the bits that bitsandbytes returns."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.layers import kernels
from qlora_kit.layers.quantize import Quantization
from qlora_kit.layers.weight import FourBitWeight

# Whole blocks, a part of one, blocks over several rows, an odd number of weights, more than the
# constants of one scale, and more than one launch block.
SHAPES = [(3, 64), (1, 8), (5, 24), (7, 33), (40, 1024), (9, 4099)]


def packed(
    shape: tuple[int, int], quant_type: str, double_quant: bool, seed: int = 0
) -> FourBitWeight:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values *= torch.logspace(-3, 2, shape[0])[:, None]
    weight = Quantization(4, quant_type, double_quant).freeze(values)  # type: ignore[arg-type]
    assert isinstance(weight, FourBitWeight)
    return weight


def both(weight: FourBitWeight, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight as bitsandbytes unpacks it, and as the kernel does."""
    plain = weight.dequantize(dtype)
    kernels.use(["nf4"])
    try:
        found = weight.dequantize(dtype)
    finally:
        kernels.use([])
    return plain, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_its_bits_are_those_of_bitsandbytes(
    quant_type: str, double_quant: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    plain, found = both(packed(shape, quant_type, double_quant), dtype)
    assert found.shape == plain.shape == shape
    assert found.dtype == dtype
    assert torch.equal(found, plain)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bfloat16_is_within_one_unit(quant_type: str) -> None:
    """Triton's interpreter casts to bfloat16 in a way of its own; a GPU rounds to nearest."""
    plain, found = both(packed((9, 4099), quant_type, True), torch.bfloat16)
    apart = plain.view(torch.int16).int() - found.view(torch.int16).int()
    assert apart.abs().max() <= 1


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_other_block_sizes(block_size: int) -> None:
    """A checkpoint by another program may have them."""
    from bitsandbytes import functional as bnb

    values = torch.randn(33, 515, generator=torch.Generator().manual_seed(1))
    codes, state = bnb.quantize_4bit(values, blocksize=block_size, quant_type="nf4")
    weight = FourBitWeight(
        (33, 515), codes, {"absmax": state.absmax}, quant_type="nf4", block_size=block_size
    )
    plain, found = both(weight, torch.float32)
    assert torch.equal(found, plain)
