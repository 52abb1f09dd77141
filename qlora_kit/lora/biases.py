"""The biases that an adapter trains beside its matrices: PEFT's `bias` and `lora_bias`.

With `bias` set, biases of the base were trained and replace the base's. With `lora_bias`, each B
has a bias, so a layer adds scaling · bias to its output: it is added to the layer's own bias.

Takes the tensors of an adapter file; returns the biases, and puts them on a loaded base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from qlora_kit.errors import AdapterError
from qlora_kit.layers.frozen import FrozenLinear

_OF_B = re.compile(r"(base_model\.model\.)?(?P<path>.+)\.lora_B\.bias")
# The bias of a layer that carries LoRA lies in the layer that PEFT wraps.
_OF_BASE = re.compile(r"(base_model\.model\.)?(?P<path>.+?)(?P<wrapped>\.base_layer)?\.bias")
_BIAS = ".bias"


class Biases(NamedTuple):
    """The biases in an adapter file.

    Attributes:
        trained: biases that replace those of the base, by name.
        of_b: the bias (K,) of the B of a layer, by the path of the layer.
        rest: the other tensors, by their key.
    """

    trained: dict[str, Tensor]
    of_b: dict[str, Tensor]
    rest: dict[str, Tensor]


def taken_out(
    raw: Mapping[str, Tensor],
    *,
    replace: bool,
    add: bool,
    is_whole: Callable[[str], bool],
    file: Path,
) -> Biases:
    """Divide the tensors that are no A and no B into biases and others.

    Args:
        raw: the tensors by PEFT's names.
        replace: whether the adapter replaces biases of the base (`bias`).
        add: whether its B have biases (`lora_bias`).
        is_whole: whether the module at a path was trained whole, and its bias with it.
        file: the file, for an error.

    Raises:
        AdapterError: a bias is no row of finite numbers, or stands twice.
    """
    found = Biases({}, {}, {})
    for key, tensor in raw.items():
        of_b, of_base = _OF_B.fullmatch(key), _OF_BASE.fullmatch(key)
        if add and of_b:
            found.of_b[of_b["path"]] = _checked(key, tensor, file)
        elif replace and of_base and ".original_module" in of_base["path"]:
            continue  # the base's own, beside a module that was trained whole
        elif replace and of_base and not of_b and not is_whole(of_base["path"]):
            name = f"{of_base['path']}{_BIAS}"
            if name in found.trained:
                raise AdapterError(f"{file}: {name} stands twice; expected it once; save it again")
            found.trained[name] = _checked(key, tensor, file)
        else:
            found.rest[key] = tensor
    return found


def _checked(key: str, tensor: Tensor, file: Path) -> Tensor:
    if tensor.dim() != 1 or not tensor.is_floating_point():
        raise AdapterError(
            f"{file}: {key} is {tensor.dtype} {tuple(tensor.shape)}; expected one row of numbers; "
            "save the adapter again"
        )
    wide = tensor.float()
    if not torch.isfinite(wide).all():
        raise AdapterError(f"{file}: {key} holds NaN or infinity; train it again")
    return wide


def added(
    of_b: Mapping[str, Tensor],
    outputs: Mapping[str, int],
    scaling_of: Callable[[str], float],
    folder: Path,
) -> dict[str, Tensor]:
    """Return what is added to the bias of each layer, scaling · bias (K,), by the bias's name.

    Args:
        of_b: see `Biases`.
        outputs: K of each layer that carries LoRA, by path.
        scaling_of: gives the scaling of a layer.
        folder: of the adapter, for an error.

    Raises:
        AdapterError: a layer has no LoRA, or has another number of outputs.
    """
    for path, bias in of_b.items():
        if outputs.get(path) != len(bias):
            raise AdapterError(
                f"{folder}: {path} has a bias of {len(bias)} numbers in lora_B and "
                f"{outputs.get(path, 'no')} outputs; expected as many; save the adapter again"
            )
    return {f"{path}{_BIAS}": scaling_of(path) * bias for path, bias in of_b.items()}


def check_mergeable(names: Collection[str], skeleton: nn.Module, folder: Path) -> None:
    """Check that a model has every bias that something is to be added to.

    Raises:
        AdapterError: a layer has none, so the merged model has no place for it.
    """
    there = skeleton.state_dict()
    if missing := sorted(name for name in names if name not in there):
        raise AdapterError(
            f"{folder}: adds to {missing[0]} (lora_bias), which the base has not "
            f"({len(missing)} such layers), so a merged model has no place for it; expected layers "
            "with a bias; use the adapter unmerged, with --adapter"
        )


def sums(model: nn.Module, adds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the biases of a loaded model with what an adapter adds to them, fp32, by name.

    Args:
        model: a loaded model, whose layers may carry LoRA.
        adds: what is added, by the name of the bias; a layer without a bias gets this alone.
    """
    found = {}
    for name, add in adds.items():
        module = model.get_submodule(name.removesuffix(_BIAS))
        frozen = getattr(module, "frozen", module)
        assert isinstance(frozen, FrozenLinear), "only layers with LoRA add to a bias"
        own, add = frozen.bias, add.to(frozen.weight.device)
        found[name] = add if own is None else own.float() + add
    return found


def trained_alone(names: Collection[str]) -> list[str]:
    """Return the biases among the names of parameters whose weight is not among them."""
    return [
        name
        for name in names
        if name.endswith(_BIAS) and f"{name.removesuffix(_BIAS)}.weight" not in names
    ]


def mode_of(names: Collection[str], layers: Collection[str]) -> Literal["none", "all", "lora_only"]:
    """Return PEFT's word for the biases that an adapter replaces.

    Args:
        names: the names of the biases.
        layers: the paths of the layers that carry LoRA.
    """
    if not names:
        return "none"
    return "lora_only" if {name.removesuffix(_BIAS) for name in names} <= set(layers) else "all"


def key_of(name: str, layers: Collection[str]) -> str:
    """Return PEFT's key of a bias that an adapter replaces, without the prefix."""
    path = name.removesuffix(_BIAS)
    return f"{path}.base_layer{_BIAS}" if path in layers else name
