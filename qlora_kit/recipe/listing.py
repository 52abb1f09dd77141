"""Lists the runs in a folder, and draws them together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qlora_kit.config import RunsConfig
from qlora_kit.errors import ConfigError
from qlora_kit.events import Announce, Closing, Notice, Table, silent
from qlora_kit.recipe.checking import check_page
from qlora_kit.storage import write_text
from qlora_kit.train.folder import check_outside_runs

_AUTO, _PAGE = Path("auto"), "runs.html"
_MOST_LINES = 20


def runs(config: RunsConfig, announce: Announce = silent) -> dict[str, Any]:
    """Show the runs below a folder, with their state and their best figures.

    Args:
        config: the folder, the order, and the page.
        announce: receives the table, and a line for each folder that is passed over.

    Returns:
        The runs, in their order, for programs.

    Raises:
        ConfigError: there is no such folder, or `html` names no page.
        OutputError: the page would be inside a run.
        StorageError: the folder cannot be listed, or the page cannot be written.
    """
    folder = config.folder
    _check_folder(folder)
    page = _page_of(config)

    from qlora_kit.recipe.run_folders import find_runs
    from qlora_kit.report.run_list import differing, in_order, runs_page, terminal_table

    found = find_runs(folder)
    listed = in_order(found.runs, config.sort)
    if listed:
        head, rows, left_out = terminal_table(listed)
        announce(Table(f"{len(listed)} run(s) in {folder}", head, rows))
        if left_out:
            announce(Notice(f"these options differ too: {', '.join(left_out)}; --html shows them"))
    else:
        announce(Notice(f"{folder}: no runs"))
    for line in found.passed_over[:_MOST_LINES]:
        announce(Notice(f"passed over: {line}"))
    if (more := len(found.passed_over) - _MOST_LINES) > 0:
        announce(Notice(f"passed over: {more} more; --json names all"))
    if page is not None:
        write_text(page, runs_page(listed, f"Runs in {folder}", page))
        announce(Closing((str(page),), ()))
    return {
        "folder": str(folder),
        "runs": [run.as_json() for run in listed],
        "differing": list(differing(listed)),
        "passed_over": list(found.passed_over),
        "page": None if page is None else str(page),
    }


def _check_folder(folder: Path) -> None:
    if os.path.isdir(folder):
        return
    found = "is a file" if os.path.lexists(folder) else "no such folder"
    raise ConfigError(f"{folder}: {found}; expected a folder of runs; name the one to list")


def _page_of(config: RunsConfig) -> Path | None:
    """Return the path of the page, after checking that it can be written; None without one."""
    if config.html is None:
        return None
    page = config.folder / _PAGE if config.html == _AUTO else config.html
    check_page(page)
    check_outside_runs(page, "--html")
    return page
