"""The types of numbers in a GGUF file: how tensors are packed, and how exact they then are.

Takes fp32 tensors; returns the bytes that the library `gguf` makes of them, and back.
"""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from qlora_kit.config import GgufTypeName
from qlora_kit.errors import ModelError

_TYPES: dict[GgufTypeName, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_ROUNDED_TO = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_BLOCK = 32
_FP16 = torch.finfo(torch.float16)
_FP32 = torch.finfo(torch.float32)


def file_type(name: GgufTypeName) -> int:
    """Return the number of a file whose matrices have this type (`general.file_type`)."""
    return int(_TYPES[name][1])


def stored_type(name: GgufTypeName, shape: tuple[int, ...]) -> gguf.GGMLQuantizationType:
    """Return the type of a tensor in a file of matrices of type `name`.

    Vectors are F32: llama.cpp adds and multiplies them in fp32 only. Rows that are no whole number
    of blocks cannot be Q8_0 and are F16, as in llama.cpp's own quantiser.
    """
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    if name == "q8_0" and shape[-1] % _BLOCK:
        return gguf.GGMLQuantizationType.F16
    return _TYPES[name][0]


def stored_bytes(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of a type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(block) * int(size)


def encode(name: str, tensor: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """Return the numbers of a fp32 tensor in a type.

    Raises:
        ModelError: a value is too large for the type.
    """
    limit = _FP16.max
    if kind == gguf.GGMLQuantizationType.Q8_0:
        limit *= 127  # the scale of a block is its largest value / 127, in fp16
    is_narrow = kind in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0)
    if is_narrow and tensor.numel() and float(tensor.abs().max()) > limit:
        raise ModelError(
            f"{name}: its largest value {float(tensor.abs().max()):.3g} does not fit "
            f"{kind.name.lower()}; pass --gguf-type bf16"
        )
    packed: np.ndarray[Any, Any] = gguf.quantize(tensor.float().contiguous().numpy(), kind)
    return np.ascontiguousarray(packed)


def decode(data: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType) -> Tensor:
    """Return what `encode` packed, fp32, in memory of its own."""
    return torch.from_numpy(np.array(gguf.dequantize(data, kind), dtype=np.float32))


def excess(expected: Tensor, found: Tensor, kind: gguf.GGMLQuantizationType) -> float:
    """Return the largest difference of two fp32 tensors, in units of the largest rounding error.

    Rounding a number to F32, F16 or BF16 is wrong by at most half a unit in its last place. A Q8_0
    number is a multiple of its block's scale, so it is wrong by at most half of the scale, which is
    1/127 of the largest number of the block; that the scale itself is rounded to fp16 adds 127
    times its rounding error.
    """
    if expected.shape != found.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    largest = float(expected.abs().max())
    if kind == gguf.GGMLQuantizationType.Q8_0:
        blocks = expected.reshape(-1, _BLOCK).abs().amax(1, keepdim=True)
        tiny = 127 * _FP16.smallest_normal * _FP16.eps
        allowed = (blocks * (0.5 / 127 + _FP16.eps / 2) + tiny).expand(-1, _BLOCK)
        allowed = allowed.reshape(expected.shape) * (1 + 1e-5)
    else:
        limits = torch.finfo(_ROUNDED_TO[kind.name.lower()])
        # Half a unit for the rounding, and half for what fp32 arithmetic did before.
        slack = limits.smallest_normal * limits.eps + largest * _FP32.eps
        allowed = expected.abs().mul(limits.eps).add_(slack)
    return float((found - expected).abs_().div_(allowed + 1e-38).max().nan_to_num(nan=math.inf))
