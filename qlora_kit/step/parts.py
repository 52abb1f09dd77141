"""The parts of a step, and the part that a piece of recorded work is for.

Takes launches: the work of a device, each piece with its name and the names around it. Returns the
name of a part. Records nothing; see `step.recording`.

A launch is recognised by its own name, by the labels of `step.recording` around it, by the names of
the operations that it ran in, and, where it is a matrix product, by the shapes of its operands. So
the parts of the kit's step and of any other step on a model of transformers can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qlora_kit.layers.projections import projections

Shape = tuple[int, ...]

PARTS = (
    "base products", "LoRA", "dequantisation", "attention", "norms", "RoPE", "MLP beside products",
    "head and loss", "optimizer", "copies", "everything else",
)  # fmt: skip
"""The parts, in the order in which they are shown."""

LABEL = "part of step: "
"""The beginning of a label in a recording; behind it comes the name of a part."""

NODE = "autograd::engine::evaluate_function: "
"""The beginning of the name under which autograd runs the backward of an operation."""

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
"""The operations that are matrix products."""

# A label of one of these parts holds for all that runs inside it, products too.
_WHOLE = ("dequantisation", "head and loss", "copies")
# A matrix whose rows or columns are at most this many times the rank is one of LoRA: several LoRA
# matrices may share a product.
_MOST_RANKS = 8
_ATTENTION = ("scaled_dot_product", "flash_attention", "fmha", "_sdpa", "flash_fwd", "flash_bwd")
_LOSS = ("crossentropy", "cross_entropy", "losssum", "log_softmax", "nll_loss", "logsumexp")
# The names of kernels in Triton are those of their functions.
_OWN_KERNELS = {
    "_unpack": "dequantisation", "_rotate": "RoPE", "_matrices": "LoRA", "_left": "LoRA",
    "_add": "LoRA",
    "_gate": "MLP beside products", "_gate_back": "MLP beside products",
    "_cross_entropy": "head and loss",
}  # fmt: skip
_WORDS = (
    ("rotary", "RoPE"),
    ("rope", "RoPE"),
    ("rms_norm", "norms"),
    ("rmsnorm", "norms"),
    ("layer_norm", "norms"),
    ("lora", "LoRA"),
    ("mlp", "MLP beside products"),
    ("swiglu", "MLP beside products"),
    ("geglu", "MLP beside products"),
    ("softmax", "attention"),
    # The norm of all gradients, and their clipping, have no other name in a recording.
    ("_foreach_", "optimizer"),
    ("vector_norm", "optimizer"),
)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel on the device; on a CPU, one call of an operation.

    Attributes:
        name: its name.
        seconds: the seconds that it took.
        chain: names of the operation that launched it and of the operations and labels around that
            one, innermost first; then the same for the operation of forward whose backward it is.
            The chain ends with the layer that all of it lies in.
        shape: shapes of the operands of the nearest matrix product in the chain; () without one.
    """

    name: str
    seconds: float
    chain: tuple[str, ...]
    shape: tuple[Shape, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """The sizes by which the products of a step are told apart.

    Attributes:
        rank: the largest rank of the adapter.
        vocabulary: the size of the model's vocabulary.
        weights: the shapes of the weights of the model's projections, (K, D).
    """

    rank: int
    vocabulary: int
    weights: frozenset[Shape] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, rank: int) -> Sizes:
        """Return the sizes of a model of transformers, loaded or a skeleton."""
        config: Any = model.config
        shapes = frozenset(each.shape for each in projections(model).values())
        vocabulary = getattr(config.get_text_config(), "vocab_size", 0)  # images have none
        return cls(rank, vocabulary, shapes)


def part_of(launch: Launch, sizes: Sizes) -> str:
    """Return the part of a step that a launch is for."""
    kernel = launch.name.lower()
    if kernel.startswith(("memcpy", "memset")):
        return "copies"
    if own := _OWN_KERNELS.get(launch.name):
        return own
    labels = [name.removeprefix(LABEL) for name in launch.chain if name.startswith(LABEL)]
    if labels and labels[0] in _WHOLE:
        return labels[0]
    names = [kernel, *(name.lower() for name in launch.chain)]
    if _has(names, "optimizer.step", "optimizer.zero_grad", "fused_adam"):
        return "optimizer"
    # An operation behind the node is one of forward: the backward of a product that unpacked its
    # weight does more than unpack.
    if _has(_before_node(names), "dequant"):
        return "dequantisation"
    if _has(names, *_ATTENTION):
        return "attention"
    if launch.shape:
        return _part_of_product(launch, sizes)
    if _has(names, *_LOSS):
        return "head and loss"
    return _by_words(names) or "everything else"


def _has(names: list[str], *words: str) -> bool:
    return any(word in name for name in names for word in words)


def _before_node(names: list[str]) -> list[str]:
    node = next((i for i, name in enumerate(names) if name.startswith(NODE)), len(names))
    return names[:node]


def _by_words(names: list[str]) -> str | None:
    """Return the part that the innermost telling name tells, be it a label or a word."""
    labels = {(LABEL + part).lower(): part for part in PARTS}
    for name in names:
        if part := labels.get(name):
            return part
        for word, part in _WORDS:
            if word in name:
                return part
    return None


def _part_of_product(launch: Launch, sizes: Sizes) -> str:
    """Return the part of a product by its last two operands, (M, K) and (K, N).

    A projection multiplies by its weight, which comes last. The gradient of a LoRA matrix looks the
    same where a batch has as many tokens as a projection has outputs; then it is counted wrongly.
    """
    left, right = launch.shape[-2:]
    if right in sizes.weights or right[::-1] in sizes.weights:
        return "base products"
    if sizes.vocabulary in (*left, *right):
        return "head and loss"
    if len(right) > 2:
        return "attention"
    return "LoRA" if min(*left, *right) <= _MOST_RANKS * sizes.rank else "base products"
