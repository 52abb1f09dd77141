"""The time of a step, from its work and the rates of the device.

An operation takes as long as its arithmetic or its bytes, whichever takes longer, at the best rate
of the device; on a CPU also the time to call it. On a GPU the host calls ahead while the device
computes, so a step takes as long as the device or the host, whichever takes longer. No step reaches
the best rates: the shares below are those that were measured, and `benchmarks/time_predictions.py`
measures them again.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from qlora_kit.model.ceilings import Ceilings
from qlora_kit.plan.ledger import Operation, Work
from qlora_kit.plan.network import BYTES_PER_SECOND

# Share of the best rates that a step reaches. On a GPU: three steps of deepseek-7b, which one H100
# limited and not its host; on a CPU: three steps of SmolLM2-135M (docs/performance.md).
GPU_SHARE = 0.78
CPU_SHARE = 0.70
# Copies run beside the computation; the published cost of doing so is 0 to 2 % of the step.
SHARE_OF_COPIES_SEEN = 0.1
# An operation of a step takes the host longer than a small one alone: around it are Python,
# autograd and the allocator. So many times as long, measured on a CPU.
CALL_FACTOR = 23

_LIMITS = {
    "device": "the device",
    "host": "the host, whose time is known within a factor of two only",
    "link": "the copies",
    "network": "the network, at stated rates",
}
# From the first of these times on, a time is told in the unit beside it.
_UNITS = ((86_400 * 2, 86_400, "days"), (5_400, 3_600, "h"), (90, 60, "min"))
_STEPS_OF_UNKNOWN_DATA = 1000


@dataclass(frozen=True)
class StepWork:
    """The work of an optimiser step on rows of the mean length.

    Attributes:
        micro_batch: the work of one micro-batch.
        update: the work of clipping and of the optimiser.
        micro_batches: micro-batches of a step.
        tokens: tokens of a step, padding not counted.
        reduced_bytes: bytes of gradients that a device receives from others, once a step.
    """

    micro_batch: Work
    update: Work
    micro_batches: float
    tokens: float
    reduced_bytes: int = 0


@dataclass(frozen=True)
class Seconds:
    """The time of some work, apart for those who do it at the same time.

    Attributes:
        device: arithmetic and passes over memory, on a CPU with the calls.
        host: the calls of the host of a GPU; 0 on a CPU.
        link: copies between host and device.
        network: what is received from other devices beside the computation, at stated rates.
        reduction: what is received after it, likewise.
    """

    device: float
    host: float = 0.0
    link: float = 0.0
    network: float = 0.0
    reduction: float = 0.0

    @property
    def all(self) -> float:
        """The time of the work."""
        beside = max(self.device, self.host, self.link, self.network)
        return beside + SHARE_OF_COPIES_SEEN * self.link + self.reduction

    @property
    def bound(self) -> str:
        """Who the others wait for: "device", "host", "link" or "network"."""
        return max(
            ("device", "host", "link", "network"), key=lambda name: float(getattr(self, name))
        )


def seconds_of(work: Work, ceilings: Ceilings) -> Seconds:
    """Return the time that a device takes for some work.

    Args:
        work: counted on the device that is planned for.
        ceilings: the best rates of the device.
    """
    best = _best_seconds(work.operations, ceilings)
    calls = work.operations.total() * (ceilings.call_seconds or 0.0) * CALL_FACTOR
    if (link := ceilings.link_bytes_per_second) is None:
        return Seconds(best / CPU_SHARE + calls)
    network = work.received_bytes / BYTES_PER_SECOND
    return Seconds(best / GPU_SHARE, calls, work.crossing_bytes / link, network)


def step_seconds(step: StepWork, ceilings: Ceilings) -> Seconds:
    """Return the time of an optimiser step."""
    one, update = seconds_of(step.micro_batch, ceilings), seconds_of(step.update, ceilings)
    return Seconds(
        one.device * step.micro_batches + update.device,
        one.host * step.micro_batches + update.host,
        one.link * step.micro_batches + update.link,
        one.network * step.micro_batches,
        step.reduced_bytes / BYTES_PER_SECOND if ceilings.is_of_gpu else 0.0,
    )


@dataclass(frozen=True)
class Pace:
    """The predicted time of a run, without evaluations, checkpoints and loading.

    Attributes:
        step: the time of an optimiser step on rows of the mean length.
        tokens: tokens of such a step, padding not counted.
        steps: optimiser steps of the run; None where its data are not known.
        ceilings: the rates that the time follows from.
    """

    step: Seconds
    tokens: float
    steps: int | None
    ceilings: Ceilings

    @classmethod
    def of(cls, step: StepWork, steps: int | None, ceilings: Ceilings) -> Pace:
        """Return the time of a run of such steps on a device."""
        return cls(step_seconds(step, ceilings), step.tokens, steps, ceilings)

    def seconds_for(self, tokens: float) -> float:
        """Return the time of a step of as many tokens, padding not counted."""
        return self.step.all * tokens / self.tokens

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Return the time as a table."""
        steps = self.steps or _STEPS_OF_UNKNOWN_DATA
        step = f"{about(self.step.all)} a step, {_digits(self.tokens / self.step.all)} tokens/s"
        return (
            (f"{steps:,} steps", f"{about(self.step.all * steps)}: {step}"),
            ("reckoned with", f"{self.share:.0%} of the rates {self._source}"),
        )

    @property
    def _source(self) -> str:
        if not self.ceilings.is_measured:
            return "from the card's data sheet, not measured; the host is taken to keep up"
        if not self.ceilings.is_of_gpu:
            return "measured on this device"
        return f"measured on this device; the limit is {_LIMITS[self.step.bound]}"

    @property
    def share(self) -> float:
        """The share of the best rates that the step is taken to reach."""
        return GPU_SHARE if self.ceilings.is_of_gpu else CPU_SHARE

    def as_json(self) -> dict[str, Any]:
        """Return the time for programs, with the digits that are known."""
        steps = self.steps or _STEPS_OF_UNKNOWN_DATA
        return {
            "step_seconds": _rounded(self.step.all),
            "tokens_per_second": _rounded(self.tokens / self.step.all),
            "steps": self.steps,
            "tokens_per_step": self.tokens,
            ("run_seconds" if self.steps else "seconds_per_1000_steps"): _rounded(
                self.step.all * steps
            ),
            "bound_by": self.step.bound,
            "share_of_ceilings": self.share,
            "ceilings": asdict(self.ceilings),
        }


def about(seconds: float) -> str:
    """Return a predicted time for people, with no more than two digits: "about 3.2 h"."""
    for least, unit_seconds, unit in _UNITS:
        if seconds >= least:
            return f"about {_digits(seconds / unit_seconds)} {unit}"
    return f"about {_digits(seconds)} s"


def _rounded(value: float) -> float:
    """Return a value with the two digits that a prediction knows."""
    return float(f"{value:.1e}") if math.isfinite(value) else value


def _digits(value: float) -> str:
    return f"{_rounded(value):,.15g}"


def _best_seconds(operations: Counter[Operation], ceilings: Ceilings) -> float:
    return sum(
        count * _operation_seconds(operation, ceilings) for operation, count in operations.items()
    )


def _operation_seconds(operation: Operation, ceilings: Ceilings) -> float:
    if operation.kind == "unpacking" and operation.dtype in ceilings.unpacked_per_second:
        return operation.bytes / ceilings.unpacked_per_second[operation.dtype]
    arithmetic = 0.0
    if operation.flop:
        rates = ceilings.flop_per_second
        arithmetic = operation.flop / rates.get(operation.dtype, rates["float32"])
    return max(arithmetic, ceilings.pass_seconds(operation.bytes))
