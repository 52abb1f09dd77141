"""Turns a weight into a frozen weight, and frozen weights from and into bitsandbytes' own format.

`Quantization.freeze` packs with bitsandbytes' kernels; `read_quantized` and `bitsandbytes_parts`
read and write the tensors that a bitsandbytes checkpoint stores.

This package and `train/optimizer.py` are the only importers of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qlora_kit.config import BaseModelOptions
from qlora_kit.errors import ModelError
from qlora_kit.layers.nearest import nearest_codes
from qlora_kit.layers.weight import (
    ABSMAX_BLOCK_SIZE,
    BLOCK_SIZE,
    FourBitWeight,
    FrozenWeight,
    Int8Weight,
    PlainWeight,
    QuantType,
)

_DEFAULTS = BaseModelOptions()
_FLOAT16_MAX = 65504.0
# Divided by in place of a constant of zero, whose values are all zero.
_LEAST_CONSTANT = 1e-30


@dataclass(frozen=True)
class Quantization:
    """The bits and the format of the frozen weights of a base.

    Attributes:
        bits: bits of a weight.
        quant_type: code book of the weights, at 4 bits.
        double_quant: whether the absmax values are quantised too, at 4 bits.
    """

    bits: Literal[4, 8, 16] = _DEFAULTS.bits
    quant_type: QuantType = _DEFAULTS.quant_type
    double_quant: bool = _DEFAULTS.double_quant

    def freeze(self, weight: Tensor) -> FrozenWeight:
        """Quantise a weight (K, D) on the device where it lies.

        Raises:
            ModelError: at 8 bits, a value is beyond the range of float16; the kernel takes float16.
        """
        if self.bits == 16:
            return PlainWeight(weight)
        if self.bits == 8:
            return _freeze_int8(weight)
        return _freeze_4bit(weight, self.quant_type, self.double_quant)

    def as_bitsandbytes(self, dtype: torch.dtype, kept: Sequence[str] = ()) -> dict[str, Any]:
        """Return the `quantization_config` by which transformers recognises these weights.

        Args:
            dtype: the dtype that transformers shall compute in.
            kept: names of modules whose layers are not packed; transformers knows language heads.
        """
        named: dict[str, Any] = {"quant_method": "bitsandbytes"}
        if kept:
            named["llm_int8_skip_modules"] = list(kept)
        if self.bits == 8:
            return {**named, "load_in_8bit": True, "load_in_4bit": False}
        return {
            **named,
            "load_in_8bit": False,
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }

    def describe(self) -> str:
        """Return the bits and the format in words, such as "4-bit nf4, double quantisation"."""
        if self.bits != 4:
            return f"{self.bits}-bit"
        return f"4-bit {self.quant_type}" + (", double quantisation" if self.double_quant else "")


def _freeze_int8(weight: Tensor) -> Int8Weight:
    if weight.dtype != torch.float16 and weight.abs().amax() > _FLOAT16_MAX:
        raise ModelError("a weight beyond 65504 does not fit 8 bits; use --bits 4 or 16")
    # A GPU's kernel ignores strides: it reads row after row from the beginning of the memory.
    rows = weight.to(torch.float16).contiguous()
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(rows)
    return Int8Weight(codes, absmax)


def _freeze_4bit(weight: Tensor, quant_type: QuantType, double_quant: bool) -> FourBitWeight:
    codes, state = bnb.quantize_4bit(
        weight, blocksize=BLOCK_SIZE, quant_type=quant_type, compress_statistics=double_quant
    )
    shape = (weight.shape[0], weight.shape[1])
    return FourBitWeight(shape, codes, _constants(state), quant_type=quant_type)


def recoded(weight: FrozenWeight, values: Tensor) -> FrozenWeight:
    """Pack values with the constants of a packed weight; the result shares them, and has new codes.

    A value beyond its constant has the largest code.

    Args:
        weight: in 4 or 8 bits.
        values: (K, D), fp32, changed in place. Where a code of the weight is the largest, they have
            its sign, and the size of the constant at least.
    """
    if isinstance(weight, Int8Weight):
        per_code = (127 / weight.absmax.clamp(min=_LEAST_CONSTANT)).unsqueeze(1)
        codes = values.mul_(per_code).round_().clamp_(-127, 127).to(torch.int8)
        return Int8Weight(codes, weight.absmax)
    assert isinstance(weight, FourBitWeight)
    blocks = in_blocks(weight, values)
    if values.device.type == "cpu":
        return weight.with_codes(_nearest(blocks, weight.quant_type))
    return weight.with_codes(codes_by_kernel(values, blocks, weight.quant_type, weight.block_size))


def in_blocks(weight: FourBitWeight, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return values (K, D) by the blocks of a weight, (n, size), and the constants (n,) of these.

    The last block may be shorter; it stands apart then.
    """
    size, absmax, flat = weight.block_size, weight.absmax_values(), values.view(-1)
    whole = len(flat) // size * size
    blocks = [(flat[:whole].view(-1, size), absmax[: whole // size])]
    if whole < len(flat):
        blocks.append((flat[whole:].view(1, -1), absmax[-1:]))
    return blocks


def codes_by_kernel(
    values: Tensor, blocks: Sequence[tuple[Tensor, Tensor]], quant_type: QuantType, size: int
) -> Tensor:
    """Return the codes of values (K, D) and of their blocks, which are changed: (K · D / 2, 1).

    bitsandbytes' kernels take a constant to be the largest value of its block. Clamped, the values
    have the constants that are there.
    """
    for part, absmax in blocks:
        most = absmax.unsqueeze(1)
        torch.clamp(part, min=-most, max=most, out=part)
    codes: Tensor = bnb.quantize_4bit(values, blocksize=size, quant_type=quant_type)[0]
    return codes


def _nearest(blocks: Sequence[tuple[Tensor, Tensor]], quant_type: QuantType) -> Tensor:
    """Return the codes of blocks of values and their constants, two in a byte: (n / 2, 1)."""
    book = bnb.get_4bit_type(quant_type, device="cpu")
    found = [nearest_codes(*part, book).view(-1) for part in blocks]
    if sum(map(len, found)) % 2:
        found.append(found[0].new_zeros(1))
    codes = found[0] if len(found) == 1 else torch.cat(found)
    first, second = codes.view(-1, 2).unbind(1)
    return (first << 4).bitwise_or_(second).unsqueeze(1)


def empty_4bit(
    shape: tuple[int, int], quantization: Quantization, device: torch.device
) -> FourBitWeight:
    """Return a weight whose tensors have their sizes, and no values yet.

    Args:
        shape: (K, D).
        quantization: 4 bits, in either format.
        device: the device of the tensors.
    """
    elements = shape[0] * shape[1]
    blocks = -(-elements // BLOCK_SIZE)

    def sized(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device=device)

    constants = {"absmax": sized(blocks, torch.float32)}
    if quantization.double_quant:
        constants = {
            "absmax": sized(blocks, torch.uint8),
            "absmax_scale": sized(-(-blocks // ABSMAX_BLOCK_SIZE), torch.float32),
            "absmax_code": sized(256, torch.float32),
            "absmax_offset": torch.empty((), device=device),
        }
    codes = sized(-(-elements // 2), torch.uint8).unsqueeze(1)
    return FourBitWeight(shape, codes, constants, quant_type=quantization.quant_type)


def _constants(state: Any) -> dict[str, Tensor]:
    """Return the constants of a bitsandbytes quantisation state as plain tensors."""
    if not state.nested:
        return {"absmax": state.absmax}
    return {
        "absmax": state.absmax,
        "absmax_scale": state.state2.absmax,
        "absmax_code": state.state2.code,
        "absmax_offset": state.offset,
    }


def bitsandbytes_parts(weight: FrozenWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that a bitsandbytes checkpoint stores of a weight; see `read_quantized`.

    Args:
        weight: a weight in 4 or 8 bits.
        dtype: dtype of the weight before it was quantised, to which bitsandbytes unpacks it.
    """
    if isinstance(weight, Int8Weight):
        # Format 0 is: codes by rows.
        row_format = torch.zeros((), dtype=torch.uint8)
        return {"weight": weight.codes, "SCB": weight.absmax, "weight_format": row_format}
    assert isinstance(weight, FourBitWeight)
    offset, constants = None, None
    if weight.double_quant:
        offset = weight.absmax_offset
        constants = bnb.QuantState(
            weight.absmax_scale,
            code=weight.absmax_code,
            blocksize=weight.constants_block_size,
            dtype=torch.float32,
        )
    state = bnb.QuantState(
        weight.absmax,
        shape=torch.Size(weight.shape),
        code=bnb.get_4bit_type(weight.quant_type, device=weight.device),
        blocksize=weight.block_size,
        quant_type=weight.quant_type,
        dtype=dtype,
        offset=offset,
        state2=constants,
    )
    parts = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    return {"weight": weight.codes, **parts}


def read_quantized(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> FrozenWeight:
    """Rebuild a frozen weight from the tensors that a bitsandbytes checkpoint stores of it.

    Args:
        parts: the stored tensors, by the end of their name. For 8 bits: "weight" and "SCB". For
            4 bits: "weight", "weight.absmax", "weight.quant_map" and
            "weight.quant_state.bitsandbytes__nf4"; with double quantisation also
            "weight.nested_absmax" and "weight.nested_quant_map".
        shape: (K, D) of the layer.

    Raises:
        ModelError: the parts are those of neither format, or of a weight of another shape.
    """
    codes = parts["weight"]
    if "SCB" in parts:
        if tuple(codes.shape) != shape:
            raise ModelError(f"8-bit weight of shape {tuple(codes.shape)}; expected {shape}")
        return Int8Weight(codes, parts["SCB"])
    state_parts = {name: tensor for name, tensor in parts.items() if name.startswith("weight.")}
    try:
        state = bnb.QuantState.from_dict(state_parts, device=codes.device)
    except (ValueError, KeyError, AssertionError) as error:
        raise ModelError(f"not the parts of a 4-bit weight ({sorted(parts)})") from error
    if tuple(state.shape) != shape:
        raise ModelError(f"4-bit weight of shape {tuple(state.shape)}; expected {shape}")
    return FourBitWeight(
        shape,
        codes,
        _constants(state),
        quant_type=state.quant_type,
        block_size=state.blocksize,
        constants_block_size=state.state2.blocksize if state.nested else ABSMAX_BLOCK_SIZE,
    )
