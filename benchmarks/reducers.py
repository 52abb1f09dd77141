"""Predict the gain of each memory reducer, for a full-size model, on any machine.

    python benchmarks/reducers.py --model deepseek-7b

Runs the step on fake tensors (`qlora_kit.plan`), as `qlora-kit plan` does, and switches the
reducers on one after the other. Prints and saves the predicted peak of a step, in GB (10^9 bytes),
by tokens a row. Predicted for a CUDA GPU in bf16; measured on none.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from measure import print_table, save_results
from our_stack import OFF, peaks

# Each line adds a reducer to the lines above it, until "the default".
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("no recompute, all logits at once", {**OFF, "recompute": False, "loss_chunk_tokens": 1 << 20}),
    ("+ logits in chunks", {**OFF, "recompute": False}),
    ("+ recompute", OFF),
    ("+ embedding on the CPU", {**OFF, "embedding_on_cpu": True}),
    ("+ layer checkpoints in host memory", {"mlp_tile_tokens": 0}),
    ("+ MLP in tiles: the default on a GPU", {}),
    ("+ 8-bit Adam", {"optimizer": "adamw8bit"}),
    ("+ head in 8 bits, approximate", {"optimizer": "adamw8bit", "head_bits": 8}),
    ("+ head in 4 bits, approximate", {"optimizer": "adamw8bit", "head_bits": 4}),
    ("the default, 8 bits", {"bits": 8}),
    ("the default, 16 bits", {"bits": 16}),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="deepseek-7b")
    parser.add_argument("--lengths", default="512,2048,4096,8192,32768", help="tokens a row")
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    rows = [row(arguments.model, name, changes, lengths) for name, changes in STEPS]
    print_table(
        [{"reducers": r["name"], **{str(n): _gb(r["peak_bytes"][str(n)]) for n in lengths}}
         for r in rows],
        ["reducers", *map(str, lengths)],
    )  # fmt: skip
    print("saved", save_results(f"reducers_{arguments.model}", {"rows": rows}))


def row(model: str, name: str, changes: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    """Predict one line of the table."""
    found: dict[str, Any] = {"name": name, "changes": changes, "peak_bytes": {}, "host_bytes": {}}
    for length in lengths:
        peak, host = predicted(model, changes, length)
        found["peak_bytes"][str(length)], found["host_bytes"][str(length)] = peak, host
        print(f"predicted {name}, {length}", file=sys.stderr)
    return found


def predicted(model: str, changes: dict[str, Any], length: int) -> tuple[int, int]:
    """Return the predicted peaks of training steps, in bytes, on the device and on the host."""
    import qlora_kit as qk

    # Without kernels, so that the table shows what the reducers alone do.
    settings = {"kernels": "plain", **changes}
    config = qk.TrainConfig(model=model, max_length=length, eval_batch_size=1, **settings)
    found = peaks(qk.find_model(model), config, for_gpu=True)
    return found["step"], found["host"]


def _gb(value: int) -> str:
    return f"{value / 1e9:.2f}"


if __name__ == "__main__":
    main()
