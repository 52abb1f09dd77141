"""`report.html`: a run that explains itself, in one file that opens without a network.

Takes the summary of a run, the rows of its log, its samples and its pictures. The page shows
text of the data (the samples), so it is for those who may see the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qlora_kit.redact import redacted_values
from qlora_kit.report.facts import RunSummary
from qlora_kit.report.page import figure, note, page, section, table
from qlora_kit.report.plot import memory_curve
from qlora_kit.report.tables import Rows
from qlora_kit.storage import write_text

NAME = "report.html"
_MOST_ROWS = 50
_STYLE = """
.samples td + td, pre { white-space: pre-wrap; font: .88rem/1.45 ui-monospace, monospace; }
td:first-child { color: var(--faint); white-space: nowrap; }
pre { background: var(--wash); padding: .8rem 1rem; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
"""


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
    sections = [
        section("Results", table(summary.results)),
        section("What was trained on what", table(summary.facts)),
        section(
            "Loss",
            figure(loss_picture.read_bytes(), "Loss and learning rate by optimiser step"),
            *_evaluations(log_rows),
        ),
        *_samples(samples),
        section("Memory", *_memory(log_rows, step_picture, on_gpu, predicted_bytes)),
        *_incidents(log_rows),
        section("Settings", *_settings(summary)),
        section("Next", f"<pre>{escape(chr(10).join(summary.commands))}</pre>"),
        section("Versions", table(summary.versions)),
    ]
    title = f"{folder.name}: LoRA adapter for {summary.base_name}"
    write_text(folder / NAME, page(title, sections, _STYLE))


def _evaluations(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    found = [row for row in rows if "eval_loss" in row]
    if not found:
        yield note("No validation rows: the loss is of training only, and says little of others.")
        return
    lines = [
        (row["optimizer_step"], f"{row['epoch']:.2f}", f"{row['eval_loss']:.4f}",
         "best so far" if row["is_best"] else "")
        for row in found
    ]  # fmt: skip
    head = ("step", "epoch", "validation loss", "")
    yield from _folded("Evaluations", table(lines[-_MOST_ROWS:], head), len(lines))


def _samples(samples: Sequence[Rows]) -> Iterator[str]:
    if not samples:
        return
    parts = [
        note(
            "Prompts of the validation rows, or of the data where there are none, continued "
            "greedily by the model before the first step and after the last."
        )
    ]
    for number, rows in enumerate(samples, 1):
        parts.append(f'<h3>Sample {number}</h3>\n<div class="samples">{table(rows)}</div>')
    yield section("Samples", *parts)


def _memory(
    rows: Sequence[dict[str, Any]], step_picture: Path, on_gpu: bool, predicted_bytes: int | None
) -> Iterator[str]:
    # On a CPU the log has the process, and the prediction is of its tensors.
    levels = {"predicted peak": predicted_bytes} if on_gpu and predicted_bytes else {}
    what = "peak allocated on the device so far" if on_gpu else "anonymous memory of the process"
    yield figure(memory_curve(rows, levels), f"Memory after each optimiser step: {what}")
    if step_picture.is_file():
        caption = "Tensors in one optimiser step on the longest rows, rehearsed before the first"
        yield figure(step_picture.read_bytes(), caption)


def _incidents(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Say what did not go as planned; nothing where all did."""
    lines: list[tuple[int, str]] = []
    for row in rows:
        if "rows_now" in row:
            fewer = f"{row['rows_now']} row(s) at a time from here, of {row['rows_asked']}"
            lines.append((row["optimizer_step"], f"out of memory: {fewer}"))
        elif "rows" in row:
            numbers = f"loss {row['loss']}, gradient norm {row['grad_norm']}"
            where = ", ".join(map(str, row["rows"][:16]))
            lines.append((row["optimizer_step"], f"skipped: {numbers}, on rows {where}"))
    if lines:
        yield section("What went otherwise", table(lines[:_MOST_ROWS], ("step", "")))


def _settings(summary: RunSummary) -> Iterator[str]:
    yield note("Options that are not at their default:")
    yield table(summary.changed)
    yield from _folded("All options", table(summary.settings), len(summary.settings))


def _folded(title: str, content: str, count: int) -> Iterator[str]:
    yield f"<details><summary>{escape(title)} ({count})</summary>\n{content}\n</details>"
