"""What a loaded base says of the first rows of a run: its inputs, and the gradients of its weights.

The starts EVA and LoRA-GA are made of it. Takes a base without an adapter, and batches; leaves the
base as it was.

Shapes: D in, K out, R rank, q directions of a sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.config import StepOptions, TrainConfig
from qlora_kit.data.batch import TokenRows
from qlora_kit.data.mixing import epoch_windows
from qlora_kit.errors import ConfigError
from qlora_kit.layers.projections import projections
from qlora_kit.lora.attach import Adapter, attach, detach
from qlora_kit.lora.spec import LoraSpec, Variant
from qlora_kit.lora.starts.eva import PrincipalInputs, eva
from qlora_kit.lora.starts.lora_ga import lora_ga
from qlora_kit.lora.starts.residual import widened
from qlora_kit.lora.targets import targeted_paths
from qlora_kit.model.load import Base
from qlora_kit.model.start import Pair
from qlora_kit.step.settle import settle, unsettle
from qlora_kit.tasks.task import Batch, Objective
from qlora_kit.train.optimizer_step import differentiate

MOST_BATCHES = 32
"""micro-batches whose inputs EVA sees, if its directions do not settle before"""
MOST_ROWS = 32
"""rows whose gradients LoRA-GA sees"""


def first_batches(
    rows: TokenRows, objective: Objective, config: TrainConfig, most_rows: int
) -> Iterator[Batch]:
    """Yield the first micro-batches of a run, in the order of its first epoch."""
    taken = 0
    for window in epoch_windows(rows, config, 0):
        for indices in window:
            if taken >= most_rows:
                return
            taken += len(indices)
            yield objective.batch([rows[index] for index in indices])


# ---------------------------------------------------------------- inputs


def pairs_of_inputs(
    base: Base, lora: LoraSpec, objective: Objective, batches: Iterator[Batch], seed: int
) -> dict[str, Pair]:
    """Return A and B of each layer as EVA has them; layers of one input are analysed once.

    Held are R directions of D numbers an input, and the activations of a forward.

    Raises:
        ConfigError: no batch has as many tokens as the rank.
    """
    paths = targeted_paths(base.model, lora)
    found = projections(base.model)
    seen = _Seen(base.model, paths, max(map(lora.rank_of, paths)))
    with base.in_evaluation(), torch.no_grad(), seen.listening():
        for number, batch in enumerate(batches):
            if number and seen.has_settled:
                break
            seen.show(objective, batch)
    pairs = {}
    for path in paths:
        components = seen.of(path).components
        if components is None:
            raise ConfigError(
                f"--init eva: no micro-batch has as many tokens as the rank, {lora.rank_of(path)}; "
                "expected more rows at once; raise --batch-size, or lower --rank"
            )
        rank = lora.rank_of(path)
        pair = widened(*eva(components[:rank], found[path].out_features), rank, seed)
        pairs[path] = pair[0].cpu(), pair[1].cpu()
    return pairs


class _Seen:
    """The principal inputs of layers, from one forward after another."""

    def __init__(self, model: nn.Module, paths: Sequence[str], count: int) -> None:
        self._layers = {path: model.get_submodule(path) for path in paths}
        self._count = count
        self._found: dict[str, PrincipalInputs] = {}
        self._same: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None
        self._tokens: torch.Size | None = None
        self._learnt: Tensor | None = None

    def of(self, path: str) -> PrincipalInputs:
        """Return what is known of the inputs of a layer."""
        return self._found[self._same.get(path, path)]

    @property
    def has_settled(self) -> bool:
        """Whether no direction of any layer turns any more."""
        return all(each.has_settled for each in self._found.values())

    def show(self, objective: Objective, batch: Any) -> None:
        """Run a batch, and take in the inputs of each layer."""
        # Where single tokens are learnt, padding and the others are left out, as PEFT does.
        if (positions := getattr(batch, "positions", None)) is not None:
            self._tokens, self._learnt = batch.input_ids.shape, positions + 1
        objective.measured(batch)
        self._last = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the input of every call of the layers."""
        hooks = [
            layer.register_forward_pre_hook(partial(self._hear, path))
            for path, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hear(self, path: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if self._last is not None and self._last[1] is x:
            self._same[path] = self._last[0]
            return
        self._last = (path, x)
        own = self._found.setdefault(path, PrincipalInputs(min(self._count, x.shape[-1])))
        if own.has_settled:
            return
        own.add(self._rows(x))

    def _rows(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._learnt is None or x.shape[:-1] != self._tokens:
            return rows
        return rows.index_select(0, self._learnt.to(x.device))


# ---------------------------------------------------------------- gradients


def pairs_of_gradients(
    base: Base,
    lora: LoraSpec,
    objective: Objective,
    batches: Sequence[Batch],
    options: StepOptions,
    seed: int,
) -> dict[str, Pair]:
    """Return A and B of each layer as LoRA-GA has them.

    No gradient G of a weight is ever formed. LoRA's own gradients say what G does to a few
    directions: with B = 0 that of B is G Aᵀ, and with A = 0 that of A is Bᵀ G. So forward and
    backward passes of an adapter of rank q = 4R, which changes nothing of the model, make a
    randomised singular value decomposition (Halko et al. 2011, algorithms 4.3 and 5.1): with one
    iteration, or exactly where q is all of the smaller side. Held are A, B and their gradients of
    rank q, and the activations of a training step.

    Args:
        base: a loaded base, without an adapter.
        lora: the layers, and R of each.
        objective: the task, bound to the base.
        batches: micro-batches; the gradient is that of their mean loss.
        options: how a step is computed.
        seed: draws the first directions.
    """
    found = projections(base.model)
    paths = targeted_paths(base.model, lora)
    sizes = {path: min(4 * lora.rank_of(path), *found[path].shape) for path in paths}
    is_exact = all(sizes[path] == min(found[path].shape) for path in paths)
    by_path: Mapping[str, Any] = sizes
    sketch = replace(
        lora, rslora=False, dropout=0.0, rank_pattern=by_path, alpha_pattern=by_path,
        variant=Variant(),
    )  # fmt: skip
    adapter = attach(base, sketch, seed)
    settle(base.model, options, base.hardware)
    was_training = base.model.training
    base.model.train()
    try:
        show = partial(_show, adapter, objective, batches, seed)
        for _ in range(1 if is_exact else 2):
            left = _left_directions(adapter, show)
            right = _right_directions(adapter, show)
        return {path: _pair(left[path], right[path], lora.rank_of(path), seed) for path in paths}
    finally:
        base.model.train(was_training)
        unsettle(base.model, base.hardware)
        detach(adapter)


def _show(adapter: Adapter, objective: Objective, batches: Sequence[Batch], seed: int) -> None:
    """Leave the gradients of the mean loss in the parameters."""
    total = sum(batch.weight for batch in batches)
    for parameter in adapter.parameters().values():
        parameter.grad = None
    device = adapter.base.hardware.device
    # The dropout of the model itself must be the same in every pass.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch in batches:
            differentiate(objective.loss_sum(batch) / total)


def _left_directions(adapter: Adapter, show: Callable[[], None]) -> dict[str, Tensor]:
    """Return an orthonormal basis (K, q) of G Aᵀ of each layer; A becomes 0, and B that basis."""
    show()
    found = {}
    for path, layer in adapter.layers.items():
        assert layer.lora_B.grad is not None
        found[path] = torch.linalg.qr(layer.lora_B.grad)[0]
        layer.lora_B.data.copy_(found[path])
        layer.lora_A.data.zero_()
    return found


def _right_directions(adapter: Adapter, show: Callable[[], None]) -> dict[str, Tensor]:
    """Return Bᵀ G (q, D) of each layer; A becomes a basis of its rows, and B 0."""
    show()
    found = {}
    for path, layer in adapter.layers.items():
        assert layer.lora_A.grad is not None
        found[path] = layer.lora_A.grad
        layer.lora_A.data.copy_(torch.linalg.qr(found[path].mT)[0].mT)
        layer.lora_B.data.zero_()
    return found


def _pair(left: Tensor, right: Tensor, rank: int, seed: int) -> Pair:
    u, sizes, v = torch.linalg.svd(right, full_matrices=False)
    a, b = widened(*lora_ga(left @ u, sizes, v, rank), rank, seed)
    return a.cpu(), b.cpu()
