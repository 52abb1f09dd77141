"""Layers that are trained whole, and trained rows of tables: which of a model; putting them on.

`--modules-to-save` names layers as PEFT does, by the end of their paths; `TokenRows` names rows. A
head that is the embedding as well stays so: both have one parameter. Takes a loaded base; returns
the layers that were put in the places of frozen ones. Reads and writes no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_kit.errors import ConfigError
from qlora_kit.layers.experts import Stack
from qlora_kit.layers.frozen import FrozenLinear, TransposedLinear
from qlora_kit.layers.head import SlicedWeight
from qlora_kit.layers.projections import (
    base_prefix,
    input_embedding,
    router_paths,
    stacks,
)
from qlora_kit.layers.trained import (
    TiedOutput,
    TrainedEmbedding,
    TrainedLayer,
    TrainedLinear,
    TrainedNorm,
)
from qlora_kit.layers.trained_rows import RowsEmbedding, RowsHead, first_rows
from qlora_kit.layers.windows import window_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.lora.spec import LoraSpec
    from qlora_kit.model.load import Base

# Of a fresh layer whose architecture does not say it.
_STD = 0.02
_MOST_NAMED = 5


@dataclass(frozen=True)
class TokenRows:
    """Rows of the tables of a vocabulary that are trained, all others staying frozen.

    Attributes:
        ids: numbers of the rows, by the path of their table. A head that is the embedding as well
            is not named: it has the rows of the embedding.
        fresh: numbers of those that start at the mean of the known rows.
        known: the number of known rows; they are the first ones.
    """

    ids: Mapping[str, tuple[int, ...]]
    fresh: frozenset[int] = field(default=frozenset())
    known: int = 0

    @classmethod
    def of(
        cls, skeleton: PreTrainedModel, ids: tuple[int, ...], fresh: frozenset[int], known: int
    ) -> TokenRows:
        """Return the rows of the embedding and of the head of a model, tied or not.

        Raises:
            ConfigError: the model has no single embedding, or no head that gives a token.
        """
        embedding, head = vocabulary(skeleton)
        if embedding is None or head is None or skeleton.config.is_encoder_decoder:
            raise ConfigError(
                f"--new-tokens: {skeleton.config.model_type} has no single embedding and head of "
                "tokens; expected a model that continues texts; leave it out"
            )
        paths = (embedding,) if is_pair(skeleton) else (embedding, head)
        return cls(dict.fromkeys(paths, ids), fresh, known)

    def count(self, model: nn.Module) -> int:
        """Return the number of trained parameters of a model."""
        embedding: Any = input_embedding(model)
        return sum(len(ids) for ids in self.ids.values()) * int(embedding.weight.shape[1])


def vocabulary(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Return the paths of the input embedding and of the head of a model; None without one."""
    paths = {module: path for path, module in model.named_modules()}
    embedding, head = input_embedding(model), model.get_output_embeddings()
    return (
        None if embedding is None else paths.get(embedding),
        None if head is None else paths.get(head),
    )


def is_pair(model: PreTrainedModel) -> bool:
    """Whether the head of a model has the weights of its embedding."""
    embedding, head = vocabulary(model)
    return f"{head}.weight" in (model.all_tied_weights_keys or {}) and embedding is not None


# ---------------------------------------------------------------- names


def whole_paths(model: PreTrainedModel, spec: LoraSpec) -> tuple[str, ...]:
    """Return the paths of the layers that are trained whole: a task's own, and those named.

    Of an embedding and a head that are one, both are returned, the embedding first.

    Raises:
        ConfigError: a name matches nothing, or what cannot be trained whole; a line for each.
    """
    found: dict[str, None] = dict.fromkeys(spec.whole)
    faults = []
    for name in spec.modules_to_save:
        paths = _named(model, name)
        reasons = {path: why for path in paths if (why := _unfit(model, path, spec))}
        if not paths:
            faults.append(
                f"--modules-to-save: '{name}' names no layer of the model; expected the end of a "
                f"path, such as {', '.join(_examples(model))}"
            )
        for path, why in list(reasons.items())[:1]:
            faults.append(f"--modules-to-save: '{name}' names {path}, {why}")
        found.update(dict.fromkeys(paths))
    if faults:
        raise ConfigError(*faults)
    embedding, head = vocabulary(model)
    if is_pair(model) and found.keys() & {embedding, head}:
        found = dict.fromkeys([str(embedding), str(head), *found])
    return tuple(found)


def _named(model: nn.Module, name: str) -> list[str]:
    """Return the outermost modules that PEFT means by a name: those whose path ends with it."""
    paths: list[str] = []
    for path, _ in model.named_modules():
        is_inside = any(path.startswith(f"{other}.") for other in paths)
        if path and path.endswith(name) and not is_inside and not path.endswith(".frozen"):
            paths.append(path)
    return paths


def _examples(model: PreTrainedModel) -> Iterator[str]:
    embedding, head = vocabulary(model)
    yield from (path.rpartition(".")[2] for path in (embedding, head) if path)
    names = (path for path, module in model.named_modules() if _is_norm(module))
    yield from dict.fromkeys(path.rpartition(".")[2] for path in names)


def _unfit(model: PreTrainedModel, path: str, spec: LoraSpec) -> str | None:
    """Return why a module cannot be trained whole, and what to do; None if it can."""
    module = model.get_submodule(path)
    table = vocabulary(model)
    prefix = base_prefix(model)
    if path in spec.whole or (table[1] is None and prefix and not path.startswith(prefix)):
        return "which belongs to the head of the task and is trained whole already; leave it out"
    if path in table:
        if model.config.is_encoder_decoder:
            return "which both halves of the model share; expected other layers; leave it out"
        if spec.new_tokens or spec.token_rows:
            return (
                "of which --new-tokens trains rows only; expected one of the two; leave one of "
                "them out"
            )
        return None
    if isinstance(module, Stack) or any(path.startswith(f"{each}.") for each in stacks(model)):
        return "an expert or a stack of them; expected LoRA on experts; name it with --targets"
    if any(f"{path}.".startswith(f"{each}.") for each in router_paths(model)):
        return "a router, which stays frozen; leave it out"
    own = getattr(module, "frozen", module)
    if isinstance(own, TransposedLinear) or getattr(own, "is_transposed", False):
        return "which is stored transposed; expected LoRA on such layers; name it with --targets"
    if window_of(own) is not None:
        return "a convolution; expected LoRA on such layers; name it with --targets"
    if isinstance(own, nn.Linear | FrozenLinear) or _is_norm(module):
        return None
    if next(module.children(), None) is not None:
        return "which holds several layers; expected layers; name those that it holds"
    return "which is no linear layer, embedding of tokens, head or norm; leave it out"


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has parameters (D,) only, and no parts: a norm of whatever formula."""
    own = list(module.parameters(recurse=False))
    no_parts = next(module.children(), None) is None and next(module.buffers(), None) is None
    return bool(own) and no_parts and all(each.ndim == 1 for each in own)


def check_not_targeted(
    named: Mapping[str, str], whole: tuple[str, ...], heads: tuple[str, ...]
) -> None:
    """Check that no layer is named for LoRA and to be trained whole.

    Args:
        named: the target that names a layer itself, no group of layers, by the layer's path.
        whole: the paths of the layers that are trained whole.
        heads: those of them that nobody asked for: the layers of a classifier's head.

    Raises:
        ConfigError: a layer is.
    """
    both = [path for path in whole if path in named]
    if both and both[0] in heads:
        raise ConfigError(
            f"--targets: '{named[both[0]]}' names {both[0]}, the head of the classifier, which is "
            "trained whole anyway; expected other layers; leave it out"
        )
    if both:
        raise ConfigError(
            f"--modules-to-save: {both[0]} is named by --targets {named[both[0]]} as well; "
            "expected LoRA on a layer, or all of it trained; leave it out of one of them"
        )


def count_whole(model: PreTrainedModel, spec: LoraSpec) -> int:
    """Return the number of parameters that are trained without LoRA."""
    paths = whole_paths(model, spec)
    if is_pair(model) and vocabulary(model)[1] in paths:
        paths = tuple(path for path in paths if path != vocabulary(model)[1])
    whole = 0
    for path in paths:
        whole += sum(each.numel() for each in model.get_submodule(path).parameters())
    return whole + (spec.token_rows.count(model) if spec.token_rows else 0)


# ---------------------------------------------------------------- putting them on


def train_whole(base: Base, spec: LoraSpec, generator: torch.Generator) -> dict[str, TrainedLayer]:
    """Put trained layers in the places of frozen ones, and return them by path.

    Args:
        base: a loaded base, changed in place.
        spec: what is trained; its LoRA is attached already.
        generator: draws the values that the base does not have.

    Raises:
        ConfigError: a layer has LoRA already, or what is named cannot be trained.
    """
    model = base.model
    embedding, head = vocabulary(model)
    if base.shards is not None and (spec.modules_to_save or spec.token_rows):
        raise ConfigError(
            "--shard-base: divides the base, of which --modules-to-save and --new-tokens train "
            "parts; expected all of it in each process; leave one of them out"
        )
    layers: dict[str, TrainedLayer] = {}
    for path in whole_paths(model, spec):
        layers[path] = _trained(base, path, layers.get(str(embedding)) if path == head else None)
        if f"{path}.weight" in base.fresh:
            _draw(base, layers[path], generator)
    for path, layer in layers.items():
        model.set_submodule(path, layer)  # type: ignore[arg-type]
    rows = {} if spec.token_rows is None else _rows(base, spec.token_rows)
    for path, layer in rows.items():
        model.set_submodule(path, layer)  # type: ignore[arg-type]
    return {**layers, **rows}


def _trained(base: Base, path: str, embedding: TrainedLayer | None) -> TrainedLayer:
    """Return the trained layer for a path; `embedding` is what a tied head goes with."""
    model = base.model
    module: nn.Module = model.get_submodule(path)
    if module is input_embedding(model):
        _check_rows_are_plain(module, path)
        return TrainedEmbedding(module, base.hardware.device, base.hardware.dtype)
    if module is model.get_output_embeddings():
        assert isinstance(module, FrozenLinear)
        if isinstance(module.weight, SlicedWeight):
            raise ConfigError(
                f"--modules-to-save: trains {path} whole, and --head-bits {module.weight.bits} "
                "holds it frozen; expected all of it in 16 bits; leave one of them out"
            )
        if is_pair(model) and isinstance(embedding, TrainedEmbedding):
            return TiedOutput(module, embedding.weight)
        return TrainedLinear(module)
    if _is_norm(module):
        return TrainedNorm(module)
    if not isinstance(module, FrozenLinear):
        raise ConfigError(f"{path}: cannot be trained whole; expected a layer without LoRA")
    return TrainedLinear(module)


def _check_rows_are_plain(table: nn.Module, path: str) -> None:
    is_plain = type(table).forward is nn.Embedding.forward or hasattr(table, "embed_scale")
    if not is_plain:
        raise ConfigError(
            f"{path}: {type(table).__name__} computes its rows in a way the kit does not know; "
            "expected a plain table; leave it frozen"
        )


def _draw(base: Base, layer: TrainedLayer, generator: torch.Generator) -> None:
    """Draw a layer that no checkpoint has, in host memory: the same values on every device."""
    assert isinstance(layer, TrainedLinear)
    std = float(getattr(base.model.config, "initializer_range", _STD))
    drawn = torch.empty(layer.weight.shape).normal_(0, std, generator=generator)
    layer.weight.data.copy_(drawn)


def _rows(base: Base, wanted: TokenRows) -> dict[str, TrainedLayer]:
    model, device = base.model, base.hardware.device
    embedding, head = vocabulary(model)
    found: dict[str, TrainedLayer] = {}
    for path, ids in wanted.ids.items():
        module = model.get_submodule(path)
        if path == embedding:
            _check_rows_are_plain(module, path)
            start = first_rows(module.weight.detach(), ids, wanted.fresh, wanted.known)
            found[path] = RowsEmbedding(module, ids, start, device)
        elif isinstance(module, FrozenLinear) and path == head:
            start = first_rows(module.weight, ids, wanted.fresh, wanted.known)
            found[path] = RowsHead(module, ids, start, device)
        else:
            raise ConfigError(f"{path}: has no rows of tokens; expected an embedding or a head")
    own = found.get(str(embedding))
    if is_pair(model) and head is not None and head not in found and isinstance(own, RowsEmbedding):
        frozen = model.get_submodule(head)
        assert isinstance(frozen, FrozenLinear)
        found[head] = RowsHead(frozen, own.ids, own.rows, device)
    return found


def check_fits_rows(
    rows: TokenRows, model: PreTrainedModel, values: Mapping[str, Tensor]
) -> Iterator[str]:
    """Yield what does not fit between trained rows and a model: tables, numbers, and widths."""
    paths = [path for path in vocabulary(model) if path]
    for path, ids in rows.ids.items():
        if path not in paths:
            yield f"its {path} is no table of tokens of the base, which has {', '.join(paths)}"
            continue
        table: Any = model.get_submodule(path).weight
        count, width = table.shape
        if max(ids) >= count:
            yield f"its row {max(ids)} of {path} is beyond the {count} rows of the base"
        if values[path].shape[1] != width:
            yield f"its rows of {path} have {values[path].shape[1]} numbers, and the base's {width}"
