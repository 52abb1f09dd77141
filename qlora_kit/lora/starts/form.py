"""The form in which an adapter is stored whose start has changed its base.

The base in training is W' = W − s B₀ A₀, and the trained model W' + s B A. On the original base
that is a plain adapter of rank 2R, as PEFT converts such adapters:

    W + s [B, −B₀] [A; A₀]

So the file is one that any PEFT user can put on the original base, and it holds A, B, A₀ and B₀ bit
for bit: the kit takes them apart, and rebuilds the base exactly.

Source: PiSSA (arXiv:2404.02948), section 3; the order is that of PEFT's `subtract_mutated_init`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qlora_kit.errors import AdapterError
from qlora_kit.lora.files import CONFIG, RECORD
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.model.start import Pair

if TYPE_CHECKING:
    from qlora_kit.lora.stored import StoredAdapter


def doubled(spec: LoraSpec) -> LoraSpec:
    """Return the spec of the adapter of rank 2R, with the same scaling of each layer."""
    factor = math.sqrt(2) if spec.rslora else 2
    return replace(
        spec,
        rank=2 * spec.rank,
        alpha=factor * spec.alpha,
        rank_pattern={name: 2 * rank for name, rank in spec.rank_pattern.items()},
        alpha_pattern={name: factor * alpha for name, alpha in spec.alpha_pattern.items()},
    )


def with_start(pair: Pair, start: Pair | None) -> Pair:
    """Return [A; A₀] (2R, D) and [B, −B₀] (K, 2R); A and B as they are where there is no start."""
    if start is None:
        return pair
    (a, b), (first_a, first_b) = pair, start
    return torch.cat([a, first_a]), torch.cat([b, -first_b], dim=1)


def as_trained(stored: StoredAdapter) -> StoredAdapter:
    """Return an adapter of rank 2R as it was trained: with A and B of rank R, and its start.

    Raises:
        AdapterError: the files do not fit each other.
    """
    start = None if stored.record is None else stored.record.start
    if start is None:
        return stored
    ranks = [len(a) for a, _ in stored.tensors.values()]
    if stored.spec.rank % 2 or any(rank % 2 for rank in ranks) or stored.stacked:
        raise AdapterError(
            f"{stored.folder}: {RECORD} says that it started from {start.init}, and {CONFIG} has "
            f"rank {stored.spec.rank}; expected twice the trained rank in every layer; restore "
            "both files"
        )
    spec = replace(
        stored.spec,
        rank=stored.spec.rank // 2,
        alpha=start.alpha,
        rank_pattern={name: rank // 2 for name, rank in stored.spec.rank_pattern.items()},
        alpha_pattern=dict(start.alpha_pattern),
    )
    trained, first = {}, {}
    for path, (a, b) in stored.tensors.items():
        rank = len(a) // 2
        trained[path] = a[:rank].contiguous(), b[:, :rank].contiguous()
        first[path] = a[rank:].contiguous(), -b[:, rank:]
    return replace(stored, spec=spec, tensors=trained, start=first)
