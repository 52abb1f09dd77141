"""A few faults of each promise; `make test-slow` has more, `make test-faults` all of them.

The harness forks hundreds of processes, so it runs in a process that pytest has not filled with
threads. One run of it makes every row.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support import PROJECT

PROMISES = (
    "kills", "resumes", "stops", "corruption", "disk-errors", "full-disks", "numerics", "memory",
    "artefacts", "mutations", "classifier", "streaming", "mixed-streaming", "tokenized-later",
    "processes", "sweeps", "preferring",
)  # fmt: skip


@pytest.fixture(scope="module", params=["few", pytest.param("some", marks=pytest.mark.slow)])
def table(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The rows of the table for some of the faults, by the name of the promise."""
    base = tmp_path_factory.getbasetemp()
    # The workers of xdist share one table, because its tests may run in any worker.
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    file = folder / f"faults-{request.param}.json"
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            _make_table(request.param, file)
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return dict(zip(PROMISES, rows, strict=True))


def _make_table(size: str, file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--size", size, "--json", str(file)],
        cwd=PROJECT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert file.is_file(), done.stderr


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_is_kept_under_faults(table: dict[str, dict[str, Any]], promise: str) -> None:
    row = table[promise]
    if not row["tried"]:
        pytest.skip(row["detail"])
    assert row["held"] == row["tried"], row["detail"]


def test_a_safeguard_is_found_however_its_lines_are_broken(tmp_path: Path) -> None:
    """Every safeguard also is in the place where its mutation looks for it."""
    from faults.mutations import MUTATIONS, file_of, without

    for mutation in MUTATIONS:
        file = file_of(tmp_path, mutation)
        file.parent.mkdir(parents=True, exist_ok=True)
        source = file_of(PROJECT, mutation).read_text()
        # Unparsed code has no comments, and every statement is on one line.
        file.write_text(ast.unparse(ast.parse(source)))
        assert without(tmp_path, mutation) == without(PROJECT, mutation), mutation.safeguard
        assert without(PROJECT, mutation) != file.read_text(), mutation.safeguard


def test_a_safeguard_that_has_moved_is_missed() -> None:
    from faults.mutations import Change, Mutation, without

    for function, found in (("_seal", "sync_file(...) + 1"), ("_unseal", "sync_file(...)")):
        moved = Mutation("it", "storage.folders", (Change(function, found),), "")
        with pytest.raises(RuntimeError, match="stands 0 times"):
            without(PROJECT, moved)
