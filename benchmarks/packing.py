"""Supervised tokens per second of packed and of padded steps, on the same rows of a file.

    python benchmarks/packing.py --model FOLDER --data FILE [--steps 4] [--rounds 2] [--json FILE]

Every side trains through the command line, in a process of its own, one after another and in
turns. All have the same base, LoRA, samples a step and longest row:

    packed     what `train` does by default
    by length  what it did before: one row a micro-batch, padded to nothing
    padded     `--no-packing --no-group-by-length --batch-size 8`: rows in shuffled order, padded to
               the longest of their micro-batch

The speed of a side is its supervised tokens by the time of its steps, all rounds together. The
first step of each run, which warms up, is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import PROJECT, machine_and_command, print_table, run_kit

SAMPLES_A_STEP = 16
SIDES: dict[str, tuple[str, ...]] = {
    "packed": (),
    "by length": ("--no-packing",),
    "padded": ("--no-packing", "--no-group-by-length", "--batch-size", "8"),
}


def main() -> None:
    """Run all sides in turns, and print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the base")
    parser.add_argument("--data", required=True, help="file of rows of unequal length")
    parser.add_argument("--weights", default="pretrained", help="or random")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run, its first included")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for every figure of every run")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: the first is left out; expected 2 or more")
    runs: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        order = list(SIDES) if number % 2 == 0 else list(SIDES)[::-1]
        for side in order:
            runs.append({"side": side, "round": number + 1, **_run(side, arguments)})
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    rows = _rows(runs)
    print_table(rows, ["side", "supervised_per_second", "packed_is"])
    if arguments.json:
        found = {**machine_and_command(), "runs": runs, "sides": rows}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def _run(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train some steps; return the supervised tokens and the seconds of all but the first."""
    options = SIDES[side]
    batch_size = int(options[options.index("--batch-size") + 1]) if "--batch-size" in options else 1
    with tempfile.TemporaryDirectory() as folder:
        run_kit(
            PROJECT, "train", "--model", arguments.model, "--data", arguments.data,
            "--weights", arguments.weights, "--bits", arguments.bits, "--device", arguments.device,
            "--max-steps", str(arguments.steps), "--samples", "0", "--validation-fraction", "0",
            "--gradient-accumulation-steps", str(SAMPLES_A_STEP // batch_size),
            "--output", f"{folder}/run", *options,
        )  # fmt: skip
        lines = (Path(folder) / "run" / "trainer_log.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "step_seconds" in row]
    measured = steps[1:]
    return {
        "loss_of_first_step": steps[0]["loss"],
        "supervised": sum(row["supervised_tokens"] for row in measured),
        "seconds": round(sum(row["step_seconds"] for row in measured), 3),
    }


def _rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    speeds = {
        side: sum(run["supervised"] for run in runs if run["side"] == side)
        / sum(run["seconds"] for run in runs if run["side"] == side)
        for side in SIDES
    }
    return [
        {
            "side": side,
            "supervised_per_second": round(speed, 1),
            "packed_is": f"{speeds['packed'] / speed:.2f} times as fast",
        }
        for side, speed in speeds.items()
    ]


if __name__ == "__main__":
    main()
