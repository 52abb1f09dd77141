"""Every variant of LoRA on the same data, steps and number of trained parameters.

    python benchmarks/variants.py losses --model STORIES --text FILE     # three seeds each
    python benchmarks/variants.py best --model SMOLLM2 --data FILE       # the best six of them
    python benchmarks/variants.py times --model STORIES --text FILE      # on a quiet machine
    python benchmarks/variants.py table

`losses` trains the small model on the text. Each variant has three learning rates, with one seed,
and more where the best is the least or the largest of them; the best of all is run with two more
seeds. `best` trains the larger model with the six variants that are best there, and plain LoRA.
`times` runs each variant after plain LoRA, in turns, takes the median of the steps, and compares it
with the median of all runs of plain LoRA. Every run is a `train` of the command line in a process
of its own.

The file of results is read first and written after every run: a benchmark that was stopped goes on
where it was. A variant whose matrices have other sizes has the rank with which it trains as many
parameters as plain LoRA, as nearly as a whole rank allows; the table says the number.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import PROJECT, RESULTS, machine_and_command, print_table, run_kit

RANK = 8
SEEDS = (1, 2, 3)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FIRST_RATES = RATES[2:5]
SMOLLM2_RATE = 5e-4
BEST = 6
FILE = RESULTS / "variants.json"
_ROW_CHARACTERS = 200
_HELD_OUT_ROWS = 100

# Name: the options, and the rank that trains as many parameters as plain LoRA of rank 8.
VARIANTS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "LoRA": (RANK, ()),
    "rsLoRA": (RANK, ("--rslora",)),
    "DoRA": (RANK, ("--dora",)),
    "LoRA+": (RANK, ("--loraplus-ratio", "16")),
    "PiSSA": (RANK, ("--init", "pissa")),
    "OLoRA": (RANK, ("--init", "olora")),
    "LoftQ": (RANK, ("--init", "loftq")),
    "EVA": (RANK, ("--init", "eva")),
    "LoRA-GA": (RANK, ("--init", "lora-ga")),
    "learned scale": (RANK, ("--learned-scale",)),
    "frozen A": (2 * RANK, ("--freeze-a",)),
    "VB-LoRA": (RANK, ("--vblora",)),
    "rank budget": (RANK, ("--rank-budget", "{budget}")),
    "merge-aware": (RANK, ("--merge-aware",)),
}


@dataclass(frozen=True)
class Asked:
    """A run: what is trained, and how.

    Attributes:
        stage: the part of the benchmark, "losses", "best" or "times".
        variant: its name.
        rate: the learning rate.
        seed: the seed.
    """

    stage: str
    variant: str
    rate: float
    seed: int


class Results:
    """The runs that are done, in a file that is written after each of them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.runs: list[dict[str, Any]] = []
        self._made_by: dict[str, Any] = {}
        if file.is_file():
            known = json.loads(file.read_text())
            self.runs, self._made_by = known["runs"], known["made_by"]

    def of(self, stage: str, variant: str) -> list[dict[str, Any]]:
        """Return the runs of a variant in a stage."""
        return [run for run in self.runs if (run["stage"], run["variant"]) == (stage, variant)]

    def has(self, asked: Asked) -> bool:
        """Whether a run is done."""
        key = asdict(asked)
        return any(all(run[name] == value for name, value in key.items()) for run in self.runs)

    def add(self, asked: Asked, found: Mapping[str, Any]) -> None:
        """Note a run, and write the file."""
        self.runs.append({**asdict(asked), **found})
        self._file.parent.mkdir(exist_ok=True)
        # A call adds to the runs of one stage, and stages may be of different machines.
        self._made_by[asked.stage] = machine_and_command()
        content = {"made_by": self._made_by, "runs": self.runs}
        self._file.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Run a stage, or print the table of what was run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=[*STAGES, "table"])
    parser.add_argument("--model", help="folder of the base")
    parser.add_argument("--text", type=Path, help="text to learn, cut into rows")
    parser.add_argument("--data", type=Path, help="records to learn, instead of --text")
    parser.add_argument("--steps", type=int, help="optimiser steps of a run")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at one time; not for times")
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    results = Results(arguments.results)
    if arguments.stage != "table":
        with tempfile.TemporaryDirectory() as folder:
            given = _data(arguments, Path(folder))
            STAGES[arguments.stage](results, given, arguments)
    _print(results)


# ---------------------------------------------------------------- the stages


def _losses(results: Results, given: Sequence[str], arguments: argparse.Namespace) -> None:
    """Choose the learning rate of each variant with one seed; run it with two more."""
    wanted = {(name, rate) for name in arguments.only for rate in FIRST_RATES}
    tried: set[tuple[str, float]] = set()
    while wanted > tried:
        _run_all(_asked(wanted), results, given, arguments)
        tried = set(wanted)
        # The best rate has one beside it on either side, or there is no telling that it is.
        for name in arguments.only:
            at = RATES.index(_best_rate(results, name))
            wanted |= {(name, rate) for rate in RATES[max(0, at - 1) : at + 2]}
    more = [
        Asked("losses", name, _best_rate(results, name), seed)
        for name in arguments.only
        for seed in SEEDS[1:]
    ]
    _run_all(more, results, given, arguments)


def _asked(wanted: Iterable[tuple[str, float]]) -> list[Asked]:
    return [Asked("losses", name, rate, SEEDS[0]) for name, rate in sorted(wanted)]


def _best(results: Results, given: Sequence[str], arguments: argparse.Namespace) -> None:
    """Run the best variants on the larger model, at the rates that suited the smaller one.

    A rate is that of plain LoRA for this model, times what the variant's best rate was of plain
    LoRA's best rate on the small model.
    """
    ranked = sorted(VARIANTS, key=lambda name: _mean_loss(results, name))
    names = list(dict.fromkeys(["LoRA", *ranked[:BEST]]))
    plain = _best_rate(results, "LoRA")
    runs = [
        Asked("best", name, SMOLLM2_RATE * _best_rate(results, name) / plain, SEEDS[0])
        for name in names
    ]
    _run_all(runs, results, given, arguments)


def _times(results: Results, given: Sequence[str], arguments: argparse.Namespace) -> None:
    """Run each variant just after plain LoRA, so that both see the same machine."""
    for number, name in enumerate(arguments.only):
        for side in ("LoRA", name):
            # The seed tells the runs of plain LoRA apart.
            asked = Asked("times", side, FIRST_RATES[0], 100 + number)
            if not results.has(asked):
                results.add(asked, {"beside": name, **_run(asked, given, arguments)})


STAGES = {"losses": _losses, "best": _best, "times": _times}
_STEPS = {"losses": 80, "best": 40, "times": 30}


def _run_all(
    runs: Sequence[Asked], results: Results, given: Sequence[str], arguments: argparse.Namespace
) -> None:
    left = [asked for asked in runs if not results.has(asked)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for asked, found in zip(
            left, pool.map(lambda asked: _run(asked, given, arguments), left), strict=True
        ):
            results.add(asked, found)
            print(asked, found["loss"], flush=True)


def _run(asked: Asked, given: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train; return the loss on held-out rows, the median step, the peak, the trained number."""
    rank, options = VARIANTS[asked.variant]
    options = tuple(each.format(budget=_budget(arguments.model)) for each in options)
    steps = arguments.steps or _STEPS[asked.stage]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        run_kit(
            PROJECT, "train", "--model", arguments.model, *given, "--bits", "4",
            "--targets", "all-linear", "--rank", str(rank), *options, "--max-steps", str(steps),
            "--eval-steps", str(steps), "--learning-rate", str(asked.rate),
            "--seed", str(asked.seed), "--samples", "0", "--no-stream-data", "--output",
            str(output),
        )  # fmt: skip
        rows = _logged(output)
        memory = json.loads((output / "memory.json").read_text())
        trained = _trained(output)
    of_steps = [row["step_seconds"] for row in rows if "step_seconds" in row]
    return {
        "steps": steps,
        "loss": [row["eval_loss"] for row in rows if "eval_loss" in row][-1],
        "train_losses": [row["loss"] for row in rows if "loss" in row][:: max(1, steps // 20)],
        "step_seconds": statistics.median(of_steps[1:]),
        "measured_peak_bytes": memory["rehearsal"]["measured_peak_bytes"],
        "trained_parameters": trained,
    }


def _trained(output: Path) -> int:
    """Return the number of parameters that the optimiser of a run moves."""
    from safetensors import safe_open

    checkpoint = output / (output / "last").read_text().strip()
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.endswith("/exp_avg")]  # noqa: SIM118
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def _logged(output: Path) -> list[dict[str, Any]]:
    lines = (output / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _budget(model: str) -> int:
    """Return the sum of the ranks of all linear layers of a Llama at the rank of plain LoRA."""
    layers: int = json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
    return 7 * layers * RANK


def _data(arguments: argparse.Namespace, folder: Path) -> tuple[str, ...]:
    """Return the options that name the data; text is cut into rows, some of them held out."""
    if arguments.data is not None:
        return (
            "--data", str(arguments.data), "--max-length", "256", "--long-samples", "truncate",
            "--batch-size", "4", "--gradient-accumulation-steps", "1",
        )  # fmt: skip
    text = arguments.text.read_text(encoding="utf-8")
    rows = [text[at : at + _ROW_CHARACTERS] for at in range(0, len(text), _ROW_CHARACTERS)]
    random.Random(0).shuffle(rows)
    files = []
    for name, part in (("train", rows[_HELD_OUT_ROWS:]), ("held_out", rows[:_HELD_OUT_ROWS])):
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("\n".join(json.dumps({"text": row}) for row in part) + "\n")
    return (
        "--data", str(files[0]), "--validation", str(files[1]), "--max-length", "256",
        "--batch-size", "8", "--gradient-accumulation-steps", "1",
    )  # fmt: skip


# ---------------------------------------------------------------- the table


def _best_rate(results: Results, name: str) -> float:
    of_one_seed = [run for run in results.of("losses", name) if run["seed"] == SEEDS[0]]
    best: float = min(of_one_seed, key=lambda run: run["loss"])["rate"]
    return best


def _at_best_rate(results: Results, name: str) -> list[dict[str, Any]]:
    runs = results.of("losses", name)
    return [run for run in runs if run["rate"] == _best_rate(results, name)] if runs else []


def _mean_loss(results: Results, name: str) -> float:
    runs = _at_best_rate(results, name)
    return statistics.fmean(run["loss"] for run in runs) if runs else float("inf")


def _rows(results: Results) -> Iterator[dict[str, Any]]:
    for name in sorted(VARIANTS, key=lambda name: _mean_loss(results, name)):
        runs = _at_best_rate(results, name)
        if not runs:
            continue
        losses = [run["loss"] for run in runs]
        row = {
            "variant": name,
            "rate": f"{runs[0]['rate']:g}",
            "loss": f"{statistics.fmean(losses):.4f}",
            "spread": f"{max(losses) - min(losses):.4f}",
            "seeds": len(losses),
            "trained": f"{runs[0]['trained_parameters']:,}",
            "peak": f"{runs[0]['measured_peak_bytes'] / 1e6:.1f} MB",
        }
        if times := _time_ratio(results, name):
            row["time of LoRA's"] = f"{times:.2f}"
        if larger := results.of("best", name):
            row["SmolLM2"] = f"{larger[0]['loss']:.4f}"
        yield row


def _time_ratio(results: Results, name: str) -> float | None:
    """Return the median step of a variant, divided by that of all runs of plain LoRA."""
    timed = [run for run in results.runs if run["stage"] == "times"]
    own = [run["step_seconds"] for run in timed if run["variant"] == name]
    plain = [run["step_seconds"] for run in timed if run["variant"] == "LoRA"]
    return statistics.median(own) / statistics.median(plain) if own else None


def _print(results: Results) -> None:
    columns = ["variant", "rate", "loss", "spread", "seeds", "trained", "peak", "time of LoRA's"]
    print_table(list(_rows(results)), [*columns, "SmolLM2"])


if __name__ == "__main__":
    main()
