"""Decides the ranks of an adapter by the gradients of the first rows: `--rank-budget`.

A layer uses a rank by how much of its weight's gradient the rank can follow: the r-th singular
value of that gradient, summed over some rows, is the use of rank r. The gradients are never there
in full. The gradient of B under a random A finds their leading directions, and a second pass
through these the singular values: two passes of LoRA itself, in which the model computes as it was
loaded.

AdaLoRA (arXiv:2303.10512) and AutoLoRA (arXiv:2403.09113) move ranks while they train; here they
are decided once, before the first step, and stay. Takes a loaded base; leaves it as it was.

Source of the two passes: Finding structure with randomness (arXiv:0909.4061), section 5.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import Indices, TokenRows
from qlora_kit.errors import NumericsError
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.lora_experts import LoRAStack
from qlora_kit.lora.attach import Adapter, attach, detach
from qlora_kit.lora.ranks import allotted, most_rank, with_ranks
from qlora_kit.lora.spec import LoraSpec, Variant
from qlora_kit.lora.targets import targeted_paths
from qlora_kit.model.load import Base
from qlora_kit.step.settle import settle, unsettle
from qlora_kit.tasks.task import Objective, Task
from qlora_kit.train.optimizer_step import differentiate
from qlora_kit.train.random_states import seed_everything

# As many rows as four steps have by default; more cost time before the first step.
_MOST_ROWS = 64


def decided(
    base: Base,
    spec: LoraSpec,
    rows: TokenRows,
    config: TrainConfig,
    task: Task,
    pad_token_id: int,
) -> LoraSpec:
    """Return the spec with a rank for each layer instead of their sum.

    The same base, rows and options give the same ranks, in every process of a run.

    Args:
        base: a loaded base without an adapter; it is the same afterwards.
        spec: the layers to train, with the sum of their ranks.
        rows: training rows, or some of them.
        config: the options of the run, with the settings of its steps.
        task: the meaning of a row.
        pad_token_id: id that fills short rows of a batch.

    Raises:
        ConfigError: the sum is less than one rank a layer.
        NumericsError: a gradient is not finite.
    """
    budget = spec.variant.rank_budget
    assert budget is not None, "a spec without a budget has its ranks"
    most = most_rank(budget, len(targeted_paths(base.model, spec)))
    uses = uses_of(base, spec, most, rows, config, task, pad_token_id)
    return with_ranks(spec, allotted(uses, budget, most))


def uses_of(
    base: Base,
    spec: LoraSpec,
    most: int,
    rows: TokenRows,
    config: TrainConfig,
    task: Task,
    pad_token_id: int,
) -> dict[str, list[float]]:
    """Return the `most` largest singular values of the gradient of each targeted weight, by path.

    A layer that cannot have so many has fewer. See `decided` for the rest.
    """
    probe = replace(
        spec, rank=most, alpha=float(most), dropout=0.0, rslora=False, rank_pattern={},
        alpha_pattern={}, variant=Variant(galore=spec.variant.galore),
    )  # fmt: skip
    seed_everything(config.seed)
    adapter = attach(base, probe, config.seed)
    try:
        settle(base.model, config, base.hardware)
        base.model.train()
        objective = task.objective(base, pad_token_id, config.loss_chunk_tokens, None)
        return _uses(adapter, objective, rows, config.batch_size)
    finally:
        base.model.eval()
        unsettle(base.model, base.hardware)
        detach(adapter)


def _uses(
    adapter: Adapter, objective: Objective, rows: TokenRows, at_once: int
) -> dict[str, list[float]]:
    """Return the leading singular values of the gradient of each targeted weight, by path."""
    trained: dict[str, LoRALinear | LoRAStack] = {**adapter.layers, **adapter.stacks}
    _differentiate(adapter, objective, rows, at_once)
    with torch.no_grad():
        for layer in trained.values():
            # The model still computes the same, because A is zero now instead of B.
            layer.lora_B.copy_(_directions(layer.lora_B))
            layer.lora_A.zero_()
    _differentiate(adapter, objective, rows, at_once)
    uses = {path: _values(layer.lora_A) for path, layer in trained.items()}
    if broken := [path for path, values in uses.items() if not values.isfinite().all()]:
        raise NumericsError(
            f"--rank-budget: the gradient of {broken[0]} ({len(broken)} such layers) is not finite "
            "for the first rows; expected finite numbers; look at these rows, or pass --dtype "
            "bfloat16"
        )
    return {path: values.tolist() for path, values in uses.items()}


def _differentiate(adapter: Adapter, objective: Objective, rows: TokenRows, at_once: int) -> None:
    """Sum the gradients of some rows, spread over all."""
    for parameter in adapter.parameters().values():
        parameter.grad = None
    for indices in _batches(len(rows), at_once):
        differentiate(objective.loss_sum(objective.batch([rows[index] for index in indices])))


def _batches(count: int, at_once: int) -> Iterator[Indices]:
    taken = min(count, _MOST_ROWS)
    spread = [number * count // taken for number in range(taken)]
    for start in range(0, taken, at_once):
        yield tuple(spread[start : start + at_once])


def _directions(b: Tensor) -> Tensor:
    """Return orthonormal columns (…, K, R) that span the gradient of B; zeros beyond K of them."""
    assert b.grad is not None, "every targeted layer is in the graph"
    columns = torch.linalg.qr(b.grad)[0]
    wide = torch.zeros_like(b)
    wide[..., : columns.shape[-1]] = columns
    return wide


def _values(a: Tensor) -> Tensor:
    """Return the singular values of the gradient of A, as many as it can have, (≤ R,).

    Those of the experts of a stack are combined, because they share a rank.
    """
    assert a.grad is not None, "every targeted layer is in the graph"
    values: Tensor = torch.linalg.svdvals(a.grad)
    return values if values.dim() == 1 else values.square().sum(0).sqrt()
