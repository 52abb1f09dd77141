"""Compare the predicted time of a step with the measured one, on this CPU and on a GPU's record.

    python benchmarks/time_predictions.py
    python benchmarks/time_predictions.py --only cpu

On this CPU it measures the ceilings and takes optimiser steps of each shape. The fastest step
counts. With one thread (OMP_NUM_THREADS=1) both are times of the processor, so other
processes matter less.

For the GPU it takes the steps and rates that `results/gpu` has of one H100. There the host's time
for a call was not measured. It is taken from one step that the host limits (marked "fitted"), and
the other steps are predicted with it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from typing import Any

import our_stack
from measure import RESULTS, print_table, save_results
from speed_sides import one_row

from qlora_kit.storage import parse_json

WARM_UP = 1
# Model, rows, tokens, targets, dtype, steps.
CPU_SHAPES = (
    ("smollm2-135m-instruct", 2, 256, "attention", "float32", 3),
    ("smollm2-135m-instruct", 2, 256, "attention", "bfloat16", 3),
    ("smollm2-135m-instruct", 1, 64, "all-linear", "float32", 5),
    ("demo", 8, 56, "attention", "float32", 12),
)
GPU_SIDES: dict[str, dict[str, Any]] = {
    "": {}, ", plain kernels": {"kernels": "plain"}, ", nothing recomputed": {"recompute": False},
}  # fmt: skip
# The step from which the host's time for a call is taken.
FITTED = "1 x 2048, nothing recomputed"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=("cpu", "gpu"), help="leave the other out")
    only = parser.parse_args().only
    found: dict[str, Any] = {}
    if only != "cpu":
        found["gpu"] = gpu_rows()
    if only != "gpu":
        found["cpu"] = cpu_rows()
    for rows in found.values():
        print_table(rows, list(rows[0]))
    kept = RESULTS / "time_predictions.json"
    before = parse_json(kept.read_text(), str(kept)) if kept.is_file() else {}
    others = {name: before[name] for name in ("cpu", "gpu") if name in before}
    print("saved", save_results("time_predictions", {**others, **found}))


def run_of(model: str, rows: int, tokens: int, targets: str) -> dict[str, Any]:
    """Return a run of `our_stack` with random weights in 4 bits."""
    return {
        "model": model, "scaled": False, "weights": "random", "bits": 4, "rank": 16,
        "targets": targets, "setting": "default", "batch_size": rows, "length": tokens,
    }  # fmt: skip


def row_of(case: str, predicted: float, measured: float) -> dict[str, Any]:
    """Return a row of the table."""
    return {
        "case": case,
        "predicted_seconds": float(f"{predicted:.3g}"),
        "measured_seconds": float(f"{measured:.3g}"),
        "predicted / measured": round(predicted / measured, 2),
    }


# ---------------------------------------------------------------- a CPU


def cpu_rows() -> list[dict[str, Any]]:
    """Measure the ceilings, and the steps of each shape."""
    import torch

    from qlora_kit.model.ceilings import measured

    ceilings = measured(torch.device("cpu"))
    return [cpu_row(ceilings, *shape) for shape in CPU_SHAPES]


def cpu_row(
    ceilings: Any, model: str, rows: int, tokens: int, targets: str, dtype: str, steps: int
) -> dict[str, Any]:
    """Take some steps; return the prediction beside the fastest of them."""
    import torch

    import qlora_kit as qk
    from qlora_kit.events import Event, RunStarted, StepFinished
    from qlora_kit.plan.duration import StepWork, step_seconds
    from qlora_kit.plan.simulate import BatchShape, simulated_run
    from qlora_kit.plan.subject import RowSizes, Subject

    run = run_of(model, rows, tokens, targets)
    hardware = qk.choose_hardware("cpu", dtype)
    spec = our_stack.spec_of(run)
    config = qk.TrainConfig(
        batch_size=rows, gradient_accumulation_steps=1, max_steps=steps, max_length=tokens,
        targets=(targets,), device="cpu", dtype=dtype,
    )  # fmt: skip
    subject = Subject(spec, qk.LoraSpec.of(config), hardware, RowSizes(tokens))
    with simulated_run(subject, config, spec.skeleton()) as simulated:
        simulated.step(config, BatchShape(rows, tokens))
        work = StepWork(simulated.work, simulated.update_work, 1, rows * tokens)
    adapter = qk.attach(qk.load_base(spec, hardware), qk.LoraSpec.of(config))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    marks: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, RunStarted | StepFinished):
            marks.append(clock())

    ids = one_row(run, tokens)
    data = [{"input_ids": ids, "labels": ids, "row": index} for index in range(rows)]
    qk.train_adapter(adapter, data, config, announce=listen)
    seconds = [end - start for start, end in itertools.pairwise(marks)]
    case = f"{model}, {rows} x {tokens}, {targets}, {dtype}"
    found = row_of(case, step_seconds(work, ceilings).all, min(seconds[WARM_UP:]))
    print(found, file=sys.stderr)
    return found


# ---------------------------------------------------------------- the record of a GPU


def gpu_rows() -> list[dict[str, Any]]:
    """Predict the steps that `results/gpu/speed.json` has, from the rates of the same machine."""
    from qlora_kit.plan.duration import CALL_FACTOR, seconds_of

    ours = _recorded("speed")["runs"]["ours"]["figures"]
    works = {
        f"{rows} x 2048{side}": work_of(rows, options)
        for rows in (1, 4)
        for side, options in GPU_SIDES.items()
    }
    fitted = works[FITTED].operations.total() * CALL_FACTOR
    call_seconds = ours[FITTED]["step_seconds"] / fitted
    ceilings = recorded_ceilings(ours["matmul"]["flop_per_second"], call_seconds)
    rows = []
    for case, work in works.items():
        found = seconds_of(work, ceilings)
        limit = "fitted" if case == FITTED else found.bound
        rows.append(row_of(case, found.all, ours[case]["step_seconds"]) | {"limit": limit})
    return rows


def work_of(rows: int, options: dict[str, Any]) -> Any:
    """Return the work of one micro-batch of deepseek-7b with some options of the step."""
    from qlora_kit.model.architecture import build_skeleton
    from qlora_kit.plan.simulate import BatchShape, simulated_run

    run = run_of("deepseek-7b", rows, 2048, "attention")
    config = our_stack.config_of(run).model_copy(
        update={"gradient_accumulation_steps": 1, **options}
    )
    subject = our_stack._planned(our_stack.source_of(run), config, for_gpu=True)
    skeleton = build_skeleton(subject.spec.architecture())
    with simulated_run(subject, config, skeleton) as simulated:
        simulated.step(config, BatchShape(rows, 2048))
        return simulated.work


def recorded_ceilings(flop_per_second: float, call_seconds: float) -> Any:
    """Return the rates of the recorded H100.

    Memory: the fastest pass of `kernels.json`. Link: the copies to the device of `profile.json`,
    30 checkpoints of a layer and one of the embedding. The rate of fp32 products is that of the
    data sheet at the same share.
    """
    from qlora_kit.model.ceilings import Ceilings

    passes = [row["gb_per_s"] for row in _recorded("kernels")["rows"] if row["gb_per_s"]]
    profile = _recorded("profile")["runs"]["ours"]["figures"]["1 x 2048"]
    copies = next(row for row in profile["top"] if "HtoD (Pinned" in row["name"])
    sheet_share = flop_per_second / 989e12
    return Ceilings(
        device="NVIDIA H100 80GB HBM3",
        flop_per_second={"bfloat16": flop_per_second, "float32": sheet_share * 67e12},
        bytes_per_second=((1, max(passes) * 1e9),),
        unpacked_per_second={},
        link_bytes_per_second=copies["launches"] * 2048 * 4096 * 2 / copies["seconds"],
        call_seconds=call_seconds,
        is_measured=True,
    )


def _recorded(name: str) -> Any:
    file = RESULTS / "gpu" / f"{name}.json"
    return parse_json(file.read_text(encoding="utf-8"), str(file))


if __name__ == "__main__":
    main()
