"""Which trial of a sweep is best: what each measured, read from the folder of its run.

Takes run folders and records of trials; returns their order. Writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from qlora_kit.report import log
from qlora_kit.train.best import LOSS, falls
from qlora_kit.train.checkpoint import find_checkpoint, read_state
from qlora_kit.train.sweep_folder import TrialRecord

# Of a run without validation rows: the share of its last steps whose loss is averaged.
_LAST_SHARE = 0.1
VALIDATION, TRAINING = "validation", "training"


def figures_of(run: Path, metric: str) -> dict[str, Any]:
    """Return what a finished run measured.

    Args:
        run: its folder.
        metric: value of `--best-metric`.

    Returns:
        `validation`: the best value of the metric, and `step`, when it was measured; both None
        without validation rows. `training`: the mean loss of the last tenth of the steps. `steps`
        and `seconds` of training. `rows`: a hash of the rows that were measured, or where there
        are none of those that were learnt.

    Raises:
        StorageError: the run has no whole checkpoint.
    """
    rows = log.read_log(run / log.NAME)
    key = _key_of(metric)
    measured = [(row[key], row["optimizer_step"]) for row in rows if _is_number(row.get(key))]
    best = (min if falls(metric) else max)(measured, key=lambda each: each[0], default=None)
    steps = [row for row in rows if "step_seconds" in row]
    losses = [row["loss"] for row in steps if _is_number(row["loss"])]
    last = losses[-max(1, round(len(losses) * _LAST_SHARE)) :]
    checkpoint = find_checkpoint(run, "latest").folder
    identity = read_state(checkpoint).identity if checkpoint else {}
    return {
        VALIDATION: best[0] if best else None,
        "step": best[1] if best else None,
        TRAINING: fmean(last) if last else None,
        "steps": max((row["optimizer_step"] for row in steps), default=0),
        "seconds": sum(row["step_seconds"] for row in steps),
        "rows": identity.get("validation") or identity.get("rows"),
    }


def _key_of(metric: str) -> str:
    """Return the key of a metric in a log."""
    return "eval_loss" if metric == LOSS else f"eval_{metric}"


def _is_number(value: Any) -> bool:
    # A log has the texts "nan" and "inf" for numbers that are not finite.
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True)
class Ranking:
    """The finished trials of a sweep in their order.

    Attributes:
        by: VALIDATION, or TRAINING where no trial has validation rows.
        metric: value of `--best-metric`.
        ranked: the trials that have the figure, the best first.
        unranked: finished trials without it.
    """

    by: str
    metric: str
    ranked: tuple[TrialRecord, ...]
    unranked: tuple[TrialRecord, ...]

    @property
    def name(self) -> str:
        """What the trials are ranked by, in words."""
        if self.by == TRAINING:
            return "training loss"
        return f"validation {self.metric.replace('_', ' ')}"

    @property
    def key(self) -> str:
        """The key of what the trials are ranked by, in their logs."""
        return "loss" if self.by == TRAINING else _key_of(self.metric)

    def described(self, record: TrialRecord) -> str:
        """Return what a ranked trial is ranked by: "validation loss 1.2345"."""
        return f"{self.name} {value_of(record, self.by):.4f}"

    def notes(self) -> list[str]:
        """Return what the user should know of the order."""
        said = []
        if self.by == TRAINING and self.ranked:
            said.append(
                "ranked by the training loss of the last tenth of the steps, because there are no "
                "validation rows: it says little of other data; --validation FILE measures them"
            )
        if len({value_of(each, "rows") for each in self.ranked}) > 1:
            said.append(
                "the trials were not measured on the same rows, or not with the same tokens: their "
                f"{self.name} can be compared with caution only; --validation FILE fixes the rows"
            )
        if self.unranked:
            said.append(f"{len(self.unranked)} finished without {self.name}, and are not ranked")
        return said


def ranking(records: Sequence[TrialRecord], metric: str) -> Ranking:
    """Return the order of the finished trials, by `--best-metric` or by the training loss."""
    finished = [each for each in records if each.state == "finished"]
    has_any = any(value_of(each, VALIDATION) is not None for each in finished)
    by = VALIDATION if has_any else TRAINING
    having = [each for each in finished if value_of(each, by) is not None]
    sign = 1 if by == TRAINING or falls(metric) else -1
    # Sorting is stable: of equal trials the first comes first.
    ranked = sorted(having, key=lambda each: sign * float(value_of(each, by)))
    return Ranking(by, metric, tuple(ranked), tuple(e for e in finished if e not in having))


def value_of(record: TrialRecord, figure: str) -> Any:
    """Return a figure of a trial; None where it has none."""
    figures: Mapping[str, Any] = record.figures or {}
    return figures.get(figure)
