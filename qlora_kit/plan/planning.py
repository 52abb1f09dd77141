"""From a configuration to a plan: memory and time of a run, and with a budget its settings.

Takes the options of `train`; returns a `Plan`. Needs no GPU, no weights and no network: it reads
only the architecture of a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qlora_kit.config import TrainConfig, that_decide
from qlora_kit.layers.purpose import EXPERTS
from qlora_kit.model.architecture import unquantized_share
from qlora_kit.model.ceilings import Ceilings
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.positions import positions_of
from qlora_kit.plan.alternatives import nothing_fits
from qlora_kit.plan.budget import Budget
from qlora_kit.plan.duration import Pace
from qlora_kit.plan.network import Traffic
from qlora_kit.plan.search import SearchResult, search
from qlora_kit.plan.simulate import Prediction, predict
from qlora_kit.plan.subject import Subject, UsualRows
from qlora_kit.report.memory import size_text
from qlora_kit.train.windows import plan_steps

# Choices that are run in full, one after the other, where each turns out larger than extrapolated.
_MOST_TRIES = 4
_CHOICES_SHOWN = 5


@dataclass(frozen=True)
class Plan:
    """The plan of a run: its settings, and the memory and the time that it will need.

    Attributes:
        config: the configuration, with the settings that were planned.
        hardware: the hardware that was planned for.
        prediction: the peak of each phase, and the work of a step.
        budget: the memory that the run may take.
        warnings: lines that the user should read before the run.
        found: the result of the search for settings; None if there was no search.
        before_bytes: anonymous memory of the process before it loads the base, where the run is
            about to start on a CPU; 0 elsewhere.
        ceilings: the rates of the device, or the reason why they are not known.
        usual: the means over the rows of the run; None where the data are not known.
        devices: number of devices of the run; this is the plan of one.
        sharing: number of them that hold the base together.
    """

    config: TrainConfig
    hardware: Hardware
    prediction: Prediction
    budget: Budget
    warnings: tuple[str, ...] = ()
    found: SearchResult | None = None
    before_bytes: int = 0
    ceilings: Ceilings | str = "the rates of the device are not known"
    usual: UsualRows | None = None
    devices: int = 1
    sharing: int = 1

    @property
    def traffic(self) -> Traffic | None:
        """What the device receives from others in a step; None where it is alone."""
        if self.devices == 1:
            return None
        step = self.prediction.step
        gathered = round(step.micro_batch.received_bytes * step.micro_batches)
        return Traffic(self.devices, self.sharing, gathered, step.reduced_bytes)

    @property
    def pace(self) -> Pace | None:
        """The predicted time of the run; None where the rates of the device are not known."""
        if isinstance(self.ceilings, str):
            return None
        return Pace.of(self.prediction.step, self._steps, self.ceilings)

    @property
    def _steps(self) -> int | None:
        """The optimiser steps of the run; None where its data are not known."""
        usual = self.usual
        if usual is None:
            return self.config.max_steps
        return plan_steps(usual.rows, self.config).total

    def time_rows(self) -> tuple[tuple[str, str], ...]:
        """Return the predicted time as a table, or the reason why there is none."""
        if self.pace is None:
            return (("time", f"not predicted: {self.ceilings}"),)
        return self.pace.rows()

    @property
    def experts_bytes(self) -> int:
        """Bytes of the packed experts of a mixture on the device; 0 of other models."""
        return self.prediction.peak.by_purpose.get(EXPERTS, 0)

    def expert_rows(self) -> tuple[tuple[str, str], ...]:
        """Return what the experts of a mixture take, and the peak without them, as a table."""
        if not self.experts_bytes:
            return ()
        beside = self.prediction.peak.bytes - self.experts_bytes
        return (
            ("packed experts", f"{size_text(self.experts_bytes):>8}"),
            ("all beside them", f"{size_text(beside):>8}"),
            ("trained", f"{self.prediction.trainable:,} parameters"),
        )

    @property
    def card_bytes(self) -> int:
        """Bytes the run takes of a whole card, with context and a margin for fragmentation."""
        return self.budget.taken_of_card(self.prediction.peak.bytes)

    @property
    def process_bytes(self) -> int | None:
        """Bytes of anonymous memory that the process will have at most.

        None unless the run is about to start on a CPU.
        """
        peak = self.prediction.peak.bytes
        return self.budget.taken_by_process(self.before_bytes, peak) if self.before_bytes else None

    @property
    def over_bytes(self) -> int:
        """Bytes by which the run goes over its budget; 0 where it fits or has no budget."""
        return self.budget.over_bytes(self.prediction.peak.bytes, self.prediction.host_peak.bytes)

    @property
    def fits(self) -> bool | None:
        """Whether the run fits its budget; None without a budget."""
        return not self.over_bytes if self.budget.is_bounded else None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that were planned, by name."""
        found = {name: getattr(self.config, name) for name in that_decide(TrainConfig, "memory")}
        device = "cpu" if self.hardware.device.type == "cpu" else "cuda"
        return {**found, "device": device, "dtype": self.hardware.dtype_name}

    def as_json(self) -> dict[str, Any]:
        """Return the plan for programs; all sizes in bytes."""
        device, host = self.prediction.device, self.prediction.host
        return {
            "predicted_peak_bytes": self.prediction.peak.bytes,
            "host_peak_bytes": self.prediction.host_peak.bytes,
            "phase_peaks_bytes": {phase: peak.bytes for phase, peak in device.items()},
            "host_phase_peaks_bytes": {phase: peak.bytes for phase, peak in host.items()},
            "breakdown_bytes": {phase: peak.by_purpose for phase, peak in device.items()},
            "settings": self.settings,
            **({"experts_bytes": self.experts_bytes} if self.experts_bytes else {}),
            "card_bytes": self.card_bytes,
            "fits": self.fits,
            "budget_bytes": self.budget.card_bytes,
            "host_budget_bytes": self.budget.host_bytes,
            "time": self.pace.as_json() if self.pace else {"why_not": self.ceilings},
            **({"traffic": self.traffic.as_json()} if self.traffic else {}),
            "warnings": list(self.warnings),
            "choices": self.found.as_json(_CHOICES_SHOWN) if self.found else [],
            "why": self.found.why if self.found else None,
        }

    def choice_rows(self) -> tuple[tuple[str, str], ...]:
        """Return the first choices of the search as a table, with the reason for the first."""
        if self.found is None:
            return ()
        best = self.found.fitting[0].cost
        rows = []
        for place, choice in enumerate(self.found.ranked[:_CHOICES_SHOWN], start=1):
            work = choice.micro_batches * choice.needs.work.flop
            copied = choice.micro_batches * choice.needs.work.crossing_bytes
            rows.append(
                (
                    f"{place}.",
                    f"{size_text(choice.needs.peak_bytes):>8}  {self.found.ranked_by} "
                    f"{choice.cost / best:4.2f}  "
                    f"{work:.2e} FLOP  {size_text(copied):>8} copied  "
                    f"{choice.describe(self.found.layers)}",
                )
            )
        return (*rows, ("why", self.found.why))


def make_plan(
    config: TrainConfig, subject: Subject, budget: Budget, *, choose: bool = True
) -> Plan:
    """Predict the memory of a run; with a budget, choose its settings first.

    Args:
        config: the configuration as it was asked for.
        subject: the run that is planned.
        budget: the memory that the run may take.
        choose: False keeps the settings as they are; a resumed run keeps its settings.

    Raises:
        ModelError: the kit does not train this architecture.
        ConfigError: a target names no layer; or nothing fits, and the error says what would.
    """
    unquantized_share(subject.spec.skeleton())
    warnings = tuple(_warnings(subject))
    if not (budget.is_bounded and choose):
        return replace(_as_asked(config, subject, budget), warnings=warnings)
    found = search(subject, config, budget)
    if not found.fitting:
        raise nothing_fits(config, subject, budget, found.least)
    return replace(_first_that_fits(config, subject, budget, found), warnings=warnings)


def _as_asked(config: TrainConfig, subject: Subject, budget: Budget) -> Plan:
    """Predict the settings as they are, and settle the evaluation's batch by the prediction."""
    prediction = predict(subject, config)
    settled = config.model_copy(update={"eval_batch_size": prediction.evaluation_rows})
    return Plan(
        settled, subject.hardware, prediction, budget, ceilings=subject.ceilings,
        usual=subject.rows.usual, devices=subject.devices, sharing=subject.sharing,
    )  # fmt: skip


def _first_that_fits(
    config: TrainConfig, subject: Subject, budget: Budget, found: SearchResult
) -> Plan:
    """Run the first choice in full; where it does not fit after all, run a smaller one."""
    excess = host_excess = 0
    choices = list(found.fitting)
    for _ in range(_MOST_TRIES):
        chosen = choices[0]
        settled = chosen.applied(config)
        plan = replace(_as_asked(settled, subject, budget), found=found)
        if plan.fits:
            return replace(plan, found=replace(found, fitting=tuple(choices)))
        needs, prediction = chosen.needs, plan.prediction
        excess = max(excess, prediction.peak.bytes - needs.peak_bytes)
        host_excess = max(host_excess, prediction.host_peak.bytes - needs.host_peak_bytes)
        choices = [
            c
            for c in choices[1:]
            if not budget.over_bytes(
                c.needs.peak_bytes + excess, c.needs.host_peak_bytes + host_excess
            )
        ]
        if not choices:
            break
    raise nothing_fits(config, subject, budget, found.least)


def _warnings(subject: Subject) -> list[str]:
    positions = positions_of(subject.spec.architecture())
    if positions is not None and subject.rows.tokens > positions:
        return [
            f"{subject.rows.tokens:,} tokens are more than the model's {positions:,} positions; "
            "training refuses such rows"
        ]
    return []
