"""The memory of the device and of the host: measured, limited, given back, and used up."""

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

# mallopt's parameters, from glibc's malloc.h. Blocks from the first size on get a mapping of their
# own; free memory at the end of the heap stays there up to the second size.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_LOADING_THRESHOLD_BYTES = 64 << 10
# With a smaller threshold there would be no holes in the heap, but each mapping costs page faults:
# with 1 MiB, a step of SmolLM2's shape at 2 × 256 took 1.5 times as long. `restart_with_tight_heap`
# avoids the holes instead.
_TRAINING_THRESHOLD_BYTES = 32 << 20
_TRAINING_TRIM_BYTES = 512 << 20

# Linux shows the memory of a process in the first file; writing to the second resets its peak
# (man 5 proc).
_STATUS, _RESET, _RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs"), "5"

# Messages of libraries that have no error class of their own for memory that ran out.
_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
# oneDNN makes code for each new shape, and says no more than this if there is no memory for it. Of
# what it cannot compute it says "a primitive descriptor".
_NO_PRIMITIVE = "could not create a primitive"


def free_bytes(device: torch.device, processes: int = 1) -> int:
    """Return the bytes of free memory on the device where the model will run.

    Args:
        device: the device.
        processes: processes of the machine, which share its memory where it is a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // processes


def memory_in_use_bytes(device: torch.device) -> int:
    """Return the peak of allocated bytes on a GPU; on a CPU the anonymous memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return anonymous_bytes()


def anonymous_bytes() -> int:
    """Return the bytes that this process has for itself, without mapped files.

    Libraries and checkpoints that are mapped from files are resident too, but the system takes
    their pages back whenever it needs them.
    """
    return psutil.Process().memory_info().rss - _mapped_bytes()


def _mapped_bytes() -> int:
    return int(getattr(psutil.Process().memory_info(), "shared", 0))


def restart_peak() -> None:
    """Reset the peak that `peak_memory_bytes` reads on a CPU; where Linux cannot, it stays."""
    with contextlib.suppress(OSError):
        _RESET.write_text(_RESET_PEAK, encoding="ascii")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of this process in bytes: allocated on the GPU, or anonymous on a CPU.

    On a CPU it is the highest resident size, less the bytes that are mapped from files now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _peak_resident_bytes() - _mapped_bytes()


def _peak_resident_bytes() -> int:
    # Not `ru_maxrss`, which cannot be reset.
    with contextlib.suppress(OSError, StopIteration):
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return psutil.Process().memory_info().rss


def limit_memory(device: torch.device, limit_bytes: int | None) -> None:
    """Let torch take at most `limit_bytes` of a GPU; more fails as an allocation on a full card."""
    if device.type != "cuda" or limit_bytes is None:
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    is_told = text == _NO_PRIMITIVE or any(each in text for each in _OUT_OF_MEMORY_TEXTS)
    return isinstance(error, RuntimeError) and is_told


def out_of_memory_while(doing: str, remedy: str) -> AbstractContextManager[None]:
    """Turn an error of memory that ran out inside the block into one line.

    Args:
        doing: the work of the block, in words.
        remedy: advice to the user.

    Raises:
        OutOfMemory: in place of the library's error.
    """
    line = f"out of memory while {doing}; expected it to fit; {remedy}"
    return raised_as(OutOfMemory, lambda error: line if is_out_of_memory(error) else None)


def release_memory(device: torch.device) -> None:
    """Give back memory that is no longer referenced; call it outside of the `except` block.

    The traceback of an error holds the frames of the code that raised it, and so their tensors.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def memory_returned() -> Iterator[None]:
    """Give freed host memory back to the system while the block runs.

    glibc otherwise keeps the memory that loading frees: up to 900 MiB for a 310 MiB model. With a
    low threshold each tensor has its own mapping, which is given back with it. Without glibc this
    does nothing.
    """
    _set_threshold(_M_MMAP_THRESHOLD, _LOADING_THRESHOLD_BYTES)
    try:
        yield
    finally:
        return_free_memory()
        # Training allocates the same sizes again and again. A mapping for each allocation, or a
        # heap that shrinks at every free, would cost page faults.
        _set_threshold(_M_MMAP_THRESHOLD, _TRAINING_THRESHOLD_BYTES)
        _set_threshold(_M_TRIM_THRESHOLD, _TRAINING_TRIM_BYTES)


def return_free_memory() -> None:
    """Give freed memory that lies between used memory back to the system.

    Call it after work that made many small objects, not in a step: memory that is needed again
    costs page faults. Without glibc this does nothing.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Give the empty pages of the heap back to the system; without glibc this does nothing."""
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
