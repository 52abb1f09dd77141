"""The memory of the device and of the host: what is in use, given back, and used up."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from collections.abc import Iterator

import psutil
import torch

from qlora_kit.errors import OutOfMemory

# mallopt parameters and values, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LOADING_THRESHOLD_BYTES = 64 << 10
_TRAINING_THRESHOLD_BYTES = 32 << 20
_TRAINING_TRIM_BYTES = 512 << 20

# How libraries say it that have no error class of their own for it.
_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def memory_in_use_bytes(device: torch.device) -> int:
    """Return peak allocated bytes since the last reset of a GPU, or resident bytes on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


@contextlib.contextmanager
def out_of_memory_while(doing: str, remedy: str) -> Iterator[None]:
    """Turn a shortage inside the block into one line.

    Raises:
        OutOfMemory: in place of the library's error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory while {doing}; expected it to fit; {remedy}") from error


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
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LOADING_THRESHOLD_BYTES)
    try:
        yield
    finally:
        trim(0)
        # Training allocates the same sizes again and again: a mapping for each, or a heap that
        # shrinks at every free, would cost page faults.
        mallopt(_M_MMAP_THRESHOLD, _TRAINING_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRAINING_TRIM_BYTES)
