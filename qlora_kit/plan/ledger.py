"""Who holds how much memory, while code runs on fake tensors.

A `Ledger` sees every operation, learns of each storage when it is made and when the last
tensor of it is gone, and keeps the sum and its peak, told apart by purpose.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The CUDA allocator hands out multiples of this; the CPU's is told to, for one kind of sum.
ROUNDED_BYTES = 512


@dataclass(frozen=True)
class Peak:
    """The most that was live at one time.

    Attributes:
        bytes: all of it.
        by_purpose: its parts.
    """

    bytes: int
    by_purpose: dict[str, int]


class _Account:
    """The live storages of one device."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}

    def add(self, purpose: str, amount: int) -> None:
        self.live[purpose] += amount
        self.total += amount
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.live)

    def restart(self) -> None:
        self.peak, self.at_peak = self.total, dict(self.live)


class Ledger(TorchDispatchMode):
    """Keeps account of storages by device; use as a context manager around what is to be seen.

    Args:
        device: type of the device that is planned for; all else is the host.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self._accounts = {"device": _Account(), "host": _Account()}
        self._known: dict[int, tuple[str, str, int]] = {}
        self._purposes = ["activations"]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and book what it made."""
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # A number that code asks for; every check of the kit passes on 1.
            return 1
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.book(leaf, self._purposes[-1])
        return result

    def _side(self, tensor: Tensor) -> str:
        return "device" if tensor.device.type == self.device else "host"

    def book(self, tensor: Tensor, purpose: str) -> None:
        """Learn of a tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        amount = -(-storage.nbytes() // ROUNDED_BYTES) * ROUNDED_BYTES
        side = self._side(tensor)
        self._known[key] = (side, purpose, amount)
        self._accounts[side].add(purpose, amount)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        side, purpose, amount = self._known.pop(key)
        self._accounts[side].add(purpose, -amount)

    def claim(self, tensor: Tensor, purpose: str) -> None:
        """Say what a tensor is for, whatever it was made as."""
        key = tensor.untyped_storage()._cdata
        if key not in self._known:
            self.book(tensor, purpose)
            return
        side, before, amount = self._known[key]
        if before != purpose:
            self._known[key] = (side, purpose, amount)
            account = self._accounts[side]
            account.live[before] -= amount
            account.live[purpose] += amount

    @contextlib.contextmanager
    def purpose(self, name: str) -> Iterator[None]:
        """Book what is made in the block as `name`."""
        self._purposes.append(name)
        try:
            yield
        finally:
            self._purposes.pop()

    def peak(self, side: str = "device") -> Peak:
        """Return the peak since the last `restart`, on the device or on the host."""
        account = self._accounts[side]
        parts = {name: amount for name, amount in account.at_peak.items() if amount}
        return Peak(account.peak, parts)

    def restart(self) -> None:
        """Begin a new phase: what is live now is its first peak."""
        for account in self._accounts.values():
            account.restart()
