"""Private names of torch that the kit uses (2.11 to 2.13), all of them in this file.

What torch has under a public name is not here. The tests of what calls these functions show
whether a new release still has them, and that they still mean the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "FakeTensor", "FakeTensorMode", "TorchDispatchMode", "begin_memory_record",
    "end_memory_record", "is_in_backward", "largest_magnitudes", "own_buffers", "own_parameters",
    "storage_key", "tree_leaves",
]  # fmt: skip

# The binding of torch's profiler to C++, which has no types.
_profiler: Any = torch.autograd
_ACTIVITIES = {_profiler.ProfilerActivity.CPU}


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers; one that is put there has no other checks to pass."""
    return module._buffers


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters; one that is put there has no other checks to pass."""
    return module._parameters


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return what two objects of the same storage have in common."""
    return int(storage._cdata)


def largest_magnitudes(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the largest magnitude in each tensor, from one kernel for all of a device."""
    return torch._foreach_norm(list(tensors), float("inf"))


def is_in_backward() -> bool:
    """Whether autograd is running a graph on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def begin_memory_record() -> None:
    """Begin to record what the CPU's allocator hands out and takes back, and nothing else.

    `torch.profiler` has no way to leave operators out. What is begun in a backward ends with it:
    autograd puts the thread's state back as it found it.
    """
    inner: Any = torch._C._profiler
    # Shapes, memory, stacks, FLOP, modules.
    wanted = (False, True, False, False, False)
    state = _profiler.ProfilerState.KINETO
    config = _profiler.ProfilerConfig(state, *wanted, inner._ExperimentalConfig())
    _profiler._prepare_profiler(config, _ACTIVITIES)
    # Nothing that runs here is of this scope. What is, and begins in one record and ends after it,
    # writes its end into freed memory: torch.optim's step, for one, is of USER_SCOPE.
    _profiler._enable_profiler(config, _ACTIVITIES, {inner.RecordScope.STATIC_RUNTIME_MODEL})


def end_memory_record() -> Iterator[tuple[int, int]]:
    """Stop recording; yield when it was (ns) and how many bytes, negative where taken back."""
    events = _profiler._disable_profiler().events()
    return ((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]")
