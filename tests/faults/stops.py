"""SIGTERM and SIGINT in every phase: the right exit code, one line, at most one step lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from qlora_kit.events import LoadProgress, StepFinished

from .children import Ended, finish, spread, start
from .moments import at_call, at_event
from .runs import (
    Sample,
    after_a_crash,
    command,
    copy_run,
    differences,
    highest_whole,
    kit,
    last_logged_step,
    resumed,
)
from .table import Row, row_of

_PROMISE = "SIGTERM and SIGINT: exit 143 or 130, one line, one step lost at most"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_MOST_ATTEMPTS = 5
_LOOK_SECONDS = 0.005
_Act = Callable[[], None]

# The moments of each phase at which the signal comes; the number counts calls or events of a kind.
_PHASES: dict[str, tuple[Callable[[_Act], None], ...]] = {
    "loading": (
        partial(at_event, LoadProgress, 1),
        partial(at_event, LoadProgress, 9),
        partial(at_call, "qlora_kit.recipe.rows:open_tokenizer", 1),
        partial(at_call, "qlora_kit.recipe.run:resume_point", 1),
    ),
    "training": (
        partial(at_event, StepFinished, 1),
        partial(at_event, StepFinished, 17),
        partial(at_call, "qlora_kit.tasks.tokens:loss_of", 23),
        partial(at_call, "torch.autograd:backward", 50),
        partial(at_call, "torch.optim:AdamW.step", 12),
        partial(at_call, "torch.optim:AdamW.step", 30),
    ),
    "evaluating": (
        partial(at_call, "qlora_kit.tasks.causal:scores", 1),
        partial(at_call, "qlora_kit.tasks.causal:scores", 5),
        partial(at_call, "qlora_kit.tasks.causal:scores", 6),
    ),
    "saving": (
        partial(at_call, "qlora_kit.train.checkpoint:save_adapter", 3),
        partial(at_call, "qlora_kit.storage.folders:_seal", 4),
        partial(at_call, "qlora_kit.storage.folders:_swap", 5),
        partial(at_call, "qlora_kit.train.checkpoint:write_text", 6),
        partial(at_call, "qlora_kit.train.loop:delete_old", 7),
    ),
    "ending": (
        partial(at_call, "qlora_kit.report.plot:draw_loss", 1),
        partial(at_call, "qlora_kit.report.card:write_card", 1),
        partial(at_call, "qlora_kit.lora.writing:save_tensors", 1),
    ),
    "merging": (
        partial(at_event, LoadProgress, 3),
        partial(at_call, "qlora_kit.export.merge:_cast", 5),
        partial(at_call, "qlora_kit.export.shards:save_tensors", 1),
        partial(at_call, "qlora_kit.storage.folders:_seal", 1),
        partial(at_call, "qlora_kit.storage.folders:_swap", 1),
    ),
}


@dataclass(frozen=True)
class Case:
    """A signal at a moment of a phase.

    Attributes:
        phase: a key of `_PHASES`, or "random".
        moment: index in the phase, or a seed.
        signum: number of the signal.
        twice: whether a second signal follows at once.
    """

    phase: str
    moment: int
    signum: int
    twice: bool = False

    def __str__(self) -> str:
        again = ", twice" if self.twice else ""
        return f"{signal.Signals(self.signum).name} while {self.phase} ({self.moment}){again}"


def stops(sample: Sample, at_random: int, seed: int, stride: int | None = 1) -> Row:
    """Send signals.

    Args:
        sample: the run to stop.
        at_random: number of signals at random times, beside those at known moments.
        seed: the seed of the random times.
        stride: distance between the known moments that are taken; 1 takes all, None none.
    """
    cases = [
        Case(phase, moment, signum)
        for phase, moments in _PHASES.items()
        for moment, signum in product(range(len(moments)), _SIGNALS)
    ]
    cases += [
        Case(phase, 0, signum, twice=True)
        for phase, signum in product(("training", "saving", "merging"), _SIGNALS)
    ]
    cases = cases[::stride] if stride else []
    cases += [Case("random", seed + n, _SIGNALS[n % 2]) for n in range(at_random)]
    results = spread(partial(_stopped, sample), cases, sample.folder / "stops")
    phases_hit = ", ".join([*_PHASES, "twice in a row", "at random times"])
    return row_of(_PROMISE, results, phases_hit)


def _stopped(sample: Sample, case: Case) -> list[str]:
    label = str(case).replace(" ", "-").replace("(", "").replace(")", "").replace(",", "")
    output = sample.folder / "stops" / label
    if case.phase == "merging":
        wrong = _stopped_merging(sample, case, output)
    elif case.phase == "random":
        wrong = _stopped_at_random(sample, case, output)
    else:
        wrong = _stopped_training(sample, case, output)
    shutil.rmtree(output, ignore_errors=True)
    return [f"{case}: {fault}" for fault in wrong]


def _send(case: Case) -> None:
    os.kill(os.getpid(), case.signum)
    if case.twice:
        os.kill(os.getpid(), case.signum)


def _stop_command(case: Case, arguments: list[str], streams: Path) -> Ended:
    def do() -> None:
        _PHASES[case.phase][case.moment](lambda: _send(case))
        command(arguments)

    return finish(do, streams)


def _wrong_end(case: Case, ended: Ended) -> list[str]:
    """Return the faults in the end of a stopped process."""
    if ended.code != 128 + case.signum:
        return [f"exit {ended.code}: {ended.errors.strip()[-200:]}"]
    expected = [f"error: stopped by {signal.Signals(case.signum).name}"]
    if not case.twice and ended.error_lines != expected:
        return [f"said {ended.error_lines}"]
    return []


def _stopped_training(sample: Sample, case: Case, output: Path) -> list[str]:
    streams = output.with_suffix(".streams")
    ended = _stop_command(case, sample.arguments(output), streams)
    wrong = _wrong_end(case, ended)
    if not case.twice:
        wrong += _lost_steps(output)
    return wrong + after_a_crash(output) + resumed(sample, output, streams)


def _lost_steps(output: Path) -> list[str]:
    """Return a fault if a finished step is in no checkpoint; only the step begun may be lost."""
    finished, (saved, _) = last_logged_step(output), highest_whole(output)
    return [f"step {finished} was finished, {saved} is saved"] if saved < finished else []


def _stopped_at_random(sample: Sample, case: Case, output: Path) -> list[str]:
    streams, chance = output.with_suffix(".streams"), random.Random(case.moment)
    for attempt in range(_MOST_ATTEMPTS):
        shutil.rmtree(output, ignore_errors=True)
        child = start(lambda: command(sample.arguments(output)), streams)
        # The time counts from when the child makes its folder; before, it handles no signals yet.
        while not output.exists() and not child.ends_within(_LOOK_SECONDS):
            pass
        # The machine's load may have changed, so the run may end sooner than measured; then the
        # next attempt is earlier.
        if not child.ends_within(chance.uniform(0, sample.seconds) / (attempt + 1)):
            break
        child.wait()
    else:
        return [f"ended by itself {_MOST_ATTEMPTS} times"]
    child.send(case.signum)
    ended = child.wait()
    if ended.code == 0:
        # The signal came after the last safe point, when nothing was left to stop.
        return differences(output, sample.unbroken)
    wrong = _wrong_end(case, ended) + _lost_steps(output) + after_a_crash(output)
    return wrong + resumed(sample, output, streams)


def _stopped_merging(sample: Sample, case: Case, output: Path) -> list[str]:
    """Stop a merge, which must leave no files; then do it again, and it must be whole."""
    adapter = copy_run(sample.unbroken, output / "run")
    arguments = ["export", str(adapter), "--to", str(output / "merged"), "--device", "cpu"]
    streams = output.with_suffix(".streams")
    wrong = _wrong_end(case, _stop_command(case, arguments, streams))
    left = sorted(path.name for path in output.iterdir() if path != adapter)
    # A process that dies at once leaves its staging folder, which the next start removes.
    if case.twice and all(name.startswith(".") for name in left):
        left = []
    if left:
        wrong.append(f"left {left}")
    ended = kit(arguments, streams)
    if ended.code or {path.name for path in output.iterdir()} != {"run", "merged"}:
        wrong.append(f"a second merge ended with {ended.code}: {os.listdir(output)}")
    return wrong
