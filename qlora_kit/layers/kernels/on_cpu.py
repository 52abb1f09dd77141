"""The kernels' second form: what a CPU computes, in torch's own operations.

On a CPU an elementwise operation takes the time that its numbers take through memory. So these
functions make as few passes as torch's operations allow, and write over what is no longer needed.
They are no ops of their own: a simulation sees each of their tensors. They are for fp32.

Shapes: n tokens, D hidden size, I width of the MLP, V vocabulary; B rows, T tokens, H heads, d the
width of a head, r ≤ d its rotated part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------- norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x · rstd · w (..., D) and rstd (..., 1), where rstd = 1 / √(mean(x²) + ε)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rstd = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * rstd).mul_(weight), rstd


def rms_norm_back(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient of x (..., D): rstd · g − x · rstd³ · mean(g · x) with g = grad · w."""
    wide = grad * weight
    # The product with x is freed before the result is written.
    share = (wide * x).sum(-1, keepdim=True)
    share.mul_(rstd.pow(3)).div_(-x.shape[-1])
    return wide.mul_(rstd).addcmul_(x, share)


# ---------------------------------------------------------------- rotary


def rotated(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Return x (B, H, T, d) turned by its positions, or turned back, as a new tensor.

    Args:
        x: queries or keys.
        cos: (B or 1, T, r).
        sin: likewise.
        back: whether to apply the transposed map.
    """
    # The heads of a token mostly lie side by side, and its angles are the same for all of them.
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(2), sin.unsqueeze(2)
    width = cos.shape[-1]
    half = width // 2
    if width == x.shape[-1]:
        out = x * cos
    else:
        out = x.clone()
        out[..., :width].mul_(cos)
    low, high = x[..., :half], x[..., half:width]
    of_low, of_high = sin[..., half:], sin[..., :half]
    signs = 1.0, -1.0
    if back:
        of_low, of_high, signs = of_high, of_low, (-1.0, 1.0)
    out[..., half:width].addcmul_(low, of_low, value=signs[0])
    out[..., :half].addcmul_(high, of_high, value=signs[1])
    return out.transpose(1, 2)


# ---------------------------------------------------------------- gate

_SILU = "silu"


def gated(activation: str, gate: Tensor, up: Tensor) -> None:
    """Write act(gate) ∘ up (n, I) over `up`; `gate` is overwritten too."""
    if activation == _SILU:
        F.silu(gate, inplace=True)
    else:
        torch.ops.aten.gelu_(gate, approximate="tanh")
    up.mul_(gate)


def gated_back(activation: str, gate: Tensor, up: Tensor, grad: Tensor, product: bool) -> None:
    """Write the gradients over `gate` and `up`, and act(gate) ∘ up over `grad` if asked for.

    Args:
        activation: "silu" or "gelu_tanh".
        gate: (n, I).
        up: (n, I).
        grad: (n, I), the gradient of act(gate) ∘ up.
        product: whether act(gate) ∘ up is asked for.
    """
    activated = F.silu(gate) if activation == _SILU else F.gelu(gate, approximate="tanh")
    grad_activated = up * grad
    if product:
        # Of the two products of the activation, each takes the place of the other's factor.
        of_up = grad.mul(activated)
        torch.mul(activated, up, out=grad)
        up.copy_(of_up)
    else:
        torch.mul(grad, activated, out=up)
    if activation == _SILU:
        torch.ops.aten.silu_backward.grad_input(grad_activated, gate, grad_input=gate)
    else:
        torch.ops.aten.gelu_backward.grad_input(
            grad_activated, gate, approximate="tanh", grad_input=gate
        )


# ---------------------------------------------------------------- loss


def target_logprobs(logits: Tensor, targets: Tensor, scale: float, gradient: bool) -> Tensor:
    """Return log p(target) (n,) of the logits times `scale`; the logits are overwritten.

    With `gradient` they become softmax − onehot. torch's softmax makes three passes, of which two
    find the numbers in the cache, and computes the exponential in half the time of `exp`.

    Args:
        logits: (n, V).
        targets: (n,), int64.
        scale: factor of the logits.
        gradient: whether the gradient is asked for.
    """
    if scale != 1:
        logits.mul_(scale)
    targets = targets.unsqueeze(1)
    picked = logits.gather(1, targets) - logits.amax(1, keepdim=True)
    torch.softmax(logits, 1, out=logits)
    # The largest probability is 1 / Σ exp(logit − largest logit). It is never small; p(target) may
    # be zero in fp32.
    logprobs = picked.add_(logits.amax(1, keepdim=True).log_())
    if gradient:
        logits.scatter_add_(1, targets, torch.full_like(picked, -1.0))
    return logprobs.squeeze(1)
