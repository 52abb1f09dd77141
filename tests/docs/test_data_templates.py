"""The examples on templates, masks and lengths in docs/data.md give the stated results."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
from support import PROJECT

from qlora_kit.data.chat_template import built_in_templates

SECTIONS = ("Chat templates", "Masks: what is learnt", "Lengths: what is too long")


def _section(title: str) -> str:
    text = (PROJECT / "docs" / "data.md").read_text()
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.M)
    return str(found)


def test_the_examples_give_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [
        block
        for title in SECTIONS
        for block in re.findall(r"```python\n(.*?)```", _section(title), re.DOTALL)
    ]
    assert len(blocks) == 5
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "data.md", None, 0)
    told: list[str] = []
    failed, tried = doctest.DocTestRunner().run(example, out=told.append)
    assert tried > 15
    assert not failed, "".join(told)


def test_every_built_in_template_has_its_line() -> None:
    table = _section("Chat templates").split("```")[0]
    assert all(f"`{name}`" in table for name in built_in_templates())
