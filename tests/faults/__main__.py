"""`python -m tests.faults`: tests all promises, and prints a line of the table for each."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .runs import Sample, make_sample, prepare
from .table import Row, line, timed, write

_SEED = 20260


SIZES = ("few", "some", "all")
# The smallest size runs at every change of the code, and leaves out the faults that cost most time
# and rarely find a defect. The other sizes have them.
OPTIONS = {"few": ("--no-rehearse", "--no-recompute", "--samples", "0")}


def promises(size: str) -> dict[str, Callable[[Sample], Row]]:
    """Return the function that makes each row, by short name; `size` sets the number of faults."""
    from .artefacts import artefacts
    from .classifier import classifier
    from .corruption import corruption
    from .disk import disk_errors, full_disks
    from .kills import kills
    from .memory import memory
    from .mutations import MUTATIONS, mutations
    from .numerics import numerics
    from .preferring import preferring
    from .processes import processes
    from .resumes import resumes
    from .stops import stops
    from .streaming import mixed_streaming, streaming, tokenized_later
    from .sweeps import sweeps

    if size == "few":
        return {
            "kills": partial(
                kills, count=2, seed=_SEED, in_shell=0, stride=150, saves=("replacing save",)
            ),
            "resumes": partial(resumes, steps=(15,), kinds=((4, 3),)),
            "stops": partial(stops, at_random=0, seed=_SEED, stride=23),
            "corruption": partial(corruption, count=16, seed=_SEED),
            "disk-errors": partial(disk_errors, count=2),
            "full-disks": partial(full_disks, count=1),
            "numerics": partial(numerics, count=2, seed=_SEED),
            "memory": partial(memory, per_phase=1, limits=0),
            "artefacts": partial(artefacts, count=4),
            "mutations": partial(mutations, wanted=MUTATIONS[:1]),
            "classifier": partial(
                classifier,
                at_random=0,
                in_shell=0,
                stride=150,
                steps=(15,),
                kinds=((4, 3),),
                damaged=8,
                errors=2,
                disks=1,
                shortages=1,
                seed=_SEED,
                damages=6,
            ),
            "streaming": partial(streaming, killed=1, stopped=1, seed=_SEED),
            "mixed-streaming": partial(mixed_streaming, killed=1, stopped=1, seed=_SEED),
            "tokenized-later": partial(tokenized_later, killed=1, stopped=1, seed=_SEED),
            "processes": partial(processes, killed=1, hanging=0, disks=0, seed=_SEED),
            "sweeps": partial(sweeps, killed=2, stopped=1, seed=_SEED, alone=1),
            "preferring": partial(preferring, killed=1, stopped=1, seed=_SEED),
        }
    if size == "some":
        return {
            "kills": partial(kills, count=6, seed=_SEED, in_shell=0, stride=150),
            "resumes": partial(resumes, steps=(15,), kinds=((4, 3), (16, 1))),
            "stops": partial(stops, at_random=1, seed=_SEED, stride=7),
            "corruption": partial(corruption, count=40, seed=_SEED),
            "disk-errors": partial(disk_errors, count=4),
            "full-disks": partial(full_disks, count=2),
            "numerics": partial(numerics, count=6, seed=_SEED),
            "memory": partial(memory, per_phase=1, limits=1),
            "artefacts": partial(artefacts, count=4),
            "mutations": partial(mutations, wanted=MUTATIONS[:2]),
            "classifier": partial(
                classifier,
                at_random=1,
                in_shell=0,
                stride=50,
                steps=(7, 22),
                kinds=((4, 3),),
                damaged=20,
                errors=4,
                disks=2,
                shortages=1,
                seed=_SEED,
            ),
            "streaming": partial(streaming, killed=12, stopped=8, seed=_SEED),
            "mixed-streaming": partial(mixed_streaming, killed=12, stopped=8, seed=_SEED),
            "tokenized-later": partial(tokenized_later, killed=12, stopped=8, seed=_SEED),
            "processes": partial(processes, killed=6, hanging=1, disks=2, seed=_SEED),
            "sweeps": partial(sweeps, killed=8, stopped=4, seed=_SEED),
            "preferring": partial(preferring, killed=6, stopped=4, seed=_SEED, steps=(7, 22)),
        }
    return {
        "kills": partial(kills, count=200, seed=_SEED),
        "resumes": resumes,
        "stops": partial(stops, at_random=16, seed=_SEED),
        "corruption": partial(corruption, count=300, seed=_SEED),
        "disk-errors": partial(disk_errors, count=120),
        "full-disks": partial(full_disks, count=20),
        "numerics": partial(numerics, count=30, seed=_SEED),
        "memory": partial(memory, per_phase=6, limits=3),
        "artefacts": artefacts,
        "mutations": mutations,
        "classifier": partial(classifier, seed=_SEED),
        "streaming": partial(streaming, killed=40, stopped=20, seed=_SEED, in_shell=4),
        "mixed-streaming": partial(mixed_streaming, killed=40, stopped=20, seed=_SEED, in_shell=4),
        "tokenized-later": partial(tokenized_later, killed=40, stopped=20, seed=_SEED, in_shell=4),
        "processes": partial(processes, killed=40, hanging=4, disks=10, seed=_SEED),
        "sweeps": partial(sweeps, killed=40, stopped=20, seed=_SEED),
        "preferring": partial(
            preferring,
            killed=40,
            stopped=20,
            seed=_SEED,
            in_shell=4,
            steps=range(1, 30, 4),
            kinds=((16, 1), (8, 1), (4, 3)),
        ),
    }


def main() -> int:
    """Make the rows that the user asks for; return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", help="names of promises, comma-separated")
    parser.add_argument("--size", choices=SIZES, default="all", help="how many faults of each")
    parser.add_argument("--json", type=Path, help="where to write the table too")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="qlora-kit-faults-") as name:
        prepare(Path(name))
        makers = promises(given.size)
        wanted = given.only.split(",") if given.only else list(makers)
        sample = make_sample(Path(name) / "sample", OPTIONS.get(given.size, ()))
        for promise in wanted:
            rows.append(timed(partial(makers[promise], sample)))
            print(line(rows[-1]), flush=True)  # noqa: T201
    if given.json:
        write(given.json, rows)
    return int(not all(row.is_kept for row in rows))


if __name__ == "__main__":
    sys.exit(main())
