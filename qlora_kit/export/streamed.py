"""Runs several variants of a model together, with one layer in memory at a time.

Takes a skeleton and a reader of weights; returns the last hidden states of all variants. Every
layer is read once, runs all variants on the same rows, and is let go. Only one of its weights is
unpacked at a time. So a model larger than memory can be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_kit.data.batch import Batch
from qlora_kit.export.forms import Forms, Variant
from qlora_kit.layers.dora import rescaled
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.low_rank import LowRank
from qlora_kit.layers.projections import input_embedding, projections
from qlora_kit.layers.windows import Window, window_of
from qlora_kit.lora.stored import StoredAdapter
from qlora_kit.model.encoder_decoder import target_states
from qlora_kit.private_torch import own_buffers
from qlora_kit.tasks.seq2seq import SourceBatch

# Their relative positions are read from a table that no module looks up.
NOT_RUN_IN_PARTS = ("deberta", "deberta-v2")

UnitReader = Callable[[str], Sequence[Forms]]
"""Returns the parameters of a module and of all modules inside it, given its path."""


class StreamedModel:
    """A model on the meta device that borrows the weights of each layer as it reaches it.

    Args:
        skeleton: the model; it is changed in place, and of no other use afterwards.
        units: the modules that are run as a whole, see `forms.units_of`.
        read: reads the parameters of a unit.
        variants: the variants to run, all on the same rows.
        stored: the adapter; its term is computed beside the weights of `Variant.ADAPTER`.
        device: the device on which layers run.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        units: Mapping[str, nn.Module],
        read: UnitReader,
        variants: Sequence[Variant],
        stored: StoredAdapter,
        device: torch.device,
    ) -> None:
        self._model, self._read, self._variants = skeleton, read, variants
        self._device, self._stored = device, stored
        self._rows = 0
        self._running = variants[0]
        self._forms: Mapping[str, Forms] = {}
        skeleton.eval()
        for path, projection in projections(skeleton).items():
            # T5 casts the input of a layer to the dtype of its weight, whose place is kept empty.
            layer = projection.layer.float()
            assert not isinstance(layer, nn.Embedding), "a table is no projection"
            self._multiply_by_borrowed(path, layer, _low_rank_term(path, stored, device))
        embedding = input_embedding(skeleton)
        for path, unit in units.items():
            self._run_all_variants(path, unit, is_embedding=unit is embedding)
        for module in skeleton.modules():
            for name, buffer in own_buffers(module).items():
                if buffer is not None and not buffer.is_meta:
                    own_buffers(module)[name] = buffer.to(device)

    @torch.no_grad()
    def hidden_states(self, batch: Batch | SourceBatch) -> dict[Variant, Tensor]:
        """Return the last hidden states (B, T, D) of every variant, fp32.

        Args:
            batch: of texts, or of sources and targets.
        """
        if isinstance(batch, SourceBatch):
            return self._by_variant(self._target_states(batch))
        inputs = {"input_ids": batch.input_ids, "use_cache": False}
        return self._by_variant(self._run(self._model.base_model, inputs).last_hidden_state)

    def _target_states(self, batch: SourceBatch) -> Tensor:
        """Return the states that predict the targets, of all variants, one after the other."""
        self._rows = len(batch.rows)
        mask = None if batch.mask is None else self._repeated(batch.mask)
        source, written = map(self._repeated, (batch.source_ids, batch.written_ids))
        return target_states(self._model, source, mask, written)

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Tensor]) -> dict[Variant, Tensor]:
        """Return the logits (B, K) of every variant of a classifier, fp32.

        Args:
            inputs: arguments of the model, (B, …) each.
        """
        return self._by_variant(self._run(self._model, inputs).logits)

    def _run(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Run a model on the rows of all variants, one variant after the other."""
        self._rows = len(next(_tensors(dict(inputs))))
        repeated = {
            name: self._repeated(value) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        return model(**repeated)

    def _repeated(self, rows: Tensor) -> Tensor:
        return rows.repeat(len(self._variants), *(1,) * (rows.dim() - 1)).to(self._device)

    def _by_variant(self, outputs: Tensor) -> dict[Variant, Tensor]:
        return dict(zip(self._variants, outputs.chunk(len(self._variants)), strict=True))

    # ------------------------------------------------------------ one unit

    def _run_all_variants(self, path: str, unit: nn.Module, *, is_embedding: bool) -> None:
        """Let a unit read its parameters once, and run each variant with that variant's weights."""
        own = unit.forward
        if is_embedding:
            # The index matters only for a gradient, and would be out of range of few borrowed rows.
            unit.padding_idx = None  # type: ignore[assignment]

        def forward(*inputs: Any, **named: Any) -> Any:
            self._forms = {form.name: form for form in self._read(path)}
            rows = _row_count(inputs, named)
            # Positions are looked up once for all rows.
            is_shared = rows != self._rows * len(self._variants)
            slices = _row_slices(rows, self._variants)
            results = []
            for variant, part in zip(self._variants, slices, strict=True):
                self._running = variant
                given, given_named = inputs, named
                if not is_shared:
                    given, given_named = _part_of((inputs, named), rows, part)
                if is_embedding:
                    parameters = self._looked_up(path, given[0])
                    given = (torch.unique(given[0], return_inverse=True)[1], *given[1:])
                else:
                    parameters = self._small_parameters(path)
                unit.forward = own  # type: ignore[method-assign]
                try:
                    result = functional_call(unit, parameters, given, given_named)
                    results.append(result.expand(self._rows, -1, -1) if is_shared else result)
                finally:
                    unit.forward = forward  # type: ignore[method-assign]
            self._forms = {}
            return _joined(results, self._rows)

        unit.forward = forward  # type: ignore[method-assign]

    def _small_parameters(self, path: str) -> dict[str, Tensor]:
        """Return the parameters of a unit, without the weights that its linear layers borrow."""
        return {
            name.removeprefix(f"{path}."): form.of(self._running)
            for name, form in self._forms.items()
            if form.frozen is None
        }

    def _looked_up(self, path: str, ids: Tensor) -> dict[str, Tensor]:
        """Return only the looked-up rows of an embedding, which is never upcast as a whole."""
        (form,) = self._forms.values()
        rows = form.plain(self._running, torch.unique(ids).cpu())
        return {form.name.removeprefix(f"{path}."): rows.to(self._device).float()}

    def _multiply_by_borrowed(
        self, path: str, linear: nn.Linear | FrozenLinear, term: LowRank | None
    ) -> None:
        """Let a linear layer borrow its weight in fp32 only while it multiplies."""

        def forward(x: Tensor) -> Tensor:
            form = self._forms[f"{path}.weight"]
            weight = form.of(self._running)
            window = window_of(linear)
            if window is not None:
                return self._of_windows(x, weight, linear.bias, window, term)
            y = functional.linear(x, weight, linear.bias)
            has_term = self._running is Variant.ADAPTER and not form.is_trained_packed
            if term is not None and has_term:
                rows = x.reshape(-1, x.shape[-1])
                term.add_to(y.view(-1, y.shape[-1]), term.inner(rows))
                gain = self._stored.gain(path, weight)
                return y if gain is None else rescaled(y, gain, linear.bias)
            return y

        linear.forward = forward  # type: ignore[method-assign,assignment]

    def _of_windows(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, term: LowRank | None
    ) -> Tensor:
        y = window.product(x, weight, bias)
        if term is None or self._running is not Variant.ADAPTER:
            return y
        return y + term.scaling * window.low_rank(x, term.a[0], term.b[0])


def _low_rank_term(path: str, stored: StoredAdapter, device: torch.device) -> LowRank | None:
    if path not in stored.tensors:
        return None
    a, b = stored.tensors[path]
    return LowRank((a.to(device),), (b.to(device),), scaling=stored.scaling_of(path))


# ---------------------------------------------------------------- rows of the variants


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _row_count(inputs: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Return the number of rows that a unit is given: the rows of its first tensor."""
    return len(next(_tensors((inputs, named))))


def _row_slices(rows: int, variants: Sequence[Variant]) -> Iterator[slice]:
    each = rows // len(variants)
    return (slice(index * each, (index + 1) * each) for index in range(len(variants)))


def _part_of(value: Any, rows: int, part: slice) -> Any:
    """Return nested values with only some of the rows, in each tensor that has all the rows."""
    if isinstance(value, Tensor):
        # A tensor of one dimension has positions, not rows.
        return value[part] if value.dim() > 1 and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _part_of(each, rows, part) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_part_of(each, rows, part) for each in value)
    return value


def _joined(results: Sequence[Any], rows: int) -> Any:
    """Join what the variants returned, each for the given number of rows.

    Position biases of T5 are computed once for all rows, but each variant has a table of its own.
    """
    first = results[0]
    if isinstance(first, Tensor):
        is_shared = len(first) == 1 < rows
        return torch.cat([t.expand(rows, *t.shape[1:]) if is_shared else t for t in results])
    if type(first) in (tuple, list):
        return type(first)(_joined(each, rows) for each in zip(*results, strict=True))
    return first
