"""Saves adapters, and opens their merged models in plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import qlora_kit as qk


def spec_of(folder: Path, bits: int = 4) -> qk.BaseSpec:
    """Return the spec of a base in a model folder."""
    return qk.BaseSpec(qk.find_model(str(folder)), folder, qk.Quantization(bits))


def save(adapter: qk.Adapter, folder: Path) -> Path:
    """Save an adapter into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    qk.save_adapter(adapter, folder, qk.BaseRecord.of(adapter.base))
    return folder


def plain(folder: Path) -> Any:
    """Open a merged model in plain transformers, in fp32, so that both sides compute alike."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def difference(adapter: qk.Adapter, merged: Any) -> float:
    """Return the relative difference of a merged model's logits from the adapter's."""
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = adapter.base.model(input_ids=ids).logits
    return float((merged(input_ids=ids).logits - expected).norm() / expected.norm())
