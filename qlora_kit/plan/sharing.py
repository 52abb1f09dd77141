"""The ways in which the devices of a run can hold the base, planned and ranked.

Each device holds all of it, which sends the least; or the devices of a machine hold it together,
which needs the least memory and sends every layer twice a micro-batch. Takes the options and the
subject of one device; returns plans, the best first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qlora_kit.config import TrainConfig
from qlora_kit.errors import ConfigError
from qlora_kit.plan.budget import Budget
from qlora_kit.plan.duration import about
from qlora_kit.plan.planning import Plan, make_plan
from qlora_kit.plan.subject import Subject
from qlora_kit.report.memory import size_text


@dataclass(frozen=True)
class Way:
    """A way to hold the base.

    Attributes:
        sharing: number of devices that hold one base together; 1: each holds all of it.
        plan: the plan of one device; None where no settings fit.
        fits: whether it fits; None where nothing says how much memory there is.
        fault: why no settings fit.
    """

    sharing: int
    plan: Plan | None
    fits: bool | None
    fault: ConfigError | None = None

    @property
    def name(self) -> str:
        """The way in words."""
        return f"held by {self.sharing} devices together" if self.sharing > 1 else "held by each"

    def describe(self) -> str:
        """Return what a device needs and receives, in words."""
        if self.plan is None:
            return "fits with no settings"
        parts = [f"{size_text(self.plan.prediction.peak.bytes):>8} a device"]
        if self.fits is not None:
            parts.append("fits" if self.fits else "does not fit")
        if (traffic := self.plan.traffic) is not None:
            received = traffic.gathered_bytes + traffic.reduced_bytes
            parts.append(f"receives {size_text(received)} a step")
        if self.plan.pace is not None:
            parts.append(f"{about(self.plan.pace.step.all)} a step")
        return ", ".join(parts)


@dataclass(frozen=True)
class Ways:
    """The ways to hold a base, the best first.

    Attributes:
        ranked: those that were planned.
    """

    ranked: tuple[Way, ...]

    @property
    def chosen(self) -> Plan:
        """The plan of the best way."""
        plan = self.ranked[0].plan
        assert plan is not None
        return plan

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Return the ways as a table; none where there is one way only."""
        if len(self.ranked) < 2:
            return ()
        return tuple((f"{n}. {way.name}", way.describe()) for n, way in enumerate(self.ranked, 1))

    def as_json(self) -> list[dict[str, Any]]:
        """Return the ways for programs."""
        return [
            {
                "sharing": way.sharing,
                "fits": way.fits,
                "predicted_peak_bytes": way.plan.prediction.peak.bytes if way.plan else None,
                "why_not": way.fault.faults[0] if way.fault else None,
            }
            for way in self.ranked
        ]


def plan_ways(
    config: TrainConfig,
    subject: Subject,
    budget: Budget,
    *,
    on_machine: int,
    choose: bool = True,
    free_bytes: int | None = None,
    compare: bool = False,
) -> Ways:
    """Plan a run in the ways that its options leave open.

    Args:
        config: the options of one device.
        subject: the run of one device.
        budget: the memory of one device.
        on_machine: number of devices of a machine, which can hold a base together.
        choose: False keeps the settings as they are.
        free_bytes: the memory of a device where there is no budget.
        compare: whether to plan every way; otherwise the first that fits is enough.

    Raises:
        ConfigError: nothing fits in any way.
    """
    found: list[Way] = []
    for sharing in _open_ways(config, subject.devices, on_machine):
        found.append(_planned(config, subject, budget, sharing, choose, free_bytes))
        if found[-1].fits is not False and not compare:
            break
    ranked = sorted(found, key=_rank)
    if ranked[0].plan is None:
        assert ranked[0].fault is not None
        raise ranked[0].fault
    return Ways(tuple(ranked))


def _open_ways(config: TrainConfig, devices: int, on_machine: int) -> list[int]:
    if devices == 1 or on_machine == 1 or config.shard_base is False:
        return [1]
    return [on_machine] if config.shard_base else [1, on_machine]


def _planned(
    config: TrainConfig,
    subject: Subject,
    budget: Budget,
    sharing: int,
    choose: bool,
    free_bytes: int | None,
) -> Way:
    asked = config.model_copy(update={"shard_base": sharing > 1})
    try:
        plan = make_plan(asked, replace(subject, sharing=sharing), budget, choose=choose)
    except ConfigError as fault:
        return Way(sharing, None, False, fault)
    fits = plan.fits
    if fits is None and free_bytes is not None:
        fits = plan.prediction.peak.bytes <= free_bytes
    return Way(sharing, plan, fits)


def _rank(way: Way) -> tuple[bool, float, int]:
    """Order ways that fit before others, by their time; where none is known, by what they send."""
    if way.plan is None:
        return True, 0.0, -way.sharing
    pace = way.plan.pace
    seconds = 0.0 if pace is None else pace.step.all / pace.tokens
    # Of ways that do not fit, the one that needs the least memory.
    return way.fits is False, seconds, -way.sharing if way.fits is False else way.sharing
