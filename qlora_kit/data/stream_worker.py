"""Tokenises the samples of a stream: in this process, or in others that work beside the training.

Takes chunks of samples and returns their token rows as tables, in the order that is asked for.
Another process is `python -c` with a pipe to it and one back: it needs no lock of this process, and
it ends when this process does, however that ends. It imports neither torch nor `datasets`, so it is
small and soon ready.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Any, NamedTuple, Protocol

import pyarrow

from qlora_kit.config import TokenOptions
from qlora_kit.data.encode import Labelled
from qlora_kit.data.samples import Samples
from qlora_kit.data.tokens import MakesRows, Tokenizing
from qlora_kit.errors import QloraKitError, WorkerLost

Chunk = Sequence[bytes]
"""Samples, pickled: so they wait in little memory, and need not be pickled again for a pipe."""

_RUN = "from qlora_kit.data.stream_worker import main; main()"
_FRAME = struct.Struct(">Q")
_SECONDS_TO_END = 10.0


class Made(NamedTuple):
    """The token rows of a chunk.

    Attributes:
        table: the rows, sample by sample; its column `row` is the sample's index in the chunk.
        tallies: what became of each sample, by the names of `Counts`.
    """

    table: pyarrow.Table
    tallies: Sequence[Mapping[str, int]]


@dataclass(frozen=True)
class Job:
    """How samples become token rows.

    Attributes:
        makes: what a sample means.
        tokenizer: transformers' tokenizer; its chat template is set.
        options: the longest row allowed, the treatment of longer ones, the tokens to supervise.
        first: one sample or some, which decide the columns of the rows.
    """

    makes: MakesRows
    tokenizer: Any
    options: TokenOptions
    first: Samples


class _Counting(Tokenizing):
    """Keeps what became of each sample apart."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tallies: list[dict[str, int]] = [{} for _ in self.samples.items]

    def fit(self, index: int, rows: Sequence[Labelled]) -> Any:
        """See `Tokenizing.fit`."""
        self.tally = Counter()
        left = super().fit(index, rows)
        self.tallies[index] = {name: count for name, count in self.tally.items() if count}
        return left


class Tokenizer:
    """Makes the token rows of chunks.

    Raises:
        ConfigError, ModelError: see the makers of rows.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._maker = job.makes(job.first, job.tokenizer, job.options)

    def made(self, chunk: Chunk) -> Made:
        """Return the token rows of a chunk.

        Raises:
            DataError: a sample cannot become rows, see `tokens.tokenize`.
        """
        samples = replace(self._job.first, items=[pickle.loads(each) for each in chunk])
        work = _Counting(samples, self._maker.on(samples), self._job.options)
        table = work.table(range(len(chunk)))
        work.faults.raise_if_any()
        return Made(table, work.tallies)


class Tokenizes(Protocol):
    """Makes the token rows of chunks, here or elsewhere.

    Attributes:
        processes: other processes that do it; with none it is done when it is asked for.
    """

    processes: int

    def ask(self, chunk: Chunk, source: int = 0) -> Callable[[], Made]:
        """Return what returns the rows of a chunk, and waits for them if need be.

        Args:
            chunk: the samples.
            source: the number of the job by which they become rows.
        """
        ...

    def close(self) -> None:
        """End the other processes."""
        ...


class Here:
    """Tokenises in this process, see `Tokenizes`.

    Args:
        jobs: how samples become token rows, a job for each source.
    """

    processes = 0

    def __init__(self, *jobs: Job) -> None:
        self._tokenizers = [Tokenizer(job) for job in jobs]

    def ask(self, chunk: Chunk, source: int = 0) -> Callable[[], Made]:
        """See `Tokenizes`."""
        return lambda: self._tokenizers[source].made(chunk)

    def close(self) -> None:
        """See `Tokenizes`."""


class Beside:
    """Tokenises in other processes, see `Tokenizes`.

    They start at once, and are ready when the model is loaded. A thread of this process waits for
    each of them, so chunks are handed out while the training computes.

    Args:
        job: how samples become token rows.
        processes: number of the processes.
        more: the same of other sources; each process has every job.
    """

    def __init__(self, job: Job, processes: int, more: Sequence[Job] = ()) -> None:
        self.processes = processes
        told = pickle.dumps((job, *more))
        self._all = [_Process(told) for _ in range(processes)]
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="data-worker")
        for process in self._all:
            self._threads.submit(self._introduce, process)

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes."""
        return [process.pid for process in self._all]

    def ask(self, chunk: Chunk, source: int = 0) -> Callable[[], Made]:
        """See `Tokenizes`."""
        return self._threads.submit(self._made, chunk, source).result

    def _introduce(self, process: _Process) -> None:
        try:
            # A process that is gone says so when it is asked.
            with contextlib.suppress(OSError):
                process.introduce()
        finally:
            self._idle.put(process)

    def _made(self, chunk: Chunk, source: int) -> Made:
        process = self._idle.get()
        try:
            return process.made(chunk, source)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes, whatever they are doing: they hold nothing that has to be saved."""
        for process in self._all:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.forget()


class OfSource:
    """One job of what has several, as if it were the only one, see `Tokenizes`.

    Args:
        tokenizes: what makes the token rows of several sources.
        source: the number of the job.
    """

    def __init__(self, tokenizes: Tokenizes, source: int) -> None:
        self.processes = tokenizes.processes
        self._tokenizes, self._source = tokenizes, source

    def ask(self, chunk: Chunk, source: int = 0) -> Callable[[], Made]:
        """See `Tokenizes`."""
        return self._tokenizes.ask(chunk, self._source)

    def close(self) -> None:
        """See `Tokenizes`; the others end with it."""
        self._tokenizes.close()


class _Process:
    """Another process that tokenises."""

    def __init__(self, told: bytes) -> None:
        self._told = told
        # What is imported here can be imported there, and nothing from the folder it starts in.
        path = os.pathsep.join(each or os.getcwd() for each in sys.path)
        one_core = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _RUN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, **one_core},
            # Ctrl-C is for the training, which may still need the rows of the step it ends with.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self.pid = self._process.pid

    def introduce(self) -> None:
        """Tell the process its job."""
        _send(self._to, self._told)
        self._told = b""

    def made(self, chunk: Chunk, source: int) -> Made:
        """Return the rows of a chunk, by the job of its source.

        Raises:
            QloraKitError: what the process found wrong.
            WorkerLost: the process is gone.
        """
        try:
            _send(self._to, pickle.dumps((source, chunk)))
            reply = _receive(self._from)
        except OSError:
            reply = None
        if reply is None:
            raise WorkerLost(
                f"--data-workers: a process that tokenises ended ({self._end()}); expected it to "
                "go on as long as the run; free memory, or pass --data-workers 0"
            )
        made = pickle.loads(reply)
        if isinstance(made, _Wrong):
            raise made.error()
        assert isinstance(made, Made)
        return made

    def _end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_SECONDS_TO_END)
            return signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return "its pipe is closed"

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Close the pipes to a process that has ended."""
        for stream in (self._to, self._from):
            with contextlib.suppress(OSError):
                stream.close()


# ---------------------------------------------------------------- in the other process


@dataclass(frozen=True)
class _Wrong:
    """An error of the other process.

    Attributes:
        kind: its class, where it is an error of the kit; else None.
        lines: its faults, or the traceback.
    """

    kind: type[QloraKitError] | None
    lines: tuple[str, ...]

    @classmethod
    def of(cls, error: Exception) -> _Wrong:
        """Return an error in a form that can be sent."""
        if isinstance(error, QloraKitError):
            return cls(type(error), tuple(error.faults))
        return cls(None, (traceback.format_exc(),))

    def error(self) -> Exception:
        """Return the error, to be raised in this process."""
        return RuntimeError(*self.lines) if self.kind is None else self.kind(*self.lines)


def main() -> None:
    """Tokenise what comes through standard input, until it ends."""
    # The training decides what a signal means; this process ends when the pipe does.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    with os.fdopen(os.dup(0), "rb") as asked, os.fdopen(os.dup(1), "wb") as answers:
        # What a library prints must not end up between the answers.
        os.dup2(2, 1)
        told = _receive(asked)
        if told is None:
            return
        answer = _answering(told)
        with contextlib.suppress(BrokenPipeError):
            while (asked_for := _receive(asked)) is not None:
                _send(answers, pickle.dumps(answer(*pickle.loads(asked_for))))


def _answering(told: bytes) -> Callable[[int, Chunk], Made | _Wrong]:
    try:
        tokenizers = [Tokenizer(job) for job in pickle.loads(told)]
    except Exception as error:
        wrong = _Wrong.of(error)
        return lambda source, chunk: wrong

    def answer(source: int, chunk: Chunk) -> Made | _Wrong:
        try:
            return tokenizers[source].made(chunk)
        except Exception as error:
            return _Wrong.of(error)

    return answer


def _send(stream: IO[bytes], content: bytes) -> None:
    stream.write(_FRAME.pack(len(content)))
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes | None:
    """Return the next content; None where the other side has ended, also in the midst of it."""
    head = stream.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    (size,) = _FRAME.unpack(head)
    content = stream.read(size)
    return content if len(content) == size else None
