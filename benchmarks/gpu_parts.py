"""The parts of `gpu_report.py`: one function a part, each run in a process of its own.

A part takes its settings and `send`, and calls `send` with every figure as soon as it has it. The
settings are those of `our_stack`, and those described at each part.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import our_stack
import speed_sides
import throughput
from clocks import clock_of_this_machine, timed
from measure import PROJECT
from meters import meter_of_this_machine

Settings = dict[str, Any]
Send = Callable[[dict[str, Any]], None]
_TAIL = 1500


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _is_out_of_memory(error: Exception) -> bool:
    from qlora_kit.model.memory import is_out_of_memory

    return is_out_of_memory(error)


# ---------------------------------------------------------------- tests


def tests(settings: Settings, send: Send) -> None:
    """Run the project's own tests; count them, and keep the messages of those that fail.

    Args:
        settings: `files`; `expression` of marks; `without`: parts of the names of tests to leave
            out; `last`: parts of the names of tests to run last.
        send: receives the counts after each test.
    """
    if importlib.util.find_spec("pytest") is None:
        send({"left_out": "not installed: pytest"})
        return
    import pytest

    recorder = _TestRecorder(settings, send)
    with tempfile.TemporaryDirectory() as folder:
        code = pytest.main(
            [
                *(str(PROJECT / file) for file in settings["files"]), f"--rootdir={PROJECT}",
                "-c", str(PROJECT / "pyproject.toml"), "-o", "addopts=", "-m",
                settings["expression"], "-v", "--tb=short", "--continue-on-collection-errors",
                # The warnings of another version are no fault of the tested code.
                "-o", "filterwarnings=default", "-p", "no:cacheprovider", f"--basetemp={folder}/t",
            ],
            plugins=[recorder],
        )  # fmt: skip
    send({"pytest_exit_code": int(code)})


class _TestRecorder:
    """A plugin of pytest that sends the outcome of each test."""

    def __init__(self, settings: Settings, send: Send) -> None:
        self._settings, self._send = settings, send
        self._counts = {"passed": 0, "failed": 0, "skipped": 0, "left out": 0}
        self._failing: dict[str, str] = {}
        self._seconds: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        last, without = self._settings["last"], self._settings["without"]
        kept = [item for item in items if not any(name in item.nodeid for name in without)]
        self._counts["left out"] = len(items) - len(kept)
        items[:] = sorted(kept, key=lambda item: any(name in item.nodeid for name in last))
        self._send({"collected": len(items)})

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._failing[report.nodeid] = str(report.longrepr)[-_TAIL:]
            self._report()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        # If the time runs out in the middle of a test, this says in which.
        self._send({"running": nodeid})

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._seconds[report.nodeid] = round(
            self._seconds.get(report.nodeid, 0.0) + report.duration, 2
        )
        if report.failed and report.nodeid not in self._failing:
            self._counts["failed"] += 1
            self._failing[report.nodeid] = str(report.longrepr)[-_TAIL:]
        elif report.when == "call" and report.passed:
            self._counts["passed"] += 1
        elif report.skipped:
            self._counts["skipped"] += 1
        if report.when == "teardown":
            self._report()

    def _report(self) -> None:
        slowest = sorted(self._seconds.items(), key=lambda item: -item[1])[:10]
        self._send({"counts": self._counts, "failing": self._failing, "slowest_seconds": slowest})


# ---------------------------------------------------------------- peaks


def peaks(settings: Settings, send: Send) -> None:
    """Measure the peak of each phase, by length, on one base that is loaded only once.

    A step is the second micro-batch of several, so it finds gradients and optimiser state.

    Args:
        settings: `lengths`: tokens a row.
        send: receives the peaks of each length once they are measured.
    """
    import torch

    import qlora_kit as qk
    from qlora_kit.model.head import head_of
    from qlora_kit.step.settle import settle
    from qlora_kit.train.optimizer import build_optimizer

    meter = meter_of_this_machine(None)
    send({"context_bytes": meter.summary()["context_bytes"]})
    hardware = qk.choose_hardware(dtype="bfloat16")
    first = settings | {"length": min(settings["lengths"])}
    started = time.perf_counter()
    base = meter.phase("load", lambda: our_stack.load(first, hardware))
    send({"load": meter.peaks_of("load"), "load_seconds": time.perf_counter() - started})
    # A CPU's meter only sees allocations and frees inside its phases.
    adapter = meter.phase("attach", lambda: speed_sides.our_adapter(first, base))
    parameters = list(adapter.parameters().values())
    optimizer = build_optimizer(parameters, our_stack.config_of(first))
    step = _Step(base.model, head_of(base.model), parameters, optimizer, meter)
    for length in settings["lengths"]:
        run = settings | {"length": length}
        config = our_stack.config_of(run)
        settle(base.model, config, hardware)
        batch = our_stack.random_batch(run, step.head.linear.out_features).to(hardware.device)
        try:
            found: dict[str, Any] = step.phases(batch, config)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            found = {"out_of_memory": throughput.first_line(error)}
        meter.phase("between lengths", lambda: optimizer.zero_grad(set_to_none=True))
        send({f"{length} tokens": found})
        if _on_gpu():
            torch.cuda.empty_cache()
    if _on_gpu():
        free, total = torch.cuda.mem_get_info()
        # By now the context holds the kernels that were loaded meanwhile as well.
        send({"context_at_the_end_bytes": total - free - torch.cuda.memory_reserved()})


class _Step:
    """One step on a batch, run phase by phase."""

    def __init__(
        self, model: Any, head: Any, parameters: list[Any], optimizer: Any, meter: Any
    ) -> None:
        self.model, self.head, self.parameters = model, head, parameters
        self.optimizer, self.meter = optimizer, meter

    def phases(self, batch: Any, config: Any) -> dict[str, Any]:
        import torch

        from qlora_kit.tasks.causal import loss_sum, scores
        from qlora_kit.train.optimizer_step import differentiate

        self.meter.phase("steps before", self._step_before)
        chunk = config.loss_chunk_tokens
        found: dict[str, Any] = {}

        def phase(name: str, work: Callable[[], Any]) -> Any:
            result = self.meter.phase(name, work)
            found[name] = self.meter.peaks_of(name)
            return result

        def move() -> None:
            torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
            self.optimizer.step()

        self.model.train()
        loss = phase("forward", lambda: loss_sum(self.model, batch, self.head, chunk_tokens=chunk))
        found["loss"] = float(loss.detach()) / batch.weight
        phase("backward", partial(differentiate, loss))
        del loss
        phase("optimizer", move)
        self.meter.phase("step's end", lambda: self.optimizer.zero_grad(set_to_none=True))
        self.model.eval()
        phase("evaluation", lambda: scores(self.model, batch, self.head, chunk))
        return found

    def _step_before(self) -> None:
        """Leave the gradients of an earlier micro-batch, and the optimiser's state."""
        import torch

        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()


# ---------------------------------------------------------------- speed


def speed(settings: Settings, send: Send) -> None:
    """Time optimiser steps of one side, see `throughput.measure`."""
    throughput.measure(settings, send)


# ---------------------------------------------------------------- profile


def profile(settings: Settings, send: Send) -> None:
    """Record one step of the kit, and add up its time by part.

    Args:
        settings: `shapes`.
        send: receives the parts of each shape.
    """
    take = speed_sides.SIDES["ours"].build(settings, clock_of_this_machine())
    for rows, tokens in settings["shapes"]:
        found = throughput.profiled(settings, take, (rows, tokens))
        send({throughput.shape_name(rows, tokens): found})


# ---------------------------------------------------------------- ragged


def ragged(settings: Settings, send: Send) -> None:
    """Time the first and the second use of rows of several lengths.

    Args:
        settings: `lengths`, all different; `multiple`: rows are padded to a multiple of this many
            tokens; `kernels` of attention.
        send: receives for each length its tokens as the model sees them, and both times.
    """
    import qlora_kit as qk
    from qlora_kit.data.batch import collate
    from qlora_kit.model.head import head_of
    from qlora_kit.step.settle import settle
    from qlora_kit.tasks.causal import loss_sum
    from qlora_kit.train.optimizer_step import differentiate

    clock = clock_of_this_machine()
    hardware = qk.choose_hardware(dtype="bfloat16")
    longest = max(settings["lengths"])
    adapter = speed_sides.our_adapter(settings)
    config = our_stack.config_of(settings | {"length": longest})
    model = adapter.base.model.train()
    head = head_of(model)
    settle(model, config, hardware)

    def batch_of(length: int, padded_to: int) -> Any:
        ids = speed_sides.one_row(settings, length)
        padding = padded_to - length
        row = {"input_ids": ids + [0] * padding, "labels": ids + [-100] * padding, "row": 0}
        return collate([row], 0).to(hardware.device)

    def step(batch: Any) -> None:
        loss: Any = loss_sum(model, batch, head, chunk_tokens=config.loss_chunk_tokens)
        differentiate(loss)
        for parameter in adapter.parameters().values():
            parameter.grad = None

    multiple = settings["multiple"]
    for kernel in settings["kernels"]:
        with speed_sides.attention_kernel(kernel):
            # The very first step takes extra time and allocates the memory of the longest row; it
            # must not be counted to any length.
            step(batch_of(longest + multiple, longest + multiple))
            for kind in ("as they are", f"padded to {multiple}"):
                for length in settings["lengths"]:
                    is_padded = kind != "as they are"
                    whole = -(-length // multiple) * multiple if is_padded else length
                    batch = batch_of(length, whole)
                    first, second = (timed(clock, lambda b=batch: step(b)) for _ in range(2))
                    found = {
                        "tokens": batch.input_ids.shape[1],
                        "first_seconds": first,
                        "second_seconds": second,
                    }
                    send({f"{kernel} kernel": {kind: {f"{length} tokens": found}}})


# ---------------------------------------------------------------- exact


def exact(settings: Settings, send: Send) -> None:
    """Repeat a few steps with and without determinism and offloading; compare time and bits.

    Args:
        settings: `shape`: rows and tokens; `warmup` and `steps`.
        send: receives each variant, and then the comparison of their bits and times.
    """
    import torch

    import qlora_kit as qk
    from qlora_kit.model.hardware import make_deterministic

    make_deterministic()
    clock, meter = clock_of_this_machine(), meter_of_this_machine(None)
    rows, tokens = settings["shape"]
    row = speed_sides.one_row(settings, tokens)
    base = our_stack.load(settings, qk.choose_hardware(dtype="bfloat16"))
    weights: dict[str, list[Any]] = {}
    seconds: dict[str, float] = {}
    for name, deterministic, offload in _VARIANTS:
        torch.use_deterministic_algorithms(deterministic)
        adapter = speed_sides.our_adapter(settings, base, seed=0)
        steps = meter.phase(
            name,
            lambda a=adapter, o=offload: speed_sides.our_steps(
                a, row, rows, settings["warmup"] + settings["steps"], clock, offload_checkpoints=o
            ),
        )
        weights[name] = [p.detach().cpu().clone() for p in adapter.parameters().values()]
        qk.detach(adapter)
        del adapter
        found = steps.figures(rows * tokens, settings["warmup"])
        seconds[name] = found["step_seconds"]
        send({name: {**found, **meter.peaks_of(name)}})
    send({"equal_bits": _equal_bits(weights), "times_as_long": _ratios(seconds)})


# Each of the last three differs from the one before in one thing, or is a repetition of it.
_VARIANTS = (
    ("free", False, True),
    ("free, again", False, True),
    ("deterministic", True, True),
    ("deterministic, again", True, True),
    ("deterministic, not offloaded", True, False),
)


def _equal_bits(weights: dict[str, list[Any]]) -> dict[str, bool]:
    import torch

    def same(one: str, other: str) -> bool:
        return all(map(torch.equal, weights[one], weights[other]))

    return {
        "of two runs": same("free", "free, again"),
        "of two deterministic runs": same("deterministic", "deterministic, again"),
        "with and without offloading": same("deterministic", "deterministic, not offloaded"),
    }


def _ratios(seconds: dict[str, float]) -> dict[str, float]:
    free = statistics.mean([seconds["free"], seconds["free, again"]])
    steady = statistics.mean([seconds["deterministic"], seconds["deterministic, again"]])
    return {
        "deterministic": steady / free,
        "offloaded": steady / seconds["deterministic, not offloaded"],
    }


# ---------------------------------------------------------------- limits


def limits(settings: Settings, send: Send) -> None:
    """Run the command line under a memory limit; keep its exit code and its account of memory.

    Args:
        settings: `options` of `qlora-kit train`.
        send: receives the exit code, the time and the account.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder) / "rows.txt", Path(folder) / "run"
        data.write_text("forty-two comes before forty-three and after forty-one. " * 2000)
        options = [*settings["options"], "--data", str(data), "--output", str(output)]
        started = time.perf_counter()
        # It prints to the output of this process, so its last lines are kept even if it is killed.
        code = subprocess.call(
            [sys.executable, "-m", "qlora_kit", "train", *options], cwd=folder,
            env={**os.environ, "COLUMNS": "100"},
        )  # fmt: skip
        seconds = time.perf_counter() - started
        send({"options": " ".join(settings["options"]), "exit_code": code, "seconds": seconds})
        account = output / "memory.json"
        if account.is_file():
            send(_memory_figures(json.loads(account.read_text())))


def _memory_figures(account: dict[str, Any]) -> dict[str, Any]:
    """Return the figures to compare from a run's memory.json, and the file without its timeline."""
    rehearsal = dict(account.get("rehearsal") or {})
    for drawn in ("timeline_bytes", "purposes"):
        rehearsal.pop(drawn, None)
    compared = ("rows", "tokens", "predicted_peak_bytes", "measured_peak_bytes", "difference")
    return {
        "rehearsal": {name: rehearsal.get(name) for name in compared},
        "run": account.get("run"),
        "memory.json": {**account, "rehearsal": rehearsal},
    }
