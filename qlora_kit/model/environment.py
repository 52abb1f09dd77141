"""What torch and cuBLAS read from the environment, once: call this before torch is imported.

Imports neither torch nor anything that does. What the user has set stays.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_SPINS = "10000"

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


def _has_opened_gpu() -> bool:
    torch: Any = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())
