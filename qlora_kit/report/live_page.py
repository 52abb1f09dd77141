"""`report.html` while a run goes on: written again every few seconds, and loaded again by itself.

Takes the events of a run; writes the page, which the page of the finished run then replaces (see
`report.run_page`). A page that cannot be written ends no run. Like that page, it has text of the
data: the samples from before training.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType

from qlora_kit.errors import QloraKitError, first_line
from qlora_kit.events import Announce, CheckpointSaved, Event, Notice, RunFinished, RunStarted
from qlora_kit.redact import one_line, redacted_values
from qlora_kit.report import log, run_page
from qlora_kit.report.facts import RunSummary
from qlora_kit.report.page import render
from qlora_kit.report.so_far import SoFar, span_text
from qlora_kit.report.tables import Rows
from qlora_kit.signals import Stopped
from qlora_kit.storage import write_text

# The page is not written more often than this, and its writing takes at most a fiftieth of the
# time of a run, however slow the disk is.
EVERY_SECONDS = 5.0
_REST = 50
# A run that has been silent for so long, and for so many times its longest silence, has ended.
_LEAST_SILENCE_SECONDS = 60.0
_SILENCES = 3


class LivePage:
    """Writes the page of a run that goes on; a context manager, so that its end is on the page.

    Args:
        folder: the run's folder; a log in it is that of an earlier start.
        summary: what is known of the run before its steps; its commands are those to go on with.
        samples: for each sample, rows of author and text.
        on_gpu: whether the log has the memory of a GPU; otherwise it has that of the process.
        predicted_bytes: the peak that was predicted for the device, or None.
        announce: receives one notice if the page cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        summary: RunSummary,
        samples: Sequence[Rows],
        *,
        on_gpu: bool,
        predicted_bytes: int | None,
        announce: Announce,
    ) -> None:
        self._folder = folder
        self._summary = summary
        self._samples = list(samples)
        self._memory_of = run_page.memory_of(on_gpu)
        # On a CPU the log has the memory of the process, while the prediction has only its tensors.
        self._predicted_bytes = predicted_bytes if on_gpu else None
        self._announce = announce
        self._so_far = SoFar()
        self._state = "preparing the first step"
        self._due = self._heard = time.monotonic()
        self._longest_silence = 0.0
        self._has_failed = False

    def __enter__(self) -> LivePage:
        self._so_far = self._of_earlier_starts()
        self._write()
        # The first page also reads and compiles its template, which says nothing of the others.
        self._due = time.monotonic() + EVERY_SECONDS
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._state = _end_text(error)
            self._write(is_over=True)

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        if isinstance(event, RunStarted):
            # The log has dropped the rows of the steps that are taken again.
            self._so_far = self._of_earlier_starts()
            self._so_far.begin(event)
            self._state = "training"
        elif isinstance(event, CheckpointSaved):
            self._so_far.checkpoint = Path(event.path).name
        elif isinstance(event, RunFinished):
            self._state = f"{event.reason}; the page of the finished run follows"
            self._due = 0.0
        elif (row := log.row_of(event)) is not None:
            self._so_far.take(row)
        else:
            return
        now = time.monotonic()
        self._longest_silence = max(self._longest_silence, now - self._heard)
        self._heard = now
        if now >= self._due:
            self._write()

    # ------------------------------------------------------------ writing

    def _of_earlier_starts(self) -> SoFar:
        """Return the account of the log that is there."""
        found = SoFar()
        path = self._folder / log.NAME
        try:
            for row in log.read_log(path) if path.is_file() else ():
                found.take(row)
        except Exception as error:
            self._say_failed(error)
        return found

    def _write(self, *, is_over: bool = False) -> None:
        begun = time.monotonic()
        try:
            write_text(self._folder / run_page.NAME, self._page(is_over))
        except Exception as error:
            # A run of hours must not end for a page, whatever the error is.
            self._say_failed(error)
        ended = time.monotonic()
        self._due = ended + max(EVERY_SECONDS, _REST * (ended - begun))

    def _page(self, is_over: bool) -> str:
        so_far = self._so_far
        silence = max(_LEAST_SILENCE_SECONDS, _SILENCES * self._longest_silence)
        # Redacted before the template escapes the texts: an escaped secret would not be recognised.
        summary, samples, state = redacted_values((self._summary, self._samples, self._state))
        return render(
            "live.html.jinja",
            title=f"{self._folder.name}: LoRA adapter for {summary.base_name}",
            refresh_seconds=None if is_over else round(EVERY_SECONDS),
            state=state,
            share=f"{so_far.share:.1%}",
            now=so_far.rows(self._predicted_bytes, goes_on=not is_over),
            written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
            silence=span_text(silence),
            summary=summary,
            samples=samples,
            loss=so_far.loss_chart(),
            memory=so_far.memory_chart(self._predicted_bytes),
            memory_of=self._memory_of,
            evaluated=run_page.evaluated_head(so_far.evaluations),
            evaluations=run_page.evaluation_rows(so_far.evaluations)[::-1],
            incidents=run_page.incidents_of(so_far.incidents)[::-1],
        )

    def _say_failed(self, error: Exception) -> None:
        if self._has_failed:
            return
        self._has_failed = True
        found = first_line(error) if isinstance(error, QloraKitError) else type(error).__name__
        self._announce(Notice(f"the page of the run is not written ({found}); the run goes on"))


def _end_text(error: BaseException) -> str:
    """Say why a run has ended before its last step."""
    if isinstance(error, Stopped):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped by the user"
    if isinstance(error, QloraKitError):
        return f"ended by an error: {one_line(first_line(error))}"
    return f"ended by an error ({type(error).__name__})"
