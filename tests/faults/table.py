"""The table of promises: a row each, printed as it is done, and written as JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

_MOST_SHOWN = 3
_WIDTH = 11


@dataclass(frozen=True)
class Row:
    """How often a promise was tested, and how often it held.

    Attributes:
        promise: the promise, in words.
        tried: number of faults that were made; 0 if this machine allows none.
        held: number of faults after which the promise was kept.
        detail: the counts in words, and the first faults that broke the promise.
        seconds: duration of all faults.
    """

    promise: str
    tried: int
    held: int
    detail: str = ""
    seconds: float = 0.0

    @property
    def is_kept(self) -> bool:
        return self.tried == self.held


def row_of(promise: str, results: Sequence[Sequence[str]], detail: str) -> Row:
    """Return the row of all cases, given the faults of each; a case without faults has held."""
    wrong = [fault for faults in results for fault in faults]
    shown = [detail, *wrong[:_MOST_SHOWN]]
    if len(wrong) > _MOST_SHOWN:
        shown.append(f"and {len(wrong) - _MOST_SHOWN} more")
    return Row(promise, len(results), sum(not faults for faults in results), "; ".join(shown))


def timed(make: Callable[[], Row]) -> Row:
    """Return a row with the time it took."""
    start = time.perf_counter()
    row = make()
    return replace(row, seconds=time.perf_counter() - start)


def line(row: Row) -> str:
    """Return a row as a line of the table."""
    figures = f"{row.held}/{row.tried}".rjust(_WIDTH - 2)
    verdict = "BROKEN" if not row.is_kept else "held" if row.tried else "skipped"
    return f"{verdict:<7} {figures}  {row.promise:<62} {row.seconds:6.1f} s  {row.detail}"


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows with the versions they were measured with, and no machine's name or path."""
    import torch
    import transformers

    import qlora_kit

    content = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "qlora-kit": qlora_kit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "cpu_count": os.cpu_count(),
        "rows": [asdict(replace(row, seconds=round(row.seconds, 1))) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
