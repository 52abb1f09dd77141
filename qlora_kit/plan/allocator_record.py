"""The CPU allocator's own record of a block of code: the most bytes it had handed out at one time.

It sees what an operation takes for itself meanwhile, which no ledger of tensors does. The record is
torch's profiler's, without its operators: kept for a whole step, they are many times what the
step itself takes. It is read and begun again after some operations, but not within a backward.

Uses private names of torch (2.11 to 2.13): `torch.profiler` has no way to leave operators out.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.model.memory import trim_heap

# About 2 KB of record an allocation, and some allocations an operation.
_OPERATIONS_A_RECORD = 1000
# The binding of torch's profiler to C++, which has no types.
_profiler: Any = torch.autograd
_ACTIVITIES = {_profiler.ProfilerActivity.CPU}


class AllocatorRecord(TorchDispatchMode):
    """Records the block that it encloses.

    Args:
        held_bytes: handed out before the block.

    Attributes:
        peak_bytes: the most that was handed out at one time, after the block.
    """

    def __init__(self, held_bytes: int) -> None:
        super().__init__()
        self.peak_bytes = self._live = held_bytes
        self._operations = 0

    def __enter__(self) -> AllocatorRecord:
        """Begin to record."""
        _begin()
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
        """Run an operation; read what there is of the record after many."""
        result = func(*args, **(kwargs or {}))
        self._operations += 1
        if self._operations >= _OPERATIONS_A_RECORD and not _is_in_backward():
            self._read()
            _begin()
        return result

    def _read(self) -> None:
        self._operations = 0
        events = _profiler._disable_profiler().events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        for _, change in changes:
            self._live += change
            self.peak_bytes = max(self.peak_bytes, self._live)
        # The record lay between the step's own blocks; what it leaves would stay with the process.
        del events, changes
        trim_heap()


def _is_in_backward() -> bool:
    # What is begun there ends with it: autograd puts the thread's state back as it found it.
    return bool(torch._C._current_graph_task_id() != -1)


def _begin() -> None:
    inner: Any = torch._C._profiler
    # Shapes, memory, stacks, FLOP, modules.
    wanted = (False, True, False, False, False)
    state = _profiler.ProfilerState.KINETO
    config = _profiler.ProfilerConfig(state, *wanted, inner._ExperimentalConfig())
    _profiler._prepare_profiler(config, _ACTIVITIES)
    # Nothing that runs here is of this scope. What is, and begins in one record and ends after it,
    # writes its end into freed memory: torch.optim's step, for one, is of USER_SCOPE.
    _profiler._enable_profiler(config, _ACTIVITIES, {inner.RecordScope.STATIC_RUNTIME_MODEL})
