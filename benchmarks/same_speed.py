"""Compare two checkouts of the kit: is a training step as fast?

    python benchmarks/same_speed.py OTHER_CHECKOUT [--rounds 5] [--smollm2 FOLDER]

The checkouts train in turn, each in processes of its own; the one that begins changes with every
round. Both run `qlora-kit train` with its default settings. The time of a run is the lower quartile
of its steps, because other work on the machine can only slow a step. The table has the medians over
the rounds, the median of the ratios round by round, and the range of these ratios, which says how
far to trust the median.

The models, in 4 bits, are the demo, and SmolLM2-135M-Instruct where its folder is named (`make
real-models` fetches it), with 2 rows of 256 tokens a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from measure import machine_and_command, print_table, run_kit

PROJECT = Path(__file__).resolve().parent.parent
STEPS = {"demo": 80, "smollm2": 10}


def main() -> None:
    """Run both checkouts in turn and print a row for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("other", type=Path, help="the checkout to compare this one with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smollm2", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--json", type=Path, help="file for every figure of every run")
    arguments = parser.parse_args()
    checkouts = (arguments.other.resolve(), PROJECT)
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for name in ("demo", "smollm2") if arguments.smollm2 else ("demo",):
            options = _options(name, arguments.smollm2, Path(work))
            rounds = []
            for round_ in range(arguments.rounds):
                order = checkouts if round_ % 2 == 0 else checkouts[::-1]
                seconds = {c: _quick_step(c, options, Path(work) / "run") for c in order}
                rounds.append([seconds[checkout] for checkout in checkouts])
                print(f"{name}, round {round_ + 1}: {rounds[-1]}", file=sys.stderr, flush=True)
            found[name] = rounds
    print_table([_row(name, rounds) for name, rounds in found.items()], list(_row("", [[1, 1]])))
    if arguments.json:
        record = {**machine_and_command(), "step_seconds_other_and_this": found}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


def _options(name: str, smollm2: str, work: Path) -> list[str]:
    common = ["--bits", "4", "--max-steps", str(STEPS[name]), "--samples", "0"]
    common += ["--validation-fraction", "0"]
    if name == "demo":
        return ["--model", "demo", *common]
    data = work / "rows.jsonl"
    # Each row has more than 256 tokens, so every row is cut to 256 and every step does equal work.
    rows = [{"text": f"{row}: " + "the cat sat on the mat and " * 60} for row in range(24)]
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    shape = ["--max-length", "256", "--batch-size", "2", "--gradient-accumulation-steps", "1"]
    return ["--model", smollm2, "--data", str(data), *shape, *common]


def _quick_step(checkout: Path, options: list[str], output: Path) -> float:
    """Train once; return the lower quartile of the seconds of its steps, without the first."""
    command = ["train", *options, "--output", str(output), "--overwrite", "--device", "cpu"]
    run_kit(checkout, *command)
    lines = (output / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [row["step_seconds"] for row in map(json.loads, lines) if "step_seconds" in row]
    return statistics.quantiles(seconds[1:], n=4)[0]


def _row(name: str, rounds: list[list[float]]) -> dict[str, object]:
    ratios = [this / other for other, this in rounds]
    return {
        "model": name,
        "other_seconds": round(statistics.median([other for other, _ in rounds]), 4),
        "this_seconds": round(statistics.median([this for _, this in rounds]), 4),
        "this_over_other": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
    }


if __name__ == "__main__":
    main()
