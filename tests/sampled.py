"""The small run of `faults.runs`, done once for all test files of a process."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from faults.runs import Sample, make_sample


def shared_sample(factory: pytest.TempPathFactory) -> Sample:
    """Return the sample, whose unbroken run is for tests that only read it."""
    return _made(factory.getbasetemp() / "sample")


@functools.cache
def _made(folder: Path) -> Sample:
    return make_sample(folder)
