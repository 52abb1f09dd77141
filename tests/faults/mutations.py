"""Checks the tests themselves: each safeguard is taken out of a copy, and a test must fail."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .children import spread
from .runs import Sample
from .table import Row, row_of

_PROMISE = "a safeguard taken out is noticed by a test"
_PROJECT = Path(__file__).parent.parent.parent
_TESTS_FAILED = 1
_LOG = "pytest.log"


@dataclass(frozen=True)
class Change:
    """An expression of a function, and its replacement.

    Attributes:
        function: name of the function, after the name of its class, if it has one.
        found: the expression as Python; `f(...)` is a call of f with any arguments. The function
            must have it once, in whatever lines.
        replaced: the expression in its place.
    """

    function: str
    found: str
    replaced: str = "None"


@dataclass(frozen=True)
class Mutation:
    """A safeguard, the changes that take it out, and a test that must notice.

    Attributes:
        safeguard: the safeguard, in words.
        module: its module in the package.
        changes: the changes that take it out.
        test: the test, as pytest names it.
    """

    safeguard: str
    module: str
    changes: tuple[Change, ...]
    test: str


_DRAWN = "train/test_reliability.py::test_a_resumed_run_draws_what_the_unbroken_one_draws"
_FOLDER_FLUSHED = (
    "storage/test_storage.py::test_a_folder_is_flushed_before_its_rename_and_its_name_after"
)
_FILE_FLUSHED = (
    "storage/test_storage.py::test_a_file_is_flushed_before_its_rename_and_its_name_after"
)

MUTATIONS = (
    Mutation(
        "the fsync of a folder's files", "storage.folders",
        (Change("_seal", "sync_file(...)"),), _FOLDER_FLUSHED,
    ),
    Mutation(
        "the fsync of a folder's name", "storage.folders",
        (Change("_swap", "sync_folder(...)"),), _FOLDER_FLUSHED,
    ),
    Mutation(
        "the fsync of a file", "storage.files",
        (Change("write_bytes", "os.fsync(...)"),), _FILE_FLUSHED,
    ),
    Mutation(
        "the fsync of tensors", "storage.files",
        (Change("write_by", "sync_file(...)"),), _FILE_FLUSHED,
    ),
    Mutation(
        "the rename of a file", "storage.files",
        (
            Change("write_bytes", "staging_path(path)", "path"),
            Change("write_bytes", "staging.replace(...)"),
            Change("write_bytes", "staging.unlink(...)"),
        ),
        "storage/test_storage.py::test_a_failed_write_leaves_the_old_file",
    ),
    Mutation(
        "the rename of a folder", "storage.folders",
        (
            Change("staged_folder", "staging_path(target)", "target"),
            Change("staged_folder", "_swap(...)"),
            Change("staged_folder", "shutil.rmtree(...)"),
        ),
        "storage/test_storage.py::test_a_folder_appears_whole_or_not_at_all",
    ),
    Mutation(
        "the manifest", "storage.folders", (Change("_seal", "write_json(...)"),),
        "storage/test_storage.py::test_a_folder_appears_whole_or_not_at_all",
    ),
    Mutation(
        "the manifest's one form", "storage.folders",
        (Change("_manifest", "known and inside and hashes", "inside"),),
        "storage/test_storage.py::test_a_manifest_has_one_form",
    ),
    Mutation(
        "the comparison of hashes", "storage.folders",
        (Change("verify_folder", "_hash(path) != expected", "False"),),
        "storage/test_storage.py::test_every_change_of_a_byte_is_found",
    ),
    Mutation(
        "the repair of what a kill left", "storage.folders",
        (Change("clean_up", "path.rename(...)"),),
        "storage/test_storage.py::test_what_killed_processes_left_is_undone_and_what_living_ones_do_is_not",
    ),
    Mutation(
        "the lock", "storage.space", (Change("only_writer", "lock.acquire(...)"),),
        "storage/test_storage.py::test_a_folder_has_one_writer_until_it_dies",
    ),
    Mutation(
        "the check of a checkpoint that is read", "train.checkpoint",
        (Change("read_state", "verify_folder(...)"),),
        "train/test_loop.py::test_the_newest_undamaged_checkpoint_is_taken",
    ),
    Mutation(
        "the random states in a checkpoint", "train.checkpoint",
        (Change("save_checkpoint", "save_tensors(staging / _RANDOM, random_states(...))"),),
        _DRAWN,
    ),
    Mutation(
        "the random states put back", "train.checkpoint",
        (Change("restore_checkpoint", "restore_random_states(...)"),), _DRAWN,
    ),
    Mutation(
        "the random states of a step taken again", "train.optimizer_step",
        (Change("OptimizerStep._forget", "restore_random_states(...)"),),
        "train/test_reliability.py::test_a_replayed_step_draws_the_same_numbers[noisy]",
    ),
    Mutation(
        "the name of a last checkpoint", "train.loop", (Change("_Training._begin", "adopt(...)"),),
        "train/test_loop.py::test_a_last_checkpoint_not_yet_named_is_named_by_resuming",
    ),
    Mutation(
        "the skipping of what is not finite", "train.optimizer_step",
        (Change("OptimizerStep.take", "not suspect", "True"),),
        "train/test_reliability.py::test_a_gradient_that_is_not_finite_is_skipped_too",
    ),
    Mutation(
        "the wait for a safe point", "signals", (Change("_receive", "_deferring", "False"),),
        "train/test_reliability.py::test_a_signal_ends_at_once_or_at_the_next_safe_point",
    ),
)  # fmt: skip


def mutations(sample: Sample, wanted: tuple[Mutation, ...] = MUTATIONS) -> Row:
    """Take each safeguard out of a copy of the package and run the test that must notice."""
    folder = sample.folder / "mutations"
    untouched = _copied(folder / "untouched")
    if code := _run_tests(untouched, sorted({mutation.test for mutation in wanted})):
        log = (untouched / _LOG).read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the tests fail without any change, with {code}:\n{log[-3000:]}")
    results = spread(partial(_noticed, folder), wanted, folder)
    return row_of(_PROMISE, results, ", ".join(mutation.safeguard for mutation in wanted))


def file_of(project: Path, mutation: Mutation) -> Path:
    """Return the file of a mutation's module."""
    return project.joinpath("qlora_kit", *mutation.module.split(".")).with_suffix(".py")


def without(project: Path, mutation: Mutation) -> str:
    """Return the source of a module without a safeguard.

    Raises:
        RuntimeError: a function, or the expression to replace, is missing or there twice.
    """
    tree = ast.parse(file_of(project, mutation).read_text(encoding="utf-8"))
    for change in mutation.changes:
        function = _function(tree, mutation.module, change.function)
        exchange = _Exchange(change)
        exchange.visit(function)
        if exchange.count != 1:
            raise RuntimeError(
                f"{mutation.module}.{change.function}: {change.found} stands {exchange.count} times"
            )
    return ast.unparse(ast.fix_missing_locations(tree))


def _function(tree: ast.AST, module: str, path: str) -> ast.AST:
    for name in path.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        found = [node for node in ast.iter_child_nodes(tree)
                 if isinstance(node, kinds) and node.name == name]  # fmt: skip
        if len(found) != 1:
            raise RuntimeError(f"{module}: {path} stands {len(found)} times")
        (tree,) = found
    return tree


class _Exchange(ast.NodeTransformer):
    """Puts a replacement in the place of an expression, and counts how often."""

    def __init__(self, change: Change) -> None:
        self.found = ast.parse(change.found, mode="eval").body
        self.replaced = change.replaced
        self.count = 0

    def visit(self, node: ast.AST) -> Any:
        if not _matches(self.found, node):
            return self.generic_visit(node)
        self.count += 1
        return ast.parse(self.replaced, mode="eval").body


def _matches(pattern: Any, node: Any) -> bool:
    """Return whether a part of a syntax tree equals the pattern, wherever it stands."""
    if isinstance(pattern, list):
        return len(pattern) == len(node) and all(map(_matches, pattern, node))
    if not isinstance(pattern, ast.AST):
        return bool(pattern == node)
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, ast.Call) and _is_any(pattern.args):
        return _matches(pattern.func, node.func)
    return all(_matches(getattr(pattern, f), getattr(node, f)) for f in pattern._fields)


def _is_any(arguments: list[ast.expr]) -> bool:
    return [ast.dump(argument) for argument in arguments] == [ast.dump(ast.Constant(...))]


def _copied(folder: Path) -> Path:
    for name in ("qlora_kit", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_PROJECT / name, folder / name, ignore=ignored)
    return folder


def _noticed(folder: Path, mutation: Mutation) -> list[str]:
    copy = _copied(folder / f"without-{MUTATIONS.index(mutation)}")
    file_of(copy, mutation).write_text(without(copy, mutation), encoding="utf-8")
    code = _run_tests(copy, [mutation.test])
    shutil.rmtree(copy)
    if code != _TESTS_FAILED:
        return [f"without {mutation.safeguard}, pytest ended with {code}"]
    return []


def _run_tests(copy: Path, tests: list[str]) -> int:
    """Run tests of this project on a copy of the package; return pytest's exit code."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    imported = subprocess.run(
        [sys.executable, "-c", "import qlora_kit; print(qlora_kit.__file__)"],
        cwd=copy, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if not Path(imported.strip()).is_relative_to(copy):
        raise RuntimeError(f"the installed package was imported: {imported}")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    paths = [str(_PROJECT / "tests" / test) for test in tests]
    with (copy / _LOG).open("wb") as log:
        return subprocess.run(
            [*command, "--rootdir", str(_PROJECT), "-c", str(_PROJECT / "pyproject.toml"), *paths],
            cwd=copy, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
