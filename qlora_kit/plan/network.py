"""The traffic between the devices of a run, and the time that it takes at stated rates.

The bytes are counted in the simulated step. The rates are those that makers state; nothing here is
measured, and no device reaches them all of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_kit.report.memory import size_text

# Bytes a second that a device receives while it sends as much. NVLink is that of an H100 (18 links
# of 25 GB/s in each direction), PCIe what cards reach of 31.5 GB/s.
LINKS = {"NVLink of an H100": 450e9, "PCIe 4.0 x16": 25e9, "100 Gbit/s Ethernet": 12.5e9}
# Times and choices are reckoned with the slower link of those inside of a machine.
RECKONED_LINK = "PCIe 4.0 x16"
BYTES_PER_SECOND = LINKS[RECKONED_LINK]
# LoRA's gradients are fp32.
_GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """The bytes that one device receives in an optimiser step; it sends as many.

    Attributes:
        devices: number of devices.
        sharing: number of devices that hold one base together.
        gathered_bytes: parts of the base, gathered for each micro-batch beside the computation.
        reduced_bytes: the sum of the gradients, once a step.
    """

    devices: int
    sharing: int
    gathered_bytes: int
    reduced_bytes: int

    @property
    def seconds(self) -> dict[str, float]:
        """The time of all of it by the name of the link, at stated rates."""
        total = self.gathered_bytes + self.reduced_bytes
        return {name: total / rate for name, rate in LINKS.items()}

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Return the traffic as a table."""
        found = [("gradients", f"{size_text(self.reduced_bytes):>8}, once")]
        if self.gathered_bytes:
            how = "for each micro-batch, beside the computation"
            found.insert(0, ("parts of the base", f"{size_text(self.gathered_bytes):>8}, {how}"))
        times = (f"{seconds:,.2g} s over {name}" for name, seconds in self.seconds.items())
        return (*found, ("at stated rates", ", ".join(times)))

    def as_json(self) -> dict[str, Any]:
        """Return the traffic for programs."""
        return {
            "devices": self.devices,
            "sharing": self.sharing,
            "gathered_bytes": self.gathered_bytes,
            "reduced_bytes": self.reduced_bytes,
            "stated_bytes_per_second": LINKS,
            "seconds_at_stated_rates": self.seconds,
        }


def reduced_bytes(parameters: int, devices: int) -> int:
    """Return what a device receives in a sum of the gradients: each number comes almost twice.

    Args:
        parameters: number of trained parameters.
        devices: number of devices; a ring sends (n − 1) / n of all numbers, twice.
    """
    return round(2 * (devices - 1) / devices * _GRADIENT_BYTES * parameters)
