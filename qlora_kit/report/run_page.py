"""`report.html`: the page of a run, in one file that opens without a network.

Takes the summary of a run, the rows of its log, its samples and its pictures; writes the page. The
samples are text of the data, so the page is only for people who may see the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.redact import redacted_values
from qlora_kit.report.facts import RunSummary
from qlora_kit.report.labels import confusion_picture, counted_of, label_rows
from qlora_kit.report.page import RUN_PAGE, render
from qlora_kit.report.plot import memory_curve
from qlora_kit.report.profile import Summary, part_rows, title_of, top_rows
from qlora_kit.report.source_losses import rows_of_sources
from qlora_kit.report.tables import Rows
from qlora_kit.storage import write_text

NAME = RUN_PAGE
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
    labels: Mapping[str, Any] | None = None,
    profile: Summary | None = None,
) -> None:
    """Write the page into a run folder.

    Args:
        folder: the run's folder.
        summary: the summary of the run.
        log_rows: the rows of its log.
        samples: for each sample, rows of author and text.
        loss_picture: PNG of the loss.
        step_picture: PNG of the memory of one step; the file may be missing.
        on_gpu: whether the log has the memory of a GPU; otherwise it has that of the process.
        predicted_bytes: the peak that was predicted for the device, or None.
        labels: tables of a classifier's last evaluation, see `report.labels`.
        profile: the time of a step by part, see `report.profile`; None without it.

    Raises:
        StorageError: the page could not be written.
    """
    # Redacted before the template escapes the texts: an escaped secret would not be recognised.
    summary, samples, labels = redacted_values((summary, list(samples), dict(labels or {})))
    # On a CPU the log has the memory of the process, while the prediction has only its tensors.
    levels = {"predicted peak": predicted_bytes} if on_gpu and predicted_bytes else {}
    text = render(
        "run.html.jinja",
        title=f"{folder.name}: LoRA adapter for {summary.base_name}",
        summary=summary,
        samples=samples,
        label_rows=label_rows(labels),
        labels_counted=counted_of(labels),
        confusion_picture=confusion_picture(labels),
        time_rows=part_rows(profile) if profile else (),
        longest_rows=top_rows(profile) if profile else (),
        time_of=title_of(profile) if profile else "",
        evaluated=evaluated_head(log_rows),
        evaluations=evaluation_rows(log_rows),
        incidents=incidents_of(log_rows),
        most_rows=_MOST_ROWS,
        source_losses=rows_of_sources(log_rows),
        loss_picture=loss_picture.read_bytes(),
        memory_picture=memory_curve(log_rows, levels),
        memory_of=memory_of(on_gpu),
        step_picture=step_picture.read_bytes() if step_picture.is_file() else None,
    )
    write_text(folder / NAME, text)


def memory_of(on_gpu: bool) -> str:
    """Say which memory the log of a run has."""
    return "peak allocated on the device so far" if on_gpu else "anonymous memory of the process"


def _measured(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys of what evaluations measured beside the loss, in the log's order."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("eval_"))
    return [key for key in keys if key != "eval_loss"]


def evaluated_head(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the head of the table of evaluations."""
    metrics = (key.removeprefix("eval_").replace("_", " ") for key in _measured(rows))
    return ("step", "epoch", "validation loss", *metrics, "")


def evaluation_rows(rows: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the table of evaluations, under `evaluated_head`."""
    keys = ["eval_loss", *_measured(rows)]
    return [
        (row["optimizer_step"], f"{row['epoch']:.2f}", *(figure_text(row.get(key)) for key in keys),
         "best so far" if row["is_best"] else "")
        for row in rows if "eval_loss" in row
    ]  # fmt: skip


def figure_text(value: Any) -> str:
    """Return a figure of the log; what is no finite number stands there as a text."""
    return f"{value:.4f}" if isinstance(value, float | int) else str(value or "")


def incidents_of(rows: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """Return the incidents of a run, each with its step: memory that ran out, skipped steps."""
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
