"""What a sweep has found so far: its ranked table, its page, and the command of the best trial.

Takes the options, the trials and their records; writes the page. Trains nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_kit.config import SweepConfig
from qlora_kit.opening.trials import Trial, command_of, only_in_files, settings_of
from qlora_kit.recipe.ranking import TRAINING, VALIDATION, Ranking, ranking, value_of
from qlora_kit.report import log
from qlora_kit.report.sweep_page import ShownTrial, write_sweep_page
from qlora_kit.report.tables import Rows
from qlora_kit.train.folder import CONFIG
from qlora_kit.train.sweep_folder import PAGE, TrialRecord

# Figures of the table beside the one that ranks; the first has a value with validation rows only.
_BESIDE: Mapping[str, Mapping[str, str]] = {
    VALIDATION: {"step": "step", "training loss": TRAINING, "seconds": "seconds"},
    TRAINING: {"steps": "steps", "seconds": "seconds"},
}


@dataclass(frozen=True)
class SweepOutcome:
    """The outcome of a sweep, at its end or on the way.

    Attributes:
        config: its options.
        folder: its folder.
        trials: its trials.
        records: what became of each, in the same order.
    """

    config: SweepConfig
    folder: Path
    trials: Sequence[Trial]
    records: Sequence[TrialRecord]

    @cached_property
    def ranking(self) -> Ranking:
        """The order of the finished trials."""
        return ranking(self.records, self.config.best_metric)

    @cached_property
    def command(self) -> str | None:
        """The command line that trains the best trial alone; None before a trial has finished."""
        if not self.ranking.ranked:
            return None
        name = self.ranking.ranked[0].name
        best = next(trial for trial in self.trials if trial.name == name)
        output = self.folder.with_name(f"{self.folder.name}-best")
        if not only_in_files(settings_of(self.config, best)):
            return command_of(self.config, best, output)
        file = self.folder / name / CONFIG
        return shlex.join(["qlora-kit", "train", "--config", str(file), "--output", str(output)])

    @cached_property
    def _shown(self) -> list[ShownTrial]:
        """The trials as tables show them, the best first, those without a figure last."""
        by_name = {trial.name: trial for trial in self.trials}
        others = [each for each in self.records if each not in self.ranking.ranked]
        return [
            self._as_shown(each, by_name[each.name]) for each in (*self.ranking.ranked, *others)
        ]

    def _as_shown(self, record: TrialRecord, trial: Trial) -> ShownTrial:
        path = self.folder / record.name / log.NAME
        by = self.ranking.by
        return ShownTrial(
            label=str(trial.number),
            name=record.name,
            values=trial.shown_values(),
            state=record.state,
            figure=value_of(record, by),
            more={head: _text(value_of(record, key)) for head, key in _BESIDE[by].items()},
            fault=record.fault,
            log_rows=log.read_log(path) if path.is_file() else (),
        )

    def table(self) -> Rows:
        """Return the trials for the terminal, the best first."""
        return tuple(
            (f"{rank}. {each.name}", f"{each.figure:.4f}")
            if each.figure is not None
            else (f"-  {each.name}", each.fault or each.state)
            for rank, each in enumerate(self._shown, 1)
        )

    def write_page(self) -> None:
        """Write `sweep.html`."""
        write_sweep_page(
            self.folder / PAGE,
            self._shown,
            figure_name=self.ranking.name,
            curve=self.ranking.key,
            notes=self.ranking.notes(),
            command=self.command,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the outcome for programs."""
        ranked = self.ranking.ranked
        return {
            "output": str(self.folder),
            "ranked_by": self.ranking.name,
            "best": ranked[0].name if ranked else None,
            "command": self.command,
            "trials": [asdict(each) for each in self.records],
        }


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
