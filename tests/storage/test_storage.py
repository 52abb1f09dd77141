"""Files are written whole or not at all, hashes find every change, and lines have right numbers."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_kit.errors import DataError, EnvironmentFault, OutputError, StorageError
from qlora_kit.storage import (
    LOCK,
    MANIFEST,
    clean_up,
    delete_folder,
    load_tensors,
    only_writer,
    parse_json,
    read_lines,
    save_tensors,
    staged_folder,
    storage_errors,
    verify_folder,
    write_bytes,
    write_text,
)


def test_lines_are_counted_as_editors_count_them(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\ntwo\u2028still two\n\nfour".encode())
    assert [(line.line, line.record) for line in read_lines(file)] == [
        (1, "one"),
        (2, "two\u2028still two"),
        (3, ""),
        (4, "four"),
    ]


def test_a_byte_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: byte 10 is not UTF-8"):
        list(read_lines(file))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', 'key "a" stands twice'),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ('{"a": }', "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_json_is_read_strictly(text: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse_json(text, "here:1")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    write_text(file, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="no space left on device; free space"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with pytest.raises(ZeroDivisionError), staged_folder(target) as staging:
        (staging / "half").write_bytes(b"half" * (1 // 0))
    assert os.listdir(tmp_path) == []
    with staged_folder(target) as staging:
        (staging / "whole").write_text("whole")
        assert not target.exists()
    assert {path.name for path in target.iterdir()} == {"whole", "manifest.json"}
    verify_folder(target)


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with staged_folder(target) as staging:
        (staging / "old").write_text("old")
    with pytest.raises(OutputError, match="exists"), staged_folder(target):
        pass
    with staged_folder(target, replace=True) as staging:
        (staging / "new").write_text("new")
    assert not (target / "old").exists()
    assert os.listdir(tmp_path) == ["run"]


@given(content=st.binary(min_size=1, max_size=200), data=st.data())
def test_every_change_of_a_byte_is_found(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    target = tmp_path_factory.mktemp("sealed") / "run"
    with staged_folder(target) as staging:
        write_bytes(staging / "file", content)
    changed = bytearray(content)
    changed[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (target / "file").write_bytes(bytes(changed))
    with pytest.raises(StorageError, match="changed since"):
        verify_folder(target)


@pytest.mark.parametrize("lost", ["file", "manifest.json"])
def test_a_lost_file_is_found(tmp_path: Path, lost: str) -> None:
    target = tmp_path / "run"
    with staged_folder(target) as staging:
        write_text(staging / "file", "content")
    (target / lost).unlink()
    with pytest.raises(StorageError, match="not whole"):
        verify_folder(target)


def test_tensors_are_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    import torch

    file = tmp_path / "a.safetensors"
    old = os.umask(0o027)
    try:
        save_tensors(file, {"a": torch.arange(3)})
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert load_tensors(file)["a"].tolist() == [0, 1, 2]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(StorageError, match="not a complete safetensors file"):
        load_tensors(file)


def test_an_interrupt_between_the_two_renames_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "run"
    with staged_folder(target) as staging:
        write_text(staging / "file", "old")
    rename = Path.rename

    def interrupted(self: Path, new: Path) -> Path:
        if self.name.endswith(".staging"):
            raise KeyboardInterrupt
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staged_folder(target, replace=True) as staging:
        write_text(staging / "file", "new")
    assert os.listdir(tmp_path) == ["run"]
    assert (target / "file").read_text() == "old"


# ---------------------------------------------------------------- what a power cut leaves


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record the flushes and renames of a test, each with its path."""
    calls: list[tuple[str, str]] = []

    def watch(name: str, path_of: Callable[[Any], str]) -> None:
        real = getattr(os, name)

        def watched(first: Any, *rest: Any) -> Any:
            calls.append((name, path_of(first)))
            return real(first, *rest)

        monkeypatch.setattr(os, name, watched)

    watch("fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    watch("rename", os.fspath)
    watch("replace", os.fspath)
    return calls


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux for open files")
def test_a_folder_is_flushed_before_its_rename_and_its_name_after(
    tmp_path: Path, disk_calls: list[tuple[str, str]]
) -> None:
    target = tmp_path / "run"
    with staged_folder(target) as staging:
        (staging / "inner").mkdir()
        for name in ("a", "inner/b"):
            (staging / name).write_text(name)
    (renamed,) = (n for n, call in enumerate(disk_calls) if call == ("rename", str(staging)))
    before = {path for name, path in disk_calls[:renamed] if name == "fsync"}
    flushed = {str(staging / name) for name in ("", "a", "inner", "inner/b")}
    assert before >= flushed
    assert any(path.startswith(str(staging / f".{MANIFEST}")) for path in before)
    assert ("fsync", str(tmp_path)) in disk_calls[renamed:]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux for open files")
@pytest.mark.parametrize("kind", ["bytes", "tensors"])
def test_a_file_is_flushed_before_its_rename_and_its_name_after(
    tmp_path: Path, disk_calls: list[tuple[str, str]], kind: str
) -> None:
    import torch

    file = tmp_path / "file"
    if kind == "bytes":
        write_bytes(file, b"content")
    else:
        save_tensors(file, {"a": torch.arange(3)})
    names = [name for name, _ in disk_calls]
    assert names == ["fsync", "replace", "fsync"]
    assert disk_calls[0][1] == disk_calls[1][1] != str(file)
    assert disk_calls[2][1] == str(tmp_path)


def test_what_killed_processes_left_is_undone_and_what_living_ones_do_is_not(
    tmp_path: Path,
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in ("moved", "both"):
        (tmp_path / f".{name}.{ended.pid}.replaced").mkdir()
    (tmp_path / "both").mkdir()
    (tmp_path / f".half.{ended.pid}.staging").mkdir()
    (tmp_path / f".file.{ended.pid}.staging").write_text("half")
    (tmp_path / f".living.{os.getppid()}.staging").mkdir()
    (tmp_path / f".own.{os.getpid()}.staging").mkdir()
    (tmp_path / ".hidden").mkdir()
    clean_up(tmp_path, "half")
    assert not (tmp_path / f".half.{ended.pid}.staging").exists()
    assert (tmp_path / f".file.{ended.pid}.staging").exists()
    clean_up(tmp_path)
    left = {".hidden", f".living.{os.getppid()}.staging", "both", "moved"}
    assert set(os.listdir(tmp_path)) == left


def test_a_deleted_folder_loses_its_name_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "run"
    with staged_folder(target) as staging:
        write_text(staging / "file", "content")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refuse)
        with pytest.raises(StorageError, match="input/output error"):
            delete_folder(target)
        verify_folder(target)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        with pytest.raises(StorageError, match="input/output error"):
            delete_folder(target)
        assert not target.exists()
    clean_up(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("  ", " "),
        lambda text: text + "\n",
        lambda text: text.replace("{\n", '{\n  "more": 1,\n', 1),
        lambda text: text.replace('"file"', '"../file"'),
        lambda text: text.replace('"file"', '"/file"'),
        lambda text: '{\n  "sha256": {}\n}\n',
        lambda text: "[]",
        lambda text: text.replace("sha256", "sha1"),
    ],
)
def test_a_manifest_has_one_form(tmp_path: Path, change: Callable[[str], str]) -> None:
    target = tmp_path / "run"
    with staged_folder(target) as staging:
        write_text(staging / "file", "content")
    manifest = target / MANIFEST
    changed = change(manifest.read_text())
    assert changed != manifest.read_text()
    manifest.write_text(changed)
    with pytest.raises(StorageError, match="not whole"):
        verify_folder(target)


_HOLD = """
import sys, time
from pathlib import Path
from qlora_kit.storage import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_writer_until_it_dies(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(EnvironmentFault, match="another qlora-kit process writes here"),
            only_writer(tmp_path),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
    with only_writer(tmp_path):
        assert (tmp_path / LOCK).is_file()
    assert os.listdir(tmp_path) == []


def test_what_the_system_told_a_library_is_one_line_too(tmp_path: Path) -> None:
    """The tokenizers library has no error class for a full disk."""
    with (
        pytest.raises(StorageError, match="run: no space left on device; free space"),
        storage_errors(tmp_path / "run"),
    ):
        raise Exception("No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="else"), storage_errors(tmp_path / "run"):
        raise RuntimeError("something else")
