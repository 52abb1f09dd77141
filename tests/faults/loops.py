"""The training loop by itself, on made-up rows, for faults inside of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qlora_kit as qk
from qlora_kit.layers.quantize import Quantization
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.load import BaseSpec, load_base

_VOCABULARY = 640
ROWS = 24


def make_adapter(model: Path, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    """Load a base and attach an adapter to it."""
    spec = BaseSpec(qk.find_model(str(model)), model, Quantization(16))
    base = load_base(spec, Hardware(torch.device("cpu"), dtype, "CPU"))
    return qk.attach(base, qk.LoraSpec(rank=4, dropout=dropout, targets=("all-linear",)), seed=1)


def make_rows(count: int = ROWS, longest: int = 24) -> list[dict[str, Any]]:
    """Return rows of unequal length, whose prompts are not supervised."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for row in range(count):
        length = int(torch.randint(longest // 2, longest, (), generator=generator))
        ids = torch.randint(3, _VOCABULARY, (length,), generator=generator).tolist()
        # Numbered as if every other sample had been left out, so that `row` is not the index.
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:], "row": 2 * row})
    return rows


def options(**changes: Any) -> qk.TrainConfig:
    """Return the configuration of a run of 8 steps of two micro-batches of four rows."""
    defaults = {
        "max_steps": 8, "batch_size": 4, "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3, "save_steps": 1,
    }  # fmt: skip
    return qk.TrainConfig(**{**defaults, **changes})


def weights_of(adapter: Any) -> dict[str, Tensor]:
    """Return copies of the trained weights."""
    return {name: p.detach().clone() for name, p in adapter.parameters().items()}


def are_equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether two sets of weights have the same bits; a NaN equals nothing."""
    return some.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in some.items()
    )
