"""RMSNorm in one kernel forward and one backward: y = x · rstd · w, rstd = 1 / √(mean(x²) + ε).

torch has both kernels on a GPU, under names that its public `rms_norm` hides: in a simulation that
function falls apart into the steps of the formula, whose tensors no GPU would make. Here they are
ops of the kit, which say on every device which tensors they return. On a CPU they compute the plain
formula, for tests.

The weight is frozen, so backward gives the gradient of x alone. It keeps x, which the residual
stream holds anyway, and one number a token.

Shapes: D hidden size.

Source: Root Mean Square Layer Normalization (arXiv:1910.07467), equation 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.layers.kernels import serves
from qlora_kit.private_torch import own_parameters


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return y (..., D) of x (..., D), in the dtype of x; differentiable in x.

    Args:
        x: in any floating dtype.
        weight: (D,). Where its dtype and that of x differ, all is computed in the wider one and
            rounded once.
        eps: ε, added to the mean of the squares.
    """
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


class FusedNorm(nn.Module):
    """A norm of a model, computed by the kernel where it serves.

    It shares its parameter with the module that it replaces, so the names of a model's weights stay
    the same.

    Args:
        replaced: the model's own norm.
        eps: the ε of its formula.
        adds_one: whether its formula multiplies by 1 + w instead of w.
    """

    weight: nn.Parameter

    def __init__(self, replaced: nn.Module, eps: float, *, adds_one: bool) -> None:
        super().__init__()
        self._parameters = own_parameters(replaced)
        self.training = replaced.training
        self.eps, self.adds_one = eps, adds_one
        # A tuple keeps it from being a child, which would give the weight a second name.
        self._replaced = (replaced,)
        self._one_more = _one_more(self.weight) if adds_one else None

    @property
    def replaced(self) -> nn.Module:
        """The model's own norm."""
        return self._replaced[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D), in the dtype of x."""
        if serves("norm", x):
            weight = self.weight if self._one_more is None else self._one_more
            return rms_norm(x, weight, self.eps)
        y: Tensor = self.replaced(x)
        return y

    def extra_repr(self) -> str:
        """Show the formula when the model is printed."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}, adds_one={self.adds_one}"


@torch.no_grad()
def _one_more(weight: Tensor) -> Tensor:
    # In bfloat16 the sum would be off by up to 0.4 %.
    return weight.to(_accumulated(weight.dtype)) + 1


# ---------------------------------------------------------------- autograd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # The kernels would copy what is not contiguous themselves, where no plan sees it.
        x = x.contiguous()
        weight = weight.to(torch.promote_types(x.dtype, weight.dtype))
        y, rstd = torch.ops.qlora_kit.rms_norm(x.to(weight.dtype), weight, eps)
        ctx.weight = weight
        ctx.save_for_backward(x, rstd)
        out: Tensor = y.to(x.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,), (x, rstd), dtype = grads, ctx.saved_tensors, ctx.weight.dtype
        grad_y = grad_y.contiguous().to(dtype)
        grad_x = torch.ops.qlora_kit.rms_norm_backward(grad_y, x.to(dtype), ctx.weight, rstd)
        return grad_x.to(x.dtype), None, None


# ---------------------------------------------------------------- ops


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the kernels add up numbers of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def _on_gpu(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = torch.ops.aten._fused_rms_norm(x, list(weight.shape), weight, eps)
    return y, rstd


def _back_on_gpu(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    wanted = [True, False]  # the gradient of x, and not that of the weight
    grad_x: Tensor
    grad_x, _ = torch.ops.aten._fused_rms_norm_backward(
        grad, x, list(weight.shape), rstd, weight, wanted
    )
    return grad_x


def _on_cpu(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(_accumulated(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype), rstd


def _back_on_cpu(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Return rstd · (g − x̂ · mean(g · x̂)) with g = grad · w and x̂ = x · rstd."""
    wide = grad.to(rstd.dtype) * weight
    unit = x * rstd
    back = rstd * (wide - unit * (wide * unit).mean(-1, keepdim=True))
    return back.to(x.dtype)


def _in_a_simulation(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=_accumulated(x.dtype))
    return torch.empty_like(x), rstd


def _back_in_a_simulation(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(x)


_ops = torch.library.Library("qlora_kit", "FRAGMENT")
_ops.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
_ops.impl("rms_norm", _on_gpu, "CUDA")
_ops.impl("rms_norm", _on_cpu, "CPU")
_ops.impl("rms_norm", _in_a_simulation, "Meta")
_ops.define("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> Tensor")
_ops.impl("rms_norm_backward", _back_on_gpu, "CUDA")
_ops.impl("rms_norm_backward", _back_on_cpu, "CPU")
_ops.impl("rms_norm_backward", _back_in_a_simulation, "Meta")
