"""Makes an op of torch out of a function that launches a kernel.

An op has a second function, which makes tensors of the same shapes and computes nothing. So a
simulation on fake tensors sees the memory of a kernel, as it sees that of torch's own ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

# `torch.library.custom_op` wraps each call in layers of Python; what is defined here has none.
_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
# Tensors of other types are simulated, or want to see the op.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def define(schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Define an op of the namespace `qlora_kit`; no gradient flows through it.

    Args:
        schema: its name, arguments and results, in torch's language of schemas.
        run: computes the results, on a GPU or in Triton's interpreter.
        shapes: makes empty tensors like the results.

    Returns:
        The op, to be called with the arguments of the schema in their order. Of plain tensors on a
        GPU it calls `run` itself: the way through torch's dispatcher takes as long as a launch.
    """
    name = _LIBRARY.define(schema)
    for backend in ("CUDA", "CPU"):
        _LIBRARY.impl(name, run, backend)
    torch.library.register_fake(f"qlora_kit::{name}", shapes, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.qlora_kit, name).default

    def call(*arguments: Any) -> Any:
        tensor = _first_tensor(arguments)
        is_plain = type(tensor) in _PLAIN and tensor.is_cuda
        return run(*arguments) if is_plain else op(*arguments)

    return call


def _first_tensor(arguments: Sequence[Any]) -> torch.Tensor:
    """Return the first argument that is a tensor, or the first of the first list of tensors."""
    first = next(each for each in arguments if isinstance(each, torch.Tensor | list | tuple))
    return first if isinstance(first, torch.Tensor) else first[0]
