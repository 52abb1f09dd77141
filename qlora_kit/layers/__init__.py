"""The mathematics of one step: weights that multiply, frozen and LoRA layers, MLP, head, loss."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _compiled_when_called(model: Any = None, **settings: Any) -> Callable[..., Any]:
    """Stand in for `torch.compile`, which loads the compiler, until what it returns is called."""
    if model is None:
        return functools.partial(_compiled_when_called, **settings)
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(model)
    def call(*arguments: Any, **named: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(model, **settings))
        return compiled[0](*arguments, **named)

    return call


@contextmanager
def _no_compiler_yet() -> Iterator[None]:
    real, torch.compile = torch.compile, _compiled_when_called
    try:
        yield
    finally:
        torch.compile = real


# Set before bitsandbytes is first imported: without the optional `kernels` package it logs a failed
# import at every start.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# It decorates functions with `torch.compile`; the kit calls none but those for weights of an odd
# width. Loading the compiler took 2.4 s of CPU of the 4.1 that torch and bitsandbytes took. What of
# it transformers imports as well comes later: `evaluate` starts 0.9 s sooner.
with _no_compiler_yet():
    import bitsandbytes  # noqa: F401  registers the ops that unpack
