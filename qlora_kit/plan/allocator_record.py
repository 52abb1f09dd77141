"""The CPU allocator's own record of a block of code: the most bytes handed out at one time.

It includes the memory that an operation takes for itself while it runs, which no ledger of tensors
sees. torch's profiler keeps the record; it does not record operators here, because for a whole
step they would take many times the memory of the step itself. After some operations the record is
read and begun again, but never within a backward.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from qlora_kit.model.memory import trim_heap
from qlora_kit.private_torch import (
    TorchDispatchMode,
    begin_memory_record,
    end_memory_record,
    is_in_backward,
)

# An allocation takes about 2 KB of record, and an operation makes a few allocations.
_OPERATIONS_A_RECORD = 1000


class AllocatorRecord(TorchDispatchMode):
    """Records the block that it encloses.

    Args:
        held_bytes: bytes that were handed out before the block.

    Attributes:
        peak_bytes: the most bytes handed out at one time; whole only after the block.
    """

    def __init__(self, held_bytes: int) -> None:
        super().__init__()
        self.peak_bytes = self._live = held_bytes
        self._operations = 0

    def __enter__(self) -> AllocatorRecord:
        """Begin to record."""
        begin_memory_record()
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop recording."""
        super().__exit__(kind, error, traceback)
        self._read()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; after many operations, read the record so far."""
        result = func(*args, **(kwargs or {}))
        self._operations += 1
        if self._operations >= _OPERATIONS_A_RECORD and not is_in_backward():
            self._read()
            begin_memory_record()
        return result

    def _read(self) -> None:
        self._operations = 0
        changes = sorted(end_memory_record())
        for _, change in changes:
            self._live += change
            self.peak_bytes = max(self.peak_bytes, self._live)
        # The record lay between the step's own blocks; the gaps it leaves would stay allocated.
        del changes
        trim_heap()
