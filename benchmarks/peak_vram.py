"""Measure the peak memory of loading a model and of training steps on it.

    python benchmarks/peak_vram.py --model deepseek-7b --bits 4
    python benchmarks/peak_vram.py --model deepseek-7b --bits 4,8 --lengths 512,2048 --limit 10GB

On a GPU: the real architecture (random weights unless `--weights pretrained`: the memory is
the same), each row in a fresh process, per phase the peak allocated and reserved by torch,
and at the end what the device has in use. `--limit` makes torch refuse to go beyond, which
emulates a smaller card.

Without a GPU: the same code on a model scaled down to an eighth of the width and four
layers, and the CPU allocator's own record of it; the table says so. These figures show where
memory goes, not what the full model needs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import RESULTS, print_table, run_side, save_results

PHASES = ("load", "forward_backward", "optimizer", "second_step", "evaluation")
_SCALE, _LAYERS = 8, 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="deepseek-7b")
    parser.add_argument("--bits", type=_integers, default=[4], help="such as 4,8,16")
    parser.add_argument("--lengths", type=_integers, default=[512, 1024, 2048], help="tokens a row")
    parser.add_argument("--batch-sizes", type=_integers, default=[1], help="rows a micro-batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="attention")
    parser.add_argument("--weights", choices=("random", "pretrained"), default="random")
    parser.add_argument("--limit", help="hard limit of the GPU memory, such as 10GB")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure_one(json.loads(arguments.settings))))
        return
    rows = [measure_row(settings) for settings in grid(arguments)]
    report(arguments, rows)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def grid(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the settings of every row, in the order of the table."""
    common = {k: getattr(arguments, k) for k in ("model", "rank", "targets", "weights", "limit")}
    combinations = itertools.product(arguments.bits, arguments.batch_sizes, arguments.lengths)
    return [
        {**common, "bits": bits, "batch_size": batch, "length": length}
        for bits, batch, length in combinations
    ]


def measure_row(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure one configuration in a fresh process."""
    found = run_side(sys.argv[0], "measure", settings)
    shown = {k: settings[k] for k in ("bits", "batch_size", "length")}
    print(f"measured {shown}", file=sys.stderr)
    return {**shown, **found}


# ---------------------------------------------------------------- one configuration


def measure_one(settings: dict[str, Any]) -> dict[str, Any]:
    """Load, take two optimiser steps and evaluate; return the peak of each phase."""
    import torch

    meter: _GpuMeter | _CpuMeter
    meter = _GpuMeter(settings["limit"]) if torch.cuda.is_available() else _CpuMeter()
    try:
        _run_phases(settings, meter)
    except torch.cuda.OutOfMemoryError:
        return {"fits": False, **meter.summary()}
    return {"fits": True, **meter.summary()}


def _run_phases(settings: dict[str, Any], meter: _GpuMeter | _CpuMeter) -> None:
    """Run the kit's own stages, each as one phase of the meter."""
    import torch

    import qlora_kit as qk
    from qlora_kit.data.batch import collate
    from qlora_kit.model.head import head_of
    from qlora_kit.step.forward import loss_sum, scores
    from qlora_kit.step.reducers import apply, resolve
    from qlora_kit.train.optimizer import build_optimizer

    base = meter.phase("load", lambda: _load(settings))
    hardware = base.hardware
    meter.note("parameters", base.parameters)
    adapter = qk.attach(base, qk.LoraSpec(rank=settings["rank"], targets=(settings["targets"],)))
    parameters = list(adapter.parameters().values())
    optimizer = build_optimizer(parameters, qk.TrainConfig())
    head = head_of(base.model)
    apply(base.model, resolve(qk.TrainConfig(), hardware), hardware)
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.model.config.get_text_config().vocab_size
    shape = (settings["batch_size"], settings["length"])
    ids = torch.randint(0, vocabulary, shape, generator=generator).tolist()
    batch = collate([{"input_ids": r, "labels": r, "row": 0} for r in ids], 0).to(hardware.device)

    def forward_backward() -> None:
        base.model.train()
        (loss_sum(base.model, batch, head) / batch.supervised_tokens).backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    meter.phase("forward_backward", forward_backward)
    meter.phase("optimizer", step)
    # Adam's state exists from now on: this is the step that every later one is like.
    meter.phase("second_step", lambda: (forward_backward(), step()))
    base.model.eval()
    meter.phase("evaluation", lambda: scores(base.model, batch, head))


def _load(settings: dict[str, Any]) -> Any:
    import torch

    import qlora_kit as qk
    from qlora_kit.model.fetch import fetch

    source = qk.find_model(settings["model"])
    hardware = qk.choose_hardware()
    if not torch.cuda.is_available():
        source = scaled_down(source)
    is_random = settings["weights"] == "random" or not torch.cuda.is_available()
    folder = fetch(source, random=is_random).folder
    spec = qk.BaseSpec(source, folder, qk.Quantization(settings["bits"]), is_random)
    return qk.load_base(spec, hardware)


def scaled_down(source: Any) -> Any:
    """Return the same architecture with an eighth of the width and vocabulary and four layers."""
    import dataclasses

    numbers = dict(source.architecture)
    for name in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"):
        numbers[name] = max(1, numbers[name] // _SCALE)
    numbers["num_key_value_heads"] = max(1, numbers["num_key_value_heads"] // _SCALE)
    numbers["num_hidden_layers"] = _LAYERS
    numbers["torch_dtype"] = "float32"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        numbers.pop(name, None)
    return dataclasses.replace(source, architecture=numbers, folder=None)


# ---------------------------------------------------------------- meters


class _GpuMeter:
    """Peaks of torch's caching allocator, and what the device has in use at the end."""

    def __init__(self, limit: str | None) -> None:
        import torch

        self._torch = torch
        self._found: dict[str, Any] = {"measured_on": torch.cuda.get_device_name(), "scaled": False}
        self._peaks: dict[str, dict[str, int]] = {}
        if limit:
            from qlora_kit.config import parse_size

            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, parse_size(limit) / total))
        torch.empty(1, device="cuda")
        self._used_before = self._in_use()

    def _in_use(self) -> int:
        free, total = self._torch.cuda.mem_get_info()
        return int(total - free)

    def note(self, name: str, value: Any) -> None:
        self._found[name] = value

    def phase(self, name: str, run: Callable[[], Any]) -> Any:
        cuda = self._torch.cuda
        gc.collect()
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        result = run()
        cuda.synchronize()
        self._peaks[name] = {
            "allocated_bytes": cuda.max_memory_allocated(),
            "reserved_bytes": cuda.max_memory_reserved(),
        }
        return result

    def summary(self) -> dict[str, Any]:
        allocated = {name: peak["allocated_bytes"] for name, peak in self._peaks.items()}
        return {
            **self._found,
            "phase_peaks_bytes": allocated,
            "peak_bytes": max(allocated.values(), default=0),
            "reserved_bytes": max((p["reserved_bytes"] for p in self._peaks.values()), default=0),
            "device_bytes": self._in_use(),
            "context_bytes": self._used_before,
        }


class _CpuMeter:
    """The CPU allocator's own record: live bytes after each allocation, from torch's profiler."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {"measured_on": "CPU allocator", "scaled": True}
        self._live = 0
        self._peaks: dict[str, int] = {}

    def note(self, name: str, value: Any) -> None:
        self._found[name] = value

    def phase(self, name: str, run: Callable[[], Any]) -> Any:
        from torch.profiler import ProfilerActivity, profile

        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            result = run()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            record.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        changes = [e["args"]["Bytes"] for e in events if e.get("name") == "[memory]"]
        running = list(itertools.accumulate(changes, initial=self._live))
        self._peaks[name], self._live = max(running), running[-1]
        return result

    def summary(self) -> dict[str, Any]:
        return {
            **self._found,
            "phase_peaks_bytes": self._peaks,
            "peak_bytes": max(self._peaks.values(), default=0),
            "reserved_bytes": None,
            "device_bytes": None,
        }


# ---------------------------------------------------------------- report


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print the table, draw the picture and save the figures."""
    scaled = rows[0]["scaled"]
    where = rows[0]["measured_on"]
    if scaled:
        print(
            f"\nNo GPU here: {arguments.model} scaled down (width and vocabulary / {_SCALE}, "
            f"{_LAYERS} layers, fp32), measured by the {where}.\n"
            "What the full model needs on a GPU: not measured on this machine."
        )
    print_table([_shown(row) for row in rows], ["bits", "batch", "length", *PHASES, "peak GB",
                                                "reserved GB", "device GB", "fits"])  # fmt: skip
    name = f"peak_vram_{arguments.model}_{'cpu_scaled' if scaled else 'gpu'}"
    if arguments.limit:
        name += f"_{arguments.limit}"
    print("saved", save_results(name, {"limit": arguments.limit, "rows": rows}))
    print("saved", draw(rows, RESULTS / f"{name}.png", arguments.model))


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    def gb(value: int | None) -> str:
        return "-" if value is None else f"{value / 1e9:.3f}"

    phases = {name: gb(row["phase_peaks_bytes"].get(name)) for name in PHASES}
    return {
        "bits": row["bits"], "batch": row["batch_size"], "length": row["length"], **phases,
        "peak GB": gb(row["peak_bytes"]), "reserved GB": gb(row["reserved_bytes"]),
        "device GB": gb(row["device_bytes"]), "fits": "yes" if row["fits"] else "no",
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path, model: str) -> Path:
    """Draw the peak of each phase, a group of bars for each row."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.6 * len(rows)), 4.2), layout="constrained")
    width = 0.8 / len(PHASES)
    for index, phase in enumerate(PHASES):
        heights = [row["phase_peaks_bytes"].get(phase, 0) / 1e9 for row in rows]
        x = [position + (index - len(PHASES) / 2 + 0.5) * width for position in range(len(rows))]
        axes.bar(x, heights, width, label=phase.replace("_", " "))
    labels = [f"{row['bits']} bits\n{row['batch_size']} × {row['length']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels)
    axes.set_ylabel("peak allocated (GB = 10⁹ bytes)")
    note = "scaled down, CPU allocator" if rows[0]["scaled"] else rows[0]["measured_on"]
    axes.set_title(f"{model}: peak of each phase ({note})")
    figure.legend(loc="outside lower center", ncols=len(PHASES), fontsize="small")
    axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    main()
