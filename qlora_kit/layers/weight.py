"""A weight that no longer changes, in 4, 8 or 16 bits, as plain tensors that multiply.

bitsandbytes' kernels produce the tensors, and bitsandbytes' ops read them back. But they are
ordinary tensors of a module: no state hides in a tensor subclass, so fake tensors, strict state
dicts, sharding and recomputation all see the whole weight.

Shapes: D in, K out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import bitsandbytes  # noqa: F401  registers the ops that unpack
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.layers.kernels import serves
from qlora_kit.layers.kernels.nf4 import unpack_4bit
from qlora_kit.layers.purpose import HEAD, UNPACKED, announce, purpose
from qlora_kit.layers.shards import Shards, held
from qlora_kit.private_torch import own_buffers, own_parameters

QuantType = Literal["nf4", "fp4"]

BLOCK_SIZE = 64
ABSMAX_BLOCK_SIZE = 256
_INT8_STEP = 1 / 127


class FrozenWeight(nn.Module):
    """A weight W of shape (K, D) that is stored packed and multiplied unpacked.

    Code that multiplies calls `product` and `product_back`, and need not know where the numbers lie
    and how they are packed. An autograd function keeps the weight object and calls it again in
    backward. So no graph holds a packed tensor that a loader may have moved since.

    The tensors are buffers; after `as_parameters` they are parameters without gradient.

    Attributes:
        shape: (K, D).
        rows: the rows of each tensor that was cut, by its name; see `cut`.
        shards: the processes that it was cut for; None if it is whole.
    """

    bits: int
    # Tensors of a few numbers, which every process holds.
    _NEVER_CUT: tuple[str, ...] = ()

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.rows: dict[str, int] = {}
        self.shards: Shards | None = None
        self._kept: Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (K, D) in `dtype`."""
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x Wᵀ + b (..., K) of x (..., D), in the dtype of x; b (K,) is cast to it.

        Frozen layers and LoRA layers share this one product with its bias, so a fresh adapter
        changes no bit.
        """
        return F.linear(x, self.unpacked(x.dtype), None if bias is None else bias.to(x.dtype))

    def product_back(self, grad_y: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return grad_y W (..., D) of grad_y (..., K): the gradient of x, in its dtype.

        Args:
            grad_y: gradient of y.
            onto: (N, D), to which the product of grad_y (N, K) is added, in place; it is returned.
        """
        weight = self.unpacked(grad_y.dtype)
        # Not `addmm_`, whose work torch's counter of operations does not know.
        return grad_y @ weight if onto is None else torch.addmm(onto, grad_y, weight, out=onto)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (K, D) in `dtype` for a product, and announce its purpose."""
        if self._kept is not None and self._kept.dtype == dtype:
            return self._kept
        with purpose(UNPACKED):
            weight = self.dequantize(dtype)
        announce(weight, UNPACKED)
        return weight

    def keep_unpacked(self, dtype: torch.dtype | None) -> None:
        """Unpack the weight for all products to come, beside its packed tensors.

        It changes no bit.

        Args:
            dtype: the dtype of the products; None to unpack for each product again.
        """
        self._kept = None if dtype is None else self.unpacked(dtype)

    @property
    def kept_dtype(self) -> torch.dtype | None:
        """The dtype in which the weight is kept unpacked; None if it is not."""
        return None if self._kept is None else self._kept.dtype

    def as_parameters(self) -> Self:
        """Make the stored tensors parameters without gradient, as sharding a model requires."""
        for name, tensor in list(self.named_buffers(recurse=False)):
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        return self

    def cut(self, shards: Shards) -> None:
        """Keep this process's part of the tensors only. Before a product they must be gathered."""
        self.shards = shards
        for name, tensor in list(self.named_buffers(recurse=False)):
            if name not in self._NEVER_CUT:
                self.rows[name] = len(tensor)
                self.register_buffer(name, shards.part(tensor))

    @property
    def is_whole(self) -> bool:
        """Whether all of the tensors are here, whatever part of them this process stores."""
        return all(len(held(getattr(self, name))) == rows for name, rows in self.rows.items())

    def gather(self) -> dict[str, Tensor]:
        """Return the whole tensors of those that were cut, by name; all processes call it."""
        assert self.shards is not None
        return {
            name: self.shards.gathered(held(getattr(self, name)), rows)
            for name, rows in self.rows.items()
        }

    def replace(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put tensors in the places of others, for a while; return the others."""
        before = {name: getattr(self, name) for name in tensors}
        for name, tensor in tensors.items():
            if name in own_buffers(self):
                own_buffers(self)[name] = tensor
            elif isinstance(tensor, nn.Parameter):
                own_parameters(self)[name] = tensor
            else:
                own_parameters(self)[name] = nn.Parameter(tensor, requires_grad=False)
        return before

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that this process stores, by name."""
        for name, tensor in (*self.named_buffers(), *self.named_parameters()):
            yield name, held(tensor)

    @property
    def device(self) -> torch.device:
        """The device that stores the weight."""
        return next(self.stored())[1].device

    @property
    def stored_bytes(self) -> int:
        """The bytes of the stored tensors."""
        return sum(tensor.nbytes for _, tensor in self.stored())


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather the weights of a module for a block that calls it, or a part of it, by itself.

    Within the forward and backward of its layer they are there anyway. All processes that hold the
    weights enter the block together. A module whose weights are whole stays as it is.
    """
    weights = [m for m in module.modules() if isinstance(m, FrozenWeight) and not m.is_whole]
    parts = [weight.replace(weight.gather()) for weight in weights]
    try:
        yield
    finally:
        for weight, stored in zip(weights, parts, strict=True):
            weight.replace(stored)


class HeldWeight(FrozenWeight):
    """A weight that is unpacked once, by its first product, and held for the later products.

    Args:
        packed: the packed weight. All products must be in one dtype.
        uses: the number of products that it is held for; None: as long as this object is there.
    """

    def __init__(self, packed: FrozenWeight, uses: int | None = None) -> None:
        super().__init__(packed.shape)
        self.bits = packed.bits
        self._packed = packed
        self._uses = uses
        self._values: Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as the first call unpacked it."""
        return self.unpacked(dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as the first call unpacked it."""
        values = self._packed.unpacked(dtype) if self._values is None else self._values
        if self._uses is not None:
            self._uses -= 1
        self._values = None if self._uses == 0 else values
        return values


class PlainWeight(FrozenWeight):
    """A weight in 16 bits, as the checkpoint has it. There is nothing to unpack or to keep."""

    bits = 16

    def __init__(self, weight: Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        self.register_buffer("values", weight)
        self.values: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values, to which a ViT casts its images."""
        return self.values.dtype

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the values, cast if `dtype` is another dtype."""
        return self.values.to(dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the values without announcing them: nothing is unpacked."""
        if self._kept is not None and self._kept.dtype == dtype:
            return self._kept
        return self.dequantize(dtype)


class GatheredWeight(FrozenWeight):
    """A weight in 16 bits of which each process holds a part, and gathers the whole for a product.

    It is for a weight that a step needs once, such as that of the head: nothing is gathered in
    advance. Beside a GPU, its part is in host memory. All processes ask for its values together.

    Args:
        weight: (K, D), the whole weight, on any device.
        shards: the processes that hold it together.
        whole_on: the device of the gathered weight.
    """

    bits = 16

    def __init__(self, weight: Tensor, shards: Shards, whole_on: torch.device) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        self._whole_on = whole_on
        self._of = shards
        part = shards.part(weight)
        if whole_on.type == "cuda":
            part = part.cpu().pin_memory()  # the processor waits for copies from other host memory
        self.register_buffer("part", part)
        self.part: Tensor

    @property
    def values(self) -> Tensor:
        """The whole weight (K, D), which lives as long as its caller keeps it."""
        with purpose(HEAD):
            return self._of.gathered(self.part, self.shape[0], self._whole_on)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight, cast if `dtype` is another dtype."""
        return self.values.to(dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight without announcing it: nothing is unpacked."""
        return self.dequantize(dtype)


class Int8Weight(FrozenWeight):
    """A weight in 8 bits: int8 codes, and one scale for each row.

    To dequantise and multiply is more exact than LLM.int8's matmul, which also rounds the
    activations; and a merge can reproduce it.

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
        # The codes are exact in every dtype. On a CPU, a product of int8 codes and fp32 scales
        # would first cast the codes into a temporary tensor of the weight's size.
        weight = self.codes.to(dtype)
        return weight.mul_((self.absmax * _INT8_STEP).unsqueeze(1))


class FourBitWeight(FrozenWeight):
    """A weight in 4 bits: two codes a byte, and one absmax for each block of 64 weights.

    With `double_quant` the absmax values themselves are in 8 bits.

    Source: QLoRA (arXiv:2305.14314), section 3: NF4 and double quantisation.
    """

    bits = 4
    _NEVER_CUT = ("absmax_code", "absmax_offset")

    def __init__(
        self,
        shape: tuple[int, int],
        codes: Tensor,
        constants: Mapping[str, Tensor],
        *,
        quant_type: QuantType,
        block_size: int = BLOCK_SIZE,
        constants_block_size: int = ABSMAX_BLOCK_SIZE,
    ) -> None:
        """Hold the tensors that a kernel produced.

        Args:
            shape: (K, D).
            codes: (K · D / 2, 1), uint8, two weights a byte.
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

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return value in the code book · absmax, for each weight."""
        if serves("nf4", self.codes):
            return self._unpacked_by_kernel(dtype)
        absmax = self.absmax_values()
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.codes, absmax, self.block_size, self.quant_type, self._block_rows(), dtype
        )
        return weight.view(self.shape)

    def with_codes(self, codes: Tensor) -> FourBitWeight:
        """Return a weight of other codes (K · D / 2, 1), which shares the constants of this one."""
        constants = {name: each for name, each in self.stored() if name != "codes"}
        return FourBitWeight(
            self.shape, codes, constants, quant_type=self.quant_type, block_size=self.block_size,
            constants_block_size=self.constants_block_size,
        )  # fmt: skip

    def absmax_values(self) -> Tensor:
        """Return the absmax of each block of weights, fp32."""
        if not self.double_quant:
            return self.absmax
        found: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            self.absmax,
            self.absmax_scale,
            self.absmax_code,
            self.constants_block_size,
            torch.float32,
        )
        return found.add_(self.absmax_offset)

    def _unpacked_by_kernel(self, dtype: torch.dtype) -> Tensor:
        second: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if self.double_quant:
            second = (self.absmax_scale, self.absmax_code, self.absmax_offset)
        return unpack_4bit(
            self.codes, self.absmax, *second, self.shape, self.block_size,
            self.constants_block_size, self.quant_type, dtype,
        )  # fmt: skip

    def _block_rows(self) -> tuple[int, int]:
        """Return a shape for the kernel in which every row begins with a block.

        If D is a multiple of 16 and not of the block size, the AVX-512 kernel of bitsandbytes
        0.50.2 begins a block with each row, and unpacks values that were never packed.
        """
        size = self.shape[0] * self.shape[1]
        whole = size % self.block_size == 0
        return (size // self.block_size, self.block_size) if whole else (1, size)
