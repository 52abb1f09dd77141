"""The commands and code in the documentation run."""

from __future__ import annotations

import os
import re
from pathlib import Path

from faults.children import finish
from support import PROJECT


def test_the_blocks_of_the_api_page_run_in_order(tmp_path: Path) -> None:
    text = (PROJECT / "docs" / "api.md").read_text()
    script = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert script.count("qk.") > 15
    # In a process of its own, as it sets what holds for all of one.
    ended = finish(lambda: (os.chdir(tmp_path), exec(script, {})), tmp_path / "streams")
    assert ended.code == 0, ended.errors
    # The losses, metrics and stop rules of one's own did what the page says.
    found = dict(line.split(": ", 1) for line in ended.output.splitlines() if ": " in line)
    assert float(found["label smoothing"]) > 0
    assert found["text"] == "the stop rule was met True"
    *reason, matthews, _ = found["classifier"].split(" ")
    assert " ".join(reason) == "the stop rule was met"
    assert float(matthews) > 0.4, "it learnt, by the metric of the page"


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in [
        PROJECT / "README.md",
        PROJECT / "README.zh.md",
        PROJECT / "CONTRIBUTING.md",
        *(PROJECT / "docs").glob("*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
