"""Settings that torch, cuBLAS and the C library read from the environment, only once each.

They must be set before torch is imported, so this module never imports torch, nor anything that
does. A variable that the user has set stays as it is.
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

# With these sizes of its workspaces cuBLAS promises the same bits in each run. It reads the sizes
# at its first product.
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")


def prepare_environment(*, deterministic: bool = False) -> None:
    """Set up the allocators of GPU and CPU, the waiting of threads, and a silent profiler.

    Args:
        deterministic: whether a GPU must compute the same bits in each run.
    """
    # Once the GPU has been opened the setting would be ignored, and nobody would notice.
    if deterministic and not _has_opened_gpu():
        os.environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])
    # With expandable segments, blocks of many sizes leave no unusable holes between them, so a run
    # reserves little more than it allocates.
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    # A thread that waits for another spins this many times and then sleeps. By default it spins for
    # milliseconds, and beside another busy process the run then almost stands still.
    if not any(name in os.environ for name in _WAITING):
        os.environ[_WAITING[0]] = _SPINS
    # The profiler keeps the record of the CPU's allocator. It would print two lines on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def restart_with_tight_heap() -> None:
    """Restart this program, once, with a C library that can reuse its freed blocks.

    glibc before 2.38 cuts an aligned block out of a larger one, and keeps the offcuts for small
    requests. When the block is freed it cannot join its offcuts again, so the next request of its
    size needs another large block, and the heap fills with holes. SmolLM2's shape at 2 × 256 took
    0.62 GB for 0.30 GB of tensors. Without the two caches of small blocks it takes 0.43 GB, in the
    same time. The C library reads this setting only when a process begins, hence the restart. With
    another C library nothing happens.
    """
    if _C_LIBRARY in os.environ or not _keeps_offcuts():
        return
    os.environ[_C_LIBRARY] = _NO_SMALL_CACHES
    # The original arguments, so that `python -X` and `-m` stay.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def has_tight_heap() -> bool:
    """Whether this process was started with the setting of `restart_with_tight_heap`."""
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
