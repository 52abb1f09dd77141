"""Ways to divide a budget of ranks, measured against equal ranks of the same sum.

    python benchmarks/rank_budget.py --model STORIES --text FILE

Each way gives every layer a figure for each of its ranks; `lora.ranks.allotted` does the rest. All
ways have the same base in 4 bits, rows, steps, sum of ranks and scaling. Printed is the loss of
held-out rows, for each seed, its mean and its standard deviation.

- gradients: singular values of the gradient of the weight, as `train --rank-budget` has them;
- shares: each of them as its share of the layer's gradient, so that large gradients count no more;
- trained: singular values of B A after eight steps with equal ranks.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

import qlora_kit as qk
from qlora_kit.data.batch import TokenRows
from qlora_kit.lora.ranks import allotted, most_rank, with_ranks
from qlora_kit.lora.targets import targeted_paths
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.train.rank_budget import uses_of

MEAN, TOKENS, BATCH, HELD_OUT, STEPS_TO_JUDGE = 4, 64, 8, 96, 8
CHARACTERS = 120_000
SPEC = qk.LoraSpec(rank=MEAN, alpha=2.0 * MEAN, targets=("all-linear",))
Uses = Mapping[str, Sequence[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments = parser.parse_args()
    spec = qk.BaseSpec(qk.find_model(str(arguments.model)), arguments.model, qk.Quantization(4))
    base = qk.load_base(spec, qk.choose_hardware("cpu"))
    rows = rows_of(arguments.model, arguments.text)
    found: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        config = qk.TrainConfig(
            max_steps=arguments.steps, learning_rate=5e-3, batch_size=BATCH, seed=seed,
            gradient_accumulation_steps=1, recompute=False,
        )  # fmt: skip
        for name, ranked in specs(base, rows[:-HELD_OUT], config).items():
            adapter = qk.attach(base, ranked, seed)
            qk.train_adapter(adapter, rows[:-HELD_OUT], config)
            loss = held_out_loss(base, rows[-HELD_OUT:])
            found.setdefault(name, []).append(loss)
            print(f"seed {seed}  {name:10}  {loss:.4f}  {adapter.trainable:,} parameters")
            qk.detach(adapter)
    for name, losses in found.items():
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(f"{name:10}  mean {statistics.mean(losses):.4f}  spread {spread:.4f}")


def rows_of(model: Path, text: Path) -> list[dict[str, object]]:
    """Return the beginning of a text as rows of equal length."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text()[:CHARACTERS])["input_ids"]
    cut = (ids[start : start + TOKENS] for start in range(0, len(ids) - TOKENS, TOKENS))
    return [{"input_ids": row, "labels": row, "row": number} for number, row in enumerate(cut)]


def specs(
    base: qk.Base, rows: list[dict[str, object]], config: qk.TrainConfig
) -> dict[str, qk.LoraSpec]:
    """Return the trained part by each way, all with the same sum of ranks."""
    layers = len(targeted_paths(base.model, SPEC))
    budget = MEAN * layers
    most = most_rank(budget, layers)
    gradients = uses_of(base, SPEC, most, TokenRows(rows), config, CAUSAL, 0)
    ways = {
        "gradients": gradients,
        "shares": shares(gradients),
        "trained": trained(base, rows, config),
    }
    ranked = {name: with_ranks(SPEC, allotted(uses, budget, most)) for name, uses in ways.items()}
    return {"equal": SPEC, **ranked}


def shares(uses: Uses) -> dict[str, list[float]]:
    return {
        path: [value**2 / sum(each**2 for each in values) for value in values]
        for path, values in uses.items()
    }


def trained(
    base: qk.Base, rows: list[dict[str, object]], config: qk.TrainConfig
) -> dict[str, list[float]]:
    wide = replace(SPEC, rank=2 * MEAN, alpha=4.0 * MEAN)
    adapter = qk.attach(base, wide, config.seed)
    qk.train_adapter(adapter, rows, config.model_copy(update={"max_steps": STEPS_TO_JUDGE}))
    uses = {
        path: torch.linalg.svdvals(layer.delta())[: 2 * MEAN].tolist()
        for path, layer in adapter.layers.items()
    }
    qk.detach(adapter)
    return uses


@torch.no_grad()
def held_out_loss(base: qk.Base, rows: list[dict[str, object]]) -> float:
    objective = CAUSAL.objective(base, 0, 256, None)
    base.model.eval()
    batches = [objective.batch(rows[at : at + 16]) for at in range(0, len(rows), 16)]
    return sum(float(objective.loss_sum(b)) for b in batches) / sum(b.units for b in batches)


if __name__ == "__main__":
    main()
