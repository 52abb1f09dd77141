"""Memory that runs out: fewer rows at a time and the same result, or one line and exit 3."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qlora_kit as qk
from qlora_kit.errors import OutOfMemory
from qlora_kit.events import Event, MicroBatchHalved, StepFinished
from qlora_kit.infer.evaluate import evaluate
from qlora_kit.tasks.causal import CAUSAL, CausalObjective
from qlora_kit.tasks.task import Task
from qlora_kit.train.optimizer_step import OptimizerStep

from .children import Ended, finish, spread
from .loops import make_adapter, make_rows, options
from .moments import at_call
from .runs import Sample, after_a_crash, command, copy_run, highest_whole, kit, resumed
from .table import Row, row_of

_PROMISE = "out of memory: same rows and loss a step, or exit 3 and nothing lost"
_EXIT = 3
_MOST_RELATIVE_ERROR = 1e-4

# The errors that torch, Python and the allocator of the CPU raise.
_ERRORS: tuple[Callable[[], Exception], ...] = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: MemoryError(),
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
)


def memory(sample: Sample, per_phase: int, limits: int) -> Row:
    """Let memory run out.

    Args:
        sample: the run that memory runs out in.
        per_phase: number of faked shortages in each of training, evaluating, saving and merging.
        limits: number of runs that really have too little memory.
    """
    makers = (_in_training, _in_evaluation, in_a_save, in_a_merge)
    tasks = [partial(make, sample, number) for make in makers for number in range(per_phase)]
    tasks += [partial(_for_real, sample, number) for number in range(limits)]
    results = spread(lambda task: task(), tasks, sample.folder / "memory")
    detail = f"{per_phase} each in training, evaluating, saving, merging; {limits} real shortages"
    return row_of(_PROMISE, results, detail)


# ---------------------------------------------------------------- training


def _in_training(sample: Sample, number: int) -> list[str]:
    """Let micro-batches of too many rows fail, in forward or backward, early or late."""
    most_rows, place = (1, 2, 3)[number % 3], ("forward", "backward")[number % 2]
    expected = _trained(sample, None)
    found = _trained(sample, partial(_fail, number, most_rows, place, first=3 * number))
    what = f"training, {place}, more than {most_rows} rows, error {number % len(_ERRORS)}"
    return [f"{what}: {fault}" for fault in _wrong_training(expected, found, most_rows)]


# Rows, tokens and loss of each step, and the sizes that the micro-batch was cut to.
_Trained = tuple[list[tuple[list[int], int, float]], list[int]]


def _trained(sample: Sample, fail: Callable[..., Tensor] | None) -> _Trained:
    adapter = make_adapter(sample.model)
    steps: list[tuple[list[int], int, float]] = []
    cuts: list[int] = []
    rows: list[int] = []
    calls = itertools.count()
    real_attempt, real_loss_sum = OptimizerStep._attempt, CausalObjective.loss_sum

    def attempt(self: OptimizerStep, *window: Any) -> Any:
        rows.clear()
        return real_attempt(self, *window)

    def loss_sum(self: CausalObjective, batch: Any) -> Tensor:
        rows.extend(batch.rows)
        summed = real_loss_sum(self, batch)
        return fail(summed, len(batch.rows), next(calls)) if fail else summed

    def listen(event: Event) -> None:
        if isinstance(event, StepFinished):
            steps.append((sorted(rows), event.tokens, event.loss))
        elif isinstance(event, MicroBatchHalved):
            cuts.append(event.rows_now)

    OptimizerStep._attempt = attempt  # type: ignore[method-assign]
    CausalObjective.loss_sum = loss_sum  # type: ignore[method-assign]
    try:
        qk.train_adapter(adapter, make_rows(), options(), announce=listen)
    finally:
        OptimizerStep._attempt = real_attempt  # type: ignore[method-assign]
        CausalObjective.loss_sum = real_loss_sum  # type: ignore[method-assign]
    return steps, cuts


def _fail(
    number: int, most_rows: int, place: str, summed: Tensor, rows: int, call: int, *, first: int
) -> Tensor:
    """Fail with too many rows from call `first` on; the calls before it must be undone."""

    def refuse(gradient: Tensor | None = None) -> None:
        raise _ERRORS[number % len(_ERRORS)]()

    if rows > most_rows and call >= first % 12:
        if place == "forward":
            refuse()
        summed.register_hook(refuse)
    return summed


def _wrong_training(expected: _Trained, found: _Trained, most_rows: int) -> Iterator[str]:
    if not found[1] or found[1][-1] > most_rows:
        yield f"the micro-batch was cut to {found[1]}"
    if [step[:2] for step in found[0]] != [step[:2] for step in expected[0]]:
        yield "the rows of a step changed"
    for (_, _, ours), (_, _, theirs) in zip(found[0], expected[0], strict=False):
        if abs(ours - theirs) > _MOST_RELATIVE_ERROR * abs(theirs):
            yield f"loss {ours}; expected {theirs}"


# ---------------------------------------------------------------- evaluation


def _in_evaluation(sample: Sample, number: int) -> list[str]:
    from qlora_kit.tasks import causal as module

    base = make_adapter(sample.model).base
    expected = evaluate(base, make_rows(), batch_size=8)
    most_rows, first, calls = (1, 2, 3, 5)[number % 4], number % 3, itertools.count()
    real = module.scores

    def scores(model: Any, batch: Any, *rest: Any) -> Any:
        scored = real(model, batch, *rest)
        if len(batch.rows) > most_rows and next(calls) >= first:
            raise _ERRORS[number % len(_ERRORS)]()
        return scored

    module.scores = scores
    try:
        found = evaluate(base, make_rows(), batch_size=8)
    finally:
        module.scores = real
    same = (found.rows, found.weight) == (expected.rows, expected.weight)
    if not same or abs(found.loss - expected.loss) > _MOST_RELATIVE_ERROR * expected.loss:
        return [f"evaluating, more than {most_rows} rows: {found}; expected {expected}"]
    return []


# ---------------------------------------------------------------- saving and merging


_IN_A_SAVE = ("optimizer_tensors", "save_adapter", "save_tensors", "random_states")
_IN_A_MERGE = ("merge:_cast", "shards:save_tensors")


def _refuse(number: int) -> None:
    raise _ERRORS[number % len(_ERRORS)]()


def in_a_save(sample: Sample, number: int) -> list[str]:
    """Let memory run out while a checkpoint is written; return the faults."""
    output = sample.folder / "memory" / f"save-{number}"
    target = f"qlora_kit.train.checkpoint:{_IN_A_SAVE[number % len(_IN_A_SAVE)]}"

    def do() -> None:
        at_call(target, 5 + number, lambda: _refuse(number))
        command(sample.arguments(output))

    ended = finish(do, output.with_suffix(".streams"))
    wrong = _wrong_end(ended)
    if not highest_whole(output)[0]:
        wrong.append("no checkpoint from before")
    wrong += after_a_crash(output) + resumed(sample, output, output.with_suffix(".streams"))
    shutil.rmtree(output)
    return [f"saving, {target}: {fault}" for fault in wrong]


def in_a_merge(sample: Sample, number: int) -> list[str]:
    """Let memory run out while the adapter of the run is merged; return the faults."""
    folder = sample.folder / "memory" / f"merge-{number}"
    adapter = copy_run(sample.unbroken, folder / "run")
    arguments = ["export", str(adapter), "--to", str(folder / "merged"), "--device", "cpu"]
    name = _IN_A_MERGE[number % len(_IN_A_MERGE)]

    def do() -> None:
        nth = 1 if name == "shards:save_tensors" else 1 + number
        at_call(f"qlora_kit.export.{name}", nth, lambda: _refuse(number))
        command(arguments)

    wrong = _wrong_end(finish(do, folder.with_suffix(".streams")))
    if os.listdir(folder) != ["run"]:
        wrong.append(f"left {os.listdir(folder)}")
    if code := kit(arguments, folder.with_suffix(".streams")).code:
        wrong.append(f"a second merge ended with {code}")
    shutil.rmtree(folder)
    return [f"merging, {name}: {fault}" for fault in wrong]


def _wrong_end(ended: Ended) -> list[str]:
    lines = ended.error_lines
    if ended.code != _EXIT or len(lines) != 1 or "memory" not in lines[0]:
        return [f"exit {ended.code}, said {lines}"]
    return []


# ---------------------------------------------------------------- for real

REAL_ROWS, REAL_TOKENS = 96, 120
_SMALLEST_ROOM_BYTES = 8_000_000

# What is trained: an adapter, its rows, and their task.
Trained = tuple[Any, list[dict[str, Any]], Task]


def _for_real(sample: Sample, number: int) -> list[str]:
    streams = sample.folder / "memory" / f"real-{number}"
    return short_of_memory(
        lambda: (make_adapter(sample.model), make_rows(REAL_ROWS, REAL_TOKENS), CAUSAL),
        number,
        streams,
    )


def short_of_memory(make: Callable[[], Trained], number: int, streams: Path) -> list[str]:
    """Take away the memory that a micro-batch needs, so that the allocator itself refuses.

    Args:
        make: makes what is trained.
        number: each has twice the room of the one before it.
        streams: where the child writes.
    """

    def do() -> None:
        adapter, rows, task = make()
        few = options(max_steps=1, batch_size=1, gradient_accumulation_steps=1)
        qk.train_adapter(adapter, rows, few, task=task)
        room = _in_use_bytes() + _SMALLEST_ROOM_BYTES * 2**number
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        many = options(max_steps=2, batch_size=len(rows), gradient_accumulation_steps=1)
        try:
            qk.train_adapter(adapter, rows, many, task=task, announce=_say_cut)
        except OutOfMemory as error:
            print(error)  # noqa: T201
            raise SystemExit(error.exit_code) from error

    ended = finish(do, streams)
    is_cut = ended.code == 0 and "cut to" in ended.output
    is_refused = ended.code == _EXIT and ended.output.count("out of memory") == 1
    if not (is_cut or is_refused):
        return [f"a real shortage: exit {ended.code}: {ended.errors[-300:]} {ended.output}"]
    return []


def _say_cut(event: Event) -> None:
    if isinstance(event, MicroBatchHalved):
        print(f"cut to {event.rows_now}", flush=True)  # noqa: T201


def _in_use_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
