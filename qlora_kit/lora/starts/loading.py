"""Starts at work while a base is loaded: one that is computed, and one that is known.

Takes each targeted weight as it is stored; returns it frozen. Holds A and B of every layer in host
memory, and no weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.layers.weight import FrozenWeight
from qlora_kit.lora.files import StartErrors, StartRecord
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.lora.starts.loftq import loftq
from qlora_kit.lora.starts.olora import olora
from qlora_kit.lora.starts.pissa import pissa
from qlora_kit.lora.starts.residual import less, taken_by, widened
from qlora_kit.model.start import Freeze, Pair

Decide = Callable[[Callable[[], Any]], Any]
"""Returns what a function returns, in one process that does the work for all."""


def alone(work: Callable[[], Any]) -> Any:
    """Do the work in this process, which is the only one."""
    return work()


class KnownStart:
    """A start whose A and B are known: those of a stored adapter, or of rows that were seen.

    Args:
        pairs: A and B that each layer begins with, by its path.
        spec: says the scaling of each layer.
        record: the start as the adapter's record says it; None where the base is unchanged.
        rounds: whether a weight keeps the dtype that it is stored in, as in 16 bits.
    """

    def __init__(
        self,
        pairs: Mapping[str, Pair],
        spec: LoraSpec,
        record: StartRecord | None = None,
        *,
        rounds: bool = False,
    ) -> None:
        self.pairs = pairs
        self.record = record
        self._spec = spec
        self._rounds = rounds

    @property
    def changes_base(self) -> bool:
        """Whether the base is less scaling · B A."""
        return self.record is not None

    @property
    def errors(self) -> StartErrors | None:
        """What was measured when the run began; None where nothing was."""
        return self.record.errors if self.record is not None else None

    def forget(self) -> None:
        """Let go of the pairs of an unchanged base; see `Start`."""
        if not self.changes_base:
            self.pairs = {}

    def covers(self, name: str) -> bool:
        """Whether a parameter is a weight that is less something."""
        return self.changes_base and _path(name) in self.pairs

    def frozen(self, name: str, weight: Tensor, freeze: Freeze) -> FrozenWeight:
        """Return the frozen weight; see `Start`."""
        return freeze(self.less(name, weight))

    def less(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight before it is quantised; see `Start`."""
        if not self.covers(name):
            return weight
        path = _path(name)
        found = less(weight, *self.pairs[path], self._spec.scaling_of(path))
        return found.to(weight.dtype) if self._rounds else found

    def taken(self, name: str) -> Tensor:
        """Return scaling · B A; see `Start`."""
        path = _path(name)
        return taken_by(*self.pairs[path], self._spec.scaling_of(path))


class FreshStart:
    """A start that is computed as the weights are loaded: PiSSA, OLoRA, LoftQ; or taken: LoRA-GA.

    Args:
        spec: the layers, and the method.
        paths: the paths of the layers.
        bits: bits of the base.
        seed: rows of A that no weight gives are drawn from it.
        decide: lets one of several processes compute each pair for all.
        given: A and B of each layer by path, where no weight has to be asked: LoRA-GA.
    """

    def __init__(
        self,
        spec: LoraSpec,
        paths: Sequence[str],
        *,
        bits: int,
        seed: int,
        decide: Decide = alone,
        given: Mapping[str, Pair] | None = None,
    ) -> None:
        self.pairs: dict[str, Pair] = {}
        self._given = given or {}
        self._spec, self._paths = spec, frozenset(paths)
        self._bits, self._seed, self._decide = bits, seed, decide
        self._squares: list[Tensor] = []

    @property
    def changes_base(self) -> bool:
        """Whether the base is less scaling · B A."""
        return self._spec.variant.changes_base

    @property
    def record(self) -> StartRecord | None:
        """The start as the adapter's record says it; None where the base is unchanged."""
        return StartRecord.of(self._spec, self.errors) if self.changes_base else None

    @property
    def errors(self) -> StartErrors | None:
        """What quantising loses, with the start and without it; None where nothing is lost."""
        if self._bits == 16:
            return None
        weight, plain, start, apart = torch.stack(self._squares).sum(0).tolist()
        relative = [math.sqrt(each / weight) if weight else 0.0 for each in (plain, start, apart)]
        return StartErrors(plain=relative[0], start=relative[1], peft=relative[2])

    def forget(self) -> None:
        """Let go of the pairs of an unchanged base; see `Start`."""
        if not self.changes_base:
            self.pairs = {}

    def covers(self, name: str) -> bool:
        """Whether a parameter is the weight of a layer that is trained."""
        return name.endswith(".weight") and _path(name) in self._paths

    @torch.no_grad()
    def frozen(self, name: str, weight: Tensor, freeze: Freeze) -> FrozenWeight:
        """Compute A and B of a layer, and return its frozen weight; see `Start`."""
        path = _path(name)
        if not self.changes_base:
            frozen = freeze(weight)
            self.pairs[path] = self._decide(lambda: self._loftq(path, weight, frozen))
            if self._bits != 16:
                self._measure(path, weight, weight, frozen, frozen)
            return frozen
        known = self._given.get(path)
        self.pairs[path] = known or self._decide(lambda: self._of_weight(path, weight))
        rest = less(weight, *self.pairs[path], self._spec.scaling_of(path))
        frozen = freeze(rest.to(weight.dtype) if self._bits == 16 else rest)
        if self._bits != 16:
            self._measure(path, weight, rest, frozen, freeze(weight))
        return frozen

    def less(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight before it is quantised; see `Start`."""
        known = KnownStart(self.pairs, self._spec, self.record, rounds=self._bits == 16)
        return known.less(name, weight)

    def taken(self, name: str) -> Tensor:
        """Return scaling · B A; see `Start`."""
        path = _path(name)
        return taken_by(*self.pairs[path], self._spec.scaling_of(path))

    def _of_weight(self, path: str, weight: Tensor) -> Pair:
        rank, scaling = self._spec.rank_of(path), self._spec.scaling_of(path)
        if self._spec.variant.init == "olora":
            return self._kept(path, olora(weight.float(), rank))
        return self._kept(path, pissa(weight.float(), rank, scaling))

    def _loftq(self, path: str, weight: Tensor, frozen: FrozenWeight) -> Pair:
        rank, scaling = self._spec.rank_of(path), self._spec.scaling_of(path)
        unpacked = frozen.dequantize(torch.float32)
        return self._kept(path, loftq(weight, unpacked, rank, scaling))

    def _kept(self, path: str, pair: Pair) -> Pair:
        a, b = widened(*pair, self._spec.rank_of(path), self._seed)
        return a.cpu(), b.cpu()

    def _measure(
        self, path: str, weight: Tensor, rest: Tensor, frozen: FrozenWeight, plain: FrozenWeight
    ) -> None:
        """Add the squares of the norms of a weight and of what becomes of it.

        Args:
            path: the path of the layer.
            weight: the weight W.
            rest: what was quantised.
            frozen: that, quantised.
            plain: W quantised without a start.
        """
        scaling = self._spec.scaling_of(path)
        held, without = frozen.dequantize(torch.float32), plain.dequantize(torch.float32)
        lost_plain = (weight.float() - without).norm()
        if self.changes_base:
            lost = (rest - held).norm()
            # PEFT's form adds its terms to the quantised weight itself.
            apart = less(without, *self.pairs[path], scaling).sub_(held).norm()
        else:
            lost = less(weight.float() - held, *self.pairs[path], scaling).norm()
            apart = torch.zeros_like(lost)
        norms = torch.stack([weight.float().norm(), lost_plain, lost, apart])
        self._squares.append(norms.double().square())


def _path(name: str) -> str:
    return name.removesuffix(".weight")


def stored_start(folder: Path) -> KnownStart | None:
    """Return the start that the base of a stored adapter is less of; None where it is unchanged.

    Raises:
        AdapterError: see `read_adapter`.
    """
    from qlora_kit.lora.files import read_base_record
    from qlora_kit.lora.reading import read_adapter

    record = read_base_record(folder)
    if record is None or record.start is None:
        return None
    stored = read_adapter(folder)
    return KnownStart(stored.start, stored.spec, record.start, rounds=record.bits == 16)
