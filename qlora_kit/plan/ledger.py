"""The memory that tensors hold while code runs, on fake tensors or on real ones.

A `Ledger` sees every operation. It learns of each storage when it is made and when the last
tensor of it is gone, and keeps the sum of all storages and its peak, by purpose. It also counts
the work. It never sees the memory that an operation takes for itself while it runs.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from qlora_kit.layers.alike import times_now
from qlora_kit.layers.purpose import UNPACKED
from qlora_kit.model.hardware import dtype_name
from qlora_kit.private_torch import FakeTensor, TorchDispatchMode, storage_key, tree_leaves

# The CUDA allocator hands out multiples of this. Bytes on the host are rounded in the same way, so
# that the sums of both are of one kind.
ROUNDED_BYTES = 512

_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)

# The ops that unpack weights: all of bitsandbytes, and one kernel of the kit.
_UNPACKING, _FUSED_UNPACKING = "unpacking", "fused unpacking"
_UNPACKS, _UNPACKS_FUSED = "bitsandbytes", "qlora_kit::unpack_4bit"
# They make tensors and write nothing.
_EMPTY = frozenset(
    (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided,
     torch.ops.aten.new_empty, torch.ops.aten.new_empty_strided)
)  # fmt: skip
# What torch's table lacks: attention as a CPU computes it.
_FLOP_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        torch.ops.aten._scaled_dot_product_flash_attention
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


class Change(NamedTuple):
    """A change of the bytes that a purpose holds on the device; negative where they are freed."""

    purpose: str
    bytes: int


class Operation(NamedTuple):
    """One call of torch or of a kernel that computes on the device.

    Attributes:
        kind: "product" of matrices or attention, "unpacking" of weights, "fused unpacking" by a
            kernel of the kit, which takes no longer than its pass; "pass" over memory.
        dtype: the dtype of the result, or of the matrices of a product, such as "bfloat16".
        flop: floating-point operations; 0 unless it is a product.
        bytes: bytes read and written.
    """

    kind: str
    dtype: str
    flop: int
    bytes: int


@dataclass
class Work:
    """The work of a block: operations computed and bytes moved.

    Attributes:
        flop: floating-point operations of matrix products and attention.
        unpacked_bytes: bytes written by dequantisation.
        crossing_bytes: bytes copied between host and device, in either direction.
        received_bytes: bytes received from other devices.
        operations: the number of operations of each kind and size on the device.
    """

    flop: int = 0
    unpacked_bytes: int = 0
    crossing_bytes: int = 0
    received_bytes: int = 0
    operations: Counter[Operation] = field(default_factory=Counter)

    @property
    def unpacking(self) -> Work:
        """The operations that unpack weights, alone."""
        return Work(
            operations=Counter(
                {
                    operation: count
                    for operation, count in self.operations.items()
                    if operation.kind in (_UNPACKING, _FUSED_UNPACKING)
                }
            )
        )


@dataclass(frozen=True)
class Peak:
    """The most bytes that were live at one time.

    Attributes:
        bytes: their sum.
        by_purpose: their parts.
    """

    bytes: int
    by_purpose: dict[str, int]

    def and_more(self, low: Peak, high: Peak) -> Peak:
        """Return this peak plus the difference of two others, `high` minus `low`."""
        parts = Counter(self.by_purpose)
        parts.update(high.by_purpose)
        parts.subtract(low.by_purpose)
        amount = self.bytes + high.bytes - low.bytes
        return Peak(amount, {name: size for name, size in parts.items() if size})


def _named_in_table(func: Any) -> Any:
    return _FLOP_ON_CPU.get(func.overloadpacket, func.overloadpacket)


def _kind(func: Any) -> str:
    if func.namespace == _UNPACKS:
        return _UNPACKING
    return _FUSED_UNPACKING if func._schema.name == _UNPACKS_FUSED else "pass"


def _moved_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor that memory has; an expanded tensor has fewer than numbers."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


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
    """Keeps account of storages by device; a context manager around the code it is to see.

    Args:
        device: type of the device that is planned for; every other device counts as the host.

    Attributes:
        work: the work so far in a block of `counted`; None outside of one.
        changes: the changes so far in a block of `recorded`; None outside of one.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self._accounts = {"device": _Account(), "host": _Account()}
        self._known: dict[int, tuple[str, str, int]] = {}
        self._purposes = ["activations"]
        self.work: Work | None = None
        self.changes: list[Change] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and book the tensors it made."""
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # Code asks for the value of a fake tensor, which has none. Every check of the kit
            # passes on 1.
            return 1
        result = func(*args, **(kwargs or {}))
        if self.work is not None:
            self._count(self.work, func, args, kwargs or {}, result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.book(leaf, self._purposes[-1])
        return result

    def _count(
        self, work: Work, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        flop = 0
        if (count := flop_registry.get(_named_in_table(func))) is not None:
            # The formula of a batch of products takes no dtype of the result.
            sized = (each for each in args if not isinstance(each, torch.dtype))
            flop = int(count(*sized, **kwargs, out_val=result))
            work.flop += flop * times_now()
        elif func in _COPIES:
            source = args[1] if func is _COPIES[0] else args[0]
            if self._side(source) != self._side(result):
                work.crossing_bytes += result.nbytes * times_now()
                return
        self._count_operation(work, func, (args, kwargs), result, flop)

    def _count_operation(self, work: Work, func: Any, given: Any, result: Any, flop: int) -> None:
        """Count an operation that computes on the device; views and empty tensors do not."""
        read = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not made and func._schema.is_mutable:
            made = read[:1]  # an op of the kit that adds to its first tensor, and returns nothing
        if not made or self._side(made[0]) != "device" or func.overloadpacket in _EMPTY:
            return
        known = {storage_key(leaf.untyped_storage()) for leaf in read}
        is_view = all(storage_key(leaf.untyped_storage()) in known for leaf in made)
        if is_view and not func._schema.is_mutable:
            return
        # A product of 16-bit matrices may have a result in fp32; the matrices decide its rate.
        dtype = read[0].dtype if flop else made[0].dtype
        moved = sum(_moved_bytes(each) for each in (*read, *made))
        work.operations[
            Operation("product" if flop else _kind(func), dtype_name(dtype), flop, moved)
        ] += times_now()

    def _side(self, tensor: Tensor) -> str:
        return "device" if tensor.device.type == self.device else "host"

    def book(self, tensor: Tensor, purpose: str) -> None:
        """Book a tensor's storage under a purpose, unless the storage is known already."""
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key in self._known:
            return
        amount = -(-storage.nbytes() // ROUNDED_BYTES) * ROUNDED_BYTES
        side = self._side(tensor)
        self._known[key] = (side, purpose, amount)
        self._change(side, purpose, amount)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        side, purpose, amount = self._known.pop(key)
        self._change(side, purpose, -amount)

    def _change(self, side: str, purpose: str, amount: int) -> None:
        self._accounts[side].add(purpose, amount)
        if self.changes is not None and side == "device":
            self.changes.append(Change(purpose, amount))

    def claim(self, tensor: Tensor, purpose: str) -> None:
        """Say what a tensor is for; this replaces the purpose it was booked under."""
        if purpose == UNPACKED and self.work is not None:
            self.work.unpacked_bytes += tensor.nbytes * times_now()
        key = storage_key(tensor.untyped_storage())
        if key not in self._known:
            self.book(tensor, purpose)
            return
        side, before, amount = self._known[key]
        if before != purpose:
            self._known[key] = (side, purpose, amount)
            account = self._accounts[side]
            account.live[before] -= amount
            account.live[purpose] += amount
            if self.changes is not None and side == "device":
                self.changes += [Change(before, -amount), Change(purpose, amount)]

    @contextlib.contextmanager
    def purpose(self, name: str) -> Iterator[None]:
        """Book the tensors made in the block under the purpose `name`."""
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

    @contextlib.contextmanager
    def counted(self) -> Iterator[Work]:
        """Count the work of the block."""
        self.work = work = Work()
        try:
            yield work
        finally:
            self.work = None

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Change]]:
        """Record the changes on the device in the block; the first entries are the live bytes."""
        live = self._accounts["device"].live
        self.changes = changes = [Change(name, amount) for name, amount in live.items() if amount]
        try:
            yield changes
        finally:
            self.changes = None

    @property
    def live_bytes(self) -> int:
        """The bytes that are live on the device now."""
        return self._accounts["device"].total

    def restart(self) -> None:
        """Begin a new phase, whose peak so far is the bytes that are live now."""
        for account in self._accounts.values():
            account.restart()
