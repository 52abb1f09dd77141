"""Which layers of a model a specification means.

Targets are resolved from the paths of layers alone, so that a wrong name is found before any weight
is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from torch import nn

from qlora_kit.errors import ConfigError
from qlora_kit.layers.projections import (
    Group,
    Projection,
    by_lora_path,
    projections,
    router_paths,
    stacks,
)
from qlora_kit.layers.projections import (
    vocabulary as vocabulary_of,
)
from qlora_kit.layers.windows import Window
from qlora_kit.lora.spec import IS_PATTERN, LoraSpec, names_path
from qlora_kit.lora.vocabulary import check_plain
from qlora_kit.lora.whole import check_not_targeted, whole_paths
from qlora_kit.model.encoder_decoder import shared_embedding

ALL_LINEAR = "all-linear"
ALL_CONV = "all-conv"

_GROUPS = get_args(Group)


def resolve_targets(
    found: Mapping[str, Projection],
    targets: Iterable[str],
    vocabulary: Iterable[str] = (),
    routers: Iterable[str] = (),
    shared: Iterable[str] = (),
) -> list[str]:
    """Return the paths that LoRA is put on, in the order of the model.

    The experts of a mixture have the path of their stack. "all-linear" names every layer but
    those: they are to be asked for.

    Args:
        found: all projections of the model.
        targets: each is "attention", "mlp", "experts", "all-linear", "all-conv", the last part of a
            path (`q_proj`), a whole path, or a regular expression that matches whole paths.
        vocabulary: the paths of the input embedding and the head. They come last, and only for
            targets that name them: "all-linear" leaves them out, as in PEFT.
        routers: the paths of what chooses experts, which stays frozen.
        shared: the path of an embedding that two halves of a model read, which carries no LoRA.

    Raises:
        ConfigError: a target matches nothing that can carry LoRA; the error lists what can.
    """
    sites = by_lora_path(found)
    groups = {path: each[0].group for path, each in sites.items()}
    windows = {path: each[0].window for path, each in sites.items() if each[0].window is not None}
    experts = Counter(each.lora_path for each in found.values() if each.is_expert)
    unfit = {
        "names the embedding that encoder and decoder read, which carries no LoRA": [*shared],
        "names a router, which stays frozen": [*routers],
    }
    words = [group for group in _GROUPS if group in groups.values()]
    expected = ", ".join((*words, ALL_LINEAR, *((ALL_CONV,) if windows else ())))
    open_to_lora = [path for path in groups if _may_carry(windows.get(path))]
    at_ends = [*vocabulary]
    chosen: set[str] = set()
    faults = []
    for target in targets:
        named = [
            path
            for path, group in groups.items()
            if _matches(target, path, group) and _of_kind(target, windows.get(path))
        ]
        matched = [path for path in named if _may_carry(windows.get(path))]
        if target not in (ALL_LINEAR, ALL_CONV, *_GROUPS):
            matched += [path for path in at_ends if _matches(target, path)]
        if not matched:
            reason, remedy = "matches no linear layer", ""
            if named:
                reason = f"names {named[0]}, {windows[named[0]].why_no_lora}"
                remedy = "; leave it out"
            if one := _of_one_expert(target, experts):
                reason = f"names an expert of {one}, whose {experts[one]} are trained together"
                remedy = "; name the stack"
            for why, paths in unfit.items():
                if any(_matches(target, path) for path in paths):
                    reason, remedy = why, "; leave it out"
            faults.append(
                f"--targets: '{target}' {reason}; expected {expected}, or one of "
                f"{', '.join(_endings([*open_to_lora, *at_ends]))}{remedy}"
            )
        chosen.update(matched)
    if not chosen and not faults:
        faults.append(f"--targets: empty; expected {expected} or names")
    if faults:
        raise ConfigError(*faults)
    return [path for path in (*groups, *at_ends) if path in chosen]


def _of_one_expert(target: str, experts: Iterable[str]) -> str | None:
    """Return the stack of which a target names an expert by number, there or not."""
    stack, _, number = target.rpartition(".")
    named = (path for path in experts if number.isdigit() and _matches(stack, path))
    return next(named, None)


def _may_carry(window: Window | None) -> bool:
    return window is None or window.why_no_lora is None


def _of_kind(target: str, window: Window | None) -> bool:
    """Whether a target that names a kind of layers means this kind: a convolution has a window."""
    if target == ALL_CONV:
        return window is not None
    return window is None or target not in (ALL_LINEAR, *_GROUPS)


def _matches(target: str, path: str, group: str | None = None, flag: str = "--targets") -> bool:
    if target == ALL_LINEAR:
        return group != "experts"
    if target == ALL_CONV:
        return True
    if target in _GROUPS:
        return group == target
    if IS_PATTERN.search(target):
        try:
            return re.fullmatch(target, path) is not None
        except re.error as error:
            raise ConfigError(f"{flag}: '{target}' is no regular expression ({error})") from error
    return path == target or path.endswith(f".{target}")


def _named_themselves(targets: Iterable[str], paths: Iterable[str]) -> dict[str, str]:
    """Return which target names a path itself, and not a group that it is in, by path."""
    named = [each for each in targets if each not in (ALL_LINEAR, ALL_CONV, *_GROUPS)]
    return {path: each for path in paths for each in named if _matches(each, path)}


def _endings(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))


def block_of(path: str) -> int | None:
    """Return the number of the block that a layer is in; None of a layer outside of all blocks.

    As in PEFT it is the first number behind two names: of `model.layers.1.experts.0.w` it is 1.
    """
    return next((int(part) for part in path.split(".")[2:-1] if part.isdecimal()), None)


def narrowed(
    paths: Sequence[str],
    found: Mapping[str, Projection],
    spec: LoraSpec,
    frozen: Iterable[str] = (),
) -> list[str]:
    """Return the targeted paths that are left by `layers_to_transform` and `exclude_modules`.

    Args:
        paths: the paths that the targets name.
        found: all projections of the model.
        spec: has the numbers of the blocks, and what is excluded: groups and names as targets are,
            or regular expressions that match whole paths.
        frozen: paths of layers that may be excluded, and carry no LoRA anyway.

    Raises:
        ConfigError: the model has no such block; a name excludes nothing; or no layer is left.
    """
    groups = {path: each[0].group for path, each in by_lora_path(found).items()}
    blocks = {number for path in groups if (number := block_of(path)) is not None}
    flag = "--layers-to-transform"
    # A model without blocks has none to choose.
    numbers = f"0 to {max(blocks)}" if blocks else "a model of blocks; leave it out"
    faults = [
        f"{flag}: found {number}, and the model has no such block; expected {numbers}"
        for number in spec.layers_to_transform
        if number not in blocks
    ]
    excluded: set[str] = set()
    for name in spec.exclude_modules:
        flag = "--exclude-modules"
        named = {path for path in paths if _matches(name, path, groups[path], flag)}
        if not named and not any(_matches(name, path, flag=flag) for path in frozen):
            faults.append(
                f"{flag}: '{name}' excludes no targeted layer; expected one of "
                f"{', '.join(_endings(paths))}, or a regular expression of whole paths"
            )
        excluded |= named
    if faults:
        raise ConfigError(*faults)
    wanted = set(spec.layers_to_transform)
    left = [
        path for path in paths if path not in excluded and (not wanted or block_of(path) in wanted)
    ]
    if not left:
        raise ConfigError(
            "--exclude-modules and --layers-to-transform leave none of the layers that --targets "
            "names; expected one at least; exclude fewer"
        )
    return left


def check_patterns(paths: Sequence[str], spec: LoraSpec) -> None:
    """Check that every rank and alpha pattern names a targeted layer.

    Raises:
        ConfigError: patterns name no targeted layer; the error has a line for each.
    """
    faults = [
        f"--{kind}-pattern: '{pattern}' names no targeted layer; expected one of "
        f"{', '.join(_endings(paths))}"
        for kind, patterns in (("rank", spec.rank_pattern), ("alpha", spec.alpha_pattern))
        for pattern in patterns
        if not any(names_path(pattern, path) for path in paths)
    ]
    if faults:
        raise ConfigError(*faults)


def galore_paths(model: nn.Module, spec: LoraSpec) -> list[str]:
    """Return the paths of the linear layers that GaLore trains, in the order of the model.

    Args:
        model: a skeleton or a base, with or without an adapter.
        spec: `variant.galore` has groups, names or regular expressions, as targets are.

    Raises:
        ConfigError: a name names no linear layer, or one that cannot be trained whole.
    """
    flag, found = "--galore", projections(model)
    fit = {
        path: each
        for path, each in found.items()
        if each.window is None and not (each.is_expert or each.is_transposed)
    }
    faults: list[str] = []
    chosen: set[str] = set()
    for name in spec.variant.galore:
        named = [path for path, each in found.items() if _matches(name, path, each.group, flag)]
        if not named:
            endings = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in fit))
            faults.append(f"{flag}: '{name}' names no linear layer; expected one of {endings}")
        if unfit := [path for path in named if path not in fit]:
            faults.append(
                f"{flag}: '{name}' names {unfit[0]}, a convolution, an expert or a layer that is "
                "stored transposed; expected a plain linear layer; leave it out"
            )
        chosen.update(named)
    if faults:
        raise ConfigError(*faults)
    return [path for path in fit if path in chosen]


def targeted_paths(model: nn.Module, spec: LoraSpec) -> list[str]:
    """Return the paths of a model that get LoRA: layers, and stacks of experts.

    Layers that are trained whole get none.

    Raises:
        ConfigError: a target or a pattern names no layer; or experts would have dropout.
    """
    whole = whole_paths(model, spec)
    check_not_targeted(_named_themselves(spec.targets, whole), whole, spec.whole)
    apart = {*whole, *galore_paths(model, spec)}
    found = {path: each for path, each in projections(model).items() if path not in apart}
    ends, shared, routers = vocabulary_of(model), shared_embedding(model), router_paths(model)
    at_ends = {path: each for path, each in ends.items() if path not in (*whole, *shared)}
    paths = resolve_targets(found, spec.targets, at_ends, routers, shared)
    paths = narrowed(paths, found | at_ends, spec, frozen=(*ends, *shared, *routers))
    check_patterns(paths, spec)
    check_plain(spec, [path for path in at_ends if path in paths])
    experts = stacks(model).keys() & set(paths)
    if spec.dropout and experts:
        raise ConfigError(
            f"--lora-dropout: {spec.dropout:g}, and --targets names experts ({min(experts)}), "
            "which PEFT opens without dropout only; expected 0; leave it out"
        )
    return paths
