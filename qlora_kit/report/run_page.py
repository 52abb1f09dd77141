"""`report.html`: a run that explains itself, in one file that opens without a network.

Takes the summary of a run, the rows of its log, its samples and its pictures. The page shows
text of the data (the samples), so it is for those who may see the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_kit.redact import redacted_values
from qlora_kit.report.facts import RunSummary
from qlora_kit.report.page import render
from qlora_kit.report.plot import memory_curve
from qlora_kit.report.tables import Rows
from qlora_kit.storage import write_text

NAME = "report.html"
_MOST_ROWS = 50


def write_run_page(
    folder: Path,
    summary: RunSummary,
    log_rows: Sequence[dict[str, Any]],
    samples: Sequence[Rows],
    *,
    loss_picture: Path,
    step_picture: Path,
    on_gpu: bool,
    predicted_bytes: int | None,
) -> None:
    """Write the page into a run folder.

    Args:
        folder: run folder.
        summary: what the run has to say of itself.
        log_rows: of its log.
        samples: of each, who wrote what.
        loss_picture: PNG of the loss.
        step_picture: PNG of the memory of one step; need not be there.
        on_gpu: whether the memory in the log is the device's, or the process's on a CPU.
        predicted_bytes: peak that was predicted for the device, if one was.

    Raises:
        StorageError: it could not be written.
    """
    # Before they are escaped: a secret must be found as it is.
    summary, samples = redacted_values((summary, list(samples)))
    # On a CPU the log has the process, and the prediction is of its tensors.
    levels = {"predicted peak": predicted_bytes} if on_gpu and predicted_bytes else {}
    process = "anonymous memory of the process"
    text = render(
        "run.html.jinja",
        title=f"{folder.name}: LoRA adapter for {summary.base_name}",
        summary=summary,
        samples=samples,
        evaluations=_evaluation_rows(log_rows),
        incidents=_incidents(log_rows),
        most_rows=_MOST_ROWS,
        loss_picture=loss_picture.read_bytes(),
        memory_picture=memory_curve(log_rows, levels),
        memory_of="peak allocated on the device so far" if on_gpu else process,
        step_picture=step_picture.read_bytes() if step_picture.is_file() else None,
    )
    write_text(folder / NAME, text)


def _evaluation_rows(rows: Sequence[dict[str, Any]]) -> list[tuple[int, str, str, str]]:
    return [
        (row["optimizer_step"], f"{row['epoch']:.2f}", f"{row['eval_loss']:.4f}",
         "best so far" if row["is_best"] else "")
        for row in rows if "eval_loss" in row
    ]  # fmt: skip


def _incidents(rows: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """Return what did not go as planned, and in which step."""
    found: list[tuple[int, str]] = []
    for row in rows:
        if "rows_now" in row:
            fewer = f"{row['rows_now']} row(s) at a time from here, of {row['rows_asked']}"
            found.append((row["optimizer_step"], f"out of memory: {fewer}"))
        elif "rows" in row:
            numbers = f"loss {row['loss']}, gradient norm {row['grad_norm']}"
            where = ", ".join(map(str, row["rows"][:16]))
            found.append((row["optimizer_step"], f"skipped: {numbers}, on rows {where}"))
    return found
