"""VB-LoRA's adapter files, in PEFT's form: a bank of vectors, and the logits that mix them.

A file is written with all logits. One with the logits of the mixed vectors alone, which PEFT also
writes, is read as well. Once read, it is plain LoRA: A and B are composed, and the scaling is 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_kit.errors import AdapterError
from qlora_kit.layers.vector_bank import TOP, VectorBankLinear, composed
from qlora_kit.lora.files import WEIGHTS, PeftConfig

if TYPE_CHECKING:
    from qlora_kit.lora.attach import Adapter

_BANK = "base_model.vblora_vector_bank"
_ROOT = "base_model.model."
_KEY = re.compile(
    r"(?P<path>.+)\.vblora_logits_(?P<side>[AB])(\.default)?(?P<part>|_topk_indices|_topk_weights)"
)

_OF_LORA = ("lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")


def bank_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of a trained adapter by their names in PEFT's file."""
    tensors = {}
    for path, layer in adapter.layers.items():
        assert isinstance(layer, VectorBankLinear)
        tensors[_BANK] = layer.vector_bank.detach().cpu().contiguous()
        for side, logits in zip("AB", layer.logits(), strict=True):
            tensors[f"{_ROOT}{path}.vblora_logits_{side}"] = logits.cpu().contiguous()
    return tensors


def as_bank_config(content: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Return the content of `adapter_config.json` with VB-LoRA's fields in place of LoRA's."""
    layer = next(iter(adapter.layers.values()))
    assert isinstance(layer, VectorBankLinear)
    vectors, length = layer.vector_bank.shape
    kept = {name: value for name, value in content.items() if name not in _OF_LORA}
    return {
        **kept,
        "peft_type": "VBLORA",
        "num_vectors": vectors,
        "vector_length": length,
        "topk": TOP,
        "vblora_dropout": adapter.spec.dropout,
        "save_only_topk_weights": False,
    }


def with_matrices(raw: Mapping[str, Tensor], config: PeftConfig, folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a file with A and B in place of the bank and the logits.

    Args:
        raw: the tensors of the file by name; those of a file of LoRA are returned as they are.
        config: the content of `adapter_config.json`.
        folder: the folder of both, for the error.

    Raises:
        AdapterError: a bank, or the logits of a layer, are missing or have other shapes.
    """
    if config.topk is None:
        return dict(raw)
    bank = raw.get(_BANK, raw.get(f"{_BANK}.default"))
    if bank is None or bank.dim() != 2 or len(bank) < config.topk:
        raise AdapterError(
            f"{folder / WEIGHTS}: no {_BANK} of {config.topk} vectors or more; expected the "
            "vectors of VB-LoRA; save the adapter again"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for key, tensor in raw.items():
        match = _KEY.fullmatch(key)
        if match is not None:
            parts.setdefault(match["path"], {})[match["side"] + match["part"]] = tensor
        elif not key.startswith(_BANK):
            tensors[key] = tensor
    for path, found in parts.items():
        of_a, of_b = (_logits(found, side, len(bank), config.topk) for side in "AB")
        if of_a is None or of_b is None:
            raise AdapterError(
                f"{folder / WEIGHTS}: {path} has no logits of A and B for {len(bank)} vectors; "
                "expected those of VB-LoRA; save the adapter again"
            )
        a, b = composed(of_a, of_b, bank.float(), config.topk)
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a, b
    return tensors


def _logits(found: Mapping[str, Tensor], side: str, vectors: int, top: int) -> Tensor | None:
    """Return the logits (…, …, V) of A or of B, fp32; None where the file has none that fit.

    Logits that were not saved are minus infinity.
    """
    if side in found:
        logits = found[side].float()
        return logits if logits.dim() == 3 and logits.shape[-1] == vectors else None
    which, weights = found.get(f"{side}_topk_indices"), found.get(f"{side}_topk_weights")
    if which is None or weights is None or which.dim() != 3 or which.shape[-1] != top:
        return None
    # The last weight is left out of a file, because all of them sum to 1.
    shares = torch.cat([weights.float(), 1 - weights.float().sum(-1, keepdim=True)], -1)
    if shares.shape != which.shape or int(which.max()) >= vectors:
        return None
    logits = shares.new_full((*which.shape[:2], vectors), -torch.inf)
    return logits.scatter(-1, which.long(), shares.clamp_min(0).log())
