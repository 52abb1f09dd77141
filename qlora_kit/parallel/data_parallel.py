"""Several processes, each of which computes rows of its own with a base of its own.

They meet through torch.distributed: small numbers and decisions through gloo, so that no GPU is
waited for, and the gradients of an optimiser step in one sum, through NCCL on GPUs. Frozen tensors
are never sent. A process that ends, or does not answer, ends all of them with one line.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from qlora_kit.errors import QloraKitError, WorkerLost
from qlora_kit.launched import Place
from qlora_kit.model.memory import is_out_of_memory
from qlora_kit.private_torch import default_store
from qlora_kit.signals import Stopped

Value = TypeVar("Value")

STEP_SECONDS = 300.0
"""the longest that processes wait for each other in a step"""
WORK_SECONDS = 2 * 3600.0
"""the longest that they wait for one that works for all: it tokenises, evaluates or saves"""
# After a process has ended it takes the system a moment to say so.
_SECONDS_TO_BE_GONE = 2.0
# A launcher ends all processes soon after the first has ended, so the writer ends first: after its
# last checkpoint, and after its last words.
_SECONDS_TO_SAVE, _SECONDS_TO_SPEAK = 300.0, 30.0
_SECONDS_TO_PART = 60.0
_POLL_SECONDS = 0.05
# Parts of one tensor begin at multiples of as many numbers: kernels load several at a time.
_ALIGNMENT = 64
_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


class DataParallel:
    """The processes that a launcher started, see `Processes`.

    Args:
        place: the place of this process among them.
    """

    def __init__(self, place: Place) -> None:
        self._base_group: Any = None
        self._is_awaited = False
        self.rank, self.count, self.is_writer = place.rank, place.count, place.is_writer
        self._flat: Tensor | None = None
        self._parts: list[Tensor] = []
        self._store: Any = None
        self._partings = 0
        self._of_step: Any = None
        self._of_work: Any = None
        self._where: list[tuple[int, str]] = []

    def join(self) -> None:
        """Meet the other processes.

        Raises:
            WorkerLost: not all of them came.
        """
        try:
            self._find_each_other()
        except RuntimeError as error:
            raise WorkerLost(
                f"not all {self.count} processes came within {STEP_SECONDS:.0f} s "
                f"({type(error).__name__}); expected each to reach the others; look at their "
                "machines and at the network, and start all of them again"
            ) from error
        self._where = self.each(lambda: (os.getpid(), _machine()))

    def _find_each_other(self) -> None:
        patience = timedelta(seconds=STEP_SECONDS)
        if dist.is_initialized():
            store = default_store()
        else:
            store, rank, count = next(iter(rendezvous("env://", timeout=patience)))
            # What one process says is known through this, even if they do not meet.
            self._store = PrefixStore("qlora-kit", store)
            # Nothing is computed by NCCL, nor any memory taken for it, before the first sum.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=count, timeout=patience
            )
        self._store = PrefixStore("qlora-kit", store)
        # A group for each patience: a timeout belongs to a group.
        self._of_step = _gloo(STEP_SECONDS)
        self._of_work = _gloo(WORK_SECONDS)

    # ------------------------------------------------------------ a base in parts

    def share_base(self, group: Any) -> None:
        """From now on a forward needs the processes of this machine, which are torch's `group`."""
        self._base_group = group

    @property
    def computes_together(self) -> bool:
        """See `Processes`."""
        return self._base_group is not None

    def abandon(self) -> None:
        """See `Processes`."""
        self._is_awaited = True

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """See `Processes`."""
        try:
            yield
        except RuntimeError as error:
            if self.computes_together and _is_of_network(error):
                raise WorkerLost(self._who_is_lost()) from error
            raise

    # ------------------------------------------------------------ the meetings of a step

    def totals(self, *values: float) -> tuple[float, ...]:
        """See `Processes`."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def most(self, *values: float) -> tuple[float, ...]:
        """See `Processes`."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], how: Any) -> tuple[float, ...]:
        numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
        with self._meeting():
            dist.all_reduce(numbers, op=how, group=self._of_step)
        return tuple(numbers.tolist())

    def hold_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let every gradient be a part of one tensor of zeros, to which backward adds.

        So one sum reduces all of them, and they take the memory that they take anyway.
        """
        self._take_flat(parameters)
        assert self._flat is not None
        self._flat.zero_()
        for parameter, part in zip(parameters, self._parts, strict=True):
            parameter.grad = part

    def _take_flat(self, parameters: Sequence[nn.Parameter]) -> None:
        first = parameters[0]
        sizes = [-(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for parameter in parameters]
        of_these = [part.shape for part in self._parts] == [each.shape for each in parameters]
        if of_these and self._flat is not None and self._flat.device == first.device:
            return
        self._flat, self._parts = None, []
        self._flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        self._parts = [
            room[: parameter.numel()].view(parameter.shape)
            for room, parameter in zip(torch.split(self._flat, sizes), parameters, strict=True)
        ]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `Processes`."""
        assert self._flat is not None, "`hold_gradients` comes first"
        for parameter, part in zip(parameters, self._parts, strict=True):
            if parameter.grad is not None and parameter.grad.data_ptr() != part.data_ptr():
                part.copy_(parameter.grad)
            parameter.grad = part
        on_cpu = self._flat.device.type == "cpu"
        with self._meeting():
            dist.all_reduce(self._flat, group=self._of_step if on_cpu else None)

    # ------------------------------------------------------------ one works for all

    def each(self, work: Callable[[], Value]) -> list[Value]:
        """See `Processes`."""
        own = _Outcome.of(work)
        found: list[Any] = [None] * self.count
        with self._meeting():
            dist.all_gather_object(found, own, group=self._of_work)
        found[self.rank] = own
        # The first fault by rank is that of all, so that all of them end alike.
        for outcome in found:
            if outcome.fault is not None:
                raise outcome.fault
        return [outcome.value for outcome in found]

    def from_writer(self, work: Callable[[], Value]) -> Value:
        """See `Processes`."""
        value: Value = self._told(_Outcome.of(work) if self.is_writer else None, is_kept=False)
        return value

    def in_writer(self, work: Callable[[], Value]) -> Value | None:
        """See `Processes`."""
        value: Value | None = self._told(
            _Outcome.of(work) if self.is_writer else None, is_kept=True
        )
        return value

    def _told(self, own: _Outcome | None, *, is_kept: bool) -> Any:
        """Tell the others what became of the work of the writer; return its result.

        Args:
            own: what became of it, in the writer.
            is_kept: whether the result stays in the writer.
        """
        box = [_Outcome(fault=own.fault) if own is not None and is_kept else own]
        with self._meeting():
            dist.broadcast_object_list(box, src=0, group=self._of_work)
        outcome = own or box[0]
        assert outcome is not None
        if outcome.fault is not None:
            raise outcome.fault
        return outcome.value

    def writer_first(self, work: Callable[[], Value]) -> Value:
        """See `Processes`."""
        done = self.in_writer(lambda: [work()])
        return work() if done is None else done[0]

    # ------------------------------------------------------------ the end

    def part(self) -> None:
        """See `Processes`."""
        # Through the store: a process that ends closes its connections, and gloo then fails in one
        # that has not read yet what it was sent.
        self._partings += 1
        name = f"parting {self._partings}"
        with contextlib.suppress(RuntimeError):  # the store's process goes when all have come
            here = self._store.add(name, 1)
            until = time.monotonic() + _SECONDS_TO_PART
            while here < self.count and time.monotonic() < until and not self._missing():
                time.sleep(_POLL_SECONDS)
                here = self._store.add(name, 0)

    def after_writer(self, doing: str) -> None:
        """See `Processes`."""
        self._wait_for_writer(doing, _SECONDS_TO_SAVE)

    def _wait_for_writer(self, doing: str, seconds: float) -> None:
        with contextlib.suppress(RuntimeError):
            if self.is_writer:
                self._store.set(doing, "done")
            if self.is_writer or self._is_awaited:
                return
            until = time.monotonic() + seconds
            while time.monotonic() < until and not self._store.check([doing]):
                if 0 in self._missing():
                    return
                time.sleep(_POLL_SECONDS)

    def speaks(self) -> bool:
        """See `Processes`."""
        if self._store is None:
            # The first has the store: either it failed to, or the next could not reach it.
            return self.rank <= 1
        try:
            return bool(self._store.add("spoken", 1) == 1)
        except RuntimeError:
            # The store is gone with the process that had it, which is the first.
            return self.rank == 1

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        """Turn what torch raises where another process does not come into one line."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise WorkerLost(self._who_is_lost()) from error

    def _who_is_lost(self) -> str:
        until = time.monotonic() + _SECONDS_TO_BE_GONE
        while not (missing := self._missing()) and time.monotonic() < until:
            if self._has_spoken():
                break
            time.sleep(_POLL_SECONDS)
        expected = (
            "expected all of them to work until the end of the run; look for what ended it, such "
            "as memory that ran out"
        )
        if not missing:
            return (
                f"a process of {self.count} did not answer, or is gone from another machine; "
                f"{expected}"
            )
        rank, status = next(iter(missing.items()))
        what = "is gone" if status in _ENDED else "hangs: it was stopped from outside"
        return f"process {rank} of {self.count}, counted from 0, {what}; {expected}"

    def _missing(self) -> dict[int, str]:
        """Return the processes of this machine that do not run, by rank, with their status."""
        here = _machine()
        found = {
            rank: _status(pid) for rank, (pid, where) in enumerate(self._where) if where == here
        }
        not_running = (*_ENDED, psutil.STATUS_STOPPED)
        return {rank: status for rank, status in found.items() if status in not_running}

    def _has_spoken(self) -> bool:
        """Whether some process has told the user how the run ended."""
        try:
            return bool(self._store.check(["spoken"]))
        except RuntimeError:
            return False

    def lost(self) -> str | None:
        """See `Processes`."""
        return None if self._has_spoken() or not self._missing() else self._who_is_lost()

    def leave(self) -> None:
        """See `Processes`."""
        if not self._where:
            return
        with contextlib.suppress(RuntimeError, AssertionError, ValueError):
            # The others learn it at once, and not when this process has ended.
            for group in (self._of_step, self._of_work):
                dist.destroy_process_group(group)
        self._of_step = self._of_work = None
        self._wait_for_writer("leaving", _SECONDS_TO_SPEAK)


class _Outcome:
    """What became of work: its result, or the fault that ends the run."""

    def __init__(self, value: Any = None, fault: BaseException | None = None) -> None:
        self.value, self.fault = value, fault

    @classmethod
    def of(cls, work: Callable[[], Any]) -> _Outcome:
        try:
            return cls(work())
        except WorkerLost:
            raise  # nobody is met any more
        except (QloraKitError, Stopped) as fault:
            return cls(fault=fault)


def _is_of_network(error: RuntimeError) -> bool:
    """Whether torch raises an error because another process did not do its part of a gather."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _gloo(seconds: float) -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))


def _machine() -> str:
    """Return the name of this machine, with its number among those of the launcher."""
    return f"{socket.gethostname()} {os.environ.get('GROUP_RANK', '')}"


def _status(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD
