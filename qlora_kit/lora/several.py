"""Several adapters on one base: switched at once, or one for each row of a batch.

Takes a loaded base and stored adapters; returns an `AdapterSet`. The base is held once, each
adapter adds its A and B only. For inference: nothing here is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.lora import LowRank
from qlora_kit.layers.projections import projections
from qlora_kit.lora.adapter import StoredAdapter, check_fits, read_adapter
from qlora_kit.lora.attach import check_free
from qlora_kit.model.load import Base

Names = str | None | Sequence[str | None]
"""One adapter for all rows, none, or one (or none) for each row."""


class _Choice:
    """Which adapter each row has; all switched layers of a base share one."""

    def __init__(self) -> None:
        self.names: Names = None

    def parts(self, rows: int) -> Iterator[tuple[str, list[int] | None]]:
        """Yield each adapter in use with its rows; None where it has all of them."""
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
        frozen: the layer it wraps.
        terms: by name of the adapter; those that do not have this layer are not among them.
        choice: says which of them a row has.
    """

    def __init__(self, frozen: FrozenLinear, terms: Mapping[str, LowRank], choice: _Choice) -> None:
        super().__init__()
        self.frozen = frozen
        self.terms = terms
        self._choice = choice

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, ..., D) to (B, ..., K) in the dtype of x."""
        y: Tensor = self.frozen(x)
        for name, rows in self._choice.parts(len(x)):
            term = self.terms.get(name)
            if term is None:
                continue
            if rows is None:
                _add(term, x, y)
            else:
                chosen = torch.tensor(rows, device=x.device)
                part = y.index_select(0, chosen)
                _add(term, x.index_select(0, chosen), part)
                y.index_copy_(0, chosen, part)
        return y


def _add(term: LowRank, x: Tensor, y: Tensor) -> None:
    term.add_to(y.view(-1, y.shape[-1]), term.inner(x.reshape(-1, x.shape[-1])))


@dataclass(frozen=True)
class AdapterSet:
    """Adapters that share a loaded base.

    Attributes:
        base: what they are on.
        names: of the adapters, in the order they were given.
        layers: the switched layers by path.
    """

    base: Base
    names: tuple[str, ...]
    layers: Mapping[str, SwitchedLinear]
    _choice: _Choice

    def set_adapter(self, names: Names) -> None:
        """Choose an adapter for all rows, None for the base alone, or one for each row.

        Raises:
            ConfigError: there is no adapter of that name.
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
        """What the adapters take beside the base."""
        terms = (term for layer in self.layers.values() for term in layer.terms.values())
        return sum(term.a.nbytes + term.b.nbytes for term in terms)

    def detach(self) -> Base:
        """Take all adapters off: the base is again what it was, bit for bit."""
        for path, layer in self.layers.items():
            self.base.model.set_submodule(path, layer.frozen)
        return self.base


@dataclass(frozen=True)
class PerRow:
    """An adapter for each row of some data: what `evaluate` and `generate` take.

    Attributes:
        adapters: loaded.
        names: of the adapter of each row; None for the base alone.
    """

    adapters: AdapterSet
    names: Sequence[str | None]

    def choose(self, rows: Sequence[int]) -> None:
        """Let the next batch be these rows."""
        self.adapters.set_adapter([self.names[row] for row in rows])


def load_adapters(base: Base, folders: Mapping[str, Path]) -> AdapterSet:
    """Put several stored adapters on a base; none of them is chosen yet.

    Args:
        base: loaded, without an adapter.
        folders: of the adapters, by the name they get.

    Raises:
        AdapterError: see `read_adapter` and `check_fits`; or they were trained on different
            bases; or one replaces parameters of the base, which others share.
        ConfigError: the base carries an adapter already.
    """
    check_free(base)
    stored = {name: read_adapter(folder) for name, folder in folders.items()}
    _check_one_base(stored)
    for adapter in stored.values():
        check_fits(adapter, base)
        if adapter.saved:
            raise AdapterError(
                f"{adapter.folder}: replaces {next(iter(adapter.saved))} of the base "
                "(modules_to_save), which other adapters share; expected LoRA alone; use it by "
                "itself"
            )
    choice, layers = _Choice(), {}
    for path, projection in projections(base.model).items():
        frozen = projection.frozen
        terms = {
            name: _term(adapter, path, frozen.weight.device)
            for name, adapter in stored.items()
            if path in adapter.tensors
        }
        if terms:
            layers[path] = SwitchedLinear(frozen, terms, choice).train(frozen.training)
            base.model.set_submodule(path, layers[path])
    return AdapterSet(base, tuple(stored), layers, choice)


def _check_one_base(stored: Mapping[str, StoredAdapter]) -> None:
    """Tell adapters of different bases by name, before their layers are compared one by one."""
    bases = {name: each.record for name, each in stored.items() if each.record is not None}
    for name, record in bases.items():
        first, other = next(iter(bases.items()))
        if record.digest != other.digest:
            raise AdapterError(
                f"adapter {name}: trained on {record.base}, and {first} on {other.base}, whose "
                "weights are others; expected adapters of one base; leave one of them out"
            )


def _term(adapter: StoredAdapter, path: str, device: torch.device) -> LowRank:
    a, b = adapter.tensors[path]
    return LowRank(a.to(device), b.to(device), None, adapter.spec.scaling_of(path), 1.0)
