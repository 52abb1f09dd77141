"""README.zh.md and docs/quickstart.zh.md: their commands run, and their figures are README's."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from support import PROJECT

from qlora_kit.cli import main

README, QUICKSTART = PROJECT / "README.zh.md", PROJECT / "docs" / "quickstart.zh.md"


class Command(NamedTuple):
    """The arguments of a command of the kit, and what a `printf` in front gives it to read."""

    arguments: list[str]
    reads: str


def commands(page: Path) -> list[Command]:
    """Each command in the page's consoles."""
    consoles = re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.DOTALL | re.M)
    lines = [line for each in consoles for line in each.splitlines() if line.startswith("$ ")]
    return [command_of(line[2:]) for line in lines]


def command_of(line: str) -> Command:
    """Take a line apart."""
    before, _, own = line.rpartition(" | ")
    program, *arguments = shlex.split(own)
    assert program == "qlora-kit"
    if not before:
        return Command(arguments, "")
    printf, text = shlex.split(before)
    assert printf == "printf"
    return Command(arguments, text.replace("\\n", "\n"))


def ended(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("command", commands(README), ids=lambda each: " ".join(each.arguments))
def test_the_commands_of_the_readme_are_understood(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = command.arguments
    (tmp_path / "runs").mkdir()
    # A push would be made to be listed, which needs the run.
    to_hub = any(argument.startswith("hub:") for argument in arguments)
    assert ended(*arguments, *(("--help",) if to_hub else ("--dry-run",))) == 0


def test_the_quick_start_runs_from_its_first_command_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = QUICKSTART.read_text()
    for name, content in re.findall(r"^```jsonl (\S+)\n(.*?)^```$", text, re.DOTALL | re.M):
        Path(name).write_text(content)
    for command in commands(QUICKSTART):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(command.reads.encode())))
        assert ended(*command.arguments) == 0, command
    assert {path.name for path in Path("merged/mine").iterdir()} >= {"merge_report.json"}
    assert (tmp_path / "out/mine/adapter_model.safetensors").read_bytes() == (
        tmp_path / "runs/mine/adapter_model.safetensors"
    ).read_bytes()


def test_the_table_of_memory_is_that_of_the_english_page() -> None:
    def rows(page: Path) -> list[str]:
        lines = page.read_text().splitlines()
        found = [line for line in lines if re.match(r"\| \S+, [48] ", line)]
        return [line.replace(" 位 |", " bits |") for line in found]

    assert rows(README) == rows(PROJECT / "README.md")
    assert len(rows(README)) == 6


def test_each_promise_is_shown_by_the_command_of_the_english_page() -> None:
    english = (PROJECT / "README.md").read_text() + (PROJECT / "docs/hub.md").read_text()
    shown = re.findall(r"`(pytest [^`]+)`", README.read_text())
    assert len(shown) == 6
    for command in shown:
        assert f"`{command}`" in english, command
