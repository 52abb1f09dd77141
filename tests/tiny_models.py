"""Small random models of every kind that the kit knows: made, loaded and filled for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_kit.model.names import known_models

# Numbers that shrink a real architecture so that it runs in milliseconds; its kind stays.
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "original_max_position_embeddings": 32,
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def tiny_numbers(name: str) -> dict[str, Any]:
    """Return the architecture of a model in `configs/`, shrunk but of the same kind."""
    numbers = dict(known_models()[name].architecture or {})
    small = {key: value for key, value in TINY.items() if key in numbers or key.endswith("_id")}
    if "num_key_value_heads" in numbers:
        grouped = numbers["num_key_value_heads"] != numbers["num_attention_heads"]
        small["num_key_value_heads"] = 2 if grouped else 4
    rope = dict(numbers.get("rope_scaling") or {})
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = TINY["original_max_position_embeddings"]
    for factors in rope.keys() & {"short_factor", "long_factor"}:
        half = int(TINY["head_dim"] * numbers.get("partial_rotary_factor", 1.0)) // 2
        rope[factors] = rope[factors][:half]
    if rope:
        small["rope_scaling"] = rope
    return {**numbers, **small, "torch_dtype": "float32", "initializer_range": 0.2}


# The numbers of kinds that no model in configs/ has.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
# Kinds of heads and layers that no model in configs/ has.
OTHERS: dict[str, dict[str, Any]] = {
    "cohere": {"model_type": "cohere", **SIZES, "logit_scale": 0.0625},
    # Linear layers whose weights lie transposed in its files, and positions that are learnt.
    "gpt2": {
        "model_type": "gpt2",
        **SIZES,
        "n_inner": 80,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
    # Experts whose weights are stacked, and, in the second, transposed and with biases.
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 4},
    "gpt-oss": {
        "model_type": "gpt_oss",
        **SIZES,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "granite": {"model_type": "granite", **SIZES, "logits_scaling": 3.0},
    "phi": {"model_type": "phi", **SIZES, "partial_rotary_factor": 0.5},
    "qwen2-tied": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
}
# Mixtures of experts beside those above: stacked, with a shared expert or dense layers beside them.
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3-moe": tiny_numbers("qwen3-30b-a3b"),
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        **SIZES,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 40,
    },
    "olmoe": {"model_type": "olmoe", **SIZES, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        **SIZES,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}
# Names whose tiny models are equal have one architecture, and stand here once. Encoders write no
# text: they have tests of their own.
ARCHITECTURES = {
    repr(tiny_numbers(name)): name
    for name, source in known_models().items()
    if "task" not in source.settings and name not in OTHERS
}.values()
NAMES = [*ARCHITECTURES, *OTHERS]


def save_model(folder: Path, numbers: dict[str, Any]) -> Path:
    """Save a random model of an architecture; equal numbers give equal models."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**numbers)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        # Norms and biases get other values than at their start, to show whether they are loaded.
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def load_folder(
    folder: Path, bits: int = 16, *, dtype: str = "float32", **quantization: Any
) -> Any:
    """Load a model folder on the CPU, as the kit does: a `Base`."""
    from qlora_kit.layers.quantize import Quantization
    from qlora_kit.model.hardware import choose_hardware
    from qlora_kit.model.load import BaseSpec, load_base
    from qlora_kit.model.names import find_model

    spec = BaseSpec(find_model(str(folder)), folder, Quantization(bits=bits, **quantization))
    return load_base(spec, choose_hardware("cpu", dtype))


def fill_lora(adapter: Any, seed: int = 7, std: float = 0.1) -> None:
    """Give B of every LoRA layer and expert random values, as if it had been trained."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for layer in {**adapter.layers, **adapter.others()}.values():
        # Drawn on the CPU: the same values on every device.
        layer.lora_B.data.copy_(
            torch.empty(layer.lora_B.shape).normal_(0, std, generator=generator)
        )


def padded_batch() -> Any:
    """Return a `Batch` of two rows of 21 and 13 tokens, part of them not supervised."""
    import torch

    from qlora_kit.data.batch import Batch, predicting_positions

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, TINY["vocab_size"], (2, 21), generator=generator)
    labels = ids.clone()
    labels[0, :6] = labels[1, 13:] = -100
    return Batch(ids, labels, (21, 13), (0, 1), predicting_positions(labels))


def mask_of(batch: Any) -> Any:
    """Return the attention mask that transformers expects of a padded batch: (B, T), 1 a token."""
    import torch

    columns = torch.arange(batch.input_ids.shape[1])
    return (columns < torch.tensor(batch.lengths).unsqueeze(1)).long()


def write_random(folder: Path, suffix: str, numbers: dict[str, Any]) -> int:
    """Write a bf16 model in four shards with an index; return the bytes of the shards."""
    import torch
    from safetensors.torch import save_file

    from qlora_kit.model.architecture import architecture_from, build_skeleton

    config = architecture_from(numbers)
    shapes = {name: t.shape for name, t in build_skeleton(config).state_dict().items()}
    config.save_pretrained(folder)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save = save_file if suffix == "safetensors" else torch.save
    weight_map = {}
    for shard in range(4):
        file = f"{stem}-{shard}.{suffix}"
        names = list(shapes)[shard::4]
        save({n: torch.randn(shapes[n], dtype=torch.bfloat16) for n in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob(f"*.{suffix}"))
