"""Whole files or none, hashes that find every change, and lines with their right numbers."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_kit.errors import DataError, OutputError, StorageError
from qlora_kit.storage import (
    load_tensors,
    parse_json,
    read_json_lines,
    read_lines,
    save_tensors,
    staged_folder,
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
        list(read_json_lines(file))


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
