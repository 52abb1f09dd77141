"""Shows a run on the terminal while it goes: header, progress bar, notices, closing lines.

Takes events. On a terminal it shows a progress bar; elsewhere it prints plain lines, a few dozen a
run.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from qlora_kit.events import (
    Answered,
    AnswerEnded,
    AnswerPart,
    CheckpointSaved,
    Closing,
    Evaluated,
    Event,
    Facts,
    LoadProgress,
    LogLine,
    MicroBatchHalved,
    Notice,
    RowShown,
    RunFinished,
    RunStarted,
    StepFinished,
    StepSkipped,
    Table,
    Told,
)
from qlora_kit.redact import for_terminal, redacted_values
from qlora_kit.report.mask import mask_text
from qlora_kit.report.source_losses import SourceLosses, described
from qlora_kit.report.tables import aligned, print_table

_PLAIN_LINES = 20
_MOST_ROWS = 16


class Terminal:
    """Shows events; a context manager, so that the progress bar is always taken down."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total_steps = 0
        self._started = 0.0
        self._tokens = 0
        self._sources = SourceLosses()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_bar()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        # Redacted before a table folds its lines: a folded secret would not be recognised.
        event = redacted_values(event)
        if isinstance(event, Notice):
            self.console.print(f"note: {event.text}", markup=False)
        elif isinstance(event, LogLine):
            self.console.print(f"{time.strftime('%H:%M:%S')} {event.text}", markup=False)
        elif isinstance(event, StepSkipped):
            self.console.print(
                f"step {event.optimizer_step} skipped: loss {event.loss}, gradient norm "
                f"{event.grad_norm}, on rows {list(event.rows[:_MOST_ROWS])}",
                markup=False,
            )
        elif isinstance(event, MicroBatchHalved):
            self.console.print(
                f"out of memory at step {event.optimizer_step}: {event.rows_now} row(s) at a time "
                f"from here, of {event.rows_asked} asked for; the step is taken again with the "
                "same rows"
            )
        elif isinstance(event, Answered):
            # Never folded: the text may be piped to another program.
            self.console.out(event.text, highlight=False)
        elif isinstance(event, AnswerPart):
            self.console.out(for_terminal(event.text), end="", highlight=False)
        elif isinstance(event, AnswerEnded):
            self._show_end(event)
        elif isinstance(event, Told):
            self.console.out(for_terminal(event.text), highlight=False)
        elif isinstance(event, Facts):
            self._show_facts(event)
        elif isinstance(event, Table):
            self._show_table(event)
        elif isinstance(event, RowShown):
            self._show_row(event)
        elif isinstance(event, Closing):
            self._show_closing(event)
        elif isinstance(event, LoadProgress):
            self._show_load(event)
        elif isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, StepFinished):
            self._show_step(event)
        elif isinstance(event, Evaluated):
            best = " (best so far)" if event.is_best else ""
            metrics = "".join(
                f", {name.replace('_', ' ')} {value:.4f}" for name, value in event.metrics.items()
            )
            self.console.print(
                f"step {event.optimizer_step}: validation loss {event.loss:.4f}{metrics}{best}, "
                f"{event.seconds:.1f} s"
            )
        elif isinstance(event, CheckpointSaved):
            self.console.print(f"saved {event.path}", markup=False)
        elif isinstance(event, RunFinished):
            self._stop_bar()
            self.console.print(
                f"{event.reason}: {event.optimizer_step} steps, {event.seconds:.1f} s"
            )

    # ------------------------------------------------------------ tables

    def _show_facts(self, event: Facts) -> None:
        self._stop_bar()
        print_table(self.console, event.title, event.rows)

    def _show_table(self, event: Table) -> None:
        self._stop_bar()
        self.console.print(event.title, style="bold", markup=False)
        for line in aligned((event.head, *event.rows)):
            self.console.out(line, highlight=False)

    def _show_row(self, event: RowShown) -> None:
        self.console.print(event.title, style="bold", markup=False)
        in_colour = self.console.color_system is not None
        self.console.print(mask_text(event.tokens, in_colour=in_colour))

    def _show_closing(self, event: Closing) -> None:
        self._stop_bar()
        for title, lines in (("written", event.written), ("next", event.commands)):
            if lines:
                self.console.print(f"{title}:", style="bold")
            for line in lines:
                self.console.print(f"  {line}", markup=False)

    def _show_end(self, event: AnswerEnded) -> None:
        why = {
            "length": " · cut at --max-new-tokens",
            "context": " · cut: the context is full",
            "stopped": " · stopped",
        }.get(event.ended, "")
        # The first token comes of the prompt; the speed is that of the others.
        rest = event.seconds - event.first_seconds
        rate = f" · {(event.new_tokens - 1) / rest:,.1f} tokens/s" if rest > 0 else ""
        self.console.print(
            f"\n[{event.new_tokens} tokens{rate} · first after {event.first_seconds:.2f} s · "
            f"prompt {event.prompt_tokens} tokens, {event.kept_tokens} of them kept{why}]",
            markup=False, style="dim",
        )  # fmt: skip

    # ------------------------------------------------------------ progress

    def _new_bar(
        self, *columns: TextColumn | BarColumn | TimeRemainingColumn | MofNCompleteColumn
    ) -> Progress:
        self._stop_bar()
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._bar.start()
        return self._bar

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._task = None, None

    def _show_load(self, event: LoadProgress) -> None:
        if not self.console.is_terminal:
            return
        if self._task is None:
            bar = self._new_bar(TextColumn("loading"), BarColumn(), MofNCompleteColumn())
            self._task = bar.add_task("", total=event.total)
        assert self._bar is not None
        self._bar.update(self._task, completed=event.done)
        if event.done == event.total:
            self._stop_bar()

    def _start(self, event: RunStarted) -> None:
        self._total_steps, self._started, self._tokens = event.total_steps, time.monotonic(), 0
        self.console.print(
            f"training: {event.total_steps} optimiser steps"
            + (f", {event.epochs:.2f} epochs" if event.epochs is not None else "")
            + (f", from step {event.first_step}" if event.first_step > 1 else "")
        )
        if self.console.is_terminal:
            bar = self._new_bar(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._task = bar.add_task("", total=event.total_steps, completed=event.first_step - 1)

    def _show_step(self, event: StepFinished) -> None:
        self._tokens += event.tokens
        self._sources.add(event)
        rate = self._tokens / max(1e-9, time.monotonic() - self._started)
        text = (
            f"loss {event.loss:.4f}  lr {event.learning_rate:.2e}  {rate:,.0f} tokens/s  "
            f"{event.memory_bytes / 1e9:.2f} GB"
        )
        for name in ("accuracy", "margin"):
            if name in event.metrics:
                text += f"  {name} {event.metrics[name]:.3f}"
        if self._bar is not None and self._task is not None:
            text += described(self._sources.told())
            self._bar.update(self._task, advance=1, description=text)
        elif self._is_line_due(event.optimizer_step):
            text += described(self._sources.told())
            self.console.print(f"step {event.optimizer_step}/{self._total_steps}  {text}")

    def _is_line_due(self, step: int) -> bool:
        every = max(1, self._total_steps // _PLAIN_LINES)
        return step == 1 or step % every == 0 or step == self._total_steps
