"""The model of the peers' stack: transformers' layers replaced by those of bitsandbytes.

It is put together from random weights, because `from_pretrained` needs a checkpoint on the disk.
The layers are those that transformers itself would put in. Head and embedding stay in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers import AutoHfQuantizer

from qlora_kit.model.architecture import build_skeleton

_TARGETS: dict[str, Any] = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear": "all-linear",
}  # fmt: skip

Draw = Callable[[str, torch.Size, torch.device], Tensor]
"""Returns the values of a parameter in bf16, given its name, shape and device."""

Pack = Callable[[nn.Module, Callable[[], Tensor], torch.device], None]
"""Puts a packed weight into a layer, made of the values that the given function returns."""


def quantization_of(bits: int, dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """Return transformers' configuration of weights in 4 or 8 bits that compute in `dtype`."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def lora_config(run: dict[str, Any]) -> LoraConfig:
    """Return peft's configuration of an adapter, by the run's `rank` and `targets`; alpha = 2 r."""
    return LoraConfig(
        r=run["rank"], lora_alpha=2 * run["rank"], target_modules=_TARGETS[run["targets"]],
        lora_dropout=0.0, task_type="CAUSAL_LM",
    )  # fmt: skip


def empty_model(architecture: Any, bits: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return the model with bitsandbytes' layers in place, and without weights.

    Args:
        architecture: the config of the model.
        bits: 4 or 8 bits for the linear layers; head and embedding stay unquantised.
        dtype: the dtype that the linear layers compute in.
    """
    quantization = quantization_of(bits, dtype)
    model: Any = build_skeleton(architecture)
    replace_with_bnb_linear(model, ["lm_head"], quantization)
    # `from_pretrained` sets these, and the trainer and peft ask for them.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    model.is_quantized = True
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    model.config.quantization_config = quantization
    model.config.use_cache = False
    return model


def draw(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """Return ones for a norm, and normal random numbers for any other parameter."""
    value = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return value.fill_(1.0) if "norm" in name else value.normal_(0, 0.02)


def pack(layer: Any, values: Callable[[], Tensor], device: torch.device) -> None:
    """Give a layer its weight, quantised by bitsandbytes on the way to the device."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        held = layer.weight
        layer.weight = bitsandbytes.nn.Params4bit(
            values(), requires_grad=False, quant_type=held.quant_type,
            compress_statistics=held.compress_statistics, module=layer,
        )  # fmt: skip
    else:
        # Only a move away from the CPU quantises these weights.
        layer.weight = bitsandbytes.nn.Int8Params(values().cpu(), requires_grad=False)
    layer.to(device)


def fill(model: Any, device: torch.device, packed: Pack = pack, drawn: Draw = draw) -> Any:
    """Put weights into a model of `empty_model`: bf16, and packed by `packed`."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
            shape = torch.Size((layer.out_features, layer.in_features))
            packed(layer, lambda p=path, s=shape: drawn(f"{p}.weight", s, device), device)
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = drawn(f"{path}.{name}", parameter.shape, device)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty_like(buffer, device=device).copy_(buffer)
    model.tie_weights()
    # transformers sets the number of the GPU here, and accelerate compares it with its own.
    model.hf_device_map = {"": device if device.type == "cpu" else device.index}
    return model
