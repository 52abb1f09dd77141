"""Compare the speed and the memory of a training step with the peers' stacks, on this machine.

    python benchmarks/throughput.py                                  # three shapes, for a CPU
    python benchmarks/throughput.py --model deepseek-7b --shapes 1x2048,4x2048     # for a GPU
    python benchmarks/throughput.py --model FOLDER --weights pretrained --sides ours,peft,unsloth

The sides are described in `speed_sides.py`. Each runs in a process of its own, in turn, for several
rounds, every other round in reverse. All learn the same row with the same weights, dtype, batch and
recomputation; a side whose first loss differs is not compared. Ratios are taken round by round, and
their median is quoted. Steps are timed by CUDA events, or by the processor's clock.

Our sides begin as the command line does, with the heap settings that `qlora-kit train` gives
itself; the peers begin as Python does.

The share of the ceiling is the operations a second of a step over those of one large product in the
same dtype, measured in the same process right after the steps. The operations of a side that
recomputes include its recomputation. Host memory is the peak of the process's anonymous memory
while it takes steps, minus its anonymous memory after the imports; device memory is the peak that
torch allocated meanwhile.

With `--bare` the products, the attention and the unpacking of a step are timed alone, in the
same process (`bare_step.py`): no step on these libraries can be shorter.

After that each side records one step, and its time is told by part, as `qlora-kit train --profile`
tells it.

Of the built-in shapes, `smollm2` is that of SmolLM2-135M, a real model with tied weights and
grouped heads; `deep` has a small vocabulary; and `wide` is four layers under DeepSeek's vocabulary
of 102,400. All widths are multiples of 64: bitsandbytes' kernel for AVX-512 unpacks other widths
wrongly, and the peers depend on it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import our_stack
import speed_sides
from bare_step import bare_seconds
from clocks import Clock, clock_of_this_machine, matmul_rate
from measure import AnonymousPeak, machine_and_command, print_table, run_side
from speed_sides import SIDES, Take

from qlora_kit.model.environment import restart_with_tight_heap

Settings = dict[str, Any]
Send = Callable[[dict[str, Any]], None]

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "deep": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192,
        "tie_word_embeddings": False,
    },
    "wide": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 102400,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""The built-in shapes: architectures of Llama."""

_BATCHES = {"smollm2": [[2, 256]], "deep": [[4, 256]], "wide": [[2, 512]]}
_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# First losses that differ by more than this share are not of the same training.
_SAME_LOSS = {"float32": 1e-4, "bfloat16": 2e-3, "float16": 2e-3}
_MATMUL_SIZES = {"cuda": 8192, "cpu": 1024}


# ---------------------------------------------------------------- a side, in its own process


def measure(settings: Settings, send: Send) -> None:
    """Time optimiser steps of one side, and record one.

    Args:
        settings: a `speed_sides.Run` with `side`; `shapes`: rows and tokens of a step; `variants`:
            options by the name of a variant, where peers have only "" without options; `warmup` and
            `steps`; `matmul_size`; `profile`: whether a step is recorded.
        send: receives the figures of each shape once they are measured.
    """
    side = settings["side"]
    if reason := speed_sides.left_out(side, settings):
        send({"left_out": reason})
        return
    speed_sides.import_packages(side)
    memory, clock = AnonymousPeak(), clock_of_this_machine()
    clock.mark()
    take = SIDES[side].build(settings, clock)
    clock.mark()
    send(
        {
            "building_seconds": sum(clock.seconds()),
            "building_host_bytes": memory.growth_bytes,
            "after_imports_bytes": memory.start_bytes,
        }
    )
    for variant, options in (settings.get("variants") or {"": {}}).items():
        for rows, tokens in settings["shapes"]:
            name = shape_name(rows, tokens) + (variant and f", {variant}")
            try:
                found = _measured(settings, take, (rows, tokens), options, clock, memory)
            except Exception as error:
                # A batch that does not fit is a finding too.
                clock.seconds()
                found = {"failed": first_line(error)}
            send({name: found})


def shape_name(rows: int, tokens: int) -> str:
    """Return the name of a shape."""
    return f"{rows} x {tokens}"


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def _measured(
    settings: Settings,
    take: Take,
    shape: tuple[int, int],
    options: dict[str, Any],
    clock: Clock,
    memory: AnonymousPeak,
) -> dict[str, Any]:
    import torch

    on_gpu = torch.cuda.is_available()
    rows, tokens = shape
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    memory.restart()
    steps = take.steps(rows, tokens, settings["warmup"] + settings["steps"], **options)
    found = steps.figures(rows * tokens, settings["warmup"])
    found["host_bytes"] = memory.growth_bytes
    if on_gpu:
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
    dtype, size = settings.get("dtype", "bfloat16"), settings["matmul_size"]
    recomputes = options.get("recompute", recomputes_layers(settings))
    rate = matmul_rate(clock, size, dtype)
    found["recomputes"] = recomputes
    found["flop"] = speed_sides.step_flop(settings, rows, tokens, recompute=recomputes)
    found["matmul"] = {"size": size, "dtype": dtype, "flop_per_second": rate}
    found["share_of_matmul_rate"] = found["flop"] / found["step_seconds"] / rate
    if settings.get("bare"):
        found["bare_seconds"] = bare_seconds(settings, *shape, clock, recompute=recomputes)
    if settings.get("profile"):
        found["profile"] = profiled(settings, take, shape, **options)
    return found


def recomputes_layers(settings: Settings) -> bool:
    """Whether a side computes its layers again in backward."""
    return bool(settings.get("recompute", True)) and settings["side"] != "ours fastest"


def profiled(
    settings: Settings, take: Take, shape: tuple[int, int], **options: Any
) -> dict[str, Any]:
    """Record one step of a side; return its time by part, see `report.profile.summary_of`."""
    import torch

    from qlora_kit.report.profile import summary_of
    from qlora_kit.step.parts import Sizes
    from qlora_kit.step.recording import Recording, recorded

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The skeleton has the plain linear layers of every side's model.
    sizes = Sizes.of(our_stack.spec_of(settings).skeleton(), settings["rank"])
    kept: list[Recording] = []

    @contextlib.contextmanager
    def around(number: int) -> Iterator[None]:
        # The first and the last step of a run of the kit also check that something was learnt.
        if number != 2:
            yield
            return
        with recorded(take.model, sizes, device) as recording:
            yield
        kept.append(recording)

    steps = take.steps(*shape, 3, around, **options)
    return dict(summary_of({2: kept[0].time()}, device.type, 1, steps.seconds[0]))


# ---------------------------------------------------------------- all sides


def main() -> None:
    """Compare the sides, print the tables, and write every figure."""
    arguments = _arguments()
    if arguments.side:
        if arguments.side.startswith("ours"):
            restart_with_tight_heap()
        figures: dict[str, Any] = {}
        measure(json.loads(arguments.settings), figures.update)
        print(json.dumps(figures))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.model:
            settings = _settings(arguments, model, Path(folder))
            results[model] = compare(settings, arguments.sides, arguments.rounds)
            print("\n".join(tables(model, results[model])))
            if arguments.json:
                # Written after each model, so that a run that is cut short keeps its figures.
                found = {**machine_and_command(), "models": results}
                arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=_names, default=list(SHAPES), help=f"{', '.join(SHAPES)}, names, folders")
    add("--weights", choices=("random", "pretrained"), default="random")
    add("--shapes", type=_shapes, help="rows x tokens of a step, such as 1x2048,4x2048")
    add("--sides", type=_sides, default=list(SIDES), help=f"some of {', '.join(SIDES)}")
    add("--bits", type=int, choices=(4, 8), default=4)
    add("--dtype", choices=tuple(_SAME_LOSS), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--rank", type=int, default=16)
    add("--targets", choices=("attention", "all-linear"), default="attention")
    add("--recompute", action=argparse.BooleanOptionalAction, default=True, help="of every side")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=4, help="measured steps a round, after --warmup")
    add("--warmup", type=int, default=2)
    add("--profile", action=argparse.BooleanOptionalAction, default=True, help="time by part")
    add("--bare", action="store_true", help="time the products of a step alone, in each process")
    add("--json", type=Path, help="file for every figure of every run")
    add("--tiny", action="store_true", help="an eighth of the model: tries the benchmark itself")
    add("--side", help=argparse.SUPPRESS)
    add("--settings", help=argparse.SUPPRESS)
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _sides(text: str) -> list[str]:
    names = _names(text)
    if unknown := [name for name in names if name not in SIDES]:
        raise argparse.ArgumentTypeError(
            f"no side {', '.join(unknown)}; expected some of {', '.join(SIDES)}"
        )
    return names


def _shapes(text: str) -> list[list[int]]:
    found = [re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", part) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError("expected rows x tokens, such as 1x2048,4x2048")
    return [[int(match[1]), int(match[2])] for match in found if match]


def _settings(arguments: argparse.Namespace, model: str, folder: Path) -> Settings:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = model
    if model in SHAPES:
        path = folder / f"{model}.json"
        path.write_text(json.dumps(_LLAMA | SHAPES[model]))
        named = str(path)
    return {
        "model": named, "scaled": arguments.tiny, "weights": arguments.weights,
        "bits": arguments.bits, "rank": arguments.rank, "targets": arguments.targets,
        "setting": "default", "batch_size": 1, "length": 1024,
        "dtype": arguments.dtype or ("bfloat16" if device == "cuda" else "float32"),
        "recompute": arguments.recompute, "warmup": arguments.warmup, "steps": arguments.steps,
        "shapes": arguments.shapes or _BATCHES.get(model, [[1, 2048]]),
        "matmul_size": _MATMUL_SIZES[device], "profile": arguments.profile,
        "bare": arguments.bare,
    }  # fmt: skip


def compare(settings: Settings, sides: list[str], rounds: int) -> dict[str, Any]:
    """Run every side in turn, for several rounds; return the settings, all runs and a summary."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            if runs[side] and not _figures(runs[side][0]):
                # Nothing changes from round to round for a side that cannot run here.
                continue
            profile = settings["profile"] and number == 0
            runs[side].append(_run(settings | {"side": side, "profile": profile}))
            print(f"round {number + 1}: {side}", file=sys.stderr, flush=True)
    shapes = [shape_name(*shape) for shape in settings["shapes"]]
    summary = {shape: summarized(runs, shape, settings["dtype"]) for shape in shapes}
    shown = {
        name: value for name, value in settings.items() if name not in ("batch_size", "length")
    }
    shown["model"] = Path(settings["model"]).stem
    return {"settings": shown, "summary": summary, "runs": runs}


def _run(settings: Settings) -> dict[str, Any]:
    try:
        return run_side(str(Path(__file__).resolve()), settings["side"], settings)
    except RuntimeError as error:
        return {"failed": str(error).strip().splitlines()[-1][:200]}


def _figures(run: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes of a run that were measured."""
    return {name: of for name, of in run.items() if isinstance(of, dict) and "step_seconds" in of}


def summarized(
    runs: dict[str, list[dict[str, Any]]], shape: str, dtype: str
) -> list[dict[str, Any]]:
    """Return a row a side: medians over the rounds, and of the ratios round by round."""
    (first, *_) = runs
    return [_row(side, runs[side], runs[first], shape, dtype) for side in runs]


def _row(
    side: str,
    mine: list[dict[str, Any]],
    reference: list[dict[str, Any]],
    shape: str,
    dtype: str,
) -> dict[str, Any]:
    figures = [_figures(run).get(shape) for run in mine]
    if not figures or not all(figures):
        failed = [run.get(shape, {}).get("failed") for run in mine]
        whole = [run.get("left_out") or run.get("failed") for run in mine]
        reason = next(filter(None, [*failed, *whole]), "not measured")
        return {"side": side, "not_measured": reason}
    found = [each for each in figures if each]
    row: dict[str, Any] = {
        "side": side,
        "step_seconds": _median(found, "step_seconds"),
        "tokens_per_second": _median(found, "tokens_per_second"),
        "share_of_matmul_rate": _median(found, "share_of_matmul_rate"),
        "recomputes": found[0]["recomputes"],
        "host_bytes": _median(found, "host_bytes"),
        "first_loss": found[0]["losses"][0],
        "last_loss": found[0]["losses"][-1],
    }
    if "bare_seconds" in found[0]:
        bare = [sum(each["bare_seconds"].values()) for each in found]
        ratios = [each["step_seconds"] / own for each, own in zip(found, bare, strict=True)]
        row |= {"bare_seconds": statistics.median(bare), "times_bare": statistics.median(ratios)}
    if "peak_allocated_bytes" in found[0]:
        row["peak_allocated_bytes"] = _median(found, "peak_allocated_bytes")
    if parts := found[0].get("profile"):
        row["parts"] = {part: of["seconds"] for part, of in parts["parts"].items()}
        row["parts"] |= {"idle": parts["idle_seconds"], "one step": parts["step_seconds"]}
    return row | _ratios(found, [_figures(run).get(shape) for run in reference], dtype)


def _ratios(
    mine: list[dict[str, Any]], reference: list[dict[str, Any] | None], dtype: str
) -> dict[str, Any]:
    """Return the ratios to the first side, where both learn the same."""
    pairs = [(theirs, each) for theirs, each in zip(reference, mine, strict=False) if theirs]
    if not pairs:
        return {}
    for theirs, each in pairs:
        first, other = theirs["losses"][0], each["losses"][0]
        if not abs(first - other) <= _SAME_LOSS[dtype] * abs(first):
            return {"not_compared": f"the first loss is {other:.5f}, not {first:.5f}"}
    ratios = {"seconds_ratio": "step_seconds", "host_ratio": "host_bytes"}
    if "peak_allocated_bytes" in mine[0]:
        ratios["device_ratio"] = "peak_allocated_bytes"
    return {
        name: statistics.median(each[of] / theirs[of] for theirs, each in pairs)
        for name, of in ratios.items()
    }


def _median(figures: list[dict[str, Any]], name: str) -> float:
    return statistics.median([each[name] for each in figures])


# ---------------------------------------------------------------- tables


def tables(model: str, result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a model's tables."""
    settings = result["settings"]
    size, dtype = settings["matmul_size"], settings["dtype"]
    for shape, rows in result["summary"].items():
        yield (
            f"\n{model}, {shape} tokens, {settings['bits']} bits, r{settings['rank']} on "
            f"{settings['targets']}, {dtype}"
        )
        yield from _lines([_shown(row) for row in rows])
        yield (
            f"of the ceiling: operations of a step, with recomputation where `recompute` says so, "
            f"over the rate of a {size} x {size} product in {dtype} in the same process"
        )
        if any("times_bare" in row for row in rows):
            yield "x bare: times the products, attention and unpacking of the step alone"
        if any("parts" in row for row in rows):
            yield "\nseconds of one recorded step, by part"
            yield from _lines(_part_rows(rows))


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    text: list[str] = []
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print_table(rows, columns, write=text.append, absent="")
    yield from text


def _shown(row: dict[str, Any]) -> dict[str, str]:
    if "not_measured" in row:
        return {"side": row["side"], "seconds a step": row["not_measured"]}
    shown = {
        "side": row["side"],
        "seconds a step": f"{row['step_seconds']:.4g}",
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "of the ceiling": f"{row['share_of_matmul_rate']:.1%}",
        "recompute": "yes" if row["recomputes"] else "no",
        "host MB": f"{row['host_bytes'] / 1e6:,.0f}",
    }
    if "peak_allocated_bytes" in row:
        shown["device GB"] = f"{row['peak_allocated_bytes'] / 1e9:.2f}"
    if "times_bare" in row:
        shown["x bare"] = f"{row['times_bare']:.2f}"
    shown["first loss"] = f"{row['first_loss']:.5f}"
    if "not_compared" in row:
        return shown | {"x seconds": f"not compared: {row['not_compared']}"}
    names = {"x seconds": "seconds_ratio", "x host": "host_ratio", "x device": "device_ratio"}
    return shown | {name: f"{row[of]:.2f}" for name, of in names.items() if of in row}


def _part_rows(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    recorded = {row["side"]: row["parts"] for row in rows if "parts" in row}
    names = next(iter(recorded.values()))
    return [
        {"part": part, **{side: f"{of[part]:.4f}" for side, of in recorded.items()}}
        for part in names
    ]


if __name__ == "__main__":
    main()
