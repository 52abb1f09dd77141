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


def _matches(target: str, path: str, group: str | None = None) -> bool:
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
            raise ConfigError(
                f"--targets: '{target}' is no regular expression ({error})"
            ) from error
    return path == target or path.endswith(f".{target}")


def _endings(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))


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


def targeted_paths(model: nn.Module, spec: LoraSpec) -> list[str]:
    """Return the paths of a model that get LoRA: layers, and stacks of experts.

    Layers that are trained whole get none.

    Raises:
        ConfigError: a target or a pattern names no layer; or experts would have dropout.
    """
    found = {path: each for path, each in projections(model).items() if path not in spec.whole}
    shared = shared_embedding(model)
    at_ends = [path for path in vocabulary_of(model) if path not in (*spec.whole, *shared)]
    paths = resolve_targets(found, spec.targets, at_ends, router_paths(model), shared)
    check_patterns(paths, spec)
    check_plain(spec, [path for path in at_ends if path in paths])
    experts = stacks(model).keys() & set(paths)
    if spec.dropout and experts:
        raise ConfigError(
            f"--lora-dropout: {spec.dropout:g}, and --targets names experts ({min(experts)}), "
            "which PEFT opens without dropout only; expected 0; leave it out"
        )
    return paths
