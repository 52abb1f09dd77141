"""Predict the longest row that fits each card: the table of the README.

    python benchmarks/cards.py

For each model and card, it finds the longest row, one row a micro-batch, with which the whole run
fits the card. Every reducer that keeps the loss exact is on, and the context and the margin of
`qlora-kit plan --vram` are added. Predicted for a CUDA GPU in bf16; measured on none.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

from longest import longest_length
from measure import print_table, save_results

CARDS = "5GB,6GB,8GB,10GB,12GB,16GB,24GB"
MODELS = "deepseek-7b:4,deepseek-7b:8,mistral-7b:4,llama-3.1-8b:4,qwen2.5-7b:4,gemma-2-9b:4"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cards", default=CARDS, help=f"default {CARDS}")
    parser.add_argument("--models", default=MODELS, help=f"with bits; default {MODELS}")
    arguments = parser.parse_args()
    cards = arguments.cards.split(",")
    rows = [row(*model.split(":"), cards) for model in arguments.models.split(",")]
    print_table(rows, ["model", "bits", *cards])
    print("saved", save_results("cards", {"longest_row_tokens": rows}))


def row(model: str, bits: str, cards: list[str]) -> dict[str, Any]:
    """Find the longest row for each card."""
    from qlora_kit.config import parse_size
    from qlora_kit.plan.budget import Budget

    @functools.cache
    def taken(length: int) -> int:
        return Budget().taken_of_card(predicted(model, int(bits), length))

    found: dict[str, Any] = {"model": model, "bits": int(bits)}
    for card in cards:
        found[card] = longest_length(taken, parse_size(card), known=(512, 2048, 8192))
        print(f"found: {model}, {bits} bits, {card}: {found[card]}", file=sys.stderr)
    return found


def predicted(model: str, bits: int, length: int) -> int:
    """Return the peak bytes of a run on the device, with loading and evaluation."""
    import qlora_kit as qk
    from qlora_kit.plan.simulate import predict
    from qlora_kit.plan.subject import RowSizes, Subject, planned_hardware

    config = qk.TrainConfig(
        model=model, bits=bits, batch_size=1, gradient_accumulation_steps=2, eval_batch_size=1
    )
    spec = qk.BaseSpec(qk.find_model(model), None, qk.Quantization(bits), random=True)
    subject = Subject(spec, qk.LoraSpec.of(config), planned_hardware(config), RowSizes(length))
    return predict(subject, config).peak.bytes


if __name__ == "__main__":
    main()
