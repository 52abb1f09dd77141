"""The examples on formats, columns and faults in docs/data.md run, and print the stated lines."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import PROJECT

from qlora_kit.cli import main
from qlora_kit.data.shapes import FIELDS, Shape

SECTIONS = (
    "Formats: what a file may be", "Other names", "Several sources", "Labelled data",
    "Tagged words", "Preferences", "What is refused", "Larger than memory",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A code block: its language, the name of its file, and its content."""

    language: str
    file: str
    content: str


def _pages() -> str:
    text = (PROJECT / "docs" / "data.md").read_text()
    sections = re.findall(r"^## .*?(?=^## |\Z)", text, re.DOTALL | re.M)
    return "".join(each for each in sections if each.startswith(tuple(f"## {s}" for s in SECTIONS)))


def _blocks() -> list[Block]:
    found = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", _pages(), re.DOTALL | re.M)
    return [Block(*parts) for parts in found]


def _commands(console: str) -> list[tuple[str, list[str]]]:
    """Return each command of a console block with the lines it is said to print."""
    parts = [part.splitlines() for part in re.split(r"^\$ ", console, flags=re.M) if part]
    return [(command, lines) for command, *lines in parts]


def test_the_examples_print_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = 0
    for block in _blocks():
        if block.file:
            Path(block.file).write_text(block.content)
        elif block.language == "python":
            exec(block.content, {})
        for command, expected in _commands(block.content) if block.language == "console" else ():
            program, *arguments = shlex.split(command)
            assert program == "qlora-kit"
            with pytest.raises(SystemExit) as stopped:
                main([*arguments, "--json"])
            lines = capsys.readouterr().err.splitlines()
            fails = any(line.startswith("error: ") for line in expected)
            assert (stopped.value.code, lines[: len(expected)]) == (2 if fails else 0, expected)
            ran += 1
    assert ran >= 15


def test_every_format_has_its_row_and_an_example() -> None:
    page = _pages()
    for shape in Shape:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{shape}` |"))
        assert all(f"`{name}`" in row for name in FIELDS[shape].all)
        assert re.search(rf"^note: .* \d+ {shape} records? ", page, re.M), shape


def test_every_suffix_has_its_row() -> None:
    from qlora_kit.data.read import is_data_file_name

    named = re.findall(r"`[\w/]*(\.[a-z]+)`", _pages().split("A record is recognised")[0])
    formats = [suffix for suffix in named if suffix != ".gz" and suffix not in (".en", ".de")]
    known = [".conll", ".conllu", ".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt"]
    assert sorted(formats) == known
    assert all(is_data_file_name(Path(f"a{suffix}")) for suffix in formats)
