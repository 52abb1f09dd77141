"""The peers' stack, set up for `peak_vram.py`: transformers + peft + trl + bitsandbytes.

Three settings of trl's `SFTTrainer`, on the same architecture, rank, targets, rows, tokens and
accumulation as ours; NF4 with double quantisation, computed in bf16:

- `default`: the recipe of peft's guide: `prepare_model_for_kbit_training`, which casts
  embedding, head and norms to fp32, and `SFTConfig` as it comes: gradient checkpointing, AdamW,
  head and loss in tiles, LoRA matrices in bf16.
- `bare`: the same without `prepare_model_for_kbit_training`, which trl does not ask for.
- `best`: what a careful user of these four packages reaches: `bare` with non-reentrant gradient
  checkpointing, paged 8-bit AdamW and `activation_offloading`. One row has no padding;
  `padding_free` would build a mask of T × T where flash-attn is not installed.

Rows a micro-batch and tokens a row are those of the comparison, not trl's defaults (8, 1,024).
The model is put together from random weights in the layers that transformers itself would put
in, because `from_pretrained` needs a checkpoint on disk; what loading takes is not part of the
comparison.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import bitsandbytes
import datasets
import torch
from meters import Meter
from our_stack import ACCUMULATION
from peft import LoraConfig, prepare_model_for_kbit_training
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast, PrinterCallback
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers import AutoHfQuantizer
from trl import SFTConfig, SFTTrainer
from trl.kernels import chunked_logprob

from qlora_kit.model.architecture import build_skeleton

SETTINGS = ("default", "bare", "best")
_TARGETS: dict[str, Any] = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear": "all-linear",
}  # fmt: skip
_BEST: dict[str, Any] = {
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "optim": "paged_adamw_8bit",
}

# Leaves a packed weight in a layer.
Pack = Callable[[nn.Module, torch.device], None]


def quantization_of(bits: int) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def pack(layer: Any, device: torch.device) -> None:
    """Give a layer random weights, quantised by bitsandbytes on the way to the device."""
    shape = (layer.out_features, layer.in_features)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        held = layer.weight
        layer.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, quant_type=held.quant_type,
            compress_statistics=held.compress_statistics, module=layer,
        )  # fmt: skip
    else:
        # Only a move away from the CPU quantises these.
        layer.weight = bitsandbytes.nn.Int8Params(weight.cpu(), requires_grad=False)
    layer.to(device)


def empty_model(architecture: Any, bits: int) -> Any:
    """Return the model with bitsandbytes' layers in place and no weights yet.

    Args:
        architecture: its config.
        bits: 4 or 8, of the linear layers; head and embedding stay in 16.
    """
    quantization = quantization_of(bits)
    model: Any = build_skeleton(architecture)
    replace_with_bnb_linear(model, ["lm_head"], quantization)
    # What `from_pretrained` notes, and what the trainer and peft ask for.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    model.is_quantized = True
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    model.config.quantization_config = quantization
    model.config.use_cache = False
    return model


def fill(model: Any, device: torch.device, packed: Pack = pack) -> Any:
    """Put random weights into a model of `empty_model`: bf16, and packed by `packed`."""
    for layer in list(model.modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
            packed(layer, device)
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, _random(parameter, f"{path}.{name}", device))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty_like(buffer, device=device).copy_(buffer)
    model.tie_weights()
    # transformers notes the number of a GPU, and accelerate compares it with its own.
    model.hf_device_map = {"": device if device.type == "cpu" else device.index}
    return model


def _random(parameter: Tensor, name: str, device: torch.device) -> nn.Parameter:
    value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
    value = value.fill_(1.0) if "norm" in name else value.normal_(0, 0.02)
    return nn.Parameter(value, requires_grad=False)


def build_trainer(
    model: Any, run: dict[str, Any], folder: str, *, on_cpu: bool, offload: bool
) -> SFTTrainer:
    """Return a trainer that will take two optimiser steps.

    Args:
        model: of `fill`.
        run: `setting` (one of `SETTINGS`), `batch_size`, `length`, `rank`, `targets`.
        folder: for what the trainer writes.
        on_cpu: whether it trains on a CPU.
        offload: whether "best" includes `activation_offloading`, which a CPU does not know.
    """
    is_best = run["setting"] == "best"
    if run["setting"] == "default":
        model = prepare_model_for_kbit_training(model)
    rows = [[3 + n % 90 for n in range(run["length"])]] * (2 * ACCUMULATION * run["batch_size"])
    config = SFTConfig(
        output_dir=folder, max_steps=2, gradient_accumulation_steps=ACCUMULATION,
        per_device_train_batch_size=run["batch_size"], max_length=run["length"],
        bf16=True, use_cpu=on_cpu, save_strategy="no", report_to="none", disable_tqdm=True,
        **(_BEST | {"activation_offloading": offload} if is_best else {}),
    )  # fmt: skip
    lora = LoraConfig(
        r=run["rank"], lora_alpha=2 * run["rank"], target_modules=_TARGETS[run["targets"]],
        lora_dropout=0.0, task_type="CAUSAL_LM",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=config, processing_class=_tokenizer(), peft_config=lora,
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return one that the trainer asks only for the id it pads with."""
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@contextlib.contextmanager
def folded_in_place() -> Iterator[None]:
    """Let trl's loss take what it takes on a GPU, on a CPU.

    Its Triton kernels fold a tile of logits in place and its product adds to an fp32 sum; the
    torch operations that stand in for them on a CPU take several tiles more. Nothing is computed
    instead: what is measured is memory, and the loss of these runs means nothing.
    """
    with contextlib.ExitStack() as stack:
        for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
            stack.enter_context(mock.patch.object(chunked_logprob, name, _in_place))
        yield


def _in_place(*arguments: Any, **options: Any) -> None:
    return None


def train(model: Any, run: dict[str, Any], *, on_cpu: bool, offload: bool) -> None:
    """Take two optimiser steps."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if on_cpu:
            stack.enter_context(folded_in_place())
        build_trainer(model, run, folder, on_cpu=on_cpu, offload=offload).train()


def measure(architecture: Any, run: dict[str, Any], meter: Meter) -> None:
    """Load the model and train it, each as one phase of the meter."""
    on_cpu = not torch.cuda.is_available()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    model = empty_model(architecture, run["bits"])
    meter.phase("load", lambda: fill(model, device))
    meter.phase("second_step", lambda: train(model, run, on_cpu=on_cpu, offload=not on_cpu))
