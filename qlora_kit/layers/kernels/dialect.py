"""Triton, where it is installed: the language that kernels are written in.

Where it is missing, the kernels' modules can still be imported and their ops simulated, but no
kernel can be launched. This is the only importer of Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    constexpr = Any
    jit: Callable[[Any], Any]
    tl: Any
    IS_INSTALLED: bool
else:
    # bitsandbytes has imported Triton before, so this costs no time at the start.
    try:
        import triton
        import triton.language as tl
    except ImportError:
        IS_INSTALLED = False
        tl, constexpr = None, Any

        def jit(kernel: Any) -> Any:
            """Return the function: there is nothing to compile it."""
            return kernel
    else:
        IS_INSTALLED = True
        jit, constexpr = triton.jit, tl.constexpr


def tiles(size: int, tile: int) -> int:
    """Return the number of tiles that cover `size`."""
    return -(-size // tile)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below `size`: the length of a tile is one."""
    return 1 << max(size - 1, 0).bit_length()
