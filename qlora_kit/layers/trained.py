"""Layers that are trained whole: linear layers, token embeddings, output heads, norms.

They are for layers whose weights the base does not have, such as a classifier's head, or for which
LoRA is not enough. Each needs a gradient as large as its weights, and optimiser state for all of
them, so large layers cost much. Parameters are fp32, and are computed with in fp32, but for those
of an output head, which a loss computes with as with frozen ones.

Shapes: D in, K out, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.head_terms import WholeTerm, whole_head
from qlora_kit.private_torch import own_buffers


class TrainedLayer(Protocol):
    """A module in the place of a frozen one, of which all or some rows are trained."""

    @property
    def replaced(self) -> nn.Module:
        """The frozen module, to be put back."""

    def merged(self, dtype: torch.dtype) -> nn.Module:
        """Return a frozen module that computes what was trained, its weight in `dtype`."""

    def named_parameters(self) -> Any:
        """Yield the trained parameters with their names."""


class TrainedLinear(nn.Module):
    """A linear layer, y = x Wᵀ + b, with fp32 weights and a gradient, in place of a frozen layer.

    Args:
        replaced: the frozen layer; its unpacked weights are the first values, and it is kept so
            that it can be put back.
    """

    bias: nn.Parameter | None

    def __init__(self, replaced: FrozenLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        # A copy, because a plain weight in fp32 is returned as it is, and would itself be trained.
        weight = replaced.weight.dequantize(torch.float32).clone()
        self.weight = nn.Parameter(weight)
        bias = replaced.bias
        self.bias = None if bias is None else nn.Parameter(bias.float().clone())
        # A tuple keeps it from being a child: its packed weight is no part of this module.
        self._replaced = (replaced,)

    @property
    def replaced(self) -> FrozenLinear:
        """The frozen layer that this layer replaced."""
        return self._replaced[0]

    def head_parts(self) -> tuple[FrozenLinear, WholeTerm]:
        """See `TrainedHead`: where the layer is a head, of which the loss knows the formula."""
        return whole_head(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., K): computed in fp32, returned in the dtype of x."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)

    def merged(self, dtype: torch.dtype) -> nn.Module:
        """Return a frozen layer with the trained weight, in `dtype`."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return FrozenLinear.holding(self.weight.detach().to(dtype), bias)


class TrainedEmbedding(nn.Module):
    """A table of token embeddings with fp32 rows and a gradient, in place of a frozen table.

    It lies on the device of the layers, also where the frozen table lies in host memory.

    Args:
        replaced: the frozen table; its rows are the first values, and it is kept so that it can be
            put back.
        device: the device of the layers.
        dtype: the compute dtype, in which rows are returned.
    """

    def __init__(self, replaced: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        stored: Any = replaced.weight
        self.weight = nn.Parameter(stored.detach().to(device, torch.float32, copy=True))
        self.num_embeddings, self.embedding_dim = self.weight.shape
        self.padding_idx: int | None = getattr(replaced, "padding_idx", None)
        self._scale = embedding_scale(replaced, device)
        self._dtype = dtype
        self._replaced = (replaced,)

    @property
    def replaced(self) -> nn.Module:
        """The frozen table that this one replaced."""
        return self._replaced[0]

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...) to rows (..., D) in the compute dtype."""
        rows = F.embedding(ids.to(self.weight.device), self.weight, self.padding_idx)
        rows = rows if self._scale is None else rows * self._scale
        return rows.to(self._dtype)

    def merged(self, dtype: torch.dtype) -> nn.Module:
        """Return a frozen table with the trained rows, in `dtype`."""
        return with_weight(self.replaced, self.weight.detach(), dtype)


class TiedOutput(nn.Module):
    """An output head that has the weight of a table that is trained whole; it owns no parameter.

    Args:
        replaced: the frozen head; its bias, where it has one, stays frozen.
        weight: the parameter of the table (V, D).
    """

    def __init__(self, replaced: FrozenLinear, weight: nn.Parameter) -> None:
        super().__init__()
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        # Tuples keep both from being parts, whose parameters would have second names.
        self._weight, self._replaced = (weight,), (replaced,)

    @property
    def replaced(self) -> FrozenLinear:
        """The frozen head that this one replaced."""
        return self._replaced[0]

    @property
    def weight(self) -> nn.Parameter:
        """The parameter of the table (V, D)."""
        return self._weight[0]

    def head_parts(self) -> tuple[FrozenLinear, WholeTerm]:
        """See `TrainedHead`."""
        linear, term = whole_head(self.weight, None)
        linear.bias = self.replaced.bias
        return linear, term

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., V) in the dtype of x; for inference, a loss asks the parts."""
        linear, _ = self.head_parts()
        y: Tensor = linear(x)
        return y

    def merged(self, dtype: torch.dtype) -> nn.Module:
        """Return a frozen head with the trained weight, in `dtype`."""
        return FrozenLinear.holding(self.weight.detach().to(dtype), self.replaced.bias)


class TrainedNorm(nn.Module):
    """A norm with fp32 parameters and gradients, in place of a frozen norm of any formula.

    Args:
        replaced: the frozen norm: a module of parameters (D,) without parts.
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        own = copy.copy(replaced)
        own._parameters = {
            name: nn.Parameter(each.detach().float().clone())
            for name, each in replaced.named_parameters(recurse=False)
        }
        for name, parameter in own._parameters.items():
            self.register_parameter(name, parameter)
        # Tuples keep both from being parts, whose parameters would have second names.
        self._own, self._replaced = (own,), (replaced,)

    @property
    def replaced(self) -> nn.Module:
        """The frozen norm that this one replaced."""
        return self._replaced[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to its norm: computed in fp32, returned in the dtype of x."""
        y: Tensor = self._own[0](x.float())
        return y.to(x.dtype)

    def merged(self, dtype: torch.dtype) -> nn.Module:
        """Return a frozen norm with the trained parameters, in the dtype that they were stored in.

        Norms are stored in the dtype of their inputs, whatever that of merged weights.
        """
        merged = copy.copy(self.replaced)
        merged._parameters = {
            name: nn.Parameter(own.detach().to(stored.dtype), requires_grad=False)
            for (name, own), stored in zip(
                self.named_parameters(), self.replaced.parameters(), strict=True
            )
        }
        return merged


def embedding_scale(table: nn.Module, device: torch.device) -> Tensor | None:
    """Return what a table multiplies its rows by, as Gemma's does; None of a plain table."""
    scale = getattr(table, "embed_scale", None)
    if scale is None:
        return None
    stored: Any = table.weight
    # Rounded as the frozen table rounds it.
    return torch.as_tensor(scale).detach().to(stored.dtype).to(device, torch.float32)


def with_weight(table: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """Return a frozen table like another, hooks included, that holds other rows, in `dtype`."""
    stored: Any = table.weight
    other = copy.copy(table)
    values = weight.to(stored.device, dtype)
    if "weight" in own_buffers(table):
        other._buffers = {**own_buffers(table), "weight": values}
    else:
        other._parameters = {"weight": nn.Parameter(values, requires_grad=False)}
    return other
