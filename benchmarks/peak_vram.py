r"""Peak memory of training steps: predicted, measured, and compared with the peers' stack.

    python benchmarks/peak_vram.py --model deepseek-7b --bits 4
    python benchmarks/peak_vram.py --model deepseek-7b,llama-3.1-8b,qwen2.5-7b --bits 4,8 \
        --lengths 512,2048,8192 --ours "default,no reducers" --peers none

A row of the table is a run of two optimiser steps of two micro-batches each, with random weights
(they take the same memory as trained ones) and LoRA of rank 16 on the attention. For the predicted
peak the code runs on fake tensors: the kit's by `qlora_kit.plan`, the peers' (transformers + peft +
trl + bitsandbytes, settings in `peers_stack.py`) by `peers_simulated.py`, with the same account of
memory. The measured peak is the allocator's, in a fresh process.

On a GPU the real architecture runs. The table has torch's peak of allocated memory, the memory it
reserved, and the memory in use on the device. For each card of `--cards` it has the longest row
that is predicted to fit, and whether the row fitted when torch was limited to the card's memory.

Without a GPU, scaled-down models are measured, with an eighth of the width and vocabulary and four
layers, by the CPU allocator's own record, in bf16. A CPU has no second memory. So of the kit's
reducers only the tiled MLP acts there, and none of the peers' offloading does. The full size is
predicted for a GPU, and its measured column says "not measured".
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import our_stack
from longest import longest_length
from measure import RESULTS, print_table, run_side, save_results

CARDS = "8GB,10GB,12GB,24GB"
_PEERS = "default,bare,best"
# The longest row, in tokens, that a CPU computes in seconds.
_LONGEST_ON_CPU = 2048
_COLUMNS = [
    "stack", "setting", "model", "bits", "batch", "length", "predicted GB", "measured GB",
    "predicted/measured", "ours/this", "reserved GB", "device GB",
]  # fmt: skip
Run = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    if arguments.side:
        print("\n" + json.dumps(measured(json.loads(arguments.settings))))
        return
    _quiet()
    if arguments.peers and not all(map(importlib.util.find_spec, ("peft", "trl"))):
        print("peft and trl are not installed: the peers' rows are left out")
        arguments.peers = []
    name = f"peak_vram_{'+'.join(arguments.model)}_{'gpu' if _on_gpu() else 'cpu'}"
    found: dict[str, Any] = {"full_size": table(arguments, scaled=False)}
    if not _on_gpu():
        found["scaled_down"] = table(arguments, scaled=True)
    found["cards"] = []
    print("saved", draw(found, arguments.cards, RESULTS / f"{name}.png"))
    # The cards take longest, so the figures so far are saved before them.
    save_results(name, found)
    for model in arguments.model:
        for row in cards(arguments, model):
            found["cards"].append(row)
            save_results(name, found)
    print_cards(found["cards"])
    print("saved", RESULTS / f"{name}.json")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=_names, default=["deepseek-7b"], help="one or several, with commas")
    add("--bits", type=_integers, default=[4], help="such as 4,8,16")
    add("--lengths", type=_integers, default=[512, 2048, 8192], help="tokens a row")
    add("--batch-sizes", type=_integers, default=[1], help="rows a micro-batch")
    add("--ours", type=_names, default=["default"], help='settings: "default,no reducers"')
    add("--peers", type=_names, default=_names(_PEERS), help=f'settings: {_PEERS}, or "none"')
    add("--cards", type=_names, default=_names(CARDS), help='such as 8GB,24GB, or "none"')
    add("--rank", type=int, default=16)
    add("--targets", choices=("attention", "all-linear"), default="attention")
    add("--weights", choices=("random", "pretrained"), default="random")
    add("--side", help=argparse.SUPPRESS)
    add("--settings", help=argparse.SUPPRESS)
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return [] if text == "none" else [part.strip() for part in text.split(",")]


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _quiet() -> None:
    """Silence the peers' progress bars and advice, which would stand between the tables."""
    import datasets
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()


# ---------------------------------------------------------------- one row


def _runs(arguments: argparse.Namespace, *, scaled: bool) -> list[Run]:
    """Return every run of a table, in the order of its rows."""
    sides = [("ours", name) for name in arguments.ours]
    sides += [("peers", name) for name in arguments.peers]
    lengths = [n for n in arguments.lengths if not scaled or n <= _LONGEST_ON_CPU]
    product = itertools.product(
        arguments.model, arguments.bits, arguments.batch_sizes, lengths, sides
    )
    return [
        _run(arguments, model, bits, side, batch=batch, length=length, scaled=scaled)
        for model, bits, batch, length, side in product
        if _is_known(side[0], bits, scaled=scaled)
    ]


def _is_known(stack: str, bits: int, *, scaled: bool) -> bool:
    """Return whether a row would have a meaningful figure."""
    if stack == "peers":
        # Their 8-bit layers look at values, so they cannot be simulated; a CPU computes them in
        # another way.
        return bits == 4 or (bits == 8 and _on_gpu())
    # In bf16 a CPU casts an 8-bit weight to fp32 and back where no tensor shows it. A GPU does not.
    return not (scaled and bits == 8)


def _run(
    arguments: argparse.Namespace, model: str, bits: int, side: tuple[str, str], *,
    length: int, batch: int = 1, scaled: bool = False, limit: int | None = None,
) -> Run:  # fmt: skip
    return {
        "stack": side[0], "setting": side[1], "model": model, "bits": bits,
        "batch_size": batch, "length": length, "rank": arguments.rank,
        "targets": arguments.targets, "weights": arguments.weights, "scaled": scaled,
        "limit": limit,
    }  # fmt: skip


def predicted(run: Run) -> int | None:
    """Return the predicted peak of a step in bytes; None where it cannot be predicted."""
    return _predicted(json.dumps(run | {"limit": None}))


@functools.cache
def _predicted(run_as_json: str) -> int | None:
    run = json.loads(run_as_json)
    if run["stack"] == "ours":
        return our_stack.predicted(run)["step"]
    if run["bits"] != 4:
        return None
    from peers_simulated import simulate

    return simulate(our_stack.architecture_of(run), run, for_gpu=not run["scaled"])["step"]


def measured(run: Run) -> dict[str, Any]:
    """Train in this process; return the peaks that the allocator recorded."""
    import torch
    from meters import meter_of_this_machine

    _quiet()
    meter = meter_of_this_machine(run["limit"])
    fits = True
    try:
        if run["stack"] == "ours":
            our_stack.measure(run, meter)
        else:
            import peers_stack

            peers_stack.measure(our_stack.architecture_of(run), run, meter)
    except torch.OutOfMemoryError:
        fits = False
    found = meter.summary()
    peaks = found["phase_peaks_bytes"]
    steps = [peaks[phase] for phase in our_stack.STEP_PHASES if phase in peaks]
    return {"measured_bytes": max(steps, default=None), "fits": fits, **found}


def _row(run: Run) -> dict[str, Any]:
    row = {**run, "predicted_bytes": predicted(run), "measured_bytes": None}
    if run["scaled"] or _on_gpu():
        row |= _in_a_fresh_process(run)
    print("done:", *(run[key] for key in ("stack", "setting", "model", "length")), file=sys.stderr)
    return row


def _in_a_fresh_process(run: Run) -> dict[str, Any]:
    return run_side(sys.argv[0], "measure", run)


# ---------------------------------------------------------------- tables


def table(arguments: argparse.Namespace, *, scaled: bool) -> list[dict[str, Any]]:
    """Predict every run, and measure it where possible; print the table and return its rows."""
    rows = [_row(run) for run in _runs(arguments, scaled=scaled)]
    if scaled:
        print("\nScaled down, in bf16, by the CPU allocator's record:")
    else:
        print(f"\nFull size, {'on this GPU' if _on_gpu() else 'for a GPU, which is not here'}:")
    print_table([_shown(row, rows) for row in rows], _COLUMNS)
    return rows


def _shown(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    shown = {
        "stack": row["stack"], "setting": row["setting"], "model": row["model"],
        "bits": row["bits"], "batch": row["batch_size"], "length": row["length"],
        "predicted GB": _gb(row["predicted_bytes"], "not simulated"),
        "measured GB": _gb(row["measured_bytes"]),
        "reserved GB": _gb(row.get("reserved_bytes")),
        "device GB": _gb(row.get("device_bytes")),
    }  # fmt: skip
    if not row.get("fits", True):
        shown["measured GB"] = "out of memory"
    elif row["measured_bytes"] and row["predicted_bytes"]:
        shown["predicted/measured"] = f"{row['predicted_bytes'] / row['measured_bytes']:.4f}"
    share = _share_of(row, rows)
    return shown | {"ours/this": "-" if share is None else f"{share:.3f}"}


def _share_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Return the ratio of our default's peak to this peak: measured if both are, else predicted."""
    same = ("model", "bits", "batch_size", "length")
    for ours in rows:
        is_default = (ours["stack"], ours["setting"]) == ("ours", "default")
        if is_default and all(ours[key] == row[key] for key in same):
            for kind in ("measured_bytes", "predicted_bytes"):
                if ours[kind] and row[kind]:
                    return float(ours[kind] / row[kind])
    return None


def _gb(value: int | None, otherwise: str = "not measured") -> str:
    if value is None:
        return otherwise
    return f"{value / 1e9:.3f}" if value >= 1e9 else f"{value / 1e9:.4f}"


# ---------------------------------------------------------------- cards


def cards(arguments: argparse.Namespace, model: str) -> Iterator[dict[str, Any]]:
    """Find the longest row that is predicted to fit each card; on a GPU, also try it."""
    for bits, card in itertools.product(arguments.bits, arguments.cards):
        yield _card_row(arguments, model, bits, card)


def _card_row(arguments: argparse.Namespace, model: str, bits: int, card: str) -> dict[str, Any]:
    from qlora_kit.config import parse_size
    from qlora_kit.plan.budget import CONTEXT_BYTES, Budget

    def run_of(length: int, limit: int | None = None) -> Run:
        return _run(arguments, model, bits, ("ours", "default"), length=length, limit=limit)

    def taken(length: int) -> int:
        return Budget().taken_of_card(predicted(run_of(length)) or 0)

    size = parse_size(card)
    length = longest_length(taken, size, arguments.lengths)
    print("found:", model, bits, card, length, file=sys.stderr)
    row = {"model": model, "bits": bits, "card": card, "longest_length": length, "measured": None}
    if length and _on_gpu():
        row["measured"] = _in_a_fresh_process(run_of(length, size - CONTEXT_BYTES))
    return row


def print_cards(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    print(
        "\nThe longest row of one micro-batch by card, with context and fragmentation allowed for:"
    )
    print_table(
        [
            {
                "model": row["model"], "bits": row["bits"], "card": row["card"],
                "longest, predicted": row["longest_length"] or "none",
                "measured": _verdict(row["measured"]),
            }
            for row in rows
        ],
        ["model", "bits", "card", "longest, predicted", "measured"],
    )  # fmt: skip


def _verdict(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not measured"
    return f"fits, {_gb(found['measured_bytes'])} GB" if found["fits"] else "out of memory"


# ---------------------------------------------------------------- picture


def draw(found: dict[str, Any], cards: list[str], path: Path) -> Path:
    """Draw the peak over the length at full size: a line for each setting and for each card."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from qlora_kit.config import parse_size

    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found["full_size"]:
        key = tuple(row[name] for name in ("stack", "setting", "model", "bits", "batch_size"))
        lines.setdefault(key, []).append(row)
    for (stack, setting, model, bits, batch), rows in lines.items():
        known = [row for row in rows if row["predicted_bytes"]]
        lengths = [row["length"] for row in known]
        label = f"{stack}, {setting}: {model}, {bits} bits, {batch} a micro-batch"
        heights = [row["predicted_bytes"] / 1e9 for row in known]
        (line,) = axes.plot(lengths, heights, "-" if stack == "ours" else "--", label=label)
        true = [row for row in rows if row["measured_bytes"]]
        heights = [row["measured_bytes"] / 1e9 for row in true]
        axes.plot([row["length"] for row in true], heights, "o", color=line.get_color())
    for card in cards:
        axes.axhline(parse_size(card) / 1e9, color="0.8", linewidth=0.8, zorder=0)
        beside = axes.get_yaxis_transform()  # x in widths of the picture, y in GB
        axes.text(1.01, parse_size(card) / 1e9, card, transform=beside, size="small", va="center")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens a row")
    axes.set_ylabel("peak of a step (GB = 10⁹ bytes)")
    dots = "dots: measured" if _on_gpu() else "measured on no GPU"
    axes.set_title(f"Peak memory of a training step (lines: predicted; {dots})")
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    main()
