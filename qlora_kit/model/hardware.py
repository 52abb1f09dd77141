"""Where the model runs, in which dtype, and whether bitsandbytes works there."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

from qlora_kit.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# mallopt parameters and values, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LOADING_THRESHOLD_BYTES = 64 << 10
_TRAINING_THRESHOLD_BYTES = 32 << 20
_TRAINING_TRIM_BYTES = 512 << 20


@dataclass(frozen=True)
class Hardware:
    """The device and compute dtype of a run, and why that dtype."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    @property
    def device_name(self) -> str:
        """Name of the GPU, or the number of CPU threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} threads"

    @property
    def dtype_name(self) -> str:
        """Such as "bfloat16"."""
        return dtype_name(self.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return float32, bfloat16 or float16 by name."""
    return _DTYPES[name]


def choose_hardware(device: str = "auto", dtype: str = "auto") -> Hardware:
    """Resolve `--device` and `--dtype`.

    Raises:
        ConfigError: a GPU is asked for and there is none, or float16 on a CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: no GPU is visible to torch; use --device cpu, or run `qlora-kit doctor`"
        )
    where = (
        torch.device(device, torch.cuda.current_device())
        if device == "cuda"
        else torch.device(device)
    )
    if dtype != "auto":
        if dtype == "float16" and device == "cpu":
            raise ConfigError("--dtype float16: the CPU has no loss scaling; use float32")
        return Hardware(where, _DTYPES[dtype], "as asked")
    if device == "cpu":
        return Hardware(where, torch.float32, "most CPUs emulate bfloat16, which is far slower")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Hardware(where, torch.bfloat16, "the GPU computes in bfloat16")
    return Hardware(where, torch.float32, "the GPU has no bfloat16, and float16 overflows")


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
