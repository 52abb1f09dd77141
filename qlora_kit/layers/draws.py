"""The masks of dropout: within a step, each is a function of (seed, step, sample, layer).

So the mask of a sample depends neither on the other rows of its batch, nor on the cut of a
micro-batch, nor on the process that computes it; and it is the same when a layer is recomputed.
Outside of a step the masks come from torch's own random state, which this module never touches.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kit.layers.in_force import InForce
from qlora_kit.layers.segments import slices_of

# The constants of splitmix64: neighbouring steps, samples and layers get seeds far apart.
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Draws:
    """The numbers that the masks of one micro-batch are drawn from.

    Attributes:
        seed: the seed of the run.
        step: number of the optimiser step.
        samples: number of the sample in each row of the batch, (B,).
        tokens: T of the widest batch of the run. The mask of every sample is drawn at this width
            and cut: on a GPU, the first values of a draw depend on the number of values drawn.
        lengths: tokens of each sample, (B,), where all lie end to end in one row; else None.
    """

    seed: int
    step: int
    samples: tuple[int, ...]
    tokens: int
    lengths: tuple[int, ...] | None = None

    def covers(self, shape: torch.Size) -> bool:
        """Whether an input of this shape has the samples of the micro-batch, and their tokens."""
        if len(shape) != 3:
            return False
        return shape[0] == (len(self.samples) if self.lengths is None else 1)

    def kept(self, shape: torch.Size, layer: int, keep: float, device: torch.device) -> Tensor:
        """Return the mask of the inputs that a layer keeps: bool (B · T, D).

        Args:
            shape: shape of the layer's input, (B, T, D), or (B, D) for one state a row.
            layer: number of the layer among the layers with LoRA.
            keep: probability that an input is kept.
            device: device of the input.
        """
        rows, width = shape[0], shape[-1]
        tokens = shape[1] if len(shape) > 2 else 1
        kept = torch.empty(rows, tokens, width, dtype=torch.bool, device=device)
        drawn = torch.empty(max(self.tokens, tokens), width, dtype=torch.bool, device=device)
        generator = _generator(device)
        lengths = self.lengths or (tokens,) * len(self.samples)
        flat = kept.view(-1, width)
        for sample, place in zip(self.samples, slices_of(lengths), strict=True):
            generator.manual_seed(_mixed(self.seed, self.step, sample, layer))
            flat[place] = drawn.bernoulli_(keep, generator=generator)[: place.stop - place.start]
        flat[place.stop :] = True  # padding behind the last sample
        return flat


_now: InForce[Draws] = InForce()


def draws_now() -> Draws | None:
    """Return the draws in force; None where torch draws the masks."""
    return _now.value


def drawn_from(draws: Draws) -> AbstractContextManager[None]:
    """Return a block in which dropout takes its masks from `draws`, in forward and in backward."""
    return _now.being(draws)


@functools.cache
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device if device.type == "cuda" else "cpu")


def _mixed(*numbers: int) -> int:
    """Return 64 well-mixed bits, a function of all the numbers.

    Source: Fast Splittable Pseudorandom Number Generators (Steele, Lea, Flood, 2014), section 3.
    """
    state = 0
    for number in numbers:
        state = (state + number + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * _FIRST) & _WORD
        state = ((state ^ (state >> 27)) * _SECOND) & _WORD
        state ^= state >> 31
    return state
