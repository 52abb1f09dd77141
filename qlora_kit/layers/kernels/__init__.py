"""Fused kernels of a GPU, each beside the plain code that it stands in for.

The plain code is the reference: it runs wherever no kernel serves, and every kernel is tested
against it. A layer asks `serves` where it would compute, and calls the kernel or its own lines.
Nothing here decides which kernels are in use: `step.kernels` does, and says so with `use`.
"""

from __future__ import annotations

import os
from collections.abc import Collection

from torch import Tensor

NAMES = ("nf4", "lora", "norm", "rotary", "gate", "loss")
"""The kernels: 4-bit weights unpacked, LoRA's products, norms, rotary positions, MLP gate, loss."""

_in_use: frozenset[str] = frozenset()
# Triton's interpreter runs kernels on a CPU, for tests.
_DEVICES = {"cuda", "meta"} | ({"cpu"} if os.environ.get("TRITON_INTERPRET") == "1" else set())


def use(names: Collection[str]) -> None:
    """Let these kernels serve in this process from now on, and no others.

    Args:
        names: some of `NAMES`.
    """
    global _in_use
    _in_use = frozenset(names)


def in_use() -> frozenset[str]:
    """Return the kernels that serve."""
    return _in_use


def serves(name: str, tensor: Tensor) -> bool:
    """Whether a kernel serves for a tensor: it is in use, and the tensor lies on a GPU.

    The `meta` device stands in for a GPU in a simulation.
    """
    return name in _in_use and tensor.device.type in _DEVICES
