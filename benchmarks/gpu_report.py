"""Measure on a GPU the figures that have only been predicted, the most important parts first.

    python benchmarks/gpu_report.py                     # all, at most 13 minutes on an H100
    python benchmarks/gpu_report.py --only peaks,speed
    python benchmarks/gpu_report.py --rehearse          # the same on a CPU, with tiny models
    python benchmarks/gpu_report.py --predict           # beforehand, on a CPU

Each part runs in processes of its own and has a time limit. It writes PART.json into the folder of
`--output` as its figures come, so a killed part keeps the figures it had. The time that a part
leaves over goes to the next part. The report needs no installation of the kit and no network. Where
a package is missing, its part says so and is left out. The parts are described in `gpu_parts.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import supervise
from measure import PROJECT, RESULTS, command_line

PREDICTIONS = RESULTS / "gpu_predictions.json"
_MODEL: dict[str, Any] = {
    "model": "deepseek-7b", "scaled": False, "weights": "random", "bits": 4, "rank": 16,
    "targets": "attention", "setting": "default", "batch_size": 1, "length": 2048,
}  # fmt: skip
_SHAPES = [[1, 2048], [4, 2048]]
# Deterministic algorithms need this setting. cuBLAS reads it once, at its first product.
_STEADY_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
# A CPU that is busy with other work takes several times as long for tiny models.
_REHEARSAL_LIMIT_SECONDS = 900.0


@dataclass(frozen=True)
class ReportPart:
    """One part of the report.

    Attributes:
        name: the name of its function in `gpu_parts`, and of its file.
        limit_seconds: seconds that all its runs together may take on an H100.
        runs: the settings of its runs, in order; each run is a process.
        rehearsal: settings that replace those of every run on a CPU.
        environment: environment variables of its processes.
    """

    name: str
    limit_seconds: float
    runs: dict[str, dict[str, Any]]
    rehearsal: dict[str, Any]
    environment: dict[str, str] | None = None

    def settings(self, *, rehearse: bool) -> dict[str, dict[str, Any]]:
        """Return the settings of the runs, by name."""
        return {
            name: {**copy.deepcopy(run), **(self.rehearsal if rehearse else {})}
            for name, run in self.runs.items()
        }


# The kit as it comes, and with single things changed; only the first is compared with the peers.
_VARIANTS: dict[str, dict[str, Any]] = {
    "": {}, "plain kernels": {"kernels": "plain"}, "nothing recomputed": {"recompute": False},
}  # fmt: skip


def _speed(side: str, variants: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        **_MODEL, "side": side, "shapes": _SHAPES, "variants": variants or {"": {}}, "warmup": 2,
        "steps": 3, "matmul_size": 8192,
    }  # fmt: skip


def _limit(vram: str) -> dict[str, Any]:
    options = (
        "--model deepseek-7b --weights random --bits 4 --max-length 2048 --max-steps 3 --samples 0 "
        f"--validation-fraction 0 --gradient-accumulation-steps 4 --vram {vram}"
    )
    return {"options": options.split()}


def _files_with_gpu_tests() -> list[str]:
    """Return the test files with GPU tests; importing the others may fail where the report runs."""
    files = sorted((PROJECT / "tests").rglob("test_*.py"))
    gpu = [file for file in files if "mark.gpu" in file.read_text("utf-8")]
    return [str(file.relative_to(PROJECT)) for file in gpu]


_TINY = {"scaled": True}
_TINY_SHAPES = [[1, 192], [2, 160]]
PARTS = {
    part.name: part
    for part in (
        ReportPart(
            "tests", 170,
            {
                "gpu": {
                    "files": _files_with_gpu_tests(), "expression": "gpu", "without": ["32768"],
                    "last": ["budget", "SevenBillion"],
                }
            },
            {
                "files": ["tests/test_gpu.py", "tests/config/test_config.py"],
                "expression": "not slow",
            },
            _STEADY_CUBLAS,
        ),
        ReportPart(
            "peaks", 100,
            {
                f"{bits} bits": {**_MODEL, "bits": bits, "lengths": [512, 2048, 4096, 8192, 32768]}
                for bits in (4, 8)
            },
            {**_TINY, "lengths": [64, 160]},
        ),
        # The kit and peft run in this order, and at the end once more in the reverse order.
        ReportPart(
            "speed", 220,
            {
                "ours": _speed("ours", _VARIANTS), "peft": _speed("peft"),
                "peft + liger": _speed("peft + liger"), "trl": _speed("trl"),
                "peft, again": _speed("peft"), "ours, again": _speed("ours"),
            },
            {**_TINY, "shapes": _TINY_SHAPES, "warmup": 1, "steps": 2, "matmul_size": 256},
        ),
        ReportPart(
            "profile", 50, {"ours": {**_MODEL, "shapes": _SHAPES}},
            {**_TINY, "shapes": _TINY_SHAPES},
        ),
        ReportPart(
            "ragged", 45,
            {
                "ours": {
                    **_MODEL, "lengths": [701, 1013, 1319, 1627, 1933], "multiple": 64,
                    "kernels": ["default", "flash"],
                }
            },
            {**_TINY, "lengths": [61, 131], "multiple": 16},
        ),
        ReportPart(
            "exact", 50, {"ours": {**_MODEL, "shape": [1, 2048], "warmup": 1, "steps": 2}},
            {**_TINY, "shape": [1, 160]}, _STEADY_CUBLAS,
        ),
        ReportPart(
            "limits", 120, {"10 GB": _limit("10GB"), "24 GB": _limit("24GB")},
            {
                "options": "--model demo --max-length 128 --max-steps 2 --samples 0 --batch-size 2 "
                "--gradient-accumulation-steps 2 --vram 2GB --device cpu".split(),
            },
        ),
    )
}  # fmt: skip


def main() -> None:
    arguments = _arguments()
    if arguments.part:
        _measure_here(arguments)
        return
    if arguments.predict:
        print("saved", save_predictions(arguments))
        return
    folder = _output(arguments)
    # A SIGTERM must not leave a process on the GPU.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    predictions = _read_predictions(arguments.predictions)
    spare = 0.0
    results = []
    for part in arguments.only:
        limit = arguments.limits.get(part.name, _own_limit(part, arguments.rehearse) + spare)
        result = PartResult(part, folder / f"{part.name}.json", limit, predictions.get(part.name))
        print(f"{part.name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
        spare = result.measure(arguments.rehearse)
        results.append(result)
    for result in results:
        print("\n".join(result.lines()))
    print("saved", folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    names = ",".join(PARTS)
    add("--only", type=_parts, default=list(PARTS.values()), help=f"some of {names}")
    add("--limits", type=_limits, default={}, help="seconds of a part, as tests=60,peaks=90")
    add("--output", type=Path, help="folder of the figures; default benchmarks/results/gpu")
    add("--predictions", type=Path, default=PREDICTIONS, help="file of what is predicted")
    add("--predict", action="store_true", help="predict, write that file, and end")
    add(
        "--rehearse",
        action="store_true",
        help="tiny models, also on a CPU: tries the report itself",
    )
    add("--part", help=argparse.SUPPRESS)
    add("--settings", help=argparse.SUPPRESS)
    add("--figures", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _parts(text: str) -> list[ReportPart]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(
            f"no part {', '.join(unknown)}; expected some of {', '.join(PARTS)}"
        )
    return [PARTS[name] for name in names]


def _limits(text: str) -> dict[str, float]:
    try:
        pairs = [pair.split("=") for pair in text.split(",")]
        limits = {name.strip(): float(seconds) for name, seconds in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError("expected part=seconds, several with commas") from error
    _parts(",".join(limits))
    return limits


def _own_limit(part: ReportPart, rehearse: bool) -> float:
    return _REHEARSAL_LIMIT_SECONDS if rehearse else part.limit_seconds


def _output(arguments: argparse.Namespace) -> Path:
    """Return the folder of the figures; a rehearsal never replaces the figures of a GPU."""
    folder = arguments.output
    if folder is None:
        is_tried = arguments.rehearse
        folder = Path(tempfile.mkdtemp(prefix="gpu-report-")) if is_tried else RESULTS / "gpu"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        sys.exit(f"error: --output: {folder} cannot be written ({error.strerror}); name another")
    return folder.resolve()


# ---------------------------------------------------------------- predictions


def save_predictions(arguments: argparse.Namespace) -> Path:
    """Predict all parts and write the file."""
    from gpu_predictions import predict
    from measure import machine

    settings = {part.name: part.settings(rehearse=arguments.rehearse) for part in PARTS.values()}
    content = {"machine": machine(), "command": command_line(), "parts": predict(settings)}
    arguments.predictions.write_text(json.dumps(content, indent=1) + "\n")
    return Path(arguments.predictions)


def _read_predictions(path: Path) -> dict[str, Any]:
    try:
        parts: dict[str, Any] = json.loads(path.read_text())["parts"]
    except (OSError, ValueError, KeyError):
        print(f"note: {path}: no predictions there; nothing is compared", file=sys.stderr)
        return {}
    return parts


# ---------------------------------------------------------------- one part


class PartResult:
    """A part while it is measured; its file is rewritten with every new figure.

    Args:
        part: the part.
        path: the file of its figures.
        limit: seconds that the part may take.
        predicted: the predictions of its figures, or None.
    """

    def __init__(
        self, part: ReportPart, path: Path, limit: float, predicted: dict[str, Any] | None
    ) -> None:
        self._part, self._path, self._limit = part, path, limit
        self._predicted = predicted or {}
        self._content: dict[str, Any] = {
            "part": part.name, "command": command_line(), "machine": None,
            "status": "under way", "limit_seconds": limit, "runs": {},
        }  # fmt: skip

    def measure(self, rehearse: bool) -> float:
        """Measure every run of the part; return the seconds that are left of its limit."""
        started = time.monotonic()
        self._content["is_rehearsal"] = rehearse
        self._write()
        for name, settings in self._part.settings(rehearse=rehearse).items():
            left = self._limit - (time.monotonic() - started)
            run = self._content["runs"][name] = {"status": "under way", "figures": {}}
            if left <= 0:
                run["status"] = "left out: no time was left"
                continue
            ended = supervise.run(
                self._command(settings), self._environment(), left, self._receiver(run)
            )
            run["status"], run["seconds"] = ended.status, round(ended.seconds, 1)
            run["output_tail"] = ended.tail.splitlines()[-40:]
            self._write()
        statuses = [run["status"] for run in self._content["runs"].values()]
        is_done = all(status == "done" for status in statuses)
        self._content["status"] = "done" if is_done else "; ".join(
            f"{name}: {run['status']}" for name, run in self._content["runs"].items()
        )  # fmt: skip
        self._content["seconds"] = round(time.monotonic() - started, 1)
        self._write()
        return max(0.0, self._limit - (time.monotonic() - started))

    def _command(self, settings: dict[str, Any]) -> Callable[[int], list[str]]:
        return lambda descriptor: [
            sys.executable, str(Path(__file__).resolve()), "--part", self._part.name,
            "--settings", json.dumps(settings), "--figures", str(descriptor),
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        mine = dict(os.environ)
        # The warnings of another version must not end a measurement.
        mine.pop("PYTHONWARNINGS", None)
        given = filter(None, mine.get("PYTHONPATH", "").split(os.pathsep))
        # The paths are absolute, because a process of a part may work in another folder.
        paths = [str(PROJECT), *map(os.path.abspath, given)]
        return {
            **mine, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **(self._part.environment or {}),
        }  # fmt: skip

    def _receiver(self, run: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
        def receive(figures: dict[str, Any]) -> None:
            if "machine" in figures:
                self._content["machine"] = figures.pop("machine")
            supervise.merge_into(run["figures"], figures)
            self._write()

        return receive

    def _compared(self) -> list[dict[str, Any]]:
        from gpu_predictions import compared

        measured = {name: run["figures"] for name, run in self._content["runs"].items()}
        return compared(self._predicted, measured)

    def _write(self) -> None:
        """Replace the whole file at once, so that it can be read at any moment."""
        content = {**self._content, "predicted_and_measured": self._compared()}
        staging = self._path.with_suffix(".tmp")
        staging.write_text(without_paths(json.dumps(content, indent=1)) + "\n")
        staging.replace(self._path)

    def lines(self) -> list[str]:
        """Return the lines of the part: its status, the differences, and then all numbers."""
        lines = [f"\n{self._part.name}: {self._content['status']}, {self._content['seconds']} s"]
        for row in self._compared():
            lines.append(
                f"  {row['what']}: predicted {_shown(row['predicted'])}, measured "
                f"{_shown(row['measured'])} ({row['difference']:+.1%})"
            )
        for name, run in self._content["runs"].items():
            lines += [f"  {name}: {run['status']}", *_leaves(run["figures"], 2)]
        return lines


def _leaves(figures: dict[str, Any], depth: int) -> list[str]:
    lines = []
    for name, value in figures.items():
        if name == "memory.json":
            continue
        if isinstance(value, dict):
            lines += [f"{'  ' * depth}{name}", *_leaves(value, depth + 1)]
        elif isinstance(value, str | int | float) and "\n" not in str(value):
            lines.append(f"{'  ' * depth}{name}: {_shown(value)}")
    return lines


def _shown(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:,.6g}"
    return value if isinstance(value, str) else f"{value:,}"


def without_paths(text: str) -> str:
    """Return the text without the folders of the project and its packages on this machine."""
    places = {str(PROJECT): ".", sys.prefix: "…", sys.base_prefix: "…", tempfile.gettempdir(): "…"}
    for place in sorted(places, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place, places[place])
    return text


# ---------------------------------------------------------------- in the part's own process


def _measure_here(arguments: argparse.Namespace) -> None:
    send = supervise.sender(arguments.figures)
    import gpu_parts
    from measure import machine

    send({"machine": machine()})
    getattr(gpu_parts, arguments.part)(json.loads(arguments.settings), send)


if __name__ == "__main__":
    main()
