"""LoRA on stacked experts in PEFT's files: `target_parameters`, and one A and B a stack.

Takes the matrices of a stack; returns the two that PEFT stores, and back. PEFT wraps the module of
the experts once for each of its stacked weights, the first that is registered innermost, so a key
names the place of the wrapper and not the weight: `experts.base_layer.lora_A` is of `gate_up_proj`
and `experts.lora_A` of `down_proj`. Which weights are wrapped, `target_parameters` says.

PEFT 0.21 takes every layer of a mixture that has the name of an expert's former layer, in
`target_modules`, for the experts: a shared expert too. So such layers stand in `target_parameters`
as well, by their weight, which gives them the keys that they have anyway.

Shapes: E experts, R rank, D in, K out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from qlora_kit.errors import AdapterError
from qlora_kit.layers.experts import STACKED
from qlora_kit.layers.projections import ROUTER

_WRAPPED = ".base_layer"
# What every mixture of transformers calls the module that holds the stacks.
_EXPERTS = "experts"
_WEIGHT = ".weight"
_FORMER = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def key_paths(stacks: Iterable[str]) -> dict[str, str]:
    """Return the path that PEFT's key of each stack begins with, by the path of the stack."""
    by_module: dict[str, list[str]] = {}
    for path in stacks:
        by_module.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        path: module + _WRAPPED * outside
        for module, paths in by_module.items()
        for outside, path in enumerate(sorted(paths, key=_order, reverse=True))
    }


def _order(path: str) -> int:
    return STACKED.index(path.rpartition(".")[2])


def stack_of_keys(paths: Iterable[str], parameters: Sequence[str], where: object) -> dict[str, str]:
    """Return the path of the stack that each of PEFT's keys is of, by the path of the key.

    Args:
        paths: the paths that the keys begin with; those of other layers have no entry.
        parameters: `target_parameters`.
        where: the file, for an error.

    Raises:
        AdapterError: a parameter is of no stack of experts and no linear layer's, or it has no
            tensors; or there are tensors of no parameter.
    """
    for name in parameters:
        if not _can_be_trained(name):
            raise AdapterError(
                f"{where}: target_parameters names {name}, which is no stack of experts; expected "
                f"{', '.join(STACKED)} of experts; routers stay frozen here"
            )
    given = set(paths)
    unwrapped = dict.fromkeys(path.replace(_WRAPPED, "") for path in given)
    modules = [path for path in unwrapped if path.rpartition(".")[2] == _EXPERTS]
    targeted = [
        f"{module}.{name}"
        for module in modules
        for name in STACKED
        if _is_named(f"{module}.{name}", parameters)
    ]
    found = {key: path for path, key in key_paths(targeted).items()}
    layers = [f"{path}{_WEIGHT}" for path in given]
    for name in parameters:
        if not any(_is_named(path, [name]) for path in (*found.values(), *layers)):
            raise AdapterError(
                f"{where}: target_parameters names {name}, and there is no tensor of it; expected "
                "lora_A and lora_B; save the adapter again"
            )
    wrappers = {path for path in given if path.replace(_WRAPPED, "") in modules}
    if surplus := sorted(wrappers - found.keys()):
        raise AdapterError(
            f"{where}: there are tensors of {surplus[0]}, and target_parameters does not say of "
            f"which weight; expected experts' {', '.join(STACKED)}; save the adapter again"
        )
    if missing := sorted(found.keys() - given):
        raise AdapterError(
            f"{where}: target_parameters names {found[missing[0]]}, and its tensors "
            f"({missing[0]}) are missing; expected lora_A and lora_B; save the adapter again"
        )
    return found


def _can_be_trained(parameter: str) -> bool:
    owner, _, leaf = parameter.rpartition(".")
    if leaf == "weight":
        return not ROUTER.fullmatch(owner.rpartition(".")[2])
    return leaf in STACKED


def _is_named(path: str, parameters: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in parameters)


def taken_for_experts(paths: Iterable[str]) -> list[str]:
    """Return the layers of a mixture that PEFT would take for its experts."""
    return [path for path in paths if path.rpartition(".")[2] in _FORMER]


def target_parameters(
    stacks: Iterable[str], every_stack: Iterable[str], layers: Iterable[str], every: Iterable[str]
) -> list[str]:
    """Return what PEFT calls stacks and layers, by the ends of their paths if those name no other.

    Args:
        stacks: the paths of the stacks that carry LoRA.
        every_stack: the paths of all stacks of the model.
        layers: the paths of layers that PEFT would take for experts.
        every: the paths of all layers of the model.
    """
    weights = [f"{path}{_WEIGHT}" for path in layers]
    every_weight = [f"{path}{_WEIGHT}" for path in every]
    return _shortest(stacks, every_stack, 2) + _shortest(weights, every_weight, 3)


def layers_named(parameters: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the layers among `target_parameters`."""
    return tuple(name.removesuffix(_WEIGHT) for name in parameters if name.endswith(_WEIGHT))


def _shortest(targeted: Iterable[str], every: Iterable[str], parts: int) -> list[str]:
    wanted = set(targeted)
    ends = {".".join(path.split(".")[-parts:]) for path in wanted}
    named = {path for path in every if _is_named(path, ends)}
    return sorted(ends if named == wanted else wanted)


def folded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (E R, D) and B (K, R E) as PEFT stores them, of A (E, R, D) and B (E, K, R).

    The rows of A go expert by expert, the columns of B rank by rank.
    """
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def unfolded(
    path: str, a: Tensor, b: Tensor, rank: int, where: object
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Return A (R, D) and B (K, R) of each expert, by its path; undoes `folded`.

    Args:
        path: the path of the stack.
        a: (E R, D).
        b: (K, R E).
        rank: R.
        where: the folder, for an error.

    Raises:
        AdapterError: the shapes are of no whole number of experts, or of two numbers.
    """
    experts, rest = divmod(len(a), rank)
    if rest or b.shape[1] != len(a):
        raise AdapterError(
            f"{where}: {path} has A {tuple(a.shape)} and B {tuple(b.shape)}; expected rank {rank} "
            "for each of its experts in both"
        )
    of_a = a.view(experts, rank, a.shape[1])
    of_b = b.view(len(b), rank, experts).movedim(2, 0)
    of_each = zip(of_a, of_b, strict=True)
    return {f"{path}.{number}": pair for number, pair in enumerate(of_each)}
