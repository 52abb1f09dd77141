"""Whether the tests would notice: each safeguard is taken out of a copy, and a test must fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .children import spread
from .runs import Sample
from .table import Row, row_of

_PROMISE = "a safeguard taken out is noticed by a test"
_PROJECT = Path(__file__).parent.parent.parent
_TESTS_FAILED = 1
_LOG = "pytest.log"


@dataclass(frozen=True)
class Mutation:
    """A safeguard, how to take it out, and a test that must notice.

    Attributes:
        safeguard: what is taken out.
        file: in the package.
        changes: texts and what replaces them; each text stands once in the file.
        test: what to run, as pytest names it.
    """

    safeguard: str
    file: str
    changes: tuple[tuple[str, str], ...]
    test: str


_WHOLE = "test_train.py::test_a_resumed_run_ends_with_the_bits_of_the_unbroken_one[adamw-16]"
_FOLDER_FLUSHED = "test_storage.py::test_a_folder_is_flushed_before_its_rename_and_its_name_after"
_FILE_FLUSHED = "test_storage.py::test_a_file_is_flushed_before_its_rename_and_its_name_after"

MUTATIONS = (
    Mutation(
        "the fsync of a folder's files", "storage/folders.py",
        (("            sync_file(path)\n", ""),), _FOLDER_FLUSHED,
    ),
    Mutation(
        "the fsync of a folder's name", "storage/folders.py",
        (("    sync_folder(target.parent)\n", ""),), _FOLDER_FLUSHED,
    ),
    Mutation(
        "the fsync of a file", "storage/files.py",
        (("    os.fsync(stream.fileno())\n            staging", "    pass\n            staging"),),
        _FILE_FLUSHED,
    ),
    Mutation(
        "the fsync of tensors", "storage/files.py",
        (("            sync_file(staging)\n", ""),), _FILE_FLUSHED,
    ),
    Mutation(
        "the rename of a file", "storage/files.py",
        (
            ('with staging.open("wb")', 'with path.open("wb")'),
            ("os.fsync(stream.fileno())\n            staging.replace(path)",
             "os.fsync(stream.fileno())"),
        ),
        "test_storage.py::test_a_failed_write_leaves_the_old_file",
    ),
    Mutation(
        "the rename of a folder", "storage/folders.py",
        (
            ("    staging = staging_path(target)\n", "    staging = target\n"),
            ("            _swap(staging, target)\n", ""),
            ("        finally:\n            shutil.rmtree(staging, ignore_errors=True)\n", ""),
        ),
        "test_storage.py::test_a_folder_appears_whole_or_not_at_all",
    ),
    Mutation(
        "the manifest", "storage/folders.py",
        (('    write_json(folder / MANIFEST, {"sha256": hashes})\n', ""),),
        "test_storage.py::test_a_folder_appears_whole_or_not_at_all",
    ),
    Mutation(
        "the manifest's one form", "storage/folders.py",
        (("    if not (known and inside and hashes):\n", "    if not inside:\n"),),
        "test_storage.py::test_a_manifest_has_one_form",
    ),
    Mutation(
        "the comparison of hashes", "storage/folders.py",
        (("            if _hash(path) != expected:\n", "            if False:\n"),),
        "test_storage.py::test_every_change_of_a_byte_is_found",
    ),
    Mutation(
        "the repair of what a kill left", "storage/folders.py",
        (("            path.rename(target)\n", "            pass\n"),),
        "test_storage.py::test_what_killed_processes_left_is_undone_and_what_living_ones_do_is_not",
    ),
    Mutation(
        "the lock", "storage/space.py", (("            lock.acquire()\n", "            pass\n"),),
        "test_storage.py::test_a_folder_has_one_writer_until_it_dies",
    ),
    Mutation(
        "the check of a checkpoint that is read", "train/checkpoint.py",
        (("    verify_folder(folder)\n    try:\n", "    try:\n"),),
        "test_train.py::test_the_newest_undamaged_checkpoint_is_taken",
    ),
    Mutation(
        "the random states in a checkpoint", "train/checkpoint.py",
        (("        save_tensors(staging / _RANDOM, random_states(trainee.device))\n", ""),),
        _WHOLE,
    ),
    Mutation(
        "the random states put back", "train/checkpoint.py",
        (("    restore_random_states(load_tensors(folder / _RANDOM), trainee.device)\n", ""),),
        _WHOLE,
    ),
    Mutation(
        "the random states of a step taken again", "train/optimizer_step.py",
        (("    restore_random_states(states, self.device)\n                if",
          "    pass\n                if"),),
        "test_reliability.py::test_a_replayed_step_draws_the_same_dropout",
    ),
    Mutation(
        "the name of a last checkpoint", "train/loop.py",
        (("            adopt(self.saving.output, self.saving.resume, self.progress)\n", ""),),
        "test_train.py::test_a_last_checkpoint_not_yet_named_is_named_by_resuming",
    ),
    Mutation(
        "the skipping of what is not finite", "train/optimizer_step.py",
        (("        if not suspect:\n", "        if True:\n"),),
        "test_reliability.py::test_a_gradient_that_is_not_finite_is_skipped_too",
    ),
    Mutation(
        "the wait for a safe point", "signals.py",
        (("    if _deferring:\n", "    if False:\n"),),
        "test_reliability.py::test_a_signal_ends_at_once_or_at_the_next_safe_point",
    ),
)  # fmt: skip


def mutations(sample: Sample, wanted: tuple[Mutation, ...] = MUTATIONS) -> Row:
    """Take each safeguard out of a copy of the package and run the test that must notice."""
    folder = sample.folder / "mutations"
    _check_anchors()
    untouched = _copied(folder / "untouched")
    if code := _run_tests(untouched, sorted({mutation.test for mutation in wanted})):
        log = (untouched / _LOG).read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the tests fail without any change, with {code}:\n{log[-3000:]}")
    results = spread(partial(_noticed, folder), wanted, folder)
    return row_of(_PROMISE, results, ", ".join(mutation.safeguard for mutation in wanted))


def _check_anchors() -> None:
    """Check that each text to replace stands once where it is looked for: code moves."""
    for mutation in MUTATIONS:
        text = (_PROJECT / "qlora_kit" / mutation.file).read_text(encoding="utf-8")
        for anchor, _ in mutation.changes:
            if text.count(anchor) != 1:
                raise RuntimeError(f"{mutation.file}: {anchor!r} stands {text.count(anchor)} times")


def _copied(folder: Path) -> Path:
    for name in ("qlora_kit", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_PROJECT / name, folder / name, ignore=ignored)
    return folder


def _noticed(folder: Path, mutation: Mutation) -> list[str]:
    copy = _copied(folder / f"without-{MUTATIONS.index(mutation)}")
    file = copy / "qlora_kit" / mutation.file
    text = file.read_text(encoding="utf-8")
    for anchor, replacement in mutation.changes:
        text = text.replace(anchor, replacement)
    file.write_text(text, encoding="utf-8")
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
