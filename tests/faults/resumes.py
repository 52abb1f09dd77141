"""Resuming at every step, for every kind of base, gives the same bits as an unbroken run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .children import spread
from .runs import TOTAL_STEPS, Sample, differences, kit
from .table import Row, row_of

_PROMISE = "resume at every step: weights, optimiser and losses bit-equal"
_ROWS_BY_ACCUMULATION = {1: 15, 3: 45}
_KINDS = tuple((bits, accumulation) for bits in (16, 8, 4) for accumulation in (1, 3))


@dataclass(frozen=True)
class Case:
    """A run of 30 steps, resumed at one of them."""

    bits: int
    accumulation: int
    step: int


def resumes(
    sample: Sample,
    steps: Sequence[int] = range(1, TOTAL_STEPS),
    kinds: Sequence[tuple[int, int]] = _KINDS,
) -> Row:
    """Resume at `steps` with each of `kinds`: bits, and micro-batches a step."""
    spread(partial(_do_unbroken, sample), kinds, sample.folder / "resumes")
    cases = [Case(*kind, step) for kind in kinds for step in steps]
    results = spread(partial(_resumed, sample), cases, sample.folder / "resumes")
    kinds_done = ", ".join(f"{bits} bits/{accumulation}" for bits, accumulation in kinds)
    return row_of(_PROMISE, results, f"bits/accumulation: {kinds_done}; two epochs, dropout")


def _unbroken(sample: Sample, bits: int, accumulation: int) -> Path:
    return sample.folder / "resumes" / f"unbroken-{bits}-{accumulation}"


def _arguments(sample: Sample, output: Path, bits: int, accumulation: int) -> list[str]:
    # All kinds have the same number of steps in an epoch, so that epochs end at the same step.
    data = sample.folder / "resumes" / f"{_ROWS_BY_ACCUMULATION[accumulation]}.jsonl"
    if not data.is_file():
        lines = sample.data.read_text(encoding="utf-8").splitlines(keepends=True)
        data.write_text("".join(lines[: _ROWS_BY_ACCUMULATION[accumulation]]), encoding="utf-8")
    options = ("--bits", bits, "--gradient-accumulation-steps", accumulation, "--data", data)
    return sample.arguments(output, *options)


def _do_unbroken(sample: Sample, kind: tuple[int, int]) -> None:
    output = _unbroken(sample, *kind)
    keep_all = ("--save-steps", "1", "--save-total-limit", str(TOTAL_STEPS))
    ended = kit([*_arguments(sample, output, *kind), *keep_all], output.with_suffix(".streams"))
    if ended.code:
        raise RuntimeError(ended.errors)


def _resumed(sample: Sample, case: Case) -> list[str]:
    unbroken = _unbroken(sample, case.bits, case.accumulation)
    output = unbroken.with_name(f"{unbroken.name}-at-{case.step}")
    # The resumed part writes to a folder of its own, with few checkpoints.
    resume = ("--resume", str(unbroken / f"checkpoint-{case.step}"), "--save-steps", "100")
    arguments = [*_arguments(sample, output, case.bits, case.accumulation), *resume]
    ended = kit(arguments, output.with_suffix(".streams"))
    if ended.code:
        return [f"{case}: ended with {ended.code}: {ended.errors.strip()[-200:]}"]
    wrong = differences(output, unbroken, logged_after=case.step)
    shutil.rmtree(output)
    return [f"{case}: {fault}" for fault in wrong]
