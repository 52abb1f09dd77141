"""What torch, cuBLAS and the C library read from the environment, once: before torch is imported.

Imports neither torch nor anything that does. What the user has set stays.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_SPINS = "10000"
_C_LIBRARY = "GLIBC_TUNABLES"
_NO_SMALL_CACHES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"

# What cuBLAS promises the same bits with; it reads its workspaces' sizes at its first product.
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")


def prepare_environment(*, deterministic: bool = False) -> None:
    """Prepare the allocators of GPU and CPU, how threads wait, and a silent profiler.

    Args:
        deterministic: whether a GPU shall compute the same bits in each run.
    """
    # Set too late it would be ignored, and nobody could see that.
    if deterministic and not _has_opened_gpu():
        os.environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])
    # Blocks of many sizes then leave no holes between them that nothing fits into; a run so
    # reserves little more than it allocates.
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    # A thread that waits for another one spins this often, then sleeps. By default it spins for
    # milliseconds, which a process that becomes busy beside it turns into a stand-still.
    if not any(name in os.environ for name in _WAITING):
        os.environ[_WAITING[0]] = _SPINS
    # The record of the CPU's allocator is the profiler's; it says so in two lines on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def restart_with_tight_heap() -> None:
    """Begin this program again, once, with a C library that finds its freed blocks again.

    glibc before 2.38 cuts an aligned block out of a larger one and keeps the offcuts for small
    requests. The block then never grows back to what the next request of its size is cut from,
    and the heap fills with holes: SmolLM2's shape at 2 × 256 took 0.62 GB for 0.30 of tensors.
    Without the two caches of small blocks it takes 0.43 in the same time. The C library reads the
    setting only when a process begins. Elsewhere this does nothing.
    """
    if _C_LIBRARY in os.environ or not _keeps_offcuts():
        return
    os.environ[_C_LIBRARY] = _NO_SMALL_CACHES
    # As it was begun, so that `python -X` and `-m` stay.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def has_tight_heap() -> bool:
    """Whether the C library's heap finds freed blocks again, as far as this process knows."""
    return _NO_SMALL_CACHES in os.environ.get(_C_LIBRARY, "")


def _keeps_offcuts() -> bool:
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):
        return False
    return name == "glibc" and tuple(map(int, version.split(".")[:2])) < (2, 38)


def _has_opened_gpu() -> bool:
    torch: Any = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())
