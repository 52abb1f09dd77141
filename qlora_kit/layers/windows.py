"""Convolutions as linear layers: y = patches(x) Wᵀ + b, where a patch is what a window covers.

A convolution multiplies every patch of its input by one matrix W (K, D), with D = C · k · k numbers
in a patch. So its weight lies flat here, as that matrix. Targets, adapters, merges and reports see
a linear layer; only the product differs. `Window` knows how the patches lie. Never quantises.

LoRA on it has PEFT's form: A (R, D) is a convolution with the same window to R channels, and
B (K, R) a convolution of size 1. Then the sum over the patch factors, B A is again a (K, D), and it
is merged exactly.

Shapes: B rows, C channels in, K channels out, k size of the window, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input, which is padded with zeros.

    Attributes:
        channels: channels of a patch: those of the input, divided by `groups`.
        size: numbers of a patch along each dimension, (k,) or (k, k).
        stride: steps of the window.
        padding: zeros on each side, or torch's word for them.
        dilation: distance of the numbers of a patch.
        groups: parts of the channels that are computed apart.
    """

    channels: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1

    @classmethod
    def of(cls, layer: Convolution) -> Window:
        """Return the window of a convolution."""
        return cls(
            layer.in_channels // layer.groups,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )

    @property
    def kernel(self) -> tuple[int, ...]:
        """The shape of a row of W in a file: (C, k) or (C, k, k)."""
        return (self.channels, *self.size)

    @property
    def numbers(self) -> int:
        """D, the numbers of a patch."""
        return math.prod(self.kernel)

    @property
    def why_no_lora(self) -> str | None:
        """Why the layer carries no LoRA, in words; None where it can."""
        if self.groups > 1:
            return (
                f"a convolution in {self.groups:,} groups of channels, whose LoRA in PEFT's form "
                "mixes the groups and cannot be merged"
            )
        if any(step > 1 for step in self.dilation):
            return "a dilated convolution, whose LoRA PEFT computes without the dilation"
        return None

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the convolution of x (B, C, …) by W (K, D) with b (K,): (B, K, …)."""
        convolve = F.conv1d if len(self.size) == 1 else F.conv2d
        kernels = weight.view(len(weight), *self.kernel)
        return convolve(x, kernels, bias, self.stride, self.padding, self.dilation, self.groups)

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the convolution of x (B, C, …) by B A, in the dtype of A (R, D) and B (K, R)."""
        points = F.conv1d if len(self.size) == 1 else F.conv2d
        inner = self.product(x.to(a.dtype), a)
        return points(inner, b.view(*b.shape, *(1 for _ in self.size)))


class WindowedLinear(nn.Linear):
    """A skeleton's convolution with its weight laid flat, (K, D), see `Window`."""

    def __init__(self, window: Window, out_features: int, *, bias: bool) -> None:
        super().__init__(window.numbers, out_features, bias=bias, device="meta")
        self.window = window

    @classmethod
    def like(cls, layer: Convolution) -> WindowedLinear:
        """Return the flat form of a convolution, on the meta device."""
        flat = cls(Window.of(layer), layer.out_channels, bias=layer.bias is not None)
        return flat.to(layer.weight.dtype)


def window_of(layer: nn.Module) -> Window | None:
    """Return the window of a layer, in any state; None of a layer that is no convolution."""
    found: Window | None = getattr(layer, "window", None)
    return found
