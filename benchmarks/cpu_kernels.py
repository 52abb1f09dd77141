"""Time the kernels of a CPU beside the plain code: one recomputed layer, and head with loss.

    python benchmarks/cpu_kernels.py [--model smollm2,deep] [--rounds 40]

Takes the shapes of `versus_peers.py`, in 4 bits, with LoRA r16 on attention, fp32. A layer runs
forward, again in backward, and backward. The kernels take turns with the plain code in one process,
and the time is the processor time of the process: it counts no waiting on a machine that others
use as well, though their use of the caches still shows. So run it with `OMP_NUM_THREADS=1` on such
a machine. The share is the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import print_table, save_results
from versus_peers import ALPHA, MODELS, RANK, TARGETS, save_model

LAYER = {
    "plain": (), "norm": ("norm",), "rotary": ("rotary",), "gate": ("gate",),
    "all": ("norm", "rotary", "gate"),
}  # fmt: skip
LOSS = {"plain": (), "loss": ("loss",)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2,deep", help="shapes, separated by commas")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--save", action="store_true", help="write the figures to results/")
    arguments = parser.parse_args()
    found = {name: measure(MODELS[name], arguments.rounds) for name in arguments.model.split(",")}
    for name, rows in found.items():
        print(f"\n{name}")
        print_table(rows, list(rows[0]))
    if arguments.save:
        print(save_results("cpu_kernels", {"rounds": arguments.rounds, "shapes": found}))


def measure(shape: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Return the times of one shape, a row for each part and set of kernels."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(shape, Path(folder))
        layer, loss = _parts(shape, folder)
        return [*_rows("layer", layer, LAYER, rounds), *_rows("head and loss", loss, LOSS, rounds)]


def _parts(shape: dict[str, Any], folder: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return functions that run a layer, and the head with the loss, forward and backward."""
    import torch

    import qlora_kit as qk
    from qlora_kit.layers.loss import cross_entropy_sum
    from qlora_kit.model.head import head_of
    from qlora_kit.step.settle import settle

    source = qk.find_model(folder)
    spec = qk.BaseSpec(source, source.folder, qk.Quantization(4))
    base = qk.load_base(spec, qk.choose_hardware("cpu"))
    qk.attach(base, qk.LoraSpec(rank=RANK, alpha=ALPHA, targets=tuple(TARGETS)))
    model: Any = base.model.train()
    settle(model, qk.TrainConfig(), base.hardware)
    rows, tokens = shape["batch"], shape["length"]
    x = torch.randn(rows, tokens, shape["hidden_size"]).requires_grad_()
    grad = torch.randn(x.shape)
    positions = model.model.rotary_emb(x, torch.arange(tokens).unsqueeze(0))
    targets = torch.randint(0, shape["vocab_size"], (rows * tokens,))
    one, head = model.model.layers[1], head_of(model)
    trained = [each for each in one.parameters() if each.requires_grad]

    def layer() -> None:
        y = one(x, position_embeddings=positions, attention_mask=None)
        torch.autograd.grad(y, [x, *trained], grad)

    def loss() -> None:
        torch.autograd.grad(cross_entropy_sum(x.flatten(0, 1), targets, head), x)

    return layer, loss


def _rows(
    part: str, compute: Callable[[], None], sets: dict[str, tuple[str, ...]], rounds: int
) -> list[dict[str, Any]]:
    from qlora_kit.layers.kernels import use

    seconds: dict[str, list[float]] = {name: [] for name in sets}
    for name in list(sets) * (rounds + 1):
        use(sets[name])
        seconds[name].append(_seconds(compute))
    plain = seconds["plain"][1:]
    return [
        {
            "part": part,
            "kernels": name,
            "best_ms": round(1e3 * min(times[1:]), 2),
            "median_ms": round(1e3 * statistics.median(times[1:]), 2),
            "share_of_plain": round(
                statistics.median(a / b for a, b in zip(times[1:], plain, strict=True)), 3
            ),
        }
        for name, times in seconds.items()
    ]


def _seconds(compute: Callable[[], None]) -> float:
    start = time.process_time()
    compute()
    return time.process_time() - start


if __name__ == "__main__":
    main()
