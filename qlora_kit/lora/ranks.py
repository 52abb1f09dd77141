"""The ranks of an adapter whose sum is given: `--rank-budget`.

Takes a spec, and how much each layer would use of each further rank; returns the spec with a rank
for each layer. `train.rank_budget` measures the use. Never touches a model's weights.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from qlora_kit.errors import ConfigError
from qlora_kit.layers.projections import by_lora_path, projections
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.lora.targets import targeted_paths

# The most that a layer gets, in units of the mean rank.
_MOST_OF_MEAN = 2


def check_decided(spec: LoraSpec) -> None:
    """Check that a spec says the rank of each layer, and not their sum alone.

    Raises:
        ConfigError: it says the sum.
    """
    if spec.variant.rank_budget is not None:
        raise ConfigError(
            f"--rank-budget {spec.variant.rank_budget}: the ranks are not decided; expected a rank "
            "for each layer; let `train.rank_budget.decided` decide them, or leave the budget out"
        )


def most_rank(budget: int, layers: int) -> int:
    """Return the largest rank that a layer gets of a budget: twice the mean, rounded up."""
    return -(-_MOST_OF_MEAN * budget // layers)


def allotted(uses: Mapping[str, Sequence[float]], budget: int, most: int) -> dict[str, int]:
    """Give each layer one rank, and each further one to the layer that uses it best.

    Args:
        uses: how much a layer uses its first rank, its second, and so on: never rising, by path.
        budget: the sum of the ranks.
        most: the largest rank of a layer; a layer has no more than it has uses, either.

    Returns:
        The ranks by path. Their sum is less than the budget only where all layers are full.
    """
    ranks = dict.fromkeys(uses, 1)
    order = {path: number for number, path in enumerate(uses)}
    # Equal uses are decided by the order of the layers.
    waiting = [(-values[1], order[path], path) for path, values in uses.items() if len(values) > 1]
    heapq.heapify(waiting)
    left = budget - len(ranks)
    while left > 0 and waiting:
        _, _, path = heapq.heappop(waiting)
        if ranks[path] >= most:
            continue
        ranks[path] += 1
        left -= 1
        if ranks[path] < min(most, len(uses[path])):
            heapq.heappush(waiting, (-uses[path][ranks[path]], order[path], path))
    return ranks


def with_ranks(spec: LoraSpec, ranks: Mapping[str, int]) -> LoraSpec:
    """Return a spec with a rank for each layer, and each layer's scaling as it was.

    Args:
        spec: its `rank` and `alpha` say the scaling of every layer, whatever rank the layer gets.
        ranks: the rank of each targeted layer, by path.
    """
    alphas = {
        path: spec.scaling_of(path) * (math.sqrt(rank) if spec.rslora else rank)
        for path, rank in ranks.items()
    }
    variant = replace(spec.variant, rank_budget=None)
    return replace(spec, rank_pattern=dict(ranks), alpha_pattern=alphas, variant=variant)


def largest_ranks(spec: LoraSpec, model: nn.Module) -> LoraSpec:
    """Return a spec with the ranks that take the most memory a budget allows; others as they are.

    A plan is made before the ranks are decided, and so holds for whatever they become.

    Args:
        spec: the layers to train.
        model: the base, or its skeleton.

    Raises:
        ConfigError: a target or pattern names no layer, or the budget is less than one rank each.
    """
    budget = spec.variant.rank_budget
    if budget is None:
        return spec
    paths = targeted_paths(model, spec)
    if budget < len(paths):
        raise ConfigError(
            f"--rank-budget: found {budget}, and --targets names {len(paths)} layers; expected one "
            f"rank a layer at least; pass {len(paths)} or more, or fewer --targets"
        )
    layers = by_lora_path(projections(model))
    sizes = {
        path: sum(each.in_features + each.out_features for each in layers[path]) for path in paths
    }
    most = most_rank(budget, len(paths))
    # The larger a layer, the more it would use each rank.
    return with_ranks(spec, allotted({p: [sizes[p]] * most for p in paths}, budget, most))
