"""What each kernel computes in a model, as trials on a few random tokens.

Takes a loaded model; returns, for a kernel, one trial for each kind of layer that would ask for it.
A trial computes as the layer does, and gives its results and gradients. It asks for no kernel
itself: its caller puts one in use, or none, and compares. No trials: the model has nothing for the
kernel to compute. Never changes a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.head_terms import TrainedHead
from qlora_kit.layers.kernels.norm import FusedNorm
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.lora_experts import LoRAStack
from qlora_kit.layers.loss import cross_entropy_sum
from qlora_kit.layers.mlp import Parts, TiledMLP
from qlora_kit.layers.weight import FourBitWeight, gathered
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.head import head_of
from qlora_kit.private_torch import outside_of_modes
from qlora_kit.step.rotary import Rotation, has_kernel

_TOKENS = 3


class Numbers:
    """Random numbers of the device and dtype that a model computes with, always the same.

    Args:
        hardware: the device and the dtype.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._generator = torch.Generator().manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        """Return the next numbers, from a normal distribution."""
        numbers = torch.randn(shape, generator=self._generator)
        return numbers.to(self._hardware.device, self._hardware.dtype)

    def input(self, *shape: int) -> Tensor:
        """Return the next numbers, as an input that takes a gradient."""
        return self.draw(*shape).requires_grad_()

    def with_gradients(self, outputs: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> list[Tensor]:
        """Return the outputs and the gradients of the inputs, given random gradients of outputs."""
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [self.draw(*each.shape).to(each.dtype) for each in several]
        return [*(each.detach() for each in several), *torch.autograd.grad(several, inputs, grads)]


Trial = Callable[[Numbers], list[Tensor]]
"""Computes a few tokens; returns results and gradients."""


@dataclass(frozen=True)
class Tried:
    """The parts of a model that are tried.

    Attributes:
        model: a loaded model, with or without adapters.
        hardware: the device and dtype that it computes with.
        in_tiles: whether its gated MLPs work in tiles.
        rotations: what rotates its queries and keys.
    """

    model: PreTrainedModel
    hardware: Hardware
    in_tiles: bool
    rotations: tuple[Rotation, ...] = ()

    def trials(self, kernel: str) -> list[Trial]:
        """Return the trials of a kernel, one of `layers.kernels.NAMES`."""
        return list(_TRIALS[kernel](self))


def _nf4(tried: Tried) -> Iterator[Trial]:
    weights = (each for each in tried.model.modules() if isinstance(each, FourBitWeight))
    kinds = {(each.shape, each.quant_type, each.double_quant): each for each in weights}
    for weight in kinds.values():
        yield partial(_products, weight)


def _products(weight: FourBitWeight, numbers: Numbers) -> list[Tensor]:
    outputs, inputs = weight.shape
    with gathered(weight):
        y = weight.product(numbers.draw(_TOKENS, inputs))
        return [y, weight.product_back(numbers.draw(_TOKENS, outputs))]


def _lora(tried: Tried) -> Iterator[Trial]:
    every = (m for m in tried.model.modules() if isinstance(m, LoRALinear | LoRAStack))
    layers = (m for m in every if isinstance(m, LoRAStack) or m.frozen.window is None)
    if tried.hardware.dtype.itemsize == 2 and (layer := next(layers, None)) is not None:
        frozen = layer.expert(0) if isinstance(layer, LoRAStack) else layer.frozen
        yield partial(_low_rank, frozen, layer.rank, layer.scaling)


def _low_rank(frozen: FrozenLinear, rank: int, scaling: float, numbers: Numbers) -> list[Tensor]:
    # B of a fresh layer is zero, and would hide the term and the gradient of A.
    other = LoRALinear(
        frozen, rank=rank, scaling=scaling, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        other.lora_B.copy_(numbers.draw(*other.lora_B.shape))
    x = numbers.input(_TOKENS, frozen.in_features)
    with gathered(frozen):
        return numbers.with_gradients(other(x), x, other.lora_A, other.lora_B)


def _norm(tried: Tried) -> Iterator[Trial]:
    norms = (each for each in tried.model.modules() if isinstance(each, FusedNorm))
    kinds = {(norm.weight.shape, norm.eps, norm.adds_one): norm for norm in norms}
    for norm in kinds.values():
        yield partial(_normed, norm)


def _normed(norm: FusedNorm, numbers: Numbers) -> list[Tensor]:
    x = numbers.input(_TOKENS, len(norm.weight))
    return numbers.with_gradients(norm(x), x)


def _rotary(tried: Tried) -> Iterator[Trial]:
    config = tried.model.config.get_text_config()
    for rotation in tried.rotations if has_kernel() else ():
        own = getattr(config, "head_dim", None)
        width = own or config.hidden_size // config.num_attention_heads
        yield partial(_turned, rotation, width)


def _turned(rotation: Rotation, width: int, numbers: Numbers) -> list[Tensor]:
    # (B, T, H, d) seen as (B, H, T, d), as a projection gives them.
    q, k = (numbers.input(2, _TOKENS, heads, width).transpose(1, 2) for heads in (4, 2))
    angles = numbers.draw(1, _TOKENS, width // 2).repeat(1, 1, 2)
    return numbers.with_gradients(tuple(rotation(q, k, angles.cos(), angles.sin())), q, k)


def _gate(tried: Tried) -> Iterator[Trial]:
    kinds: dict[Any, TiledMLP] = {}
    for module in tried.model.modules() if tried.in_tiles else ():
        own = module.replaced if isinstance(module, TiledMLP) else module
        parts = Parts.of(own)
        if parts is not None and _is_known(parts.act):
            kinds.setdefault(type(own), TiledMLP(own, _TOKENS - 1))
    for mlp in kinds.values():
        yield partial(_gated, mlp)


def _is_known(act: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation is one of the two that the kernel has."""
    with outside_of_modes(), torch.no_grad():
        x = torch.linspace(-4, 4, 9)
        own = act(x)
        return any(torch.allclose(own, each) for each in (F.silu(x), F.gelu(x, approximate="tanh")))


def _gated(mlp: TiledMLP, numbers: Numbers) -> list[Tensor]:
    parts = Parts.of(mlp)
    assert parts is not None
    x = numbers.input(_TOKENS, parts.frozen[0].in_features)
    was_training = mlp.training
    mlp.eval()  # in training mode, two trials would draw two dropout masks
    try:
        with gathered(mlp):
            return numbers.with_gradients(mlp(x), x)
    finally:
        mlp.train(was_training)


def _loss(tried: Tried) -> Iterator[Trial]:
    if isinstance(tried.model.get_output_embeddings(), FrozenLinear | TrainedHead):
        yield partial(_summed, tried.model)


def _summed(model: PreTrainedModel, numbers: Numbers) -> list[Tensor]:
    # What is trained of a head is computed by the same lines, whichever kernels serve.
    head = replace(head_of(model), term=None)
    hidden = numbers.input(_TOKENS, head.linear.in_features)
    targets = torch.arange(_TOKENS, device=hidden.device)
    return numbers.with_gradients(cross_entropy_sum(hidden, targets, head), hidden)


_TRIALS: dict[str, Callable[[Tried], Iterator[Trial]]] = {
    "nf4": _nf4, "lora": _lora, "norm": _norm, "rotary": _rotary, "gate": _gate, "loss": _loss,
}  # fmt: skip
