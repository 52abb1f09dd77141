"""The LoRA layer that multiplies by its merged weight, packed again: y = x Ŵᵀ + b.

    Ŵ = Q(W + U + scaling · B A)

W is the frozen weight, unpacked; Q packs as W is packed. So the codes that an export packs again
are those that were trained. Backward takes Q for the identity (the straight-through estimator): A
and B get the gradients of plain LoRA, and x gets dy Ŵ. Ŵ is packed, and is renewed when A or B have
changed; no dense gradient and no unpacked weight is kept.

U puts each weight at a fixed place within the cell of its code, see `spread`. Without it every
weight would lie in the middle of its cell, where a delta of less than half a cell changes no code:
small deltas would be lost, and nothing would be learnt until they are large. With U a delta of a
tenth of a cell moves one weight in ten to the next code, so it is kept on average. Without a delta,
Q(W + U) has the codes of W.

Shapes: K out, D in, R rank.

Source: the straight-through estimator (arXiv:1308.3432), section 4; non-subtractive dither:
Lipshitz, Wannamaker and Vanderkooy, "Quantization and dither: a theoretical survey", Journal of the
Audio Engineering Society 40 (1992); LoRA (arXiv:2106.09685), section 4.1; QLoRA (arXiv:2305.14314),
section 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qlora_kit.errors import ModelError
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.low_rank import LowRank, SplitLowRank
from qlora_kit.layers.purpose import MERGED, UNPACKED, announce, purpose
from qlora_kit.layers.quantize import Quantization
from qlora_kit.layers.weight import BLOCK_SIZE, FourBitWeight, FrozenWeight, Int8Weight

# The lattice of the places within the cells: R₂'s steps, as odd parts of 2¹⁶.
_PERIOD, _OF_ROW, _OF_COLUMN = 1 << 16, 49_471, 37_345
# Weights that are spread at a time; whole blocks, if there are as many rows as a block has weights.
_CHUNK, _ROWS = 1 << 22, BLOCK_SIZE
# Half a cell would be its edge. Packing to 8 bits goes through float16, which rounds large codes.
_MOST_4BIT, _MOST_INT8 = 0.49, 0.4


class _InWeight:
    """A term that the weight holds already: it has gradients, and adds nothing."""

    def add_to(self, y: Tensor, h: Tensor, layer: int = 0) -> None:
        """Leave y as it is."""

    def add_input_gradient(self, grad_x: Tensor, grad_inner: Tensor) -> None:
        """Leave the gradient of x as it is."""


class _MergedTerm(_InWeight, LowRank):
    pass


class _SplitMergedTerm(_InWeight, SplitLowRank):
    pass


class MergeAwareLinear(LoRALinear):
    """A LoRA layer that multiplies by its merged weight, packed as the frozen weight is.

    Whoever changes A or B calls `renew` before the next product.

    Args:
        frozen: the layer that this layer wraps, in 4 or 8 bits.
        quantization: how its weight is packed.
        sizes: the other arguments of `LoRALinear`; there is no dropout.

    Raises:
        ModelError: the weight is packed in blocks of another size than the kit packs.
    """

    def __init__(self, frozen: FrozenLinear, *, quantization: Quantization, **sizes: Any) -> None:
        super().__init__(frozen, **sizes)
        size = getattr(frozen.weight, "block_size", BLOCK_SIZE)
        if size != BLOCK_SIZE:
            raise ModelError(
                f"--merge-aware: the base is packed in blocks of {size}; expected {BLOCK_SIZE}; "
                "train on the unquantised model"
            )
        self._quantization = quantization
        like = FrozenLinear(
            frozen.in_features, frozen.out_features, bias=False, is_transposed=frozen.is_transposed
        )
        like.bias = frozen.bias
        # A tuple keeps it from being a child: it is no layer of the model, and nothing to save.
        self._merged = (like,)
        like.weight = self._packed()

    @property
    def multiplied(self) -> FrozenLinear:
        """The layer with the merged weight."""
        return self._merged[0]

    @property
    def merged(self) -> FrozenWeight:
        """The merged weight Ŵ, packed."""
        return self.multiplied.weight

    def as_trained(self, term: LowRank) -> LowRank:
        """Return the term of a call as one that the weight holds."""
        kind = _SplitMergedTerm if isinstance(term, SplitLowRank) else _MergedTerm
        return kind(term.a, term.b, term.kept, *term.factors)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the merged weight Ŵ, unpacked, (K, D), fp32."""
        return self.merged.dequantize(torch.float32)

    def renew(self) -> None:
        """Make the merged weight anew, of the frozen weight and of A and B as they are."""
        weight = self._packed()
        weight.keep_unpacked(self.merged.kept_dtype)
        for _, tensor in weight.stored():
            announce(tensor, MERGED)
        self.multiplied.weight = weight

    def _packed(self) -> FrozenWeight:
        return packed_sum(
            self.frozen.weight, self.lora_A, self.lora_B, self.scaling, self._quantization
        )


@torch.no_grad()
def packed_sum(
    frozen: FrozenWeight, a: Tensor, b: Tensor, scaling: float, quantization: Quantization
) -> FrozenWeight:
    """Return Ŵ = Q(W + U + scaling · B A), (K, D), on the device of W.

    Training and export both call this, so they have the same bits on the same kind of device.

    Args:
        frozen: W, packed.
        a: A (R, D), fp32.
        b: B (K, R), fp32.
        scaling: factor of the product.
        quantization: how W is packed, and Ŵ will be.
    """
    with purpose(UNPACKED):
        values = spread(frozen)
        return quantization.freeze(torch.addmm(values, b, a, alpha=scaling, out=values))


# ---------------------------------------------------------------- the places within the cells


def spread(weight: FrozenWeight) -> Tensor:
    """Return W + U, (K, D), fp32: unpacked, with each weight at a place of its own in its cell.

    The place depends on nothing but the row and the column, and packing it gives W again. A weight
    with the largest code of its block stays, because the constant of the block is made of it.

    Args:
        weight: W, packed in 4 or 8 bits.
    """
    rows, columns = weight.shape
    values = torch.empty(rows, columns, device=weight.device)
    step = max(_ROWS, _CHUNK // columns // _ROWS * _ROWS)
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        levels = _levels(chunk, columns, weight.device)
        if isinstance(weight, FourBitWeight):
            values[chunk] = _spread_4bit(weight, chunk, levels)
        else:
            assert isinstance(weight, Int8Weight)
            values[chunk] = _spread_int8(weight, chunk, levels)
    return values


def _levels(rows: slice, columns: int, device: torch.device) -> Tensor:
    """Return the number of the place, 0 to 255, of each weight of some rows; int32, on `device`.

    They are those of a lattice, which covers every row, column and square evenly. All sums are of
    integers, so they are the same on every device.

    Source: M. Roberts, "The unreasonable effectiveness of quasirandom sequences" (2018), R₂.
    """
    of_row = torch.arange(rows.start, rows.stop, device=device) * _OF_ROW % _PERIOD
    of_column = torch.arange(columns, device=device) * _OF_COLUMN % _PERIOD
    sums = of_row.int().unsqueeze(1) + of_column.int()
    return sums.bitwise_and_(_PERIOD - 1).bitwise_right_shift_(8)


def _shares(device: torch.device, most: float) -> Tensor:
    """Return the share of a cell that each of the 256 places is off its middle, within ± most."""
    return (torch.arange(256, device=device) - 127.5) * (most / 127.5)


def _spread_4bit(weight: FourBitWeight, rows: slice, levels: Tensor) -> Tensor:
    count, columns = levels.shape
    first = rows.start * columns  # a multiple of the block size
    last = first + count * columns
    pairs = weight.codes.view(-1)[first // 2 : -(-last // 2)].int()
    codes = torch.stack((pairs >> 4, pairs & 15), 1).view(-1)[: last - first]
    places = codes.bitwise_left_shift_(8).add_(levels.view(-1))
    size = weight.block_size
    absmax = weight.absmax_values()[first // size : -(-last // size)]
    values = _places(weight).index_select(0, places)
    return values.mul_(absmax.repeat_interleave(size)[: last - first]).view(count, columns)


def _places(weight: FourBitWeight) -> Tensor:
    """Return the values of all places of all codes, in units of absmax: (16 · 256,), fp32."""
    book: Tensor = bnb.get_4bit_type(weight.quant_type, device=weight.device)
    away = book - book.unsqueeze(1)
    inner = book.abs() < 1
    up = torch.where(away > 0, away, torch.inf).amin(1).where(inner, 0.0)
    down = torch.where(away < 0, -away, torch.inf).amin(1).where(inner, 0.0)
    shares = _shares(weight.device, _MOST_4BIT)
    off = torch.where(shares > 0, up.unsqueeze(1), down.unsqueeze(1)) * shares
    return (book.unsqueeze(1) + off).view(-1)


def _spread_int8(weight: Int8Weight, rows: slice, levels: Tensor) -> Tensor:
    codes = weight.codes[rows].float()
    shares = _shares(weight.device, _MOST_INT8).index_select(0, levels.view(-1)).view(levels.shape)
    inner = codes.abs() < 127
    return codes.add_(shares.mul_(inner)).mul_((weight.absmax[rows] / 127).unsqueeze(1))


# ---------------------------------------------------------------- the same codes


def hash_of_all(hashes: Mapping[str, str]) -> str:
    """Return the SHA-256 of the packed weights of many layers, given the hash of each by path."""
    lines = "\n".join(f"{path} {each}" for path, each in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_of_codes(weight: FrozenWeight) -> str:
    """Return the SHA-256 of a packed weight: of its codes, its absmax and their second level."""
    found = hashlib.sha256()
    for _, tensor in sorted(weight.stored(), key=lambda part: part[0]):
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
