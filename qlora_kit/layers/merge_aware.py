"""The LoRA layer that multiplies by its merged weight, packed again: y = x Ŵᵀ + b.

    Ŵ = Q(W + U + scaling · B A)

W is the frozen weight, unpacked; Q packs with the constants of W, so Ŵ differs from W in its codes
alone. They are those that an export writes. Backward takes Q for the identity (the straight-through
estimator): A and B get the gradients of plain LoRA, and x gets dy Ŵ. Ŵ is packed, and is renewed
when A or B have changed; no dense gradient and no unpacked weight is kept.

Constants made anew would cost more than they give: a delta on the largest weight of a block would
move its constant, and with it all other weights of the block. The largest codes stay as they are.

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
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.low_rank import LowRank, SplitLowRank
from qlora_kit.layers.purpose import MERGED, UNPACKED, announce, purpose
from qlora_kit.layers.quantize import recoded
from qlora_kit.layers.weight import FourBitWeight, FrozenWeight, Int8Weight

# The lattice of the places within the cells: R₂'s steps, as odd parts of 2¹⁶.
_PERIOD, _OF_ROW, _OF_COLUMN = 1 << 16, 49_471, 37_345
# Weights that are spread at a time; on a CPU, what fits the cache of a core.
_CHUNK, _CHUNK_OF_CPU = 1 << 22, 1 << 18
# How far a place is off the middle of its cell, in units of the cell; half of one is its edge.
_MOST = 0.49
# Where the largest codes are put, in units of their constant: beyond it, whatever is added.
_BEYOND = 1e4


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
        sizes: the other arguments of `LoRALinear`; there is no dropout.
    """

    def __init__(self, frozen: FrozenLinear, **sizes: Any) -> None:
        super().__init__(frozen, **sizes)
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
        announce(codes_of(weight), MERGED)
        self.multiplied.weight = weight

    def _packed(self) -> FrozenWeight:
        return packed_sum(self.frozen.weight, self.lora_A, self.lora_B, self.scaling)


@torch.no_grad()
def packed_sum(frozen: FrozenWeight, a: Tensor, b: Tensor, scaling: float) -> FrozenWeight:
    """Return Ŵ = Q(W + U + scaling · B A), (K, D), on the device of W, whose constants it shares.

    Training and export both call this, so they have the same bits on the same kind of device.

    Args:
        frozen: W, packed in 4 or 8 bits.
        a: A (R, D), fp32.
        b: B (K, R), fp32.
        scaling: factor of the product.
    """
    with purpose(UNPACKED):
        values = spread(frozen)
        return recoded(frozen, torch.addmm(values, b, a, alpha=scaling, out=values))


def codes_of(weight: FrozenWeight) -> Tensor:
    """Return the codes of a weight in 4 or 8 bits: of Ŵ, all that is not shared with W."""
    assert isinstance(weight, FourBitWeight | Int8Weight)
    return weight.codes


# ---------------------------------------------------------------- the places within the cells


def spread(weight: FrozenWeight) -> Tensor:
    """Return W + U, (K, D), fp32: unpacked, with each weight at a place of its own in its cell.

    The place depends on nothing but the row and the column, and packing it gives W again. A weight
    with the largest code of its block is put far beyond its constant, where it keeps its code.

    Args:
        weight: W, packed in 4 or 8 bits.
    """
    rows, columns = weight.shape
    values = torch.empty(rows, columns, device=weight.device)
    # As many rows as a block has weights are whole blocks.
    size = getattr(weight, "block_size", 1)
    most = _CHUNK_OF_CPU if weight.device.type == "cpu" else _CHUNK
    step = max(size, most // columns // size * size)
    put = _placer(weight)
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        values[chunk] = put(chunk, _levels(chunk, columns, weight.device))
    return values


def _placer(weight: FrozenWeight) -> Callable[[slice, Tensor], Tensor]:
    """Return what puts some rows of a weight at the places with the given numbers."""
    if isinstance(weight, FourBitWeight):
        return partial(_spread_4bit, weight, _places(weight), weight.absmax_values())
    assert isinstance(weight, Int8Weight)
    return partial(_spread_int8, weight, _shares(weight.device))


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


def _shares(device: torch.device) -> Tensor:
    """Return the share of a cell that each of the 256 places is off its middle."""
    return (torch.arange(256, device=device) - 127.5) * (_MOST / 127.5)


def _spread_4bit(
    weight: FourBitWeight, of_codes: Tensor, absmax: Tensor, rows: slice, levels: Tensor
) -> Tensor:
    count, columns = levels.shape
    first = rows.start * columns  # a multiple of the block size
    last = first + count * columns
    pairs = weight.codes.view(-1)[first // 2 : -(-last // 2)].int()
    codes = torch.stack((pairs >> 4, pairs & 15), 1).view(-1)[: last - first]
    places = codes.bitwise_left_shift_(8).add_(levels.view(-1))
    values = of_codes.index_select(0, places)
    size = weight.block_size
    of_blocks = absmax[first // size : -(-last // size)]
    return values.mul_(of_blocks.repeat_interleave(size)[: last - first]).view(count, columns)


def _places(weight: FourBitWeight) -> Tensor:
    """Return the values of all places of all codes, in units of absmax: (16 · 256,), fp32."""
    book: Tensor = bnb.get_4bit_type(weight.quant_type, device=weight.device).unsqueeze(1)
    away = book.T - book
    up = torch.where(away > 0, away, torch.inf).amin(1, keepdim=True)
    down = torch.where(away < 0, -away, torch.inf).amin(1, keepdim=True)
    shares = _shares(weight.device)
    places = book + torch.where(shares > 0, up, down) * shares
    return places.where(book.abs() < 1, book * _BEYOND).view(-1)


def _spread_int8(weight: Int8Weight, shares: Tensor, rows: slice, levels: Tensor) -> Tensor:
    codes = weight.codes[rows].float()
    moved = codes + shares.index_select(0, levels.view(-1)).view(levels.shape)
    places = torch.where(codes.abs() < 127, moved, codes * _BEYOND)
    return places.mul_((weight.absmax[rows] / 127).unsqueeze(1))


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
