"""The LoRA layer: y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ, with W frozen and packed.

One autograd function serves 4, 8 and 16 bits, and one layer or several that see one x. It saves x
and the small h = dropout(x) Aᵀ before the product with W. So a recomputed layer that ends in that
product does not compute it again. Backward unpacks W again, so no unpacked weight outlives its
product. The trained term is a `LowRank`. Variants that compute otherwise are subclasses, each in a
file of its own.

Where A is frozen (LoRA-FA), x is not saved: the gradient of A alone would need it.

Shapes: N tokens, D in, K out, R rank.

Source: LoRA (arXiv:2106.09685), section 4.1; QLoRA (arXiv:2305.14314), equation 5; rsLoRA
(arXiv:2312.03732) for scaling = alpha / √rank; LoRA-FA (arXiv:2308.03303) for a frozen A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.layers import kernels
from qlora_kit.layers.draws import Draws, draws_now
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.handover import Handover
from qlora_kit.layers.head_terms import LowRankTerm
from qlora_kit.layers.kernels import split
from qlora_kit.layers.low_rank import LowRank, SplitLowRank
from qlora_kit.layers.save_first import save_first
from qlora_kit.layers.weight import FrozenWeight
from qlora_kit.layers.windows import Window


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank term.

    A (R, D) starts Kaiming-uniform and B (K, R) at zero, so a fresh layer computes the same as the
    frozen layer. Both are fp32, or wider with a wider input. Their product is cast once, when it is
    added to the frozen product.

    Args:
        frozen: the layer that this layer wraps.
        rank: R.
        scaling: factor of the low-rank term.
        dropout: probability that an input of A is zeroed in training.
        generator: draws A; None takes torch's global generator.
        number: number among the layers with LoRA, from which dropout draws its masks.
        device: the device of A and B; None: that of the frozen weight, which of a head that several
            processes hold together may be the host.
        freeze_a: whether A stays as it is drawn, and B alone is trained (LoRA-FA).

    Attributes:
        is_sum: whether y is the frozen product plus a `LowRank`. Layers that share an x, and MLPs
            in tiles, compute nothing else; other layers compute alone.
        partners: other layers that will be called with the same x after this layer, and that
            `can_share` its term. The first call computes the products of all; the others are
            handed to their layers. A layer that is called with anything else computes alone.
    """

    is_sum = True

    def __init__(
        self,
        frozen: FrozenLinear,
        *,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        number: int = 0,
        device: torch.device | None = None,
        freeze_a: bool = False,
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.number = number
        self.rank = rank
        self.scaling = scaling
        self.dropout = dropout
        self.trains_a = not freeze_a
        # A tuple keeps them from being children, which would give their parameters second names.
        self.partners: tuple[LoRALinear, ...] = ()
        self._handover = Handover()
        self._device = device or frozen.weight.device
        self._draw(generator)

    def _draw(self, generator: torch.Generator | None) -> None:
        """Make the trained parameters."""
        device = self._device
        # A is drawn on the CPU: the same seed gives the same A on every device.
        a = torch.empty(self.rank, self.frozen.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a.to(device), requires_grad=self.trains_a)
        self.lora_B = nn.Parameter(torch.zeros(self.frozen.out_features, self.rank, device=device))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return the A (R, D) and the B (K, R) that multiply, with the graph that makes them."""
        return self.lora_A, self.lora_B

    def filed(self) -> tuple[Tensor, Tensor]:
        """Return the A and the B of plain LoRA with the scaling that the spec gives the layer."""
        return self.lora_A.detach(), self.lora_B.detach()

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name; layers may share one."""
        of_a = {"lora_A": self.lora_A} if self.trains_a else {}
        return {**of_a, "lora_B": self.lora_B}

    def made_of(self) -> tuple[Tensor, ...]:
        """Return the tensors that `matrices` are made of."""
        return self.lora_A, self.lora_B

    @property
    def first_moved(self) -> nn.Parameter:
        """The parameter that the first step must move, where the layer learns at all."""
        return self.lora_B

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., K) in the dtype of x; of a convolution (B, C, …) to (B, K, …)."""
        if self.frozen.window is not None:
            return self._of_windows(x, self.frozen.window)
        handed = self._handover.take(x, *self.made_of())
        if handed is not None:
            return handed
        layers = (self, *self.partners)
        if any(layer.drops_out for layer in layers):
            layers = (self,)  # each layer has a mask of its own, so no product is common to them
        y, *others = products_of(x, layers)
        for layer, other in zip(layers[1:], others, strict=True):
            layer._handover.put(other, x, *layer.made_of())
        return y

    def _of_windows(self, x: Tensor, window: Window) -> Tensor:
        # Torch's own graph: it keeps x and h, as the one for linear layers does.
        y: Tensor = self.frozen(x)
        kept = self.draw_kept(x)
        given = x if kept is None else x * kept / (1 - self.dropout)
        term = window.low_rank(given, *self.matrices())
        return (y + self.scaling * term).to(y.dtype)

    @property
    def weight(self) -> FrozenWeight:
        """The frozen weight: T5 asks its layers for their weight's dtype, where it is a tensor."""
        return self.frozen.weight

    @property
    def multiplied(self) -> FrozenLinear:
        """The layer whose weight x is multiplied by."""
        return self.frozen

    def as_trained(self, term: LowRank) -> LowRank:
        """Return the term of a call as this kind of layer adds it to the product."""
        return term

    @property
    def drops_out(self) -> bool:
        """Whether the next call draws a mask."""
        return self.training and self.dropout > 0

    def draw_kept(self, x: Tensor) -> Tensor | None:
        """Draw the mask of the inputs of A that are kept: bool (N, D), or None without dropout.

        Of a convolution it has the shape of x (B, C, …): a number is dropped in every patch.

        Args:
            x: the input (..., D), or any tensor on its device that differs in the last size only.
        """
        if not self.drops_out:
            return None
        keep, draws = 1 - self.dropout, draws_now()
        if self.frozen.window is not None:
            return self._kept_of_windows(x, keep, draws)
        shape = torch.Size((*x.shape[:-1], self.frozen.in_features))
        if draws is not None and draws.covers(shape):
            return draws.kept(shape, self.number, keep, x.device)
        kept = torch.empty(shape, dtype=torch.bool, device=x.device)
        return kept.bernoulli_(keep).view(-1, shape[-1])

    def _kept_of_windows(self, x: Tensor, keep: float, draws: Draws | None) -> Tensor:
        shape = x.flatten(2).shape  # the channels stand in the place of tokens
        if draws is not None and draws.covers(shape):
            return draws.kept(shape, self.number, keep, x.device).view(x.shape)
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(keep)

    def head_parts(self) -> tuple[FrozenLinear, LowRankTerm]:
        """See `TrainedHead`: where the layer is a head, of which the loss knows the formula."""
        term = LowRankTerm(self.lora_A, self.lora_B, self.scaling, 1 - self.dropout)
        return self.frozen, term

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return the matrix that the low-rank term adds to W: scaling · B A, (K, D), fp32."""
        a, b = self.matrices()
        return self.scaling * (b @ a)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the weight of a frozen layer that computes the same, (K, D), fp32."""
        return self.frozen.weight.dequantize(torch.float32) + self.delta()

    @property
    def kind(self) -> tuple[object, ...]:
        """What layers must have alike to compute together."""
        return type(self), self.lora_A.shape, self.lora_A.dtype, self.trains_a, self.scaling

    def extra_repr(self) -> str:
        """Show rank and scaling when the model is printed."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def can_share(layers: Sequence[LoRALinear]) -> bool:
    """Whether layers that see one x can compute their terms together."""
    kinds = {each.kind for each in layers}
    is_trained = all(each.first_moved.requires_grad for each in layers)
    are_sums = all(each.is_sum and each.frozen.window is None for each in layers)
    return len(kinds) == 1 and is_trained and are_sums and len(layers) <= split.MOST_LAYERS


def term_of(layers: Sequence[LoRALinear], x: Tensor, kept: Tensor | None = None) -> LowRank:
    """Return the trained term of a call; to be called where no graph is recorded.

    Args:
        layers: one layer, or some that can share it, see `can_share`.
        x: the input, or any tensor on its device and in its dtype.
        kept: the mask of `draw_kept` for that call; only of a single layer.
    """
    return _term(layers, [each.matrices() for each in layers], x, kept)


def _term(
    layers: Sequence[LoRALinear],
    matrices: Sequence[tuple[Tensor, Tensor]],
    x: Tensor,
    kept: Tensor | None,
) -> LowRank:
    first = layers[0]
    a, b = zip(*matrices, strict=True)
    keep = 1.0 if kept is None else 1 - first.dropout
    return first.as_trained(as_served(LowRank(a, b, kept, first.scaling, keep), x))


def as_served(term: LowRank, x: Tensor) -> LowRank:
    """Return a term as it is multiplied on the device of x and in its dtype."""
    is_split = x.dtype == torch.bfloat16 and term.a[0].dtype == torch.float32
    return SplitLowRank.of(term) if is_split and kernels.serves("lora", x) else term


def products_of(x: Tensor, layers: Sequence[LoRALinear]) -> list[Tensor]:
    """Return the frozen product with its share of the term, (..., K), of each layer for one x."""
    rows = x.reshape(-1, x.shape[-1])
    matrices = [each.matrices() for each in layers]
    with torch.no_grad():
        term = _term(layers, matrices, x, layers[0].draw_kept(x))
    parameters = [*(a for a, _ in matrices), *(b for _, b in matrices)]
    found = products_with_term(rows, [each.multiplied for each in layers], term, parameters)
    return [y.view(*x.shape[:-1], -1) for y in found]


def products_with_term(
    x: Tensor, frozen: Sequence[FrozenLinear], term: LowRank, parameters: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return the y (N, K) of each frozen layer for one x (N, D), with its share of the term.

    Args:
        x: the input of all layers.
        frozen: the layers.
        term: their trained term.
        parameters: what the term is made of: A of each layer, then B of each.
    """
    with torch.no_grad():
        h = term.inner(x)
    # What a graph holds of several layers must not hold x itself, see `Handover`.
    held = x if len(frozen) == 1 else x.detach()
    trains_a = any(each.requires_grad for each in parameters[: len(frozen)])
    trained = parameters[0] if trains_a else parameters[-1]
    saved = save_first(trained, held if trains_a else None, term.kept, h, *term.a, *term.b)
    found: Sequence[Tensor] = _LoRAProducts.apply(x, frozen, term, h, *saved, *parameters)
    return found


class _LoRAProducts(torch.autograd.Function):
    # With d for dropout, p for the share it keeps and s for the scaling, for each layer:
    #   h = d(x) Aᵀ / p           y = x Wᵀ + b + s h Bᵀ
    #   g = s dy B / p            dA = gᵀ d(x)              dB = s dyᵀ h
    # and with the sum over the layers:
    #   dx = Σ dy W + d(Σ g A)
    # x Aᵀ, dA and the sum over g A are one product each, of the A of all layers on top of another.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: Sequence[FrozenLinear],
        term: LowRank,
        h: Tensor,
        token: Tensor,
        node: Any,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        # The context holds no activation: a graph would keep that past recomputation.
        ctx.weights, ctx.node = [each.weight for each in frozen], node
        ctx.kind, ctx.factors, ctx.count_of_a = type(term), term.factors, len(term.a)
        found = []
        for number, layer in enumerate(frozen):
            y = layer.weight.product(x, layer.bias)
            term.add_to(y, h, number)
            found.append(y)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads_y: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, h, *matrices = ctx.node.saved_tensors
        a, b = matrices[: ctx.count_of_a], matrices[ctx.count_of_a :]
        term: LowRank = ctx.kind(tuple(a), tuple(b), kept, *ctx.factors)
        grads = term.gradients(x, h, grads_y)
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for weight, grad_y in zip(ctx.weights, grads_y, strict=True):
                grad_x = weight.product_back(grad_y, onto=grad_x)
            assert grad_x is not None
            term.add_input_gradient(grad_x, grads.inner)
        return (grad_x, *(None,) * 5, *grads.a, *grads.b)
