"""The files beside the weights of a model: config.json, generation_config.json, tokenizer.

Takes an architecture and a tokenizer; writes the files that plain transformers needs to open a
folder. Never writes weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from qlora_kit.data.template import end_token_ids
from qlora_kit.layers.quantize import Quantization
from qlora_kit.model.architecture import read_generation_config
from qlora_kit.model.class_head import head_modules
from qlora_kit.model.encoder_decoder import is_encoder_decoder, is_head_tied
from qlora_kit.model.hardware import dtype_name
from qlora_kit.model.images import reads_images
from qlora_kit.storage import write_json


def write_model_files(
    folder: Path,
    skeleton: PreTrainedModel,
    tokenizer: Any,
    dtype: torch.dtype,
    *,
    base_folder: Path | None,
    quantization: Quantization | None = None,
    untied: bool = False,
    kept: Sequence[str] = (),
) -> None:
    """Write all files of a model except its weights.

    Args:
        folder: the folder of the model.
        skeleton: the architecture; its `config` is not changed.
        tokenizer: the tokenizer to save, or the image processor; a tokenizer also says which
            tokens end an answer.
        dtype: dtype of the weights that are not quantised.
        base_folder: the folder of the base, for its generation settings; None without one.
        quantization: how the weights of the linear layers are packed; None if they are not.
        untied: whether a head that shared its weights with the embedding now has its own.
        kept: names of modules whose linear layers are not packed, though others are.
    """
    architecture: PreTrainedConfig = skeleton.config
    numbers = json.loads(architecture.to_json_string(use_diff=True))
    numbers.pop("quantization_config", None)
    numbers.pop("torch_dtype", None)
    numbers["architectures"] = [type(skeleton).__name__]
    numbers["dtype"] = dtype_name(dtype)
    if is_encoder_decoder(architecture):
        # To a T5 the word also says that nothing is scaled before the head; whether the head is
        # tied, transformers finds out from the tensors.
        is_scaled = getattr(architecture, "scale_decoder_outputs", False)
        numbers["tie_word_embeddings"] = bool(is_scaled or is_head_tied(skeleton))
    elif untied:
        numbers["tie_word_embeddings"] = False
    if quantization is not None:
        if not kept and skeleton.get_output_embeddings() is None:
            kept = head_modules(skeleton)
        numbers["quantization_config"] = quantization.as_bitsandbytes(dtype, kept)
    write_json(folder / "config.json", numbers)
    tokenizer.save_pretrained(folder)
    if reads_images(architecture):
        return
    generation = read_generation_config(base_folder) if base_folder else None
    if generation is None:
        generation = GenerationConfig.from_model_config(architecture)
    ends = end_token_ids(tokenizer, generation.eos_token_id)
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends
    generation.save_pretrained(folder)
