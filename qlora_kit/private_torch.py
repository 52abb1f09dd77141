"""Private names of torch that the kit uses (2.11 to 2.13), all of them in this file.

Nothing that torch offers under a public name is here. The tests of the callers of these functions
show whether a new release still has the names, and whether they still mean the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

__all__ = [
    "FakeTensor", "FakeTensorMode", "TorchDispatchMode", "begin_memory_record", "default_store",
    "end_memory_record", "is_in_backward", "largest_magnitudes", "outside_of_modes", "own_buffers",
    "own_parameters", "storage_key", "tree_flatten", "tree_leaves", "tree_unflatten", "version_of",
]  # fmt: skip

# The binding of torch's profiler to C++, which has no types.
_profiler: Any = torch.autograd
_ACTIVITIES = {_profiler.ProfilerActivity.CPU}


def default_store() -> Any:
    """Return the store by which the processes of torch.distributed have found each other."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers; a buffer added to them skips torch's checks."""
    return module._buffers


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters; a parameter added to them skips torch's checks."""
    return module._parameters


def outside_of_modes() -> AbstractContextManager[Any]:
    """Return a block whose tensors are real, and which no ledger sees, even in a simulation."""
    return _disable_current_modes()


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that is the same for every Python object of one storage."""
    return int(storage._cdata)


def version_of(tensor: Tensor) -> int:
    """Return a number that grows when a tensor changes in place; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def largest_magnitudes(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the largest magnitude in each tensor; one kernel computes all those of a device."""
    return torch._foreach_norm(list(tensors), float("inf"))


def is_in_backward() -> bool:
    """Whether autograd is running a graph on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def begin_memory_record() -> None:
    """Begin to record the bytes that the CPU's allocator hands out and takes back.

    `torch.profiler` would also record operators, and has no way to leave them out. A record that
    is begun in a backward ends with it, because autograd restores the state of the thread.
    """
    inner: Any = torch._C._profiler
    # Shapes, memory, stacks, FLOP, modules.
    wanted = (False, True, False, False, False)
    state = _profiler.ProfilerState.KINETO
    config = _profiler.ProfilerConfig(state, *wanted, inner._ExperimentalConfig())
    _profiler._prepare_profiler(config, _ACTIVITIES)
    # No code that runs here has this scope. Code of the recorded scope that begins during a record
    # and ends after it writes into freed memory: the step of torch.optim, for one, has USER_SCOPE.
    _profiler._enable_profiler(config, _ACTIVITIES, {inner.RecordScope.STATIC_RUNTIME_MODEL})


def end_memory_record() -> Iterator[tuple[int, int]]:
    """Stop recording; yield the time (ns) and bytes of each change, negative where given back."""
    events = _profiler._disable_profiler().events()
    return ((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]")
