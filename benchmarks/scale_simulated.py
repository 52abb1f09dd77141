r"""From 1 to 512 GPUs: time, bytes and memory of a step, computed from stated rates.

    python benchmarks/scale_simulated.py
    python benchmarks/scale_simulated.py --models llama-2-7b --gpus 1,2,4,8 --card "RTX 4090" \
        --memory 24GB --inside 20 --networks ethernet=10

Nothing here is measured on several GPUs. The work, the memory and the time of one GPU are those of
`qlora-kit plan --card`, counted on fake tensors; the time of the collectives follows from the rates
of the links, which the first table of the output has and options change. `scale_model.py` has the
model. The rows of an optimiser step stay the same, whatever the number of GPUs, as in a run.

Each GPU has the whole base (replicated), or a part of every layer: of as many parts as there are
GPUs (sharded), or as a node has (2-D). A form pays as long as a step takes no more than twice the
time of one GPU's step divided by the number of GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import machine_and_command, print_table
from scale_model import FORMS, REPLICATED, Cluster, Run, Step

from qlora_kit.errors import QloraKitError

MODELS = "llama-2-7b,llama-2-13b,llama-3.1-70b,llama-3.1-405b"
GPUS = "1,2,4,8,16,32,64,128,256,512"
NETWORKS = "infiniband=3200,ethernet=100"
# Assumed: the share of its nominal rate that collectives reach of a link.
_SHARE_OF_LINK = 0.8
_HALF = 0.5
_COMPUTED = "computed from stated rates; not measured"
Row = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    try:
        compute(arguments, _ceilings(arguments))
    except QloraKitError as error:
        raise SystemExit(f"error: {error}") from None


def compute(arguments: argparse.Namespace, ceilings: Any) -> None:
    """Compute, print and save everything that was asked for."""
    print(f"{_COMPUTED}\n")
    print_table(rates(arguments, ceilings), ["rate", "value"])
    rows = [
        row
        for model in arguments.models
        for network in arguments.networks
        for row in model_rows(arguments, ceilings, model, network)
    ]
    for network in arguments.networks:
        print(f"\nan optimiser step over {network} between nodes, {_COMPUTED}; !: does not fit:")
        print_table(*_table([row for row in rows if row["network"] == network]))
    ends = stops(rows)
    print(f"\nthe most GPUs at which a form fits and pays, {_COMPUTED}:")
    print_table(ends, list(ends[0]))
    if arguments.plot:
        print("saved", draw(rows, arguments, arguments.plot))
    if arguments.json:
        found = {"what": _COMPUTED, "rates": rates(arguments, ceilings)}
        found |= {"steps": rows, "most_gpus_that_pay": ends}
        text = json.dumps({**machine_and_command(), **found}, indent=1)
        arguments.json.write_text(text + "\n")
        print("saved", arguments.json)


def _arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--models", type=_names, default=_names(MODELS), help=f"default {MODELS}")
    add("--gpus", type=_integers, default=_integers(GPUS), help=f"default {GPUS}")
    add("--rows", type=_count, default=256, help="rows of an optimiser step, on all GPUs together")
    add("--micro-batch", type=_count, default=4, help="rows of a GPU's micro-batch at most")
    add("--tokens", type=_count, default=2048, help="tokens a row")
    add("--card", default="H100", help="its rates are those of `qlora-kit plan --card`")
    add("--memory", type=_size, default=_size("80GB"), help="memory of the card")
    add("--call-us", type=float, default=4.5,
        help="host's time for a small call, µs; 0: the host keeps up, as `plan --card` takes it;\n"
        "default 4.5, fitted to the steps of the one H100 that was measured")  # fmt: skip
    add("--gpus-per-node", type=_count, default=8)
    add("--inside", type=float, default=450, help="GB/s into a GPU from its node; 450: NVLink 4")
    add("--networks", type=_networks, default=_networks(NETWORKS),
        help=f"Gb/s into a node, for all its GPUs, by name; default {NETWORKS}")  # fmt: skip
    add("--hops-us", type=_numbers, default=_numbers("3,10"),
        help="latency to the next GPU and to the next node, µs; default 3,10")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="save every figure")
    add("--plot", type=Path, metavar="FILE", help="save a picture")
    found = parser.parse_args(given)
    for gpus in found.gpus:
        if gpus > found.gpus_per_node and gpus % found.gpus_per_node:
            parser.error(
                f"--gpus {gpus}: nodes of {found.gpus_per_node} GPUs, the last one not full; "
                f"expected a multiple of {found.gpus_per_node}"
            )
    return found


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return count


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _integers(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _networks(text: str) -> dict[str, float]:
    pairs = (part.split("=") for part in _names(text))
    return {name: float(rate) for name, rate in pairs}


def _size(text: str) -> int:
    from qlora_kit.config import parse_size

    size: int = parse_size(text)
    return size


def _ceilings(arguments: argparse.Namespace) -> Any:
    from qlora_kit.model.cards import ceilings_of_card

    call_seconds = arguments.call_us * 1e-6 or None
    return dataclasses.replace(ceilings_of_card(arguments.card), call_seconds=call_seconds)


def rates(arguments: argparse.Namespace, ceilings: Any) -> list[Row]:
    """Return everything that is assumed, as a table."""
    from qlora_kit.plan.duration import GPU_SHARE

    call = arguments.call_us
    inside, between = arguments.hops_us
    stated = {
        "rows of a step, all GPUs": f"{arguments.rows} × {arguments.tokens:,} tokens",
        "rows of a micro-batch": f"{arguments.micro_batch} at most",
        "card": f"{arguments.card}, {arguments.memory / 1e9:g} GB",
        "products in bf16": f"{ceilings.flop_per_second['bfloat16'] / 1e12:.0f} TFLOP/s",
        "its memory": f"{ceilings.pass_seconds(1) ** -1 / 1e9:,.0f} GB/s",
        "a step reaches of these": f"{GPU_SHARE:.0%}",
        "host's time for a small call": f"{call:g} µs" if call else "0 µs: it keeps up",
        "GPUs of a node": str(arguments.gpus_per_node),
        "into a GPU from its node": f"{arguments.inside:g} GB/s",
        **{
            f"into a node, {name}": f"{rate:g} Gb/s = {rate / 8:g} GB/s for all its GPUs"
            for name, rate in arguments.networks.items()
        },
        "collectives reach of these": f"{_SHARE_OF_LINK:.0%}",
        "latency to the next GPU, node": f"{inside:g} µs, {between:g} µs",
    }
    return [{"rate": name, "value": value} for name, value in stated.items()]


def cluster_of(arguments: argparse.Namespace, network: str) -> Cluster:
    """Return the cluster with this network between its nodes."""
    inside, between = (1e-6 * microseconds for microseconds in arguments.hops_us)
    return Cluster(
        arguments.gpus_per_node,
        _SHARE_OF_LINK * arguments.inside * 1e9,
        _SHARE_OF_LINK * arguments.networks[network] * 1e9 / 8,
        inside,
        between,
    )


def model_rows(arguments: argparse.Namespace, ceilings: Any, model: str, network: str) -> list[Row]:
    """Return every step of a model over a network, by number of GPUs and form."""
    from qlora_kit.plan.budget import Budget

    print(f"computing {model}, {network}", file=sys.stderr)
    run = Run(model, arguments.rows, arguments.micro_batch, arguments.tokens)
    cluster, budget = cluster_of(arguments, network), Budget(arguments.memory)
    one = run.step(REPLICATED, 1, cluster, ceilings)
    found = []
    for gpus in arguments.gpus:
        for form in FORMS:
            step = run.step(form, gpus, cluster, ceilings)
            found.append(
                {
                    "model": model, "network": network, "gpus": gpus, "form": form,
                    "rows": f"{step.micro_batches} × {step.rows}",
                    "step_seconds": _short(step.seconds),
                    "tokens_per_second": _short(run.rows * run.tokens / step.seconds),
                    "efficiency": _short(one.seconds / (gpus * step.seconds)),
                    "lost_to": lost_to(run, one, step, gpus),
                    "gather_seconds": _short(step.gather_seconds),
                    "sum_seconds": _short(step.sum_seconds),
                    "sent_bytes": round(step.sent_bytes),
                    "peak_bytes": step.peak_bytes,
                    "card_bytes": budget.taken_of_card(step.peak_bytes),
                    "fits": not budget.over_bytes(step.peak_bytes, 0),
                }
            )  # fmt: skip
    return found


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def lost_to(run: Run, one: Step, step: Step, gpus: int) -> str:
    """Return what takes most of the time that an ideal division would not need."""
    busy = min(gpus, run.rows)
    lost = {
        "GPUs without rows": one.seconds / busy - one.seconds / gpus,
        "small micro-batches": step.compute_seconds - one.seconds / busy,
        "gathers of the base": step.gather_seconds,
        "the sum of gradients": step.sum_seconds,
    }
    most = max(lost, key=lambda name: lost[name])
    return most if lost[most] > 0 else "nothing"


def stops(rows: list[Row]) -> list[Row]:
    """Return, for each model, network and form, up to how many GPUs it fits and pays, and why."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        by_form = found.setdefault((row["model"], row["network"]), {})
        by_form.setdefault(row["form"], []).append(row)
    return [
        {"model": model, "network": network, **{name: _end(by_form[name]) for name in FORMS}}
        for (model, network), by_form in found.items()
    ]


def _end(steps: list[Row]) -> str:
    """Return the range of GPUs in which a form fits and pays, and what ends it."""
    fitting = [step for step in steps if step["fits"]]
    if not fitting:
        return "does not fit"
    paying = [step for step in fitting if step["efficiency"] >= _HALF]
    if not paying:
        return f"fits from {fitting[0]['gpus']}, never pays: {fitting[0]['lost_to']}"
    first, last = paying[0]["gpus"], paying[-1]["gpus"]
    beyond = [step for step in fitting if step["gpus"] > last]
    return f"{first} to {last}" + (f", then {beyond[0]['lost_to']}" if beyond else "")


# ---------------------------------------------------------------- shown


def _table(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """Return a line for each model and number of GPUs, and the names of the columns."""
    lines: dict[tuple[str, int], Row] = {}
    for row in rows:
        key, form = (row["model"], row["gpus"]), row["form"]
        line = lines.setdefault(key, {"model": key[0], "GPUs": key[1], "a GPU": row["rows"]})
        line[f"{form} s"] = f"{row['step_seconds']:.3g}"
        line["of ideal" + " " * FORMS.index(form)] = f"{row['efficiency']:.0%}"
        line[f"{form} GB sent"] = f"{row['sent_bytes'] / 1e9:.3g}"
        line[f"{form} GB"] = f"{row['card_bytes'] / 1e9:.1f}{'' if row['fits'] else ' !'}"
    found = list(lines.values())
    return found, list(found[0])


def draw(rows: list[Row], arguments: argparse.Namespace, path: Path) -> Path:
    """Draw the share of the ideal speed over each network, and the memory of a card, by model."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    networks, models = list(arguments.networks), arguments.models
    size = (2.8 * len(models) + 1.5, 2.4 * len(networks) + 3.2)
    figure, grid = pyplot.subplots(
        len(networks) + 1, len(models), figsize=size, sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, model in zip(grid.T, models, strict=True):
        *speeds, memory = column
        of_model = [row for row in rows if row["model"] == model]
        for speed, network in zip(speeds, networks, strict=True):
            over = [row for row in of_model if row["network"] == network]
            _draw_forms(speed, over, lambda row: 100 * row["efficiency"], 100 * _HALF)
            _draw_forms(memory, over, lambda row: row["card_bytes"] / 1e9, arguments.memory / 1e9)
            speed.set_ylim(0, 105)
        column[0].set_title(model)
        memory.set_yscale("log")
        memory.yaxis.set_major_formatter("{x:,.0f}")
        memory.set_xscale("log", base=2)
        memory.xaxis.set_major_formatter("{x:,.0f}")
        memory.set_xlabel("GPUs")
    for axes, network in zip(grid[:, 0], networks, strict=False):
        axes.set_ylabel(f"{network} {arguments.networks[network]:g} Gb/s:\nspeed, % of ideal")
    grid[-1, 0].set_ylabel("of each card\n(GB = 10⁹ bytes)")
    grid[0, 0].legend(FORMS, loc="lower left", fontsize="small")
    figure.suptitle(
        f"COMPUTED from stated rates, not measured: {arguments.rows} rows of "
        f"{arguments.tokens:,} tokens a step, {arguments.card}, {arguments.gpus_per_node} a node"
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _draw_forms(axes: Any, rows: list[Row], height: Callable[[Row], float], level: float) -> None:
    """Draw a line for each form, thinner ones over those that they cover, and a level."""
    for color, form in enumerate(FORMS):
        line = [row for row in rows if row["form"] == form]
        gpus, heights = [row["gpus"] for row in line], [height(row) for row in line]
        axes.plot(gpus, heights, color=f"C{color}", linewidth=4 - 1.4 * color)
    axes.axhline(level, color="0.6", linewidth=0.8)
    axes.grid(alpha=0.25)


if __name__ == "__main__":
    main()
