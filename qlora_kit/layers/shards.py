"""The part of a tensor that a process holds where several processes hold a base together.

Each process holds some of the rows of a tensor, as `torch.chunk` divides them. Never decides which
tensors are divided.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qlora_kit.private_torch import own_parameters


@dataclass(frozen=True, eq=False)
class Shards:
    """The processes that hold a base together; each has a part of every large tensor.

    Attributes:
        count: number of these processes.
        rank: number of this process among them, from 0.
        group: torch's group of these processes; None in a plan, which has no other process.
    """

    count: int
    rank: int = 0
    group: Any = None

    def part(self, tensor: Tensor) -> Tensor:
        """Return the rows of a tensor that this process holds, in memory of their own.

        The last process has fewer rows than the others where they do not divide, or none.
        """
        size = self._most_rows(len(tensor))
        return tensor[self.rank * size : (self.rank + 1) * size].clone()

    def gathered(self, part: Tensor, rows: int) -> Tensor:
        """Return a tensor of which each process holds a part; all processes call it together.

        The result is written by the collective itself, so nothing larger exists beside it.

        Args:
            part: what `part` returned of the tensor.
            rows: the rows of the whole tensor.
        """
        size = self._most_rows(rows)
        whole = part.new_empty(self.count * size, *part.shape[1:])
        if self.group is not None:
            padded = part
            if len(part) < size:
                padded = part.new_zeros(size, *part.shape[1:])
                padded[: len(part)] = part
            # As bytes, which every backend can send.
            torch.distributed.all_gather_into_tensor(_bytes(whole), _bytes(padded), self.group)
        return whole[:rows]

    def _most_rows(self, rows: int) -> int:
        return -(-rows // self.count)


def held(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds; all of it unless torch divided it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather the weights of a module for a block that calls it, or a part of it, by itself.

    Within the forward and backward of its layer they are there anyway. All processes that hold the
    weights enter the block together. A module whose weights are not divided stays as it is.
    """
    divided = [
        (own_parameters(each), name, parameter)
        for each in module.modules()
        for name, parameter in own_parameters(each).items()
        if isinstance(parameter, DTensor)
    ]
    for parameters, name, part in divided:
        parameters[name] = nn.Parameter(part.full_tensor(), requires_grad=False)
    try:
        yield
    finally:
        for parameters, name, part in divided:
            parameters[name] = part


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
