"""The memory of the device and of the host: what is in use, given back, and used up."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import torch

from qlora_kit.errors import OutOfMemory, raised_as

# mallopt's parameters, from glibc's malloc.h: blocks from this size on are mappings of their own;
# so much that is free at the end of the heap stays there.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_LOADING_THRESHOLD_BYTES = 64 << 10
# Smaller mappings would leave no holes in the heap, but each costs page faults: with 1 MiB here
# SmolLM2's shape at 2 × 256 took 1.5 times as long a step. See `restart_with_tight_heap` instead.
_TRAINING_THRESHOLD_BYTES = 32 << 20
_TRAINING_TRIM_BYTES = 512 << 20

# Linux tells of a process here, and is told here to forget its peak (man 5 proc).
_STATUS, _RESET, _RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs"), "5"

# How libraries say it that have no error class of their own for it.
_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def memory_in_use_bytes(device: torch.device) -> int:
    """Return peak allocated bytes of a GPU, or the process's own memory now on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return anonymous_bytes()


def anonymous_bytes() -> int:
    """Return the memory that this process took for itself: no file is behind it.

    Libraries and checkpoints that are mapped from files are resident too, but the system takes
    their pages back whenever it needs them.
    """
    return psutil.Process().memory_info().rss - _mapped_bytes()


def _mapped_bytes() -> int:
    return int(getattr(psutil.Process().memory_info(), "shared", 0))


def restart_peak() -> None:
    """Let `peak_memory_bytes` of a CPU begin now; where that cannot be, it has begun before."""
    with contextlib.suppress(OSError):
        _RESET.write_text(_RESET_PEAK, encoding="ascii")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of this process: allocated on the GPU, or on a CPU its own memory.

    On a CPU it is the highest resident size less what is mapped from files now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _peak_resident_bytes() - _mapped_bytes()


def _peak_resident_bytes() -> int:
    # Not `ru_maxrss`, which cannot be restarted.
    with contextlib.suppress(OSError, StopIteration):
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return psutil.Process().memory_info().rss


def limit_memory(device: torch.device, limit_bytes: int | None) -> None:
    """Let torch take no more than this of a GPU; beyond, an allocation fails as on a full card."""
    if device.type != "cuda" or limit_bytes is None:
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(t in str(error) for t in _OUT_OF_MEMORY_TEXTS)


def out_of_memory_while(doing: str, remedy: str) -> AbstractContextManager[None]:
    """Turn a shortage inside the block into one line.

    Raises:
        OutOfMemory: in place of the library's error.
    """
    line = f"out of memory while {doing}; expected it to fit; {remedy}"
    return raised_as(OutOfMemory, lambda error: line if is_out_of_memory(error) else None)


def release_memory(device: torch.device) -> None:
    """Give back what is no longer referenced; call it outside the `except` block.

    The traceback of an error holds the frames, and so the tensors, of where it was raised.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def memory_returned() -> Iterator[None]:
    """Give freed host memory back to the system while the block runs.

    glibc otherwise keeps what a load frees: up to 900 MiB for a 310 MiB model. With a low
    threshold each tensor is its own mapping and leaves with it. Elsewhere this does nothing.
    """
    _set_threshold(_M_MMAP_THRESHOLD, _LOADING_THRESHOLD_BYTES)
    try:
        yield
    finally:
        return_free_memory()
        # Training allocates the same sizes again and again: a mapping for each, or a heap that
        # shrinks at every free, would cost page faults.
        _set_threshold(_M_MMAP_THRESHOLD, _TRAINING_THRESHOLD_BYTES)
        _set_threshold(_M_TRIM_THRESHOLD, _TRAINING_TRIM_BYTES)


def return_free_memory() -> None:
    """Give back to the system what was freed and lies between what is in use.

    Call it after work that made many small objects, not in a step: what is needed again costs
    page faults. Without glibc this does nothing.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Give back the pages of the heap that nothing lies on; without glibc this does nothing."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _set_threshold(parameter: int, size: int) -> None:
    if (libc := _glibc()) is not None:
        libc.mallopt(parameter, size)


@functools.cache
def _glibc() -> Any:
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
