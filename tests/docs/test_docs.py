"""The commands and code in the documentation run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from support import PROJECT


def test_the_blocks_of_the_api_page_run_in_order(tmp_path: Path) -> None:
    text = (PROJECT / "docs" / "api.md").read_text()
    script = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert script.count("qk.") > 15
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in [
        PROJECT / "README.md",
        PROJECT / "CONTRIBUTING.md",
        *(PROJECT / "docs").glob("*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
