"""Several real processes take the very steps of one, and tell each other what must be alike."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import process_cases
import pytest
import torch
from process_cases import CASES, Found
from support import PROJECT, relative_error

from qlora_kit.parallel.data_parallel import STEP_SECONDS

Results = list[dict[str, Any]]


def launched(folder: Path, count: int, names: str = "") -> Results:
    """Take the cases in `count` processes of torchrun; return what each of them found."""
    command = (
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count,
        process_cases.__file__, folder, *([names] if names else []),
    )  # fmt: skip
    paths = (str(PROJECT), str(PROJECT / "tests"))
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(count)]
    return [
        {name: Found(**found) if name in CASES else found for name, found in file.items()}
        for file in files
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return process_cases.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def alone(models: Path) -> Callable[[str], Found]:
    """Return a function that takes a case in this process, once."""
    taken: dict[str, Found] = {}

    def take(name: str) -> Found:
        if name not in taken:
            taken[name] = CASES[name](models)
        return taken[name]

    return take


@pytest.fixture(scope="module")
def two(models: Path) -> Results:
    return launched(models, 2)


@pytest.fixture(scope="module")
def four(models: Path) -> Results:
    return launched(models, 4)


def _flat(found: Found) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in found.weights.values()])


def check_same_steps(name: str, found: Results, expected: Found) -> None:
    first: Found = found[0][name]
    assert first.reason == expected.reason
    # The loss of a preference falls towards 0, and is a difference of sums of some tens.
    at_least = 1e-6 if name == "preferring" else None
    assert first.losses == pytest.approx(expected.losses, rel=1e-6, abs=at_least)
    assert relative_error(_flat(first), _flat(expected)) < 1e-5
    for other in found[1:]:
        same: Found = other[name]
        assert same.losses == first.losses
        assert all(
            torch.equal(weight, same.weights[each]) for each, weight in first.weights.items()
        )
    # The rows were divided: each process has computed some, and together they had all of them.
    assert len(first.process_tokens) == len(found)
    assert min(first.process_tokens) > 0
    assert sum(first.process_tokens) == sum(expected.process_tokens)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(
    name: str, two: Results, alone: Callable[[str], Found]
) -> None:
    check_same_steps(name, two, alone(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_processes_take_the_steps_of_one(
    name: str, four: Results, alone: Callable[[str], Found]
) -> None:
    check_same_steps(name, four, alone(name))


def test_rows_are_divided_by_tokens(two: Results) -> None:
    ours, theirs = two[0]["uneven"].process_tokens
    assert abs(ours - theirs) < 0.1 * (ours + theirs)


def test_the_losses_of_sources_are_summed_over_the_processes(
    two: Results, alone: Callable[[str], Found]
) -> None:
    told, expected = two[0]["sources"].others, alone("sources").others
    assert [[*step] for step in told] == [[*step] for step in expected]
    for step, own in zip(told, expected, strict=True):
        for name, (loss, weight) in step.items():
            assert loss == pytest.approx(own[name][0], rel=1e-5)
            assert weight == own[name][1]


def test_an_evaluation_is_divided_and_has_the_numbers_of_one_process(
    two: Results, alone: Callable[[str], Found]
) -> None:
    (losses, measured), (expected, own) = two[1]["early_stop"].others, alone("early_stop").others
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len(losses) < process_cases.STEPS / 2, "it stopped early"
    for (loss, metrics, weight), (own_loss, own_metrics, own_weight) in zip(
        measured, own, strict=True
    ):
        assert loss == pytest.approx(own_loss, rel=1e-5)
        assert metrics == pytest.approx(own_metrics, rel=1e-5)
        assert weight == own_weight


def test_a_reference_is_asked_together(two: Results, alone: Callable[[str], Found]) -> None:
    for found in two:
        for ours, expected in zip(
            found["preferring"].others, alone("preferring").others, strict=True
        ):
            assert ours == pytest.approx(expected, rel=1e-5)


def test_rows_that_give_no_number_are_named_by_all(
    two: Results, alone: Callable[[str], Found]
) -> None:
    assert alone("not_finite").others[0] == (9,)
    # Without packing, one row at a time: the row is named, and no other.
    assert two[0]["not_finite"].others == alone("not_finite").others
    assert two[1]["not_finite"].others == [], "one process announces"


def test_memory_that_runs_out_in_one_process_halves_the_micro_batch_of_all(two: Results) -> None:
    assert two[0]["halved"].others == [1]
    assert len(two[0]["halved"].losses) == process_cases.STEPS


def test_what_the_processes_tell_each_other(two: Results) -> None:
    first, second = (found["meetings"] for found in two)
    for seen in (first, second):
        assert seen["totals"] == (2.0, 1.0)
        assert seen["most"] == (1.0, 0.0)
        assert seen["each"] == ["of 0", "of 1"]
        assert seen["from_writer"] == 0
        assert seen["refused"] == ("ConfigError", ("one", "two"), 2)
        assert seen["stopped"] == ("Stopped", None, 143)
        assert seen["unlike"][0] == "EnvironmentFault"
        assert "process 1 of 2, counted from 0, reads another data" in seen["unlike"][1][0]
    assert (first["in_writer"], second["in_writer"]) == (0, None)
    assert (first["writer_first"], second["writer_first"]) == (0, 1)
    assert sorted([first["speaks"], second["speaks"]]) == [[False, False], [True, False]]


def test_a_process_that_ends_is_missed_at_once(two: Results) -> None:
    first = two[0]["meetings"]
    assert (first["alone"][0], first["alone"][2]) == ("WorkerLost", 3)
    assert first["seconds"] < 0.2 * STEP_SECONDS


def test_processes_that_compute_together_make_as_many_forwards(two: Results) -> None:
    forwards = [found["together"].others for found in two]
    assert forwards[0] == forwards[1]


def test_gradients_are_summed_whether_autograd_adds_to_them_or_replaces_them(two: Results) -> None:
    for found in two:
        added, replaced = found["meetings"]["gradients"]
        assert torch.equal(added, torch.full((3, 5), 3.0))
        assert torch.equal(replaced, torch.full((7,), 1.0))


def test_numbers_are_finite_where_a_process_has_no_row(two: Results) -> None:
    assert all(math.isfinite(loss) for loss in two[1]["dropout"].losses)
