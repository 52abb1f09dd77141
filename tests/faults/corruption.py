"""Damage to a checkpoint's files: every change is found, and the checkpoint before it is taken."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .children import spread
from .runs import TOTAL_STEPS, Sample
from .table import Row, row_of

_PROMISE = "a damaged checkpoint is found, named and passed over"
_NEWEST, _BEFORE = f"checkpoint-{TOTAL_STEPS}", f"checkpoint-{TOTAL_STEPS - 2}"

# Each damages one file of a checkpoint; `other` is the checkpoint before it.
Damage = Callable[[Path, Path, random.Random], None]


def _truncate(file: Path, other: Path, chance: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def _flip(file: Path, other: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(bytes(content))


def _zero(file: Path, other: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    start = chance.randrange(len(content))
    end = chance.randint(start + 1, len(content))
    content[start:end] = bytes(end - start)
    file.write_bytes(bytes(content))


def _append(file: Path, other: Path, chance: random.Random) -> None:
    file.write_bytes(file.read_bytes() + chance.randbytes(chance.randint(1, 9)))


def _remove(file: Path, other: Path, chance: random.Random) -> None:
    file.unlink()


def _swap_inside(file: Path, other: Path, chance: random.Random) -> None:
    second = chance.choice([path for path in file.parent.iterdir() if path != file])
    first_bytes, second_bytes = file.read_bytes(), second.read_bytes()
    file.write_bytes(second_bytes)
    second.write_bytes(first_bytes)


def _take_from_other(file: Path, other: Path, chance: random.Random) -> None:
    file.write_bytes((other / file.name).read_bytes())


def _rename_folder(file: Path, other: Path, chance: random.Random) -> None:
    step = chance.randint(TOTAL_STEPS + 1, 10 * TOTAL_STEPS)
    file.parent.rename(file.parent.with_name(f"checkpoint-{step}"))


_DAMAGES: tuple[Damage, ...] = (
    _truncate, _flip, _zero, _append, _remove, _swap_inside, _take_from_other, _rename_folder,
)  # fmt: skip


def corruption(sample: Sample, count: int, seed: int) -> Row:
    """Damage a checkpoint in `count` ways, drawn at random."""
    case = partial(_damaged, sample)
    results = spread(case, [seed + n for n in range(count)], sample.folder / "corruption")
    kinds = (
        "truncated, bit flipped, zeroed, appended to, removed, swapped, of another step, renamed"
    )
    return row_of(_PROMISE, results, kinds)


def _damaged(sample: Sample, seed: int) -> list[str]:
    run = sample.folder / "corruption" / f"run-{seed}"
    for name in (_NEWEST, _BEFORE):
        shutil.copytree(sample.unbroken / name, run / name)
    shutil.copyfile(sample.unbroken / "last", run / "last")
    wrong = _undetected(run, *_damage(run, seed))
    shutil.rmtree(run)
    return wrong


def _damage(run: Path, seed: int) -> tuple[Path, str]:
    """Damage the newest checkpoint; return its folder afterwards, and the damage in words."""
    chance = random.Random(seed)
    before = _contents(run)
    while True:
        file = chance.choice(sorted((run / _NEWEST).iterdir()))
        damage = chance.choice(_DAMAGES)
        damage(file, run / _BEFORE, chance)
        # Zeroing a zero, or taking an equal file from the checkpoint before, damages nothing.
        if _contents(run) != before:
            (folder,) = (path for path in run.glob("checkpoint-*") if path.name != _BEFORE)
            return folder, f"{damage.__name__.strip('_')} of {file.name}, seed {seed}"


def _contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def _undetected(run: Path, folder: Path, what: str) -> list[str]:
    """Return how the damage stayed undetected: in a checkpoint that is named, or as the latest."""
    from qlora_kit.errors import StorageError
    from qlora_kit.train.checkpoint import find_checkpoint

    wrong = []
    try:
        find_checkpoint(run, str(folder))
        wrong.append(f"{what}: accepted by name")
    except StorageError:
        pass
    found = find_checkpoint(run, "latest")
    if found.folder is None or found.folder.name != _BEFORE:
        wrong.append(f"{what}: the latest is {found.folder}")
    if len(found.damaged) != 1 or folder.name not in found.damaged[0]:
        wrong.append(f"{what}: said {found.damaged}")
    return wrong
