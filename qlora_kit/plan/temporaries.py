"""The memory that a device takes and that no tensor shows.

On a CPU there is none: predictions agree with the allocator's record
(`tests/plan/test_allocator.py`). On a GPU it has not been measured yet.
"""

from __future__ import annotations

# cuBLAS keeps one workspace a handle, and torch takes it from its own allocator: 8,519,680 bytes up
# to Ampere, 32 MiB on Hopper and later. The larger is assumed, so that a plan holds on both.
_CUBLAS_BYTES = 32 << 20


def workspace_bytes(device: str) -> int:
    """Return the bytes that the first matrix product takes; "meta" stands in for a GPU."""
    return _CUBLAS_BYTES if device == "meta" else 0
