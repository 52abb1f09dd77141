"""Packages of npm that tests ask, in `.node/`: llama.cpp, and axe-core for pages."""

from __future__ import annotations

from pathlib import Path

import pytest

_NODE = Path(__file__).parents[1] / ".node"
MODULES = _NODE / "node_modules"


def npm_package(name: str) -> Path:
    """Return the folder of a package.

    A test without it fails, so that nobody takes a file for right that its reader has not read.
    Only where `make node` found the packages out of reach it is skipped.
    """
    found = MODULES / name
    if found.is_dir():
        return found
    out_of_reach = _NODE / "out-of-reach"
    if out_of_reach.is_file():
        pytest.skip(out_of_reach.read_text().strip())
    pytest.fail(f"no {found}; expected what `make node` fetches; run it")
