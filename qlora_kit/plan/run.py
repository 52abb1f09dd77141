"""The plan of a run that is about to start, and the account of memory and time it then takes.

Takes the options and a `Subject`; settles the options that were left open, rehearses the
largest step, and compares the measured memory and time with the predicted: on the terminal, in
`memory.json` and in `memory.png`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from qlora_kit.config import TrainConfig
from qlora_kit.errors import ConfigError, QloraKitError
from qlora_kit.events import Announce, Facts, Notice
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.memory import (
    anonymous_bytes,
    free_bytes,
    limit_memory,
    return_free_memory,
)
from qlora_kit.plan.budget import budget_of
from qlora_kit.plan.duration import about
from qlora_kit.plan.planning import Plan
from qlora_kit.plan.rehearsal import Rehearsal, rehearse
from qlora_kit.plan.sharing import plan_ways
from qlora_kit.plan.subject import Subject, rates_of, standing_in_for
from qlora_kit.plan.watch import PURPOSES
from qlora_kit.redact import redacted_values
from qlora_kit.report.memory import ACCOUNT, difference_text, draw_timeline, size_text
from qlora_kit.storage import write_text
from qlora_kit.train.optimizer_step import OptimizerStep

NAME = ACCOUNT
PICTURE = "memory.png"


def plan_run(
    config: TrainConfig,
    subject: Subject,
    announce: Announce,
    *,
    choose: bool = True,
    on_machine: int = 1,
) -> Plan | None:
    """Predict the memory of a run before anything is loaded, and keep the run to its budget.

    Args:
        config: the configuration as it was asked for.
        subject: the run, on the hardware of this machine.
        announce: receives the prediction and the choice.
        choose: False for a resumed run, whose settings were chosen before.
        on_machine: processes of the run that share the memory of this machine.

    Returns:
        The plan, with the settings to train with. None where the code could not be simulated;
        with a budget, that is an error.

    Raises:
        ConfigError: nothing fits the budget, or the settings do not fit the free memory.
    """
    hardware = subject.hardware
    held = subject.held_bytes
    budget = budget_of(
        config, on_gpu=hardware.device.type != "cpu", processes=on_machine, held_bytes=held
    )
    planned = replace(
        subject, hardware=standing_in_for(hardware), ceilings=rates_of(hardware.device)
    )
    free = None if budget.is_bounded else free_bytes(hardware.device, on_machine) + held
    try:
        ways = plan_ways(
            config, planned, budget, on_machine=on_machine, choose=choose, free_bytes=free
        )
        plan = ways.chosen
    except QloraKitError:
        raise
    except Exception as error:
        # Without a plan there is no promise about the memory of the run, but it can still run.
        if budget.is_bounded:
            raise
        announce(Notice(f"the memory of this run is not predicted ({type(error).__name__})"))
        return None
    if hardware.device.type == "cpu":
        return_free_memory()
        plan = replace(plan, before_bytes=anonymous_bytes() - held)
    if ways.rows():
        announce(Facts(f"the base on {subject.devices} devices", ways.rows()))
    _announce_plan(plan, announce)
    if budget.is_bounded:
        limit_memory(hardware.device, budget.allocatable_bytes)
    else:
        free = free_bytes(hardware.device, on_machine) + held
        _check_free_memory(plan, free, announce)
    return plan


def keep_to_budget(config: TrainConfig, hardware: Hardware, on_machine: int) -> None:
    """Keep a process to the budget of a plan that another process has made."""
    if hardware.device.type == "cuda":
        budget = budget_of(config, on_gpu=True, processes=on_machine)
        limit_memory(hardware.device, budget.allocatable_bytes)


def _announce_plan(plan: Plan, announce: Announce) -> None:
    if plan.found is not None:
        announce(Facts(f"settings for {plan.budget.describe()}", plan.choice_rows()))
    peak = plan.prediction.peak.bytes
    rows = [("predicted peak", f"{size_text(peak)}, in {plan.prediction.peak_phase}")]
    if plan.budget.on_gpu:
        rows.append(("on the host", f"{size_text(plan.prediction.host_peak.bytes)}"))
    elif plan.process_bytes is not None:
        has = f"of which it has {size_text(plan.before_bytes)} now"
        rows.append(("of the process", f"{size_text(plan.process_bytes)}, {has}"))
    if plan.budget.card_bytes is not None:
        rows.append(("of the budget", f"{plan.card_bytes / plan.budget.card_bytes:.0%}"))
    announce(Facts("memory", tuple(rows)))
    announce(Facts("time", plan.time_rows()))
    if plan.traffic is not None:
        announce(Facts("received by a device in a step", plan.traffic.rows()))


def _check_free_memory(plan: Plan, free: int, announce: Announce) -> None:
    """Check settings that no search has chosen against the memory that is free now.

    Raises:
        ConfigError: not even the tensors fit.
    """
    peak = plan.prediction.peak.bytes
    if peak > free:
        raise ConfigError(
            f"the run needs {size_text(peak)} and {size_text(free)} of memory are free; "
            "expected it to fit; pass --vram auto to choose settings that do, or a smaller "
            "--max-length, --batch-size or --eval-batch-size"
        )
    needed = plan.card_bytes - (plan.budget.beside_bytes if plan.budget.on_gpu else 0)
    if needed > free:
        announce(
            Notice(
                f"the run needs {size_text(needed)} with all margins and "
                f"{size_text(free)} are free: it may not fit; --vram auto chooses what does"
            )
        )


# ---------------------------------------------------------------- predicted and measured


@dataclass
class MemoryAccount:
    """The predicted and the measured memory of a run, kept in its folder.

    Attributes:
        output: the run's folder.
        plan: the plan with the prediction, or None.
        announce: receives the measured memory beside the predicted.
        has_sources: whether rows are sources and targets.
        micro_batches: micro-batches of a step.
        rehearsal: the rehearsed step, or None before it.
    """

    output: Path
    plan: Plan | None
    announce: Announce
    has_sources: bool = False
    micro_batches: int = 2
    rehearsal: Rehearsal | None = field(default=None, init=False)

    def rehearse(self, step: OptimizerStep) -> None:
        """Take the largest step of the run, undo it, and announce the memory it took."""
        self.rehearsal = found = rehearse(step, self.micro_batches, has_sources=self.has_sources)
        measured = f"{size_text(found.peak_bytes)} by the {found.how}"
        if (predicted := self._predicted_step(found)) is not None:
            measured += f", predicted {size_text(predicted)}"
            measured += f" ({difference_text(found.peak_bytes, predicted)})"
        rows = f"{found.rows} × {found.tokens:,} tokens"
        self.announce(Notice(f"rehearsed a step on the longest rows, {rows}: {measured}"))
        self._write(None)
        levels = {"measured": found.peak_bytes}
        if predicted is not None:
            levels["predicted"] = predicted
        title = f"one optimiser step on the longest rows, {rows}"
        draw_timeline(found.timeline, PURPOSES, levels, title, self.output / PICTURE)
        # The ledger's account and the picture leave many small objects behind.
        return_free_memory()

    def _predicted_step(self, found: Rehearsal) -> int | None:
        """Return the predicted peak of the rehearsed step; None where its rows were halved."""
        if self.plan is None or found.rows < found.rows_asked:
            return None
        phases = ["forward", "backward", "optimizer"]
        if self.plan.budget.on_gpu:
            # The record of a GPU's allocator begins with the process, so loading is in it.
            phases.append("load")
        return max(self.plan.prediction.device[phase].bytes for phase in phases)

    def close(self, run_peak_bytes: int) -> tuple[tuple[str, str], ...]:
        """Write the account of a finished run and return it as a table.

        Args:
            run_peak_bytes: peak of the run: allocated bytes of a GPU, or on a CPU the anonymous
                memory of the process, which holds more than tensors.
        """
        self._write(run_peak_bytes)
        rows = []
        if self.plan is not None:
            rows.append(("predicted peak", f"{size_text(self.plan.prediction.peak.bytes)}"))
        measured, predicted = self._measured(run_peak_bytes), None
        if self.plan is not None and self.plan.budget.on_gpu:
            predicted = self.plan.prediction.peak.bytes
        elif self.rehearsal is not None:
            predicted = self._predicted_step(self.rehearsal)
        if measured is not None:
            text = f"{size_text(measured)}"
            if predicted is not None:
                text += f" ({difference_text(measured, predicted)})"
            rows.append(("measured peak", text))
        return tuple(rows)

    def _measured(self, run_peak_bytes: int) -> int | None:
        if self.plan is not None and self.plan.budget.on_gpu:
            return run_peak_bytes
        return self.rehearsal.peak_bytes if self.rehearsal else None

    def _write(self, run_peak_bytes: int | None) -> None:
        content: dict[str, Any] = {"predicted": self.plan.as_json() if self.plan else None}
        if (found := self.rehearsal) is not None:
            predicted = self._predicted_step(found)
            content["rehearsal"] = {
                "rows": found.rows,
                "tokens": found.tokens,
                "measured_peak_bytes": found.peak_bytes,
                "measured_by": found.how,
                "predicted_peak_bytes": predicted,
                "difference": None if predicted is None else found.peak_bytes / predicted - 1,
                "purposes": PURPOSES,
                "timeline_bytes": found.timeline,
            }
        if self.plan is not None and self.plan.process_bytes is not None:
            content["process"] = {
                "before_bytes": self.plan.before_bytes,
                "predicted_bytes": self.plan.process_bytes,
            }
        if run_peak_bytes is not None:
            on_gpu = self.plan is not None and self.plan.budget.on_gpu
            kind = "allocated" if on_gpu else "anonymous"
            content["run"] = {f"peak_{kind}_bytes": run_peak_bytes}
        write_text(self.output / NAME, json.dumps(redacted_values(content), indent=1) + "\n")


# The first steps of a process also compile kernels, and fill caches and the allocator's pool.
_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class StepTimes:
    """The measured time of a run's steps beside the predicted.

    Attributes:
        measured_seconds: mean of the measured steps.
        steps: number of the measured steps.
        predicted_seconds: the time that was predicted for steps of as many tokens; None where there
            was no prediction.
    """

    measured_seconds: float
    steps: int
    predicted_seconds: float | None

    @classmethod
    def of(
        cls,
        log_rows: Sequence[Mapping[str, Any]],
        plan: Plan | None,
        first_step: int,
        processes: int = 1,
    ) -> StepTimes | None:
        """Return the times of the steps of this process, without its first ones.

        Args:
            log_rows: the rows of the run's log.
            plan: the plan with the prediction, or None.
            first_step: the first step that this process took; the log may have earlier ones.
            processes: number of processes, of which each computes its share of the tokens.

        Returns:
            The times; None where the log has no step after the first ones.
        """
        begin = first_step + _WARM_UP_STEPS
        taken = [
            row for row in log_rows if "step_seconds" in row and row["optimizer_step"] >= begin
        ]
        if not taken:
            return None
        pace = plan.pace if plan else None
        tokens = fmean(row["tokens"] for row in taken) / processes
        predicted = pace.seconds_for(tokens) if pace else None
        return cls(fmean(row["step_seconds"] for row in taken), len(taken), predicted)

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Return the times as a table."""
        how = f"mean of {self.steps:,} after the first {_WARM_UP_STEPS}"
        measured = f"{self.measured_seconds:.3g} s, {how}"
        if self.predicted_seconds is None:
            return (("measured step", measured),)
        difference = self.measured_seconds / self.predicted_seconds - 1
        return (
            ("predicted step", about(self.predicted_seconds)),
            ("measured step", f"{measured} ({difference:+.0%})"),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the times for programs."""
        return asdict(self)
