"""Adapters, rows and options for the training loop, and listeners that read the events of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qlora_kit as qk
from qlora_kit.events import Event, StepFinished

Rows = list[dict[str, Any]]


def make_adapter(
    folder: Path,
    bits: int = 4,
    dropout: float = 0.0,
    rank: int = 4,
    alpha: float = 32.0,
    targets: str = "all-linear",
) -> qk.Adapter:
    """Load a base and attach an adapter to all of its linear layers, or to those that are named."""
    source = qk.find_model(str(folder))
    spec = qk.BaseSpec(source, folder, qk.Quantization(bits))
    base = qk.load_base(spec, qk.choose_hardware("cpu"))
    spec = qk.LoraSpec(rank=rank, alpha=alpha, dropout=dropout, targets=(targets,))
    return qk.attach(base, spec, seed=1)


def make_rows(count: int, seed: int = 0) -> Rows:
    """Return rows of unequal length, with unsupervised prompts of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(count):
        length = int(torch.randint(3, 24, (), generator=generator))
        ids = torch.randint(3, 96, (length,), generator=generator).tolist()
        prompt = int(torch.randint(0, length - 1, (), generator=generator))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "row": row})
    return rows


def make_pairs(count: int, seed: int = 0) -> Rows:
    """Return pairs of unequal prompts and answers."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> list[int]:
        length = int(torch.randint(2, most, (), generator=generator))
        found: list[int] = torch.randint(3, 96, (length,), generator=generator).tolist()
        return found

    pairs = []
    for row in range(count):
        prompt, chosen, rejected = tokens(9), tokens(14), tokens(14)
        none = [-100] * len(prompt)
        pairs.append(
            {
                "input_ids": prompt + chosen + prompt + rejected,
                "labels": none + chosen + none + rejected,
                "chosen_tokens": len(prompt + chosen),
                "row": row,
            }
        )
    return pairs


def options(**changes: Any) -> qk.TrainConfig:
    """Return a configuration of four steps of one micro-batch, with changes."""
    defaults = {"max_steps": 4, "learning_rate": 5e-3, "gradient_accumulation_steps": 1}
    return qk.TrainConfig(**{**defaults, **changes})


def weights_of(adapter: qk.Adapter) -> dict[str, torch.Tensor]:
    """Return copies of the trained weights."""
    return {name: p.detach().clone() for name, p in adapter.parameters().items()}


def record(events: list[Event]) -> Callable[[Event], None]:
    """Return a listener that appends each event to `events`."""
    return events.append


def losses(events: list[Event]) -> list[float]:
    """Return the loss of each finished step."""
    return [event.loss for event in events if isinstance(event, StepFinished)]
