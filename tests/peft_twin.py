"""The same model with the same adapter in transformers and PEFT: the reference of parity tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import mask_of
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.data.batch import Batch
from qlora_kit.lora.attach import Adapter


def transformers_model(folder: Path, bits: int) -> Any:
    """Return transformers' model: plain, or with bitsandbytes' own 4-bit layers."""
    quantization = None
    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization
    )


def peft_twin(folder: Path, bits: int, adapter: Adapter) -> Any:
    """Return transformers' model with PEFT's LoRA, with the A and B of `adapter`."""
    spec = adapter.spec
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        target_modules=sorted(adapter.layers),
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        task_type="CAUSAL_LM",
    )
    twin = get_peft_model(transformers_model(folder, bits), config)
    for path, layer in adapter.layers.items():
        theirs = twin.get_submodule(f"base_model.model.{path}")
        theirs.lora_A["default"].weight.data.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.data.copy_(layer.lora_B)
    return twin


def twin_parameters(twin: Any, adapter: Adapter) -> dict[str, Tensor]:
    """Return PEFT's trained parameters, by the names that the kit gives them."""
    return {
        f"{path}.lora_{side}": twin.get_submodule(
            f"base_model.model.{path}.lora_{side}.default"
        ).weight
        for path in adapter.layers
        for side in "AB"
    }


def their_loss(twin: Any, batch: Batch) -> Tensor:
    return twin(input_ids=batch.input_ids, attention_mask=mask_of(batch), labels=batch.labels).loss
