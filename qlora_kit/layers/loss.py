"""The head and the loss as one chunked operation: no logits matrix ever exists.

Takes hidden states (N, D) and their targets (N,); returns a sum over the tokens. The logits of a
few hundred tokens exist at one time, and are turned into the gradient in place. The gradients of
the hidden states, and of what is trained of the head (`layers.head_terms`), are computed in the
same pass. Never averages: the caller does.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kit.config import StepOptions
from qlora_kit.layers.head import Head, SlicedWeight
from qlora_kit.layers.kernels import serves
from qlora_kit.layers.kernels.cross_entropy import target_logprobs
from qlora_kit.layers.purpose import LOSS_CHUNK, purpose

CHUNK_TOKENS = StepOptions().loss_chunk_tokens

ChunkLoss = Callable[[Tensor, Tensor], Tensor]
"""Takes fp32 logits (n, V) and targets (n,) of a chunk; returns the sum of its loss."""


def cross_entropy_sum(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    chunk_tokens: int = CHUNK_TOKENS,
    weights: Tensor | None = None,
    losses: Tensor | None = None,
) -> Tensor:
    """Return the sum of −log p(target) over all tokens, each times its weight, a scalar in fp32.

    Args:
        hidden: (N, D), in the compute dtype.
        targets: (N,), int64, each in 0 … V−1.
        head: formula of the logits.
        chunk_tokens: tokens whose logits exist at one time.
        weights: (N,), fp32, factor of each token; None where all have 1.
        losses: (N,), is filled with what each token adds to the sum; None where nobody asks.

    Source: the online form of Cut Your Losses (arXiv:2411.09009), section 4, by rows.
    """
    with purpose(LOSS_CHUNK):
        total: Tensor = _CrossEntropySum.apply(
            hidden, targets, head, chunk_tokens, weights, losses, *head.trained
        )
    return total


def chunked_loss_sum(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    loss: ChunkLoss,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Return the sum of a custom loss over all tokens, a scalar.

    Args:
        hidden: (N, D), in the compute dtype.
        targets: (N,), int64.
        head: formula of the logits.
        loss: receives the logits and targets of each chunk in turn and returns a sum; it
            must be differentiable in the logits and must not depend on other chunks.
        chunk_tokens: tokens whose logits exist at one time.
    """
    total: Tensor = _CustomLossSum.apply(hidden, targets, head, loss, chunk_tokens, *head.trained)
    return total


def token_logprobs(
    hidden: Tensor, targets: Tensor, head: Head, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Return log p(target) of each token, (N,) in fp32, differentiable in `hidden` and the head.

    Losses that weigh tokens or compare sequences are built from this. Backward computes the logits
    again, so it costs one matmul more than `cross_entropy_sum`.

    Args:
        hidden: (N, D), in the compute dtype.
        targets: (N,), int64, each in 0 … V−1.
        head: formula of the logits.
        chunk_tokens: tokens whose logits exist at one time.
    """
    with purpose(LOSS_CHUNK):
        logprobs: Tensor = _TokenLogprobs.apply(hidden, targets, head, chunk_tokens, *head.trained)
    return logprobs


class TokenScores(NamedTuple):
    """The scores of tokens that evaluation needs.

    Attributes:
        logprobs: log p(target), (N,), fp32.
        is_top: whether the target is the most likely token, (N,), bool.
    """

    logprobs: Tensor
    is_top: Tensor


@torch.no_grad()
def score_tokens(
    hidden: Tensor, targets: Tensor, head: Head, chunk_tokens: int = CHUNK_TOKENS
) -> TokenScores:
    """Return log p(target) of each token, and whether the target is the most likely token.

    Args:
        hidden: (N, D), in the compute dtype.
        targets: (N,), int64, each in 0 … V−1.
        head: formula of the logits.
        chunk_tokens: tokens whose logits exist at one time.
    """
    weight = head.weight(hidden.dtype)
    logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    is_top = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    for rows, chunk in _walk(hidden, targets, head, weight, chunk_tokens, gradient=False):
        is_top[rows] = chunk.is_top()
        logprobs[rows] = chunk.logprobs()
    return TokenScores(logprobs, is_top)


# ---------------------------------------------------------------- one chunk


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _walk(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    weight: Tensor | SlicedWeight,
    size: int,
    *,
    gradient: bool,
) -> Iterator[tuple[slice, _Chunk | _FusedChunk]]:
    """Yield the rows of each chunk, and the chunk; `gradient` says whether it will be asked for.

    All chunks share one buffer (size, V): a chunk is spent once the next one is asked for.
    """
    fused = _FusedChunk.serves(hidden, head)
    dtype = hidden.dtype if fused else torch.float32
    shape = (min(size, len(hidden)), len(weight))
    buffer = torch.empty(shape, dtype=dtype, device=hidden.device)
    capped = None if head.softcap is None else torch.empty_like(buffer)
    for rows in _chunks(len(hidden), size):
        part = head.rows(rows)
        if fused:
            yield rows, _FusedChunk(hidden[rows], targets[rows], part, weight, buffer, gradient)
        else:
            yield rows, _Chunk(hidden[rows], targets[rows], part, weight, buffer, capped)


class _Chunk:
    """The logits of a few tokens, turned into log-probabilities and then into a gradient.

    All of it happens in one fp32 buffer (n, V), in few passes: each pass reads and writes the
    whole buffer.
    """

    def __init__(
        self,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        weight: Tensor | SlicedWeight,
        buffer: Tensor,
        capped: Tensor | None,
    ) -> None:
        self._head, self._weight, self._hidden = head, weight, hidden
        self._targets = targets.unsqueeze(1)
        self._values = buffer[: len(hidden)]
        self._capped = None if capped is None else capped[: len(hidden)]
        head.fill_logits(hidden, weight, self._values, self._capped)

    def is_top(self) -> Tensor:
        """Return whether each target is the most likely token (n,); only before `logprobs`."""
        return self._values.argmax(dim=1) == self._targets.squeeze(1)

    def logprobs(self) -> Tensor:
        """Return log p(target) (n,). Afterwards the buffer holds exp(logit − largest logit)."""
        self._values -= self._values.amax(dim=1, keepdim=True)
        picked = self._values.gather(1, self._targets)
        self._values.exp_()
        self._sum = self._values.sum(dim=1, keepdim=True)
        return (picked - self._sum.log()).squeeze(1)

    def fill_gradients(self, token_grads: Tensor | float, found: _Gradients) -> None:
        """Write the gradients of Σ token_grads · (−log p) into those found; after `logprobs`.

        The gradient of the logits is softmax − onehot = (exp − sum · onehot) / sum. The division
        is done after the product with W, whose rows are D wide instead of V.
        """
        grad, factor = self._values, token_grads * self._head.scale / self._sum
        if self._hidden.dtype == torch.float16:
            # The sums reach V, which is beyond float16's 65504: divide before the cast.
            grad /= self._sum
            factor, self._sum = factor * self._sum, torch.ones_like(self._sum)
        grad.scatter_add_(1, self._targets, -self._sum)
        if self._capped is not None:
            grad *= self._capped.square_().neg_().add_(1)
        self._head.fill_gradients(
            self._hidden, grad, self._weight, factor, found.hidden, found.trained
        )


class _FusedChunk:
    """A chunk whose log-probabilities and gradient one kernel computes.

    Its buffer (n, V) has the dtype of the hidden states, in which the products are computed
    anyway: so the logits are the same numbers in half the memory, and no pass casts them.
    """

    @staticmethod
    def serves(hidden: Tensor, head: Head) -> bool:
        """Whether a kernel serves for the head's formula, on the device of the hidden states."""
        # A scale below zero would turn the order of the logits, in which `is_top` looks.
        plain = head.linear.bias is None and head.softcap is None and head.scale > 0
        return plain and serves("loss", hidden)

    def __init__(
        self,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        weight: Tensor | SlicedWeight,
        buffer: Tensor,
        gradient: bool,
    ) -> None:
        self._head, self._weight, self._hidden = head, weight, hidden
        self._targets, self._gradient = targets, gradient
        self._values = buffer[: len(hidden)]
        head.fill_products(hidden, weight, self._values)

    def is_top(self) -> Tensor:
        """Return whether each target is the most likely token (n,); only before `logprobs`."""
        return self._values.argmax(dim=1) == self._targets

    def logprobs(self) -> Tensor:
        """Return log p(target) (n,). Afterwards the buffer holds the gradient, if one is wanted."""
        return target_logprobs(
            self._values, self._targets, scale=self._head.scale, gradient=self._gradient
        )

    def fill_gradients(self, token_grads: Tensor | float, found: _Gradients) -> None:
        """Write the gradients of Σ token_grads · (−log p) into those found; after `logprobs`."""
        factor = token_grads * self._head.scale
        self._head.fill_gradients(
            self._hidden, self._values, self._weight, factor, found.hidden, found.trained
        )


# ---------------------------------------------------------------- autograd


class _Gradients(NamedTuple):
    """The gradients that a loss computes in its pass.

    Attributes:
        hidden: of the hidden states, (N, D), in their dtype; None if nobody wants it.
        trained: of what is trained of the head, summed over the chunks, fp32 or wider; none if
            nobody wants them.
    """

    hidden: Tensor | None
    trained: tuple[Tensor, ...]

    @classmethod
    def wanted(cls, needs: Sequence[bool], hidden: Tensor, trained: Sequence[Tensor]) -> _Gradients:
        """Return gradients to be filled.

        Args:
            needs: what autograd wants: of `hidden` first, and of `trained` last.
            hidden: (N, D).
            trained: the trained parameters of the head.
        """
        own = torch.empty_like(hidden) if needs[0] else None
        # Whoever wants one of them wants all.
        is_trained = any(needs[len(needs) - len(trained) :])
        return cls(own, tuple(map(torch.zeros_like, trained)) if is_trained else ())

    @property
    def are_wanted(self) -> bool:
        """Whether there is anything to fill."""
        return self.hidden is not None or bool(self.trained)

    def rows(self, rows: slice) -> _Gradients:
        """Return the gradients that a chunk fills."""
        return self._replace(hidden=None if self.hidden is None else self.hidden[rows])


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """Return grad · factor, rounded once: 1 / tokens in bf16 would be up to 0.4 % off."""
    return torch.mul(grad, factor.reshape(1, 1), out=torch.empty_like(grad))


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        chunk_tokens: int,
        weights: Tensor | None,
        losses: Tensor | None,
        *trained: Tensor,
    ) -> Tensor:
        weight = head.weight(hidden.dtype)
        found = _Gradients.wanted(ctx.needs_input_grad, hidden, trained)
        # Gradients are kept relative to the largest weight: in float16 a large one would overflow.
        ctx.largest = weights.max() if weights is not None and len(weights) else None
        # fp64: a sum over many thousand tokens must not depend on how they are batched.
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for rows, chunk in _walk(
            hidden, targets, head, weight, chunk_tokens, gradient=found.are_wanted
        ):
            logprobs = chunk.logprobs()
            factors: Tensor | float = 1.0
            if weights is not None:
                logprobs = logprobs.double() * weights[rows]
                factors = (weights[rows] / ctx.largest).unsqueeze(1)
            total -= logprobs.sum(dtype=torch.float64)
            if losses is not None:
                losses[rows] = -logprobs
            if found.are_wanted:
                chunk.fill_gradients(factors, found.rows(rows))
        _keep(ctx, found)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor = grads[0] if ctx.largest is None else grads[0] * ctx.largest
        return _kept(ctx, factor, others=5)


class _CustomLossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        loss: ChunkLoss,
        chunk_tokens: int,
        *trained: Tensor,
    ) -> Tensor:
        found = _Gradients.wanted(ctx.needs_input_grad, hidden, trained)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for rows in _chunks(len(hidden), chunk_tokens):
            part = hidden[rows].detach().requires_grad_(found.hidden is not None)
            with torch.set_grad_enabled(found.are_wanted):
                value = loss(head.rows(rows).logits(part), targets[rows])
            total += value.detach().double()
            if not found.are_wanted:
                continue
            wanted = [part] if found.hidden is not None else []
            grads = [*torch.autograd.grad(value, [*wanted, *(trained if found.trained else ())])]
            if found.hidden is not None:
                found.hidden[rows] = grads.pop(0)
            for own, grad in zip(found.trained, grads, strict=True):
                own += grad
        _keep(ctx, found)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _kept(ctx, grads[0], others=4)


def _keep(ctx: Any, found: _Gradients) -> None:
    """Keep the gradients of a sum for backward, which multiplies them by the sum's own."""
    ctx.save_for_backward(found.hidden)
    ctx.of_trained, ctx.is_spent = found.trained, False


def _kept(ctx: Any, factor: Tensor, others: int) -> tuple[Tensor | None, ...]:
    """Return the kept gradients times `factor`, and None for the `others` that autograd asks for.

    Those of what is trained are scaled in place, because that of a whole head is as large as the
    head in fp32. So they are there for one backward only.
    """
    (grad,) = ctx.saved_tensors
    of_trained, ctx.of_trained = ctx.of_trained, ()
    if ctx.is_spent:
        raise RuntimeError("the loss of a trained head has one backward; compute it again")
    ctx.is_spent = bool(of_trained)
    for each in of_trained:
        each.mul_(factor)
    own = None if grad is None else _scaled(grad, factor)
    return _for_inputs(ctx, own, others, of_trained)


def _for_inputs(
    ctx: Any, of_hidden: Tensor | None, others: int, of_trained: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return what autograd is given: of the hidden states, `others`, and what is trained."""
    missing = len(ctx.needs_input_grad) - 1 - others - len(of_trained)
    return (of_hidden, *(None,) * (others + missing), *of_trained)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        chunk_tokens: int,
        *trained: Tensor,
    ) -> Tensor:
        ctx.head, ctx.chunk_tokens = head, chunk_tokens
        ctx.save_for_backward(hidden, targets, *trained)
        weight = head.weight(hidden.dtype)
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for rows, chunk in _walk(hidden, targets, head, weight, chunk_tokens, gradient=False):
            logprobs[rows] = chunk.logprobs()
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, *trained = ctx.saved_tensors
        with purpose(LOSS_CHUNK):
            weight = ctx.head.weight(hidden.dtype)
            found = _Gradients.wanted(ctx.needs_input_grad, hidden, trained)
            walk = _walk(hidden, targets, ctx.head, weight, ctx.chunk_tokens, gradient=True)
            for rows, chunk in walk:
                chunk.logprobs()
                chunk.fill_gradients(-grads[0][rows].unsqueeze(1), found.rows(rows))
        return _for_inputs(ctx, found.hidden, 3, found.trained)
