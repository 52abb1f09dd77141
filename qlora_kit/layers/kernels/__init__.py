"""Fused kernels, each beside the plain code that it stands in for.

The plain code is the reference: it runs wherever no kernel serves, and every kernel is tested
against it. A layer asks `serves` where it would compute, and calls the kernel or its own lines.
Nothing here decides which kernels are in use: `step.kernels` does, and says so with `use`.

On a GPU a kernel is one launch. On a CPU some of them have a second form: torch's operations in
fewer passes over memory and with fewer tensors than the plain code (`kernels.on_cpu`).
"""

from __future__ import annotations

import os
from collections.abc import Collection

import torch
from torch import Tensor

NAMES = ("nf4", "lora", "norm", "rotary", "gate", "loss")
"""The kernels: 4-bit weights unpacked, LoRA's products, norms, rotary positions, MLP gate, loss."""

ON_CPU = ("norm", "rotary", "gate", "loss")
"""Those that a CPU has as well."""

_in_use: frozenset[str] = frozenset()
# Triton's interpreter runs kernels on a CPU, for tests.
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEVICES = {"cuda", "meta"} | ({"cpu"} if _IS_INTERPRETED else set())


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


def offered(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the kernels that there are for tensors of a device and a dtype, some of `NAMES`.

    The `meta` device stands in for a GPU in a simulation. On a CPU they compute in fp32 only.
    """
    if device.type in _DEVICES:
        return NAMES
    return ON_CPU if dtype == torch.float32 else ()


def serves(name: str, tensor: Tensor) -> bool:
    """Whether a kernel serves for a tensor: it is in use, and there is one for such tensors."""
    return name in _in_use and name in offered(tensor.device, tensor.dtype)


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether a kernel takes its form for a CPU for this tensor."""
    return tensor.device.type == "cpu" and not _IS_INTERPRETED
