"""The layers of a model that can carry LoRA: one view for the whole package.

Takes a model in any state: a skeleton on the meta device, loaded and frozen, or with adapters on
it. Returns its layers as `Projection` records; changes nothing. Targets, quantisation, plan, merge
and reports ask here, and so agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal

from torch import nn

from qlora_kit.layers.experts import Stack
from qlora_kit.layers.frozen import FrozenLinear, TransposedLinear
from qlora_kit.layers.windows import Window, window_of

_OF_VOCABULARY = (nn.Embedding, nn.Linear, FrozenLinear)
Group = Literal["attention", "mlp", "experts"]

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# The last is T5's name for it, whatever its activation.
_MLP = re.compile(r"mlp|feed_?forward|ffn|dense_?relu_?dense", re.IGNORECASE)
# The projections that see one x: attention's of its queries, keys and values (q_proj, query, q_lin,
# query_proj, q, …), and a gated MLP's. A model calls the first before the others.
_FIRST = re.compile(r"q(uery)?(_(proj|lin))?|gate_proj|wi_0")
_OTHERS = re.compile(r"(k(ey)?|v(alue)?)(_(proj|lin))?|up_proj|wi_1")
# Attention to what another half of the model computed: its keys and values have an input of their
# own.
_CROSS = re.compile(r"enc_?dec|encoder_attn|cross", re.IGNORECASE)
ROUTER = re.compile(r"gate|router|shared_expert_gate")
"""names of what chooses experts, or weighs a shared one, beside the experts"""


@dataclass(frozen=True)
class Projection:
    """A layer y = x Wᵀ + b of a model, a convolution, or a part of its vocabulary.

    Attributes:
        path: path of the layer in the model.
        layer: a skeleton's `nn.Linear` or a loaded base's `FrozenLinear`, never a layer around it;
            an `nn.Embedding` is a table W (K, D) whose rows are looked up.
        group: the part of the model that the layer belongs to; None if its path does not tell.
        is_expert: whether it is a layer of a `Stack`, which carries LoRA as a whole.
    """

    path: str
    layer: nn.Linear | FrozenLinear | nn.Embedding
    group: Group | None
    is_expert: bool = False

    @property
    def window(self) -> Window | None:
        """The window of a convolution, whose weight lies flat, see `layers.windows`."""
        return window_of(self.layer)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The shape of a row of the weight in a file: (D,), or (C, k, k) of a convolution."""
        return (self.in_features,) if self.window is None else self.window.kernel

    @property
    def in_features(self) -> int:
        """D."""
        layer = self.layer
        return layer.embedding_dim if isinstance(layer, nn.Embedding) else layer.in_features

    @property
    def out_features(self) -> int:
        """K."""
        layer = self.layer
        return layer.num_embeddings if isinstance(layer, nn.Embedding) else layer.out_features

    @property
    def lora_path(self) -> str:
        """The path by which LoRA on it is known: of an expert that of its stack."""
        return self.path.rpartition(".")[0] if self.is_expert else self.path

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight: (K, D)."""
        return self.out_features, self.in_features

    @property
    def is_transposed(self) -> bool:
        """Whether a checkpoint of the model holds the weight as (D, K)."""
        layer = self.layer
        if isinstance(layer, FrozenLinear):
            return layer.is_transposed
        return isinstance(layer, TransposedLinear)

    @property
    def weight_name(self) -> str:
        """The name of the weight in a state dict."""
        return f"{self.path}.weight"

    @property
    def frozen(self) -> FrozenLinear:
        """The layer, for callers that have a loaded base."""
        assert isinstance(self.layer, FrozenLinear), "a skeleton has no frozen layers"
        return self.layer


def projections(model: nn.Module) -> dict[str, Projection]:
    """Return the projections of a model by path, in the order of the model.

    The layers of a head are left out: the head of a language model is not quantised with the
    projections, and the head of a classifier is trained whole. So are the routers of a mixture,
    which stay as they are stored.
    """
    head = _part(model, "get_output_embeddings")
    base = base_prefix(model)
    stacked = {each for stack in stacks(model).values() for each in stack}
    routers = tuple(f"{path}." for path in router_paths(model))
    found = {
        path: _projection(path, layer, is_expert=module in stacked)
        for path, module in model.named_modules()
        if module is not head
        and path.startswith(base)
        and not f"{path}.".startswith(routers)
        and (layer := _layer_of(module)) is not None
    }
    # The frozen layer inside a LoRA layer was found already, under the path of the LoRA layer, or
    # is that of a head.
    in_head = getattr(head, "frozen", None)
    inner = {f"{path}.frozen" for path in found}
    inner |= {path for path, each in found.items() if each.layer is in_head}
    return {path: each for path, each in found.items() if path not in inner}


def _projection(path: str, layer: nn.Linear | FrozenLinear, *, is_expert: bool) -> Projection:
    return Projection(path, layer, "experts" if is_expert else group_of(path), is_expert)


def with_one_input(model: nn.Module) -> list[list[str]]:
    """Return the paths of the projections that see one x, by x, in the order of their calls.

    They are the queries, keys and values of each attention, and gate and up of each MLP. Their
    names tell: a caller must expect a model that calls one of them with something else after all.
    """
    first: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for path, projection in projections(model).items():
        parent, _, name = path.rpartition(".")
        for pattern, found in ((_FIRST, first), (_OTHERS, others)):
            if projection.group is not None and pattern.fullmatch(name):
                found.setdefault(parent, []).append(path)
    groups = []
    for parent in {**first, **others}:
        one, rest = first.get(parent, []), others.get(parent, [])
        is_cross = _CROSS.search(".".join(parent.split(".")[-2:]))
        groups += [one, rest] if is_cross else [one + rest]
    return [paths for paths in groups if len(paths) > 1]


def stacks(model: nn.Module) -> dict[str, Stack]:
    """Return the stacks of a model, each by the path of the tensor that a checkpoint holds."""
    return {path: each for path, each in model.named_modules() if isinstance(each, Stack)}


def by_lora_path(found: Mapping[str, Projection]) -> dict[str, list[Projection]]:
    """Return projections by the path that LoRA on them has: the experts of a stack share one."""
    grouped: dict[str, list[Projection]] = {}
    for each in found.values():
        grouped.setdefault(each.lora_path, []).append(each)
    return grouped


def router_paths(model: nn.Module) -> list[str]:
    """Return the paths of what chooses the experts of a mixture, beside the experts."""
    blocks = dict.fromkeys(_above(path, 2) for path in stacks(model))
    return [
        f"{block}.{name}" if block else name
        for block in blocks
        for name, _ in model.get_submodule(block).named_children()
        if ROUTER.fullmatch(name)
    ]


def _above(path: str, levels: int) -> str:
    return ".".join(path.split(".")[:-levels])


def projected_weights(model: nn.Module) -> Set[str]:
    """Return the names of the weights to quantise: of all projections but convolutions."""
    return {each.weight_name for each in projections(model).values() if each.window is None}


def convolutions(model: nn.Module) -> dict[str, Window]:
    """Return the windows of all convolutions, by the names of their weights."""
    return {each.weight_name: each.window for each in projections(model).values() if each.window}


def transposed_weights(model: nn.Module) -> Set[str]:
    """Return the names of the weights that an unquantised checkpoint holds as (D, K)."""
    return {each.weight_name for each in projections(model).values() if each.is_transposed}


def vocabulary_paths(model: nn.Module) -> set[str]:
    """Return the paths of the input embedding and the output head."""
    parts = (input_embedding(model), _part(model, "get_output_embeddings"))
    wanted = {part for part in parts if part is not None}
    return {path for path, module in model.named_modules() if module in wanted}


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the table that ids are looked up in; None of a model that reads images."""
    return None if takes_pixels(model) else _part(model, "get_input_embeddings")


def takes_pixels(model: nn.Module) -> bool:
    """Whether a model of transformers reads images."""
    return getattr(model, "main_input_name", "") == "pixel_values"


def vocabulary(model: nn.Module) -> dict[str, Projection]:
    """Return the input embedding and the output head of a model by path; W is (V, D) of both.

    They carry LoRA where they are asked for by name, and are no projections otherwise.
    """
    parts = (input_embedding(model), _part(model, "get_output_embeddings"))
    wanted = [part for part in parts if part is not None]
    return {
        path: Projection(path, layer, None)
        for path, module in model.named_modules()
        if module in wanted
        and isinstance(layer := getattr(module, "frozen", module), _OF_VOCABULARY)
    }


def carriers(model: nn.Module) -> dict[str, Projection]:
    """Return all that can carry LoRA by path: the projections, then the vocabulary's parts."""
    return {**projections(model), **vocabulary(model)}


def group_of(path: str) -> Group | None:
    """Return the group of the layer at a path, or None if no name in the path tells.

    The nearest enclosing name decides: `layers.0.self_attn.q_proj` is attention.
    """
    for name in reversed(path.split(".")[:-1]):
        if _ATTENTION.search(name):
            return "attention"
        if _MLP.search(name):
            return "mlp"
    return None


def _layer_of(module: nn.Module) -> nn.Linear | FrozenLinear | None:
    """Return the linear layer that a module is or wraps, or None."""
    layer = getattr(module, "frozen", module)
    return layer if isinstance(layer, nn.Linear | FrozenLinear) else None


def base_prefix(model: nn.Module) -> str:
    """Return what the paths of a model of transformers begin with, but for those of its heads."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def _part(model: nn.Module, getter: str) -> nn.Module | None:
    """Return the embedding or head that a model of transformers names; None for other models."""
    return getattr(model, getter)() if hasattr(model, getter) else None
