"""The folder of a run: which one, whether it may be written, and its checkpoints by name.

Knows names only, reads no tensor and imports no torch, so that a wrong `--output` is found
at once.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from qlora_kit.errors import OutputError
from qlora_kit.storage import check_writable

LAST, BEST = "last", "best"
CONFIG = "training_config.yaml"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_RUNS = Path("runs")


def checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints of a run folder, the oldest first."""
    found = [path for path in output.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step of a checkpoint from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def choose_output(output: Path | None, model: str, *, resume: bool, overwrite: bool) -> Path:
    """Return the folder of the run, `runs/<model>-<n>` where none is named.

    Raises:
        OutputError: it holds something and neither resuming nor overwriting was asked for,
            both were, or overwriting would delete what is not a run.
    """
    if resume and overwrite:
        raise OutputError("--resume and --overwrite contradict each other; pass one of them")
    if output is None:
        if resume:
            raise OutputError("--resume: which run? name its folder with --output")
        taken = {path.name for path in _RUNS.glob(f"{model}-*")}
        check_writable(_RUNS)
        number = next(n for n in range(1, len(taken) + 2) if f"{model}-{n}" not in taken)
        return _RUNS / f"{model}-{number}"
    check_writable(output)
    if not output.exists() or not any(output.iterdir()) or resume:
        return output
    if not overwrite:
        raise OutputError(
            f"{output}: not empty; continue that run with --resume, replace it with --overwrite, "
            "or name another --output"
        )
    if not (output / CONFIG).is_file():
        raise OutputError(f"{output}: --overwrite deletes a run, but this holds no {CONFIG}")
    return output


def clear_run(output: Path) -> None:
    """Delete an earlier run that `choose_output` allowed to be replaced."""
    if output.exists():
        shutil.rmtree(output)
