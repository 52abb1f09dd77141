"""A base that several runs of one process train on, one after another.

Each run gets it as it was loaded, so its bits are those of a run in a process of its own. Takes
what `load_base` takes; keeps at most one base. Trains nothing.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch

from qlora_kit.events import Announce, silent
from qlora_kit.lora.attach import Adapter, detach
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.load import Base, BaseSpec, Placement, is_tied, load_base
from qlora_kit.model.memory import release_memory, return_free_memory, trim_heap
from qlora_kit.step.settle import unsettle

# Rotary positions of these kinds remember the longest row that they have seen.
_WITH_A_MEMORY = ("dynamic", "longrope")


class KeptBase:
    """Loads the bases of runs that follow each other, and keeps the last one for the next run.

    Attributes:
        loads: number of bases that were loaded.
    """

    def __init__(self) -> None:
        self._kept: Base | None = None
        self.loads = 0

    def held_bytes(self, spec: BaseSpec, hardware: Hardware) -> int:
        """Return the bytes of the device that a base takes already, since it was kept.

        A kept base that is not the one that is wanted is dropped: there is no room for two.
        """
        kept = self._kept
        if kept is None or not _is_same(kept, spec, hardware):
            self.drop()
            return 0
        tensors = chain(kept.model.parameters(), kept.model.buffers())
        found = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
                 for each in tensors if each.device.type == hardware.device.type}  # fmt: skip
        return sum(found.values())

    def load(
        self,
        spec: BaseSpec,
        hardware: Hardware,
        announce: Announce = silent,
        placement: Placement | None = None,
    ) -> Base:
        """Return the kept base, or load another in its place; see `load_base`."""
        kept, wanted = self._kept, placement or Placement()
        if kept is not None and _is_same(kept, spec, hardware):
            resolved = wanted.resolved(hardware.device, tied=is_tied(kept.model))
            if resolved == kept.placement:
                if hardware.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(hardware.device)
                return replace(kept, hardware=hardware)
        self.drop()
        self._kept = load_base(spec, hardware, announce, placement)
        self.loads += 1
        return self._kept

    def take_back(self, adapter: Adapter) -> None:
        """Take an adapter off its base, which is then as it was loaded, bit for bit."""
        base = adapter.base
        unsettle(base.model, base.hardware)
        detach(adapter)
        base.model.eval()
        if _remembers(base):
            self.drop()

    def collect(self) -> None:
        """Give back the memory of the last run; call it when nothing refers to the run any more."""
        if self._kept is None:
            return_free_memory()
        else:
            release_memory(self._kept.hardware.device)
            trim_heap()

    def drop(self) -> None:
        """Keep no base any more, and give its memory back."""
        kept, self._kept = self._kept, None
        if kept is not None:
            device = kept.hardware.device
            del kept
            release_memory(device)
            trim_heap()


def _is_same(kept: Base, spec: BaseSpec, hardware: Hardware) -> bool:
    of_kept = (kept.hardware.device, kept.hardware.dtype)
    return kept.spec == spec and of_kept == (hardware.device, hardware.dtype)


def _remembers(base: Base) -> bool:
    rope = getattr(base.model.config.get_text_config(), "rope_parameters", None) or {}
    return rope.get("rope_type") in _WITH_A_MEMORY
