"""The specification of an adapter for the same model with fewer blocks.

A plan measures some phases on a model of a few blocks. What names blocks by number there would name
none: so each kind of layer is trained in every block of the short model, if it is in any block of
the whole one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from qlora_kit.layers.projections import by_lora_path, projections
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.lora.targets import galore_paths, targeted_paths


def shortened(spec: LoraSpec, whole: nn.Module, short: nn.Module) -> LoraSpec:
    """Return the spec for a model of fewer blocks, at the largest rank that a kind of layer has.

    Args:
        spec: the layers of the whole model to train, and how.
        whole: the model, such as its skeleton.
        short: the same with fewer blocks.

    Raises:
        ConfigError: a target or pattern names no layer of the whole model.
    """
    if not _may_name_blocks(spec):
        return spec
    ranks: dict[str, int] = {}
    for path in targeted_paths(whole, spec):
        kind = _kind(path)
        ranks[kind] = max(ranks.get(kind, 0), spec.rank_of(path))
    paths = [path for path in by_lora_path(projections(short)) if _kind(path) in ranks]
    return replace(
        spec,
        targets=tuple(paths),
        rank_pattern={path: ranks[_kind(path)] for path in paths},
        alpha_pattern={},
        layers_to_transform=(),
        exclude_modules=(),
        whole=_of_kinds(spec.whole, short),
        variant=replace(spec.variant, galore=_of_kinds(galore_paths(whole, spec), short)),
    )


def _may_name_blocks(spec: LoraSpec) -> bool:
    names = (*spec.targets, *spec.exclude_modules, *spec.rank_pattern, *spec.alpha_pattern,
             *spec.variant.galore)  # fmt: skip
    named = any(character.isdecimal() for name in names for character in name)
    return named or bool(spec.layers_to_transform or spec.exclude_modules)


def _of_kinds(paths: Iterable[str], short: nn.Module) -> tuple[str, ...]:
    """Return the layers of a model that are of the kind of one of these."""
    kinds = {_kind(path) for path in paths}
    return tuple(path for path, _ in short.named_modules() if _kind(path) in kinds)


def _kind(path: str) -> str:
    """Return a path without its numbers."""
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))
