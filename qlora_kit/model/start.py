"""What is taken from the weights of a base, or learnt of them, while they are loaded.

`frozen_tensors` asks a `Start` for the frozen weight of each layer that it covers. It knows no
more of starts than this; they are made in `lora.starts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from qlora_kit.layers.weight import FrozenWeight

Pair = tuple[Tensor, Tensor]
"""A (R, D) and B (K, R) of a layer, fp32, in host memory"""
Freeze = Callable[[Tensor], FrozenWeight]


class Start(Protocol):
    """What A and B of each layer begin with, and what the base is less because of them."""

    @property
    def pairs(self) -> Mapping[str, Pair]:
        """A and B that each layer begins with, by its path."""
        ...

    @property
    def changes_base(self) -> bool:
        """Whether the base is less scaling · B A."""
        ...

    @property
    def record(self) -> Any:
        """The start as an adapter's record says it; None where the base is unchanged."""
        ...

    @property
    def errors(self) -> Any:
        """What quantising loses with the start and without it; None where it was not measured."""
        ...

    def forget(self) -> None:
        """Let go of the pairs of an unchanged base, which A and B of its layers now hold."""
        ...

    def covers(self, name: str) -> bool:
        """Whether a parameter is a weight whose loading it decides."""
        ...

    def frozen(self, name: str, weight: Tensor, freeze: Freeze) -> FrozenWeight:
        """Return the frozen weight of a layer.

        Args:
            name: the name of the weight.
            weight: (K, D), as it is stored, on the device that it is frozen on.
            freeze: quantises a weight as the base is quantised; keeps it in 16 bits.
        """
        ...

    def less(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight (K, D) as it is before it is quantised; others as they are."""
        ...

    def taken(self, name: str) -> Tensor:
        """Return scaling · B A, (K, D), fp32, in host memory: what a weight is less."""
        ...
