"""Parameters of an adapter that replace parameters of the base: PEFT's `modules_to_save`.

Takes a loaded model and named tensors; puts the tensors in, and later the base's own back. Trains
nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.errors import AdapterError
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.projections import transposed_weights
from qlora_kit.layers.weight import FrozenWeight, PlainWeight
from qlora_kit.model.class_head import head_layers
from qlora_kit.model.load import Base, BaseSpec, say_rows
from qlora_kit.model.vocabulary import rows_of, tables
from qlora_kit.private_torch import own_buffers, own_parameters

Original = FrozenWeight | Tensor | None


def check_saved(
    saved: Mapping[str, Tensor],
    spec: BaseSpec,
    skeleton: PreTrainedModel,
    folder: Path,
    biases: Collection[str] = (),
) -> None:
    """Check that saved parameters fit a base, and that none is missing among them.

    Args:
        saved: the parameters, by their name in the base.
        spec: the specification of the base.
        skeleton: the skeleton of the base.
        folder: the folder of the adapter, for the error.
        biases: the parameters that are biases alone, saved without the weight beside them.

    Raises:
        AdapterError: a parameter is missing in the base, or has another shape there, or is stored
            transposed; or a module is not whole, or a classifier has no head.
    """
    if not saved and spec.classes is None:
        return
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    if turned := sorted(saved.keys() & transposed_weights(skeleton)):
        raise AdapterError(
            f"{folder}: {turned[0]} was trained whole, in a layer that is stored transposed; "
            "expected LoRA on such layers; train it again with target_modules instead of "
            "modules_to_save"
        )
    for name, tensor in saved.items():
        if shapes.get(name) != tuple(tensor.shape):
            found = f"of shape {shapes[name]}" if name in shapes else "missing"
            hint = ""
            if name in shapes and shapes[name][1:] == tuple(tensor.shape)[1:]:
                hint = " (tokens were added; resize the base's embeddings first)"
            raise AdapterError(
                f"{folder}: its {name} {tuple(tensor.shape)} is {found} in the base{hint}; "
                "expected the base it was trained on; name it with --model"
            )
    modules = {name: each for name, each in saved.items() if name not in biases}
    missing = sorted(_needed(modules, spec, skeleton) - saved.keys())
    if missing:
        raise AdapterError(
            f"{folder}: {missing[0]} is missing ({len(missing)} such parameters); expected modules "
            "that were trained whole to be whole; save the adapter again"
        )


def _needed(
    saved: Mapping[str, Tensor], spec: BaseSpec, skeleton: PreTrainedModel
) -> frozenset[str]:
    """Return the parameters that have to be saved: whole modules, and a head without values."""
    paths = {name.rpartition(".")[0] for name in saved}
    beside = {
        f"{path}.{leaf}"
        for path in paths
        for leaf, _ in skeleton.get_submodule(path).named_parameters(recurse=False)
    }
    in_head = {
        f"{path}.{leaf}"
        for path in head_layers(skeleton, spec.fresh)
        for leaf in ("weight", "bias")
    }
    return frozenset(beside | (in_head & spec.fresh))


def put_in_place(model: nn.Module, saved: Mapping[str, Tensor]) -> dict[str, Original]:
    """Replace parameters of a loaded model; return its own parameters, for `put_back`.

    A head that shares the embedding's weights keeps them if only the embedding is replaced.

    Args:
        model: a loaded model, changed in place.
        saved: the new parameters, by their name in the model.
    """
    originals: dict[str, Original] = {}
    for name, tensor in saved.items():
        module, leaf = _owner(model, name)
        own = getattr(module, leaf)
        originals[name] = own
        if own is None:
            _set(module, leaf, tensor)  # a bias, which the layer had not
        elif isinstance(own, FrozenWeight):
            like = own.values if isinstance(own, PlainWeight) else tensor
            setattr(module, leaf, PlainWeight(tensor.to(own.device, like.dtype)))
        else:
            _set(module, leaf, tensor.to(own.device, own.dtype))
    return originals


def put_back(model: nn.Module, originals: Mapping[str, Original]) -> None:
    """Undo `put_in_place`."""
    for name, own in originals.items():
        module, leaf = _owner(model, name)
        if isinstance(own, FrozenWeight):
            setattr(module, leaf, own)
        else:
            _set(module, leaf, own)


@dataclass(frozen=True)
class Unresized:
    """A base before it got another number of rows of tokens.

    Attributes:
        base: the base, whose model has changed since.
        tables: its own tables, by name.
    """

    base: Base
    tables: Mapping[str, Original]

    @classmethod
    def of(cls, base: Base) -> Unresized:
        """Remember a base that will be resized in place."""
        owners = {name: _owner(base.model, name) for name in tables(base.spec.skeleton())}
        return cls(base, {name: getattr(module, leaf) for name, (module, leaf) in owners.items()})

    def put_back(self) -> Base:
        """Give the model its own tables again, bit for bit."""
        put_back(self.base.model, self.tables)
        rows = rows_of(self.base.spec.architecture())
        assert rows is not None, "it had tables"
        say_rows(self.base.model, rows)
        return self.base


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    frozen = getattr(module, "frozen", None)
    return (frozen if isinstance(frozen, FrozenLinear) else module), leaf


def _set(module: nn.Module, leaf: str, tensor: Tensor | None) -> None:
    if leaf in own_buffers(module) or tensor is None:
        own_buffers(module)[leaf] = tensor
    elif isinstance(tensor, nn.Parameter):
        own_parameters(module)[leaf] = tensor
    else:
        own_parameters(module)[leaf] = nn.Parameter(tensor, requires_grad=False)
