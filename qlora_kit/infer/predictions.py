"""The file of predictions: each answer of a model, with what was expected and its own figures.

Takes rows; writes them as JSON lines, all or none. It holds text of the data, which is what it is
for: nothing of it gets into a log, a notice or an error. Secrets are left out. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.errors import ConfigError, OutputError
from qlora_kit.redact import redacted_values
from qlora_kit.storage import check_writable, write_text

SUFFIX = ".jsonl"


def check_predictions(path: Path, data: str | None, *, overwrite: bool) -> None:
    """Check that predictions can be written, before long work begins.

    Args:
        path: the file.
        data: what is measured, as `--data` names it.
        overwrite: whether a file of that name may be replaced.

    Raises:
        ConfigError: the name is not one of JSON lines, or its folder is missing.
        OutputError: there is such a file already; or it is of the data.
        StorageError: the folder may not be written.
    """
    if path.suffix != SUFFIX or path.is_dir():
        raise ConfigError(
            f"--predictions: found {path}; expected a file name that ends in {SUFFIX}; correct it"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"--predictions: no folder {path.parent}; expected one; make it")
    if _is_read(path, data):
        raise OutputError(
            f"--predictions: {path} is of the data that is measured; expected a new file; name "
            "another"
        )
    if path.exists() and not overwrite:
        raise OutputError(
            f"--predictions: {path} exists; expected a new file; pass --overwrite to replace it, "
            "or name another"
        )
    check_writable(path.parent)


def _is_read(path: Path, data: str | None) -> bool:
    """Return whether a file is one of the files, or in the folder, that `--data` names."""
    if data is None or not path.exists():
        return False
    # `os.path` answers no where `Path` raises, for example for a name that is too long.
    read = [name for name in (data, *data.split("+")) if os.path.exists(name)]
    return any(os.path.samefile(name, each) for name in read for each in (path, path.parent))


def write_predictions(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, all or none.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in redacted_values(rows))
    write_text(path, "".join(f"{line}\n" for line in lines))
