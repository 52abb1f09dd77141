"""Many runs that differ in a few options, on one base: `qlora-kit sweep`.

options → trials → checks → for each trial: attach, train, detach → ranking, page, winner
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qlora_kit.config import SweepConfig, TrainConfig, resolve, that_decide
from qlora_kit.errors import (
    ConfigError,
    EnvironmentFault,
    InputError,
    NumericsError,
    QloraKitError,
    VerificationError,
)
from qlora_kit.events import Announce, Closing, Event, Facts, Notice, silent
from qlora_kit.launched import place
from qlora_kit.lora.files import WEIGHTS
from qlora_kit.model.environment import prepare_environment
from qlora_kit.model.names import find_model
from qlora_kit.opening.trials import Trial, described_values, settings_of, trials_of
from qlora_kit.recipe.training import train
from qlora_kit.report.tables import Rows
from qlora_kit.signals import Stopped
from qlora_kit.train.sweep_folder import (
    PAGE,
    TrialRecord,
    claimed_sweep,
    clear_sweep,
    read_records,
    stored_sweep,
    write_options,
    write_records,
)

if TYPE_CHECKING:
    from qlora_kit.recipe.bases import KeptBase
    from qlora_kit.recipe.sweep_outcome import SweepOutcome

_KINDS: tuple[type[QloraKitError], ...] = (
    InputError, EnvironmentFault, NumericsError, VerificationError,
)  # fmt: skip


def sweep(config: SweepConfig, announce: Announce = silent) -> dict[str, Any]:
    """Train a run for each combination of values, and rank them.

    The base is loaded once for all trials that have the same. The bits of each trial are those of
    the same run by itself. What a trial has failed by is recorded, and the others go on.

    Returns:
        The trials with what they measured, and the winner, for programs.
    """
    _check_alone(config)
    prepare_environment(deterministic=config.deterministic)
    source = find_model(config.model)
    _check_as_begun(config)
    trials = trials_of(config)
    with ExitStack() as at_the_end:
        folder = at_the_end.enter_context(
            claimed_sweep(
                config.output, source.name, resume=config.resume, overwrite=config.overwrite
            )
        )
        config = _with_threads(config, trials)
        records = {} if config.overwrite else read_records(folder)
        whole = Sweep(config, folder, trials, announce, records)
        left = whole.left()
        predicted = whole.check(left)
        if config.overwrite:
            clear_sweep(folder)
        write_options(folder, config)
        whole.say_what_comes(left, predicted)
        whole.train(left)
        return whole.closed()


def _check_alone(config: SweepConfig) -> None:
    """Refuse what a sweep, which trains in one process and goes on as a whole, cannot do."""
    if config.devices not in (None, 1) or place().count > 1:
        asked = f"--devices {config.devices}" if config.devices else f"{place().count} processes"
        raise ConfigError(
            f"{asked}: a sweep trains one trial after another in one process; expected 1; leave it "
            "out, and pass it to the winning command"
        )
    if config.shard_base:
        raise ConfigError(
            "--shard-base: a sweep trains in one process, which holds all of the base; expected "
            "none; leave it out"
        )
    if config.resume not in (None, "latest"):
        raise ConfigError(
            f"--resume {config.resume}: a sweep has no checkpoint of its own; expected --resume "
            "alone; each trial goes on from its last one"
        )
    if config.allow_change:
        raise ConfigError(
            "--allow-change: a sweep goes on as it was begun; expected no change; leave it out, or "
            "begin a new sweep"
        )


def _check_as_begun(config: SweepConfig) -> None:
    """Refuse to resume a sweep with other options: its trials would not be alike."""
    stored = stored_sweep(config.output, config.resume)
    if stored is None or config.overwrite:
        return
    begun, own = resolve(SweepConfig, [stored]), {"output", "overwrite", "resume"}
    before, now = (each.model_dump(mode="json", exclude=own) for each in (begun, config))
    if differing := [name for name in now if now[name] != before[name]]:
        faults = (
            f"--resume: {name} was {_shown(before[name])} and is now {_shown(now[name])}; a sweep "
            "goes on as it was begun; leave it out, or begin a new sweep"
            for name in differing
        )
        raise ConfigError(*faults)


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict) and "key" in value[0]:
        return " ".join(f"{each['key']}={each['values']}" for each in value)
    return repr(value)


def _with_threads(config: SweepConfig, trials: Iterable[Trial]) -> SweepConfig:
    """Settle the number of threads for all trials: it decides how sums are divided."""
    from qlora_kit.model.threads import choose_threads

    if any("threads" in trial.values for trial in trials):
        return config
    return config.model_copy(update={"threads": choose_threads(config.threads).count})


@dataclass
class Sweep:
    """A sweep whose folder is claimed.

    Attributes:
        config: its options.
        folder: its folder.
        trials: its trials, in their order.
        announce: receives the events.
        records: what became of trials before, by name.
        bases_loaded: number of bases that were loaded for it in this process.
    """

    config: SweepConfig
    folder: Path
    trials: tuple[Trial, ...]
    announce: Announce
    records: dict[str, TrialRecord]
    bases_loaded: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        fresh = {each.name: TrialRecord(each.name, each.values) for each in self.trials}
        self.records = {name: self.records.get(name, record) for name, record in fresh.items()}

    # ------------------------------------------------------------ before the first trial

    def left(self) -> list[Trial]:
        """Return the trials that are not done, those on one base behind each other."""
        left = [each for each in self.trials if not self._is_done(self.records[each.name])]
        by_base: dict[str, list[Trial]] = {}
        for trial in left:
            config = settings_of(self.config, trial)
            base = repr([getattr(config, name) for name in that_decide(TrainConfig, "base")])
            by_base.setdefault(base, []).append(trial)
        return [trial for trials in by_base.values() for trial in trials]

    def _is_done(self, record: TrialRecord) -> bool:
        if record.state == "finished":
            return (self.folder / record.name / WEIGHTS).is_file()
        # Numbers that are not finite would be so again; memory and disk may have room now.
        return record.state == "failed" and record.exit_code == NumericsError.exit_code

    def check(self, trials: Iterable[Trial]) -> Rows:
        """Check what can be checked of trials before the first begins.

        Returns:
            What is predicted of them, as a table.

        Raises:
            QloraKitError: a trial cannot be trained.
        """
        from qlora_kit.recipe.foreseeing import Foreseen

        return Foreseen.of([settings_of(self.config, trial) for trial in trials]).rows()

    def say_what_comes(self, left: list[Trial], predicted: Rows) -> None:
        """Say how many trials there are, and what is known of them."""
        config = self.config
        how = "every combination" if config.search == "grid" else f"drawn by seed {config.seed}"
        rows = [("trials", f"{len(self.trials)}, {how}")]
        if done := len(self.trials) - len(left):
            rows.append(("of these done", f"{done}"))
        rows += [*described_values(config).items(), *predicted]
        self.announce(Facts(f"qlora-kit sweep: {config.model} → {self.folder}", tuple(rows)))
        if not left:
            self.announce(Notice(f"{self.folder}: this sweep is finished; nothing to do"))

    # ------------------------------------------------------------ one trial after another

    def train(self, left: list[Trial]) -> None:
        """Train the trials that are left, and write after each what became of it.

        Raises:
            Stopped: a signal came; the trial under way has saved what it has trained.
        """
        from qlora_kit.recipe.bases import KeptBase

        bases, said = KeptBase(), _Once(self.announce)
        try:
            for count, trial in enumerate(left, 1):
                self._try(trial, said, bases)
                self._tell(trial, len(left) - count)
        except Stopped:
            again = f"qlora-kit sweep --output {shlex.quote(str(self.folder))} --resume"
            self.announce(Notice(f"go on with the sweep by: {again}"))
            raise
        self.bases_loaded = bases.loads

    def _try(self, trial: Trial, announce: Announce, bases: KeptBase) -> None:
        self.announce(Notice(f"{self._name(trial)}: {trial.described()}"))
        self._record(trial, state="running", fault=None, exit_code=None)
        failed = self._failure(trial, announce, bases)
        bases.collect()
        if failed is None:
            self._finish(trial)
            return
        fault = failed.faults[0]
        self.announce(Notice(f"{self._name(trial)} failed: {fault}"))
        self._record(trial, state="failed", fault=fault, exit_code=failed.exit_code)

    def _name(self, trial: Trial) -> str:
        return f"trial {trial.number} of {len(self.trials)}"

    def _failure(self, trial: Trial, announce: Announce, bases: KeptBase) -> QloraKitError | None:
        """Train a trial; return the error that it failed by, without what it holds."""
        from qlora_kit.model.memory import out_of_memory_while

        output = self.folder / trial.name
        remedy = "try --batch-size 1, a smaller --max-length or --rank, or fewer --bits"
        try:
            with out_of_memory_while("training a trial", remedy):
                config = settings_of(self.config, trial, output, resume=output.is_dir())
                if not _was_finished(output, config):
                    train(config, announce, bases)
        except QloraKitError as error:
            # The error itself holds the frames of the run, and so its tensors.
            return _of_code(error.exit_code)(*error.faults)
        return None

    def _finish(self, trial: Trial) -> None:
        from qlora_kit.recipe.ranking import figures_of

        figures = figures_of(self.folder / trial.name, self.config.best_metric)
        self._record(trial, state="finished", figures=figures)

    def _record(self, trial: Trial, **changes: Any) -> None:
        self.records[trial.name] = replace(self.records[trial.name], **changes)
        told = {"search": self.config.search, "best_metric": self.config.best_metric}
        write_records(self.folder, told, [*self.records.values()])

    def _tell(self, trial: Trial, left: int) -> None:
        """Rewrite the page, and say which trial is best so far and how long the others may take."""
        from qlora_kit.plan.duration import about

        found = self._outcome()
        found.write_page()
        if not (found.ranking.ranked and left):
            return
        ranked = found.ranking.ranked
        seconds = fmean(each.figures["seconds"] for each in ranked if each.figures)
        best = f"{ranked[0].name}, {found.ranking.described(ranked[0])}"
        how_long = f"{about(seconds * left)} of steps at the mean of those done"
        text = f"{self._name(trial)} is done, {left} left, {how_long}; best so far: {best}"
        self.announce(Notice(text))

    # ------------------------------------------------------------ the end

    def _outcome(self) -> SweepOutcome:
        from qlora_kit.recipe.sweep_outcome import SweepOutcome

        return SweepOutcome(self.config, self.folder, self.trials, [*self.records.values()])

    def closed(self) -> dict[str, Any]:
        """Write the page, show the ranking and the winner, and return the outcome.

        Raises:
            QloraKitError: no trial has finished; it is the error of the first.
        """
        found = self._outcome()
        found.write_page()
        self.announce(Facts(f"trials by {found.ranking.name}", found.table()))
        for note in found.ranking.notes():
            self.announce(Notice(note))
        failed = [each for each in self.records.values() if each.state == "failed"]
        if not any(each.state == "finished" for each in self.records.values()):
            raise _of_code(failed[0].exit_code)(
                f"no trial has finished; the first ended with: {failed[0].fault}"
            )
        commands = (found.command,) if found.command else ()
        self.announce(Closing((str(self.folder / PAGE),), commands))
        return {**found.as_json(), "finished": True, "bases_loaded": self.bases_loaded}


# ---------------------------------------------------------------- parts of it


def _was_finished(output: Path, config: TrainConfig) -> bool:
    """Whether a run was finished by a process that did not live to write so."""
    from qlora_kit.train.checkpoint import find_checkpoint
    from qlora_kit.train.resume import is_finished

    if config.resume is None:
        return False
    found = find_checkpoint(output, config.resume).folder
    return found is not None and is_finished(output, found, config)


def _of_code(code: int | None) -> type[QloraKitError]:
    return next((kind for kind in _KINDS if kind.exit_code == code), QloraKitError)


class _Once:
    """Passes on the events of a trial: tables only of the sweep, and no notice twice."""

    def __init__(self, announce: Announce) -> None:
        self._announce = announce
        self._said: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        if isinstance(event, Facts | Closing):
            return
        if isinstance(event, Notice):
            if event.text in self._said:
                return
            self._said.add(event.text)
        self._announce(event)
