"""The part of a tensor that a process holds where several processes hold a base together.

Each process holds some of the rows of a tensor, as `torch.chunk` divides them. Never decides which
tensors are divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

# torch 2.13 has it under a new name, and warns of the old one.
_of_torch: Any = torch.distributed
_all_gather = getattr(_of_torch, "all_gather_single", None) or _of_torch.all_gather_into_tensor


@dataclass(frozen=True, eq=False)
class Shards:
    """The processes that hold a base together; each has a part of every large tensor.

    Attributes:
        count: number of these processes.
        rank: number of this process among them, from 0.
        group: torch's group of these processes.
    """

    count: int
    rank: int = 0
    group: Any = None

    def part(self, tensor: Tensor) -> Tensor:
        """Return the rows of a tensor that this process holds, in memory of their own.

        The last process has fewer rows than the others where they do not divide, or none.
        """
        size = self.part_rows(len(tensor))
        return tensor[self.rank * size : (self.rank + 1) * size].clone()

    def gathered(self, part: Tensor, rows: int, device: torch.device | None = None) -> Tensor:
        """Return a tensor of which each process holds a part; all processes call it together.

        The collective itself writes the result, in place, so nothing else exists beside it.

        Args:
            part: what `part` returned of the tensor, there or in host memory.
            rows: the rows of the whole tensor.
            device: the device of the whole tensor; None: that of the part.
        """
        size = self.part_rows(rows)
        whole = part.new_empty(self.count * size, *part.shape[1:], device=device)
        own = whole[self.rank * size : (self.rank + 1) * size]
        own[: len(part)].copy_(part, non_blocking=True)
        # As bytes, which every backend can send.
        _all_gather(_bytes(whole), _bytes(own), self.group)
        return whole[:rows]

    def part_rows(self, rows: int) -> int:
        """Return the rows that a process holds of a tensor of `rows` rows, at most."""
        return -(-rows // self.count)


def held(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds; all of it unless torch divided it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
