"""Answers requests as they come: a queue, and a batch that rows join and leave at any token.

Takes `Asked` and calls back with pieces of text, from a thread of its own. Memory is bounded by
the rows of a batch, by the requests that wait, and by the length that its caller allows.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

import torch

from qlora_kit.events import Announce, LogLine, silent
from qlora_kit.infer.serving.asked import (
    Asked,
    Failed,
    Finished,
    FinishReason,
    Hear,
    Piece,
    QueueFull,
)
from qlora_kit.infer.serving.choosing import Chooser, next_tokens
from qlora_kit.infer.serving.running import Batch, Row
from qlora_kit.infer.serving.text import TextSoFar
from qlora_kit.lora.several import AdapterSet
from qlora_kit.model.load import Base
from qlora_kit.model.memory import is_out_of_memory, release_memory

_LOST_MEMORY = Failed(503, "out of memory with this many tokens in work; try again later")
_NOT_NUMBERS = Failed(500, "the model computed what is no number")
_LONGEST_RETRY_SECONDS = 60


class Answer(Row):
    """An answer that waits or is written.

    Args:
        asked: the request.
        hear: receives what comes of it, from the engine's thread.
    """

    def __init__(self, asked: Asked, hear: Hear) -> None:
        super().__init__(asked)
        self.hear = hear
        self.begun = time.monotonic()
        self.chooser = Chooser(asked.sampling)
        self.text = TextSoFar(asked.tokenizer, asked.stops)
        self.tokens = 0
        self.batch = 1
        self.is_cancelled = False

    def cancel(self) -> None:
        """Let the engine drop the answer; nobody waits for it any more."""
        self.is_cancelled = True

    @property
    def is_late(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() - self.begun > self.asked.seconds

    @property
    def failed_by_time(self) -> Failed:
        """What is answered when its time is up."""
        return Failed(504, f"the time limit of {self.asked.seconds:g} s is up")


class Engine:
    """Answers requests in one thread.

    Args:
        base: the loaded model.
        adapters: the adapters on it; None where it is used as it is.
        max_batch: rows that are answered together.
        queue: requests that may wait besides.
        announce: receives lines of the log, from the engine's thread.
    """

    def __init__(
        self,
        base: Base,
        adapters: AdapterSet | None = None,
        max_batch: int = 8,
        queue: int = 64,
        announce: Announce = silent,
    ) -> None:
        self._base, self._announce = base, announce
        self._most, self._queue = max_batch, queue
        self._batch = Batch(base, adapters)
        self._waiting: deque[Answer] = deque()
        self._starting = 0
        self._change = threading.Condition()
        self._is_stopping = False
        self._mean_seconds = 1.0
        # A daemon: a program that ends at once does not wait for answers.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Check the model, and begin to answer.

        Raises:
            ModelError: its rows cannot be answered together, see `Batch.check`.
        """
        with torch.inference_mode(), self._base.in_evaluation():
            self._batch.check(token=0)
        self._thread.start()

    def submit(self, asked: Asked, hear: Hear) -> Answer:
        """Take a request; `hear` gets its pieces, and at last `Finished` or `Failed`.

        Raises:
            QueueFull: as many wait as may, or the engine is stopping.
        """
        answer = Answer(asked, hear)
        with self._change:
            self._waiting = deque(each for each in self._waiting if not each.is_cancelled)
            taken = len(self._waiting) + self._starting + len(self._batch.rows)
            if self._is_stopping or taken >= self._most + self._queue:
                raise QueueFull(self._retry_seconds(taken))
            self._waiting.append(answer)
            self._change.notify()
        return answer

    def stop(self, seconds: float = 10.0) -> None:
        """End the thread at the next token; answers that are not whole fail."""
        with self._change:
            self._is_stopping = True
            self._change.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._is_stopping

    def counts(self) -> tuple[int, int]:
        """Return how many answers are written now, and how many wait."""
        with self._change:
            return len(self._batch.rows) + self._starting, len(self._waiting)

    # ------------------------------------------------------------ the thread

    def _work(self) -> None:
        try:
            with torch.inference_mode(), self._base.in_evaluation():
                while self._has_work():
                    self._drop()
                    self._guarded(self._admit)
                    if self._batch.rows:
                        self._guarded(self._step)
        finally:
            # Also where the thread ends by a panic of a library: nobody waits for ever.
            self._is_stopping = True
            self._fail_all(Failed(503, "the server is stopping"))

    def _has_work(self) -> bool:
        """Wait for work; return whether there is any, which is not so when the engine stops."""
        with self._change:
            while not (self._waiting or self._batch.rows or self._is_stopping):
                self._change.wait()
            return not self._is_stopping

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do work; an error of it ends the answers that it was done for, and nothing else."""
        try:
            work()
            return
        except Exception as error:
            lacks_memory = is_out_of_memory(error)
            name = type(error).__name__
        # Here the error is gone, and so are the tensors that its frames held.
        if lacks_memory and self._batch.rows:
            release_memory(self._base.hardware.device)
            self._log("out of memory: the answer that began last is given up")
            self._end(self._batch.rows[-1], _LOST_MEMORY)
            return
        self._log(f"a step failed ({name}): {len(self._batch.rows)} answers are given up")
        for row in list(self._batch.rows):
            self._end(row, Failed(500, f"the model failed ({name})"))

    def _drop(self) -> None:
        """Take out what nobody waits for, and what has taken too long."""
        with self._change:
            waiting = list(self._waiting)
            late = [each for each in waiting if each.is_late and not each.is_cancelled]
            self._waiting = deque(e for e in waiting if not (e.is_late or e.is_cancelled))
        for answer in late:
            answer.hear(answer.failed_by_time)
        for row in list(self._batch.rows):
            assert isinstance(row, Answer)
            if row.is_cancelled:
                self._batch.leave([row])
                self._log(f"{row.asked.name}: cancelled after {row.tokens} tokens")
            elif row.is_late:
                self._end(row, row.failed_by_time)

    def _admit(self) -> None:
        """Let the request that has waited longest join, if there is room.

        One at a time: the answers that are being written wait for no more than one prompt.
        """
        with self._change:
            if not self._waiting or len(self._batch.rows) >= self._most:
                return
            answer = self._waiting.popleft()
            self._starting = 1
        try:
            self._begin(answer)
        except Exception as error:
            # The others go on: a prompt alone has touched nothing of theirs.
            reason = _LOST_MEMORY if is_out_of_memory(error) else None
            answer.hear(reason or Failed(500, f"the model failed ({type(error).__name__})"))
            self._log(f"{answer.asked.name}: a prompt failed ({type(error).__name__})")
        finally:
            self._starting = 0

    def _begin(self, answer: Answer) -> None:
        cache, logits = self._batch.start(answer)
        (token,) = next_tokens(logits, [answer.chooser])
        ended = self._told(answer, token)
        if ended is not None:
            self._end(answer, ended)
            return
        with self._change:
            # Counted once at any moment: nobody is refused for a row that is counted twice.
            self._batch.join(answer, cache)
            self._starting = 0
        rows = self._batch.rows
        for row in rows:
            assert isinstance(row, Answer)
            row.batch = max(row.batch, len(rows))
        named = Counter(row.asked.name for row in rows)
        parts = ", ".join(f"{name} {count}" for name, count in sorted(named.items()))
        self._log(f"batch of {len(rows)} ({parts}), {len(self._waiting)} waiting")

    def _step(self) -> None:
        logits = self._batch.step()
        answers = [row for row in self._batch.rows if isinstance(row, Answer)]
        tokens = next_tokens(logits, [answer.chooser for answer in answers])
        for answer, token in zip(answers, tokens, strict=True):
            ended = self._told(answer, token)
            if ended is not None:
                self._end(answer, ended)

    def _told(self, answer: Answer, token: int | None) -> Finished | Failed | None:
        """Give the text of a token out; return the end of the answer, if the token ends it."""
        if token is None:
            return _NOT_NUMBERS
        answer.last, answer.tokens = token, answer.tokens + 1
        is_end = token in answer.asked.ends
        given = "" if is_end else answer.text.add(token)
        is_full = answer.tokens >= answer.asked.sampling.max_new_tokens
        if is_end or (is_full and not answer.text.is_stopped):
            given += answer.text.rest()
        if given:
            answer.hear(Piece(given))
        if is_end or answer.text.is_stopped:
            return _finished(answer, "stop")
        return _finished(answer, "length") if is_full else None

    def _end(self, row: Row, ended: Finished | Failed) -> None:
        assert isinstance(row, Answer)
        self._batch.leave([row])
        row.hear(ended)
        asked = f"{row.asked.name}: {len(row.asked.ids)} + {row.tokens} tokens"
        if isinstance(ended, Finished):
            self._mean_seconds += (ended.seconds - self._mean_seconds) / 8
            how = f"{ended.reason}, in batches of up to {ended.batch}"
            self._log(f"{asked} in {ended.seconds:.2f} s, {how}")
        else:
            self._log(f"{asked}, {ended.status}: {ended.reason}")

    def _fail_all(self, failed: Failed) -> None:
        with self._change:
            waiting, self._waiting = list(self._waiting), deque()
        for row in list(self._batch.rows):
            self._end(row, failed)
        for answer in waiting:
            answer.hear(failed)

    def _retry_seconds(self, taken: int) -> int:
        rounds = max(1.0, (taken - self._most) / self._most)
        return min(_LONGEST_RETRY_SECONDS, max(1, math.ceil(rounds * self._mean_seconds)))

    def _log(self, text: str) -> None:
        self._announce(LogLine(text))


def _finished(answer: Answer, reason: FinishReason) -> Finished:
    return Finished(reason, answer.tokens, answer.batch, time.monotonic() - answer.begun)
