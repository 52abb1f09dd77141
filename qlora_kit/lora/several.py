"""Several adapters on one base: one for a whole batch, or one for each row of it.

Takes a loaded base and stored adapters; returns an `AdapterSet`. Memory holds the base once; each
adapter adds only its A and B. It is for inference: nothing here is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.layers.dora import rescaled
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.head_terms import LowRankTerm
from qlora_kit.layers.lora_embedding import scale_of
from qlora_kit.layers.low_rank import LowRank
from qlora_kit.layers.projections import carriers
from qlora_kit.layers.windows import Window
from qlora_kit.lora.adapter import check_fits
from qlora_kit.lora.attach import check_free
from qlora_kit.lora.reading import read_adapter
from qlora_kit.lora.stored import StoredAdapter
from qlora_kit.model.load import Base

Names = str | None | Sequence[str | None]
"""Name of the adapter of all rows, None for the base alone, or one name or None for each row."""


class _Choice:
    """The adapter of each row. All switched layers of a base share one `_Choice`."""

    def __init__(self) -> None:
        self.names: Names = None

    def parts(self, rows: int) -> Iterator[tuple[str, list[int] | None]]:
        """Yield each adapter in use with its rows; None stands for all rows."""
        if self.names is None:
            return
        if isinstance(self.names, str):
            yield self.names, None
            return
        if len(self.names) != rows:
            raise ConfigError(
                f"set_adapter: {len(self.names)} names for a batch of {rows} rows; expected one "
                "for each"
            )
        for name in dict.fromkeys(self.names):
            if name is not None:
                yield name, [row for row, each in enumerate(self.names) if each == name]


class SwitchedLinear(nn.Module):
    """A frozen linear layer with the low-rank terms of several adapters.

    Args:
        frozen: the layer that this layer wraps.
        terms: the terms by name of their adapter; adapters without this layer are left out.
        choice: the adapter of each row.
        biases: what an adapter adds to the output besides, (K,), by its name (`lora_bias`).
        gains: what an adapter with DoRA multiplies the outputs by, (K,), by name.
    """

    def __init__(
        self,
        frozen: FrozenLinear,
        terms: Mapping[str, LowRank],
        choice: _Choice,
        biases: Mapping[str, Tensor] | None = None,
        gains: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.terms = terms
        self.biases = biases or {}
        self.gains = gains or {}
        self._choice = choice

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, ..., D) to (B, ..., K) in the dtype of x."""
        y: Tensor = self.frozen(x)
        for name, rows in self._choice.parts(len(x)):
            term = self.terms.get(name)
            if term is None:
                continue
            if (bias := self.biases.get(name)) is not None:
                y = _with_bias(y, bias, rows, self.frozen.window)
            if self.frozen.window is not None:
                y = _added_in_windows(self.frozen.window, term, x, y, rows)
            elif rows is None:
                y = self._with(name, term, x, y)
            else:
                chosen = torch.tensor(rows, device=x.device)
                part = y.index_select(0, chosen)
                part = self._with(name, term, x.index_select(0, chosen), part)
                y.index_copy_(0, chosen, part)
        return y

    def _with(self, name: str, term: LowRank, x: Tensor, y: Tensor) -> Tensor:
        """Return a product y with an adapter's part of it; y may be changed in place."""
        term.add_to(y.view(-1, y.shape[-1]), term.inner(x.reshape(-1, x.shape[-1])))
        gain = self.gains.get(name)
        return y if gain is None else rescaled(y, gain, self.frozen.bias)

    def head_parts(self) -> tuple[FrozenLinear, LowRankTerm | None]:
        """See `TrainedHead`: where the layer is a head, of which a loss knows the formula.

        Raises:
            ConfigError: the rows of a batch have different adapters, which a loss cannot tell.
        """
        names = self._choice.names
        named = {names} if names is None or isinstance(names, str) else set(names)
        terms = [self.terms.get(name) if name is not None else None for name in named]
        if len(named) > 1 and any(terms):
            raise ConfigError(
                "adapters with LoRA on the output head, in one batch with others, are measured one "
                "at a time; expected one adapter; evaluate each by itself"
            )
        term = terms[0]
        if term is None:
            return self.frozen, None
        return self.frozen, LowRankTerm(term.a[0], term.b[0], term.scaling)


class SwitchedEmbedding(nn.Module):
    """A frozen input embedding with the low-rank terms of several adapters.

    Args:
        frozen: the table that this layer wraps.
        terms: the terms by name of their adapter, whose B (V, R) is looked up; adapters without
            this layer are left out.
        choice: the adapter of each row.
    """

    def __init__(self, frozen: nn.Embedding, terms: Mapping[str, LowRank], choice: _Choice) -> None:
        super().__init__()
        self.frozen = frozen
        self.terms = terms
        self._choice = choice

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B, T) to (B, T, D), in the dtype of the layers."""
        y: Tensor = self.frozen(ids).clone()
        for name, rows in self._choice.parts(len(ids)):
            term = self.terms.get(name)
            if term is None:
                continue
            chosen = torch.arange(len(ids)) if rows is None else torch.tensor(rows)
            chosen = chosen.to(y.device)
            inner = term.b[0][ids.to(y.device).index_select(0, chosen)]
            added = term.scaling * scale_of(self.frozen) * (inner @ term.a[0])
            y.index_copy_(0, chosen, (y.index_select(0, chosen) + added).to(y.dtype))
        return y

    @property
    def weight(self) -> Tensor:
        """The frozen table (V, D), for callers that ask an embedding for its size or dtype."""
        return self.frozen.weight


def _with_bias(y: Tensor, bias: Tensor, rows: list[int] | None, window: Window | None) -> Tensor:
    # The channels of a convolution come before its places.
    given = bias if window is None else bias.view(-1, *(1 for _ in window.size))
    chosen = slice(None) if rows is None else rows
    y[chosen] = (y[chosen] + given).to(y.dtype)
    return y


def _added_in_windows(
    window: Window, term: LowRank, x: Tensor, y: Tensor, rows: list[int] | None
) -> Tensor:
    chosen = (
        torch.arange(len(x), device=x.device) if rows is None else torch.tensor(rows).to(x.device)
    )
    added = term.scaling * window.low_rank(x.index_select(0, chosen), term.a[0], term.b[0])
    return y.index_add(0, chosen, added.to(y.dtype))


@dataclass(frozen=True)
class AdapterSet:
    """Adapters that share a loaded base.

    Attributes:
        base: the base that they are on.
        names: the names of the adapters, in the order of the caller.
        layers: the switched layers by path.
    """

    base: Base
    names: tuple[str, ...]
    layers: Mapping[str, SwitchedLinear | SwitchedEmbedding]
    _choice: _Choice

    def set_adapter(self, names: Names) -> None:
        """Choose an adapter for all rows, None for the base alone, or one for each row.

        Raises:
            ConfigError: no adapter has a name that is given.
        """
        given = (names,) if names is None or isinstance(names, str) else tuple(names)
        for name in given:
            if name is not None and name not in self.names:
                raise ConfigError(
                    f"no adapter is named {name!r}; expected one of {', '.join(self.names)}"
                )
        self._choice.names = names if names is None or isinstance(names, str) else given

    @property
    def bytes(self) -> int:
        """The bytes of all adapters, without the base."""
        layers = self.layers.values()
        terms = (term for layer in layers for term in layer.terms.values())
        linear = (layer for layer in layers if isinstance(layer, SwitchedLinear))
        gains = sum(gain.nbytes for layer in linear for gain in layer.gains.values())
        return gains + sum(each.nbytes for term in terms for each in (*term.a, *term.b))

    def detach(self) -> Base:
        """Take all adapters off; the base is the same as before, bit for bit."""
        for path, layer in self.layers.items():
            self.base.model.set_submodule(path, layer.frozen)
        return self.base


@dataclass(frozen=True)
class PerRow:
    """An adapter for each row of some data, for `evaluate` and `generate`.

    Attributes:
        adapters: the loaded adapters.
        names: name of the adapter of each row; None for the base alone.
    """

    adapters: AdapterSet
    names: Sequence[str | None]

    def choose(self, rows: Sequence[int]) -> None:
        """Choose the adapters of the next batch, given the indices of its rows."""
        self.adapters.set_adapter([self.names[row] for row in rows])


def load_adapters(base: Base, folders: Mapping[str, Path]) -> AdapterSet:
    """Put several stored adapters on a base. None of them is chosen yet.

    Args:
        base: a loaded base without an adapter, changed in place.
        folders: folders of the adapters, by the names that they get.

    Raises:
        AdapterError: see `read_adapter` and `check_fits`; or the adapters were trained on
            different bases; or one replaces parameters of the base, which the others share.
        ConfigError: the base carries an adapter already.
    """
    check_free(base)
    stored = {name: read_adapter(folder) for name, folder in folders.items()}
    _check_one_base(stored)
    for adapter in stored.values():
        if adapter.start:
            raise AdapterError(
                f"{adapter.folder}: its start has changed the base that it was trained on, which "
                "other adapters share; expected one on the base as it is stored; use it by itself"
            )
        check_fits(adapter, base)
        if adapter.spec.variant.merge_aware:
            raise AdapterError(
                f"{adapter.folder}: was trained merge-aware, and multiplies by weights of its own "
                "in place of the base's; expected adapters that share a base; use it by itself"
            )
        if adapter.stacked:
            raise AdapterError(
                f"{adapter.folder}: trains experts ({next(iter(adapter.stacked))}), which see the "
                "tokens of all rows together; expected LoRA on other layers; use it by itself"
            )
        if adapter.saved:
            raise AdapterError(
                f"{adapter.folder}: replaces {next(iter(adapter.saved))} of the base "
                "(modules_to_save or bias), which other adapters share; expected LoRA alone; use "
                "it by itself"
            )
        if adapter.rows:
            raise AdapterError(
                f"{adapter.folder}: has rows of tokens of its own ({next(iter(adapter.rows))}), in "
                "tables that other adapters share; expected LoRA alone; use it by itself"
            )
    choice = _Choice()
    layers: dict[str, SwitchedLinear | SwitchedEmbedding] = {}
    for path, carrier in carriers(base.model).items():
        terms = {
            name: _term(adapter, path, base.hardware.device)
            for name, adapter in stored.items()
            if path in adapter.tensors
        }
        if not terms:
            continue
        frozen = carrier.layer
        if isinstance(frozen, nn.Embedding):
            layers[path] = SwitchedEmbedding(frozen, terms, choice).train(frozen.training)
        else:
            biases = {
                name: stored[name].added[f"{path}.bias"].to(base.hardware.device)
                for name in terms
                if f"{path}.bias" in stored[name].added
            }
            gains = _gains(stored, path, carrier.frozen, base.hardware.dtype)
            switched = SwitchedLinear(carrier.frozen, terms, choice, biases, gains)
            layers[path] = switched.train(frozen.training)
        base.model.set_submodule(path, layers[path])
    return AdapterSet(base, tuple(stored), layers, choice)


def _check_one_base(stored: Mapping[str, StoredAdapter]) -> None:
    """Refuse adapters of different bases by name, before their layers are compared one by one."""
    bases = {name: each.record for name, each in stored.items() if each.record is not None}
    for name, record in bases.items():
        first, other = next(iter(bases.items()))
        if record.classifies != other.classifies:
            kinds = [each.classifies or "causal" for each in (record, other)]
            raise AdapterError(
                f"adapter {name}: for task {kinds[0]}, and {first} for task {kinds[1]}; expected "
                "adapters of one task; leave one of them out"
            )
        if record.digest != other.digest:
            raise AdapterError(
                f"adapter {name}: trained on {record.base}, and {first} on {other.base}, whose "
                "weights are others; expected adapters of one base; leave one of them out"
            )


def _gains(
    stored: Mapping[str, StoredAdapter], path: str, frozen: FrozenLinear, dtype: torch.dtype
) -> dict[str, Tensor]:
    with_dora = {name: each for name, each in stored.items() if path in each.magnitudes}
    found = {
        name: each.gain(path, frozen.weight.dequantize(dtype)) for name, each in with_dora.items()
    }
    return {name: gain for name, gain in found.items() if gain is not None}


def _term(adapter: StoredAdapter, path: str, device: torch.device) -> LowRank:
    a, b = adapter.tensors[path]
    return LowRank((a.to(device),), (b.to(device),), scaling=adapter.scaling_of(path))
