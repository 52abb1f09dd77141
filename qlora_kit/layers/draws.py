"""What dropout drops: a function of (seed, step, sample, layer) while a step is taken.

So a mask depends neither on the rows that share a batch with a sample, nor on how a micro-batch was
cut, nor on the process that computes it; and it is the same when a layer is recomputed. Outside of
a step torch's own random state decides.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kit.layers.in_force import InForce

# Of splitmix64: neighbouring steps, samples and layers get seeds far apart.
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Draws:
    """What the masks of one micro-batch are drawn from.

    Attributes:
        seed: of the run.
        step: the optimiser step.
        samples: which sample each row of the batch is, (B,).
        tokens: T of the widest batch of the run. As many are drawn for every sample: a GPU gives
            the first of them other values where fewer are asked for.
    """

    seed: int
    step: int
    samples: tuple[int, ...]
    tokens: int

    def kept(self, shape: torch.Size, layer: int, keep: float, device: torch.device) -> Tensor:
        """Return which inputs of a layer are kept: bool (B · T, D).

        Args:
            shape: of the input, (B, T, D), or (B, D) for one state a row.
            layer: its number among the layers with LoRA.
            keep: probability that one is kept.
            device: of the input.
        """
        rows, width = shape[0], shape[-1]
        tokens = shape[1] if len(shape) > 2 else 1
        kept = torch.empty(rows, tokens, width, dtype=torch.bool, device=device)
        drawn = torch.empty(max(self.tokens, tokens), width, dtype=torch.bool, device=device)
        generator = _generator(device)
        for row, sample in enumerate(self.samples):
            generator.manual_seed(_mixed(self.seed, self.step, sample, layer))
            kept[row] = drawn.bernoulli_(keep, generator=generator)[:tokens]
        return kept.view(-1, width)


_now: InForce[Draws] = InForce()


def draws_now() -> Draws | None:
    """Return what masks are drawn from now; None leaves it to torch."""
    return _now.value


def drawn_from(draws: Draws) -> AbstractContextManager[None]:
    """Return a block in which dropout draws from these, in forward and in backward."""
    return _now.being(draws)


@functools.cache
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device if device.type == "cuda" else "cpu")


def _mixed(*numbers: int) -> int:
    """Return 64 well-mixed bits of some numbers.

    Source: Fast Splittable Pseudorandom Number Generators (Steele, Lea, Flood, 2014), section 3.
    """
    state = 0
    for number in numbers:
        state = (state + number + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * _FIRST) & _WORD
        state = ((state ^ (state >> 27)) * _SECOND) & _WORD
        state ^= state >> 31
    return state
