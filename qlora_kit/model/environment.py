"""What torch reads from the environment, once, when it is imported: call this before.

Imports neither torch nor anything that does. What the user has set stays.
"""

from __future__ import annotations

import os

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prepare_environment() -> None:
    """Let the segments of a GPU's allocator grow, and its profiler be silent."""
    # Blocks of many sizes then leave no holes between them that nothing fits into; a run so
    # reserves little more than it allocates.
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    # The record of the CPU's allocator is the profiler's; it says so in two lines on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
