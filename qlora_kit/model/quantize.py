"""A weight that no longer changes, in 4, 8 or 16 bits, as plain tensors.

`Quantization.freeze` turns a weight into a `FrozenWeight`; that one answers `dequantize`.
The tensors are what bitsandbytes' kernels produce and are read back by bitsandbytes' ops,
but they are ordinary buffers: no state hides in a tensor subclass, so fake tensors, strict
state dicts, sharding and recomputation all see the whole weight.

This file and `train/optimizer.py` are the only importers of bitsandbytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora_kit.config import BaseModelOptions
from qlora_kit.errors import ModelError

# Without the optional `kernels` package bitsandbytes logs a failed import at every start.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from bitsandbytes import functional as bnb  # noqa: E402

QuantType = Literal["nf4", "fp4"]

_DEFAULTS = BaseModelOptions()
BLOCK_SIZE = 64
_ABSMAX_BLOCK_SIZE = 256
_FLOAT16_MAX = 65504.0
_INT8_STEP = 1 / 127


class FrozenWeight(nn.Module):
    """A weight of shape (K, D) that is stored packed and multiplied unpacked.

    Its tensors are buffers. An autograd function keeps the weight itself and asks it again in
    backward, so that nothing holds a packed tensor which a loader may have moved since.
    """

    bits: int

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (K, D) in `dtype`."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weight is stored."""
        return next(self.buffers()).device

    @property
    def stored_bytes(self) -> int:
        """Bytes the stored tensors take."""
        return sum(tensor.nbytes for tensor in self.buffers())


class PlainWeight(FrozenWeight):
    """16 bits: the weight as the checkpoint has it."""

    bits = 16

    def __init__(self, weight: Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        self.register_buffer("values", weight)
        self.values: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the values, cast when the compute dtype is another one."""
        return self.values.to(dtype)


class Int8Weight(FrozenWeight):
    """8 bits: int8 codes and one scale a row.

    Dequantised and multiplied, it is more exact than LLM.int8's matmul, which also rounds
    the activations, and it is what a merge reproduces.

    Source: LLM.int8() (arXiv:2208.07339), section 2.2, vector-wise quantisation.
    """

    bits = 8

    def __init__(self, codes: Tensor, absmax: Tensor) -> None:
        super().__init__((codes.shape[0], codes.shape[1]))
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.codes: Tensor
        self.absmax: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return codes · absmax / 127, computed in fp32 and rounded once."""
        # Codes are exact in every dtype. One product with both would first cast them into a
        # temporary of the weight's size on a CPU.
        weight = self.codes.to(dtype)
        return weight.mul_((self.absmax * _INT8_STEP).unsqueeze(1))


class FourBitWeight(FrozenWeight):
    """4 bits: two codes a byte, one absmax a block of 64, itself in 8 bits if `double_quant`.

    Source: QLoRA (arXiv:2305.14314), section 3: NF4 and double quantisation.
    """

    bits = 4

    def __init__(
        self,
        shape: tuple[int, int],
        codes: Tensor,
        constants: Mapping[str, Tensor],
        *,
        quant_type: QuantType,
        block_size: int = BLOCK_SIZE,
        constants_block_size: int = _ABSMAX_BLOCK_SIZE,
    ) -> None:
        """Hold what a kernel produced.

        Args:
            shape: (K, D).
            codes: uint8, two weights a byte.
            constants: `absmax` alone (fp32), or `absmax` (uint8) with `absmax_scale`,
                `absmax_code` and `absmax_offset` for double quantisation.
            quant_type: code book of the weights.
            block_size: weights that share one absmax.
            constants_block_size: absmax values that share one absmax_scale.
        """
        super().__init__(shape)
        self.quant_type: QuantType = quant_type
        self.block_size = block_size
        self.constants_block_size = constants_block_size
        self.double_quant = len(constants) > 1
        self.register_buffer("codes", codes)
        for name, tensor in constants.items():
            self.register_buffer(name, tensor)
        self.codes: Tensor
        self.absmax: Tensor
        self.absmax_scale: Tensor
        self.absmax_code: Tensor
        self.absmax_offset: Tensor

    @classmethod
    def empty(
        cls, shape: tuple[int, int], quantization: Quantization, device: torch.device
    ) -> FourBitWeight:
        """Return a weight whose tensors have their sizes and no values yet."""
        elements = shape[0] * shape[1]
        blocks = -(-elements // BLOCK_SIZE)

        def sized(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, device=device)

        constants = {"absmax": sized(blocks, torch.float32)}
        if quantization.double_quant:
            constants = {
                "absmax": sized(blocks, torch.uint8),
                "absmax_scale": sized(-(-blocks // _ABSMAX_BLOCK_SIZE), torch.float32),
                "absmax_code": sized(256, torch.float32),
                "absmax_offset": torch.empty((), device=device),
            }
        codes = sized(-(-elements // 2), torch.uint8).unsqueeze(1)
        return cls(shape, codes, constants, quant_type=quantization.quant_type)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return code book values · absmax."""
        absmax = self.absmax
        if self.double_quant:
            absmax = torch.ops.bitsandbytes.dequantize_blockwise(
                absmax,
                self.absmax_scale,
                self.absmax_code,
                self.constants_block_size,
                torch.float32,
            ).add_(self.absmax_offset)
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.codes, absmax, self.block_size, self.quant_type, self._block_rows(), dtype
        )
        return weight.view(self.shape)

    def _block_rows(self) -> tuple[int, int]:
        """Return a shape of the weight whose rows begin with a block.

        Where D is a multiple of 16 and not of the block size, bitsandbytes' kernel for AVX-512
        (0.50.2) begins a block with each row, and unpacks values that were never packed.
        """
        size = self.shape[0] * self.shape[1]
        whole = size % self.block_size == 0
        return (size // self.block_size, self.block_size) if whole else (1, size)


@dataclass(frozen=True)
class Quantization:
    """How the frozen weights of a base are held."""

    bits: Literal[4, 8, 16] = _DEFAULTS.bits
    quant_type: QuantType = _DEFAULTS.quant_type
    double_quant: bool = _DEFAULTS.double_quant

    def freeze(self, weight: Tensor) -> FrozenWeight:
        """Quantise a weight (K, D) on the device where it lies.

        Raises:
            ModelError: at 8 bits, a value beyond float16, through which int8 goes.
        """
        if self.bits == 16:
            return PlainWeight(weight)
        if self.bits == 8:
            return _freeze_int8(weight)
        return _freeze_4bit(weight, self.quant_type, self.double_quant)

    def as_bitsandbytes(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the `quantization_config` that transformers finds such weights by.

        Args:
            dtype: what transformers shall compute in.
        """
        named: dict[str, Any] = {"quant_method": "bitsandbytes"}
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
        """Return the scheme in a few words, such as "4-bit nf4, double quantisation"."""
        if self.bits != 4:
            return f"{self.bits}-bit"
        return f"4-bit {self.quant_type}" + (", double quantisation" if self.double_quant else "")


def _freeze_int8(weight: Tensor) -> Int8Weight:
    if weight.dtype != torch.float16 and weight.abs().amax() > _FLOAT16_MAX:
        raise ModelError("a weight beyond 65504 does not fit 8 bits; use --bits 4 or 16")
    # The kernel of a GPU reads row after row from where the memory begins, whatever the strides.
    rows = weight.to(torch.float16).contiguous()
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(rows)
    return Int8Weight(codes, absmax)


def _freeze_4bit(weight: Tensor, quant_type: QuantType, double_quant: bool) -> FourBitWeight:
    codes, state = bnb.quantize_4bit(
        weight, blocksize=BLOCK_SIZE, quant_type=quant_type, compress_statistics=double_quant
    )
    shape = (weight.shape[0], weight.shape[1])
    return FourBitWeight(shape, codes, _constants(state), quant_type=quant_type)


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
    """Return what a bitsandbytes checkpoint stores of a weight, see `read_quantized`.

    Args:
        weight: in 4 or 8 bits.
        dtype: what it was before, which bitsandbytes unpacks it to.
    """
    if isinstance(weight, Int8Weight):
        # The format is 0: codes by rows.
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
    """Rebuild a frozen weight from what a bitsandbytes checkpoint stores of it.

    Args:
        parts: the stored tensors by the rest of their name: "weight" with "SCB" for 8 bits;
            "weight" with "weight.absmax", "weight.quant_map",
            "weight.quant_state.bitsandbytes__nf4" and, double-quantised,
            "weight.nested_absmax", "weight.nested_quant_map" for 4 bits.
        shape: (K, D) of the layer.

    Raises:
        ModelError: the parts are neither of the two, or of another shape.
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
        constants_block_size=state.state2.blocksize if state.nested else _ABSMAX_BLOCK_SIZE,
    )
