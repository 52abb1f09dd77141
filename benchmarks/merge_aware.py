"""Compare merging back into 4 bits after plain LoRA and after merge-aware training.

    python benchmarks/merge_aware.py                      # stories260K learns Shakespeare, minutes
    python benchmarks/merge_aware.py --model models/SmolLM2-135M-Instruct \
        --data alpaca_en_demo.json --steps 40 --batch-size 4 --learning-rate 5e-4

Both sides train on the same rows for as many steps, and are exported with `--requantize`. The
losses are those of the export's report, in fp32, on held-out rows. Recovery is the share of what
plain LoRA learns, unmerged, that is in the merged model of 4 bits:

    (base - merged in 4 bits) / (base - plain LoRA)

Called again with the same --folder and options it goes on where it was stopped. The ratio of the
step times says something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from measure import PROJECT, machine, print_table, run_side, save_results

ASSETS = Path(os.environ.get("QLORA_KIT_ASSETS", PROJECT / "assets"))
SIDES = ("plain", "merge-aware")
HELD_OUT_ROWS, HELD_OUT_CHARACTERS = 50, 60_000
COLUMNS = ["side", "base", "trained", "merged", "recovery", "step_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(ASSETS / "models/stories260K"))
    parser.add_argument("--data", type=Path, default=ASSETS / "data/tinyshakespeare.txt")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--init", default="kaiming", help="start of A and B, on both sides")
    parser.add_argument("--verify-tokens", type=int, default=8192)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--folder", type=Path, default=Path("runs/merge-aware"))
    parser.add_argument("--name", default="merge_aware_stories_cpu", help="of the results")
    parser.add_argument("--side", choices=["train"])
    parser.add_argument("--settings")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(train(**json.loads(arguments.settings))))
        return
    options = {
        name: getattr(arguments, name)
        for name in (
            "model", "steps", "batch_size", "accumulation", "max_length", "learning_rate", "rank",
            "init", "verify_tokens",
        )
    }  # fmt: skip
    arguments.folder.mkdir(parents=True, exist_ok=True)
    divide(arguments.data, arguments.folder)
    rows = []
    for seed in arguments.seeds:
        found = {side: _once(arguments, options, seed, side) for side in SIDES}
        learnt = found["plain"]["base"] - found["plain"]["trained"]
        for each in found.values():
            each["recovery"] = (each["base"] - each["merged"]) / learnt
        rows += found.values()
    print_table(rows, ["seed", *COLUMNS])
    seconds = {side: [r["step_seconds"] for r in rows if r["side"] == side] for side in SIDES}
    ratio = statistics.median(seconds["merge-aware"]) / statistics.median(seconds["plain"])
    print(f"step time, merge-aware beside plain: {ratio:.2f} (load {os.getloadavg()[0]:.1f})")
    settings = {**options, "data": arguments.data.name, "model": Path(arguments.model).name}
    save_results(
        arguments.name,
        {"settings": settings, "rows": rows, "load_average": os.getloadavg(), **machine()},
    )


def _once(
    arguments: argparse.Namespace, options: dict[str, Any], seed: int, side: str
) -> dict[str, Any]:
    """Return the figures of a side: those of an earlier call, if there are some."""
    run = {**options, "folder": str(arguments.folder), "seed": seed, "name": side}
    kept = arguments.folder / f"{side}-{seed}.json"
    if kept.is_file():
        earlier = json.loads(kept.read_text())
        if earlier["options"] == run:
            return dict(earlier["found"])
        raise SystemExit(f"{kept}: was made with other options; name another --folder")
    found = {"seed": seed, "side": side, **run_side(__file__, "train", run)}
    kept.write_text(json.dumps({"options": run, "found": found}, indent=1))
    return found


def divide(data: Path, folder: Path) -> None:
    """Write the rows to learn from and those that are held out, with the ending of the data."""
    text = data.read_text(encoding="utf-8")
    if data.suffix == ".json":
        rows = json.loads(text)
        parts = [json.dumps(rows[:-HELD_OUT_ROWS]), json.dumps(rows[-HELD_OUT_ROWS:])]
    else:
        cut = len(text) * 9 // 10
        parts = [text[:cut], text[cut : cut + HELD_OUT_CHARACTERS]]
    for name, part in zip(("train", "test"), parts, strict=True):
        (folder / f"{name}{data.suffix}").write_text(part, encoding="utf-8")


def train(
    *,
    folder: str,
    name: str,
    model: str,
    steps: int,
    batch_size: int,
    accumulation: int,
    max_length: int,
    learning_rate: float,
    rank: int,
    init: str,
    verify_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Train and export one side; go on with its run, if it was stopped."""
    from qlora_kit.config import ExportConfig, TrainConfig
    from qlora_kit.recipe.exporting import export
    from qlora_kit.recipe.training import train as train_run

    output = Path(folder) / f"{name}-{seed}"
    (data,), (test,) = Path(folder).glob("train.*"), Path(folder).glob("test.*")
    config = TrainConfig(
        model=model, data=str(data), validation=str(test), output=output, bits=4, rank=rank,
        init=init, targets=("all-linear",), max_length=max_length,
        batch_size=batch_size, gradient_accumulation_steps=accumulation,
        learning_rate=learning_rate, max_grad_norm=1.0,
        max_steps=steps, save_steps=10, seed=seed, merge_aware=name == "merge-aware",
        resume="latest" if output.exists() else None,
    )  # fmt: skip
    train_run(config)
    done = export(
        ExportConfig(
            adapter=output, to=Path(folder) / f"{name}-{seed}-merged", data=str(test),
            requantize=True, overwrite=True, verify_tokens=verify_tokens,
        )
    )  # fmt: skip
    report = done["report"]
    losses = {each["variant"]: each["loss"] for each in report["variants"]}
    return {
        "base": losses["base"],
        "trained": losses["adapter"],
        "merged": losses["written"],
        "codes_are_trained": report.get("codes_are_trained"),
        "step_seconds": statistics.median(_step_seconds(output)),
    }


def _step_seconds(output: Path) -> list[float]:
    lines = (output / "trainer_log.jsonl").read_text().splitlines()
    found = (json.loads(line) for line in lines)
    return [each["step_seconds"] for each in found if "step_seconds" in each]


if __name__ == "__main__":
    main()
