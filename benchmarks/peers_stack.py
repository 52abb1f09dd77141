"""The peers' stack, set up for `peak_vram.py`: transformers + peft + trl + bitsandbytes.

There are three settings of trl's `SFTTrainer`. All have the same architecture, rank, targets, rows,
tokens and accumulation as the kit's side, in NF4 with double quantisation, computed in bf16:

- `default` is the recipe of peft's guide: `prepare_model_for_kbit_training`, which casts
  embedding, head and norms to fp32, and `SFTConfig` as it comes: gradient checkpointing, AdamW,
  head and loss in tiles, LoRA matrices in bf16.
- `bare` is the same without `prepare_model_for_kbit_training`, which trl does not ask for.
- `best` is the setting of a careful user of these four packages: `bare` with non-reentrant
  gradient checkpointing, paged 8-bit AdamW and `activation_offloading`. One row has no padding;
  `padding_free` would build a mask of T × T where flash-attn is not installed.

The rows of a micro-batch and the tokens of a row are those of the comparison, not trl's defaults
(8, 1,024). The model has random weights (`peers_model.py`), and loading is not compared.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import datasets
import torch
from meters import Meter
from our_stack import ACCUMULATION
from peers_model import empty_model, fill, lora_config
from peft import prepare_model_for_kbit_training
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.kernels import chunked_logprob

SETTINGS = ("default", "bare", "best")
_BEST: dict[str, Any] = {
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "optim": "paged_adamw_8bit",
}


def build_trainer(
    model: Any, run: dict[str, Any], folder: str, *, on_cpu: bool, offload: bool
) -> SFTTrainer:
    """Return a trainer that will take two optimiser steps.

    Args:
        model: the model that `fill` returned.
        run: `setting` (one of `SETTINGS`), `batch_size`, `length`, `rank`, `targets`.
        folder: the folder for the trainer's files.
        on_cpu: whether it trains on a CPU.
        offload: whether "best" includes `activation_offloading`, which does not work on a CPU.
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
    trainer = SFTTrainer(
        model=model, args=config, processing_class=tokenizer(), peft_config=lora_config(run),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a small tokenizer; the trainer asks it only for the id of its padding token."""
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@contextlib.contextmanager
def folded_in_place() -> Iterator[None]:
    """Let trl's loss take the same memory on a CPU as on a GPU.

    On a GPU its Triton kernels fold a tile of logits in place, and its product adds to an fp32
    sum. The torch operations that replace them on a CPU take several more tiles. Here they compute
    nothing at all: only memory is measured, and the loss of these runs has no meaning.
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
