"""Tiny models of every family that goes into GGUF, with adapters and a real tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from data_fixtures import make_tokenizer
from merging import save, spec_of
from tiny_models import SIZES, save_model
from transformers import AutoTokenizer

import qlora_kit as qk
from qlora_kit.config import ExportConfig
from qlora_kit.recipe.exporting import export

_ROWS = {**SIZES, "vocab_size": 512, "initializer_range": 0.1, "max_position_embeddings": 128}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "partial_rotary_factor": 0.75,
}  # fmt: skip
_GEMMA = {
    **_ROWS, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 8,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip

# One for each line of the table, and one for each thing that a line does.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_ROWS},
    "llama-biases": {
        "model_type": "llama", **_ROWS, "attention_bias": True, "mlp_bias": True, "head_dim": 24,
    },
    "llama3": {
        "model_type": "llama", **_ROWS, "rope_parameters": _LLAMA3, "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", **_ROWS, "sliding_window": 32},
    "qwen2": {"model_type": "qwen2", **_ROWS, "tie_word_embeddings": True},
    "qwen2-yarn": {
        "model_type": "qwen2", **_ROWS,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen3": {"model_type": "qwen3", **_ROWS, "head_dim": 128},
    "gemma2": {"model_type": "gemma2", **_GEMMA},
    "gemma2-caps": {
        "model_type": "gemma2", **_GEMMA, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {"model_type": "gemma3_text", **_GEMMA, "num_hidden_layers": 7},
    "phi3": {"model_type": "phi3", **_ROWS, "sliding_window": None},
    "phi4-mini": {
        # llama.cpp takes memory for 256 tokens at least, and then counts the text as so long.
        "model_type": "phi3", **_ROWS, "rope_parameters": _LONGROPE, "tie_word_embeddings": True,
        "original_max_position_embeddings": 256, "max_position_embeddings": 1024,
        "sliding_window": 1024,
    },
}  # fmt: skip


def save_family(folder: Path, name: str, tokenizer: Path, **changes: Any) -> Path:
    """Save a random model of a family, with the tokenizer of another folder."""
    save_model(folder, {**FAMILIES[name], **changes})
    if FAMILIES[name]["model_type"].startswith("qwen"):
        # transformers gives this family its own splitting rules, whatever the files say.
        make_tokenizer().save_pretrained(folder)
        return folder
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def exported(adapter: Path, folder: Path, form: str = "gguf", **options: Any) -> Path:
    """Export an adapter without comparing predictions; return the folder."""
    values = {"adapter": adapter, "to": folder, "form": form, "verify_tokens": 0, **options}
    export(ExportConfig(**values))
    return folder


def save_trained(base: Path, folder: Path, bits: int = 16, std: float = 0.05, **spec: Any) -> Path:
    """Save an adapter on a base, with a delta of the size that training gives."""
    loaded = qk.load_base(spec_of(base, bits), qk.choose_hardware("cpu"))
    numbers = {"rank": 4, "targets": ("all-linear",), **spec}
    adapter = qk.attach(loaded, qk.LoraSpec(**numbers), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.normal_(0, std, generator=generator)
    save(adapter, folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder
