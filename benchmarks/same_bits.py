"""Compare two checkouts of the kit: do they write the same bits?

    python benchmarks/same_bits.py OTHER_CHECKOUT [--stories FOLDER] [--smollm2 FOLDER] [--steps 6]

Each checkout trains the demo and the named models, in processes of its own and on one thread: at 4,
8 and 16 bits, with tiles, accumulation and patterns of ranks. It exports some runs as merged and as
packed models, and evaluates several adapters on one base. The SHA-256 of every weight file and the
figures are compared. Dropout is 0. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import run_kit

PROJECT = Path(__file__).resolve().parent.parent

_TEXTS = ("the cat sat", "a dog ran far", "two birds sang in the tall tree", "it rained all day")
# The options of each run, by its name.
_RUNS = {
    "4 bits": "--bits 4",
    "8 bits, accumulation": "--bits 8 --batch-size 2 --gradient-accumulation-steps 3",
    "16 bits, all layers": "--bits 16 --targets all-linear",
    "4 bits, tiles, accumulation": (
        "--bits 4 --mlp-tile-tokens 16 --gradient-accumulation-steps 2 --batch-size 3"
    ),
    "4 bits, no recompute, 8-bit Adam": "--bits 4 --no-recompute --optimizer adamw8bit",
    "4 bits, tiles, a rank of its own": (
        "--bits 4 --mlp-tile-tokens 24 --targets all-linear --rank-pattern q_proj=2 --rslora"
    ),
}
_EXPORTS = {"merged": "", "packed": "--requantize"}


def main() -> int:
    """Run both checkouts and print a line for each comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("other", type=Path, help="the checkout to compare this one with")
    parser.add_argument("--stories", help="folder of stories260K")
    parser.add_argument("--smollm2", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    models = {"demo": "demo", "stories260K": arguments.stories, "SmolLM2": arguments.smollm2}
    differing = compared = 0
    with tempfile.TemporaryDirectory() as work:
        for label, model in models.items():
            if model is None:
                continue
            found = [
                dict(_finger_prints(checkout.resolve(), Path(work) / str(side), model, arguments))
                for side, checkout in enumerate((arguments.other, PROJECT))
            ]
            for name in found[0]:
                is_same = found[0][name] == found[1].get(name)
                compared, differing = compared + 1, differing + (not is_same)
                verdict = "same" if is_same else f"DIFFERS: {found[0][name]} {found[1].get(name)}"
                print(f"{label:12} {name:48} {verdict}", flush=True)
    print(f"{compared - differing} of {compared} the same")
    return int(differing > 0)


def _finger_prints(
    checkout: Path, work: Path, model: str, arguments: argparse.Namespace
) -> Iterator[tuple[str, str]]:
    """Yield the name and the hashes or figures of everything one checkout makes of a model."""
    work = work / Path(model).name
    work.mkdir(parents=True)
    rows = work / "rows.jsonl"
    pairs = [{"prompt": text, "completion": f" {text} again" * 4} for text in _TEXTS * 3]
    rows.write_text("\n".join(json.dumps(pair) for pair in pairs), encoding="utf-8")
    data = [] if model == "demo" else ["--data", str(rows), "--max-length", "64"]
    for index, (name, options) in enumerate(_RUNS.items()):
        output = work / str(index)
        _kit(
            checkout, "train", "--model", model, *data, *options.split(), "--max-steps",
            str(arguments.steps), "--output", str(output), "--samples", "0",
            "--validation-fraction", "0", "--save-steps", "1000",
        )  # fmt: skip
        yield name, _sha(output / "adapter_model.safetensors")
        if index in (0, 1):
            for kind, flags in _EXPORTS.items():
                to = work / f"{index}-{kind}"
                _kit(checkout, "export", str(output), "--to", str(to), *flags.split())
                weights = sorted(to.glob("*.safetensors"))
                yield f"{name}, {kind}", " ".join(_sha(each) for each in weights)
    several = f"a={work / '0'},b={work / '3'}"
    chosen = [{**pair, "adapter": "ab"[row % 2]} for row, pair in enumerate(pairs)]
    rows.write_text("\n".join(json.dumps(pair) for pair in chosen), encoding="utf-8")
    figures = _kit(checkout, "evaluate", "--adapters", several, "--data", str(rows), "--json")
    yield "several adapters, loss of each", figures.strip().replace(str(work), "")


def _kit(checkout: Path, *arguments: str) -> str:
    return run_kit(checkout, *arguments, OMP_NUM_THREADS="1")


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
