"""A preference run under kills and signals: its reference is lost as little as its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .kills import kills
from .resumes import resumes
from .runs import Sample, done_once, save_model, write_lines
from .stops import stops
from .table import Row

_PROMISE = "a preference run under SIGKILL, signals and resumes: bit-equal, its reference too"
_OPTIONS = ("--task", "preference", "--learning-rate", "1e-2")


def preferring(
    sample: Sample,
    killed: int,
    stopped: int,
    seed: int,
    *,
    in_shell: int = 0,
    steps: Sequence[int] = (),
    kinds: Sequence[tuple[int, int]] = ((4, 3),),
) -> Row:
    """Kill, stop and resume runs that compare two answers.

    Args:
        sample: whose folder and options are taken.
        killed: number of SIGKILLs at random times, or more.
        stopped: number of SIGTERMs and SIGINTs at random times.
        seed: of the random times.
        in_shell: number of the kills that hit a process of its own.
        steps: at which a run is resumed.
        kinds: bits, and micro-batches a step, of the runs that are resumed.
    """
    measures = "qlora_kit.tasks.preference:PreferenceObjective.measured"
    own = Sample(sample.folder / "preferring", (*_OPTIONS, *sample.options), measures=measures)
    own = done_once(own, save_model, _write_pairs)
    parts = {
        "kills": kills(own, killed, seed, in_shell=in_shell, saves=()),
        "stops": stops(own, stopped, seed, stride=None),
    }
    if steps:
        parts["resumes"] = resumes(own, steps, kinds)
    broken = [part.detail for part in parts.values() if not part.is_kept]
    detail = ", ".join(f"{part.tried} {name}" for name, part in parts.items())
    rows = parts.values()
    tried, held = sum(row.tried for row in rows), sum(row.held for row in rows)
    return Row(_PROMISE, tried, held, "; ".join([detail, *broken]))


def _write_pairs(sample: Sample) -> None:
    """Prefer each built-in answer to the one of the record before."""
    from qlora_kit.data.samples import BUILT_IN

    lines, worse = [], "nothing"
    for line in BUILT_IN["train"].read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["completion"] != worse:
            pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": worse}
            lines.append(json.dumps(pair))
        worse = row["completion"]
    write_lines(sample, lines)
