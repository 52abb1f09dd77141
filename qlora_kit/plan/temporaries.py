"""What a device takes that no tensor shows.

On the CPU nothing was found: predictions agree with the allocator's record
(`tests/plan/test_allocator.py`). On a GPU not measured yet.
"""

from __future__ import annotations

# cuBLAS keeps one workspace a handle; torch takes it from its own allocator. 8,519,680 bytes up
# to Ampere, 32 MiB on Hopper and later: the larger, so that a plan holds on both.
_CUBLAS_BYTES = 32 << 20


def workspace_bytes(device: str) -> int:
    """Return what is taken once, by the first matrix product; "meta" stands in for a GPU."""
    return _CUBLAS_BYTES if device == "meta" else 0
