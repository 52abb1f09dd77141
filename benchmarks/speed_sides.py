"""The sides of a comparison of speed: the kit, and the peers' stack as its own classes run it.

Each side is a function that builds the model and returns a `Take`. A `Take` takes optimiser steps
on a batch that repeats one row, and returns the time of each step. All sides compute in bf16 with
the same NF4 or int8 weights, recompute every layer, clip the gradient, and move by AdamW with fp32
state at the same learning rate.

- `ours`: `qlora_kit.train_adapter`, as it comes.
- `peft`: transformers + peft + bitsandbytes in a plain loop, under autocast as the Trainer has it.
- `peft + liger`: the same with liger-kernel's fused norms, RoPE, SwiGLU and loss.
- `trl`: `SFTTrainer` on the same model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import our_stack
from clocks import Clock

Run = dict[str, Any]
"""`model`, `scaled`, `weights`, `bits`, `rank`, `targets`, `setting`: see `our_stack`."""

LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 0.3
_SEED = 1


@dataclass(frozen=True)
class Timed:
    """The seconds and the loss of each optimiser step, in order."""

    seconds: list[float]
    losses: list[float]

    def figures(self, tokens: int, warmup: int) -> dict[str, Any]:
        """Return the median of the steps after the warm-up, and the figures of every step.

        Args:
            tokens: tokens of one step.
            warmup: number of first steps that the median leaves out.
        """
        step = statistics.median(self.seconds[warmup:])
        return {
            "step_seconds": step,
            "tokens_per_second": tokens / step,
            "seconds": [round(value, 6) for value in self.seconds],
            "losses": [round(value, 6) for value in self.losses],
        }


Take = Callable[..., Timed]
"""Takes optimiser steps, given the rows of a batch, the tokens of a row and a number of steps.

The kit's also takes options of its `TrainConfig`, by name.
"""

Side = Callable[[Run, Clock], Take]


def missing_packages(side: str) -> list[str]:
    """Return the modules that a side needs and that are not installed."""
    return [name for name in _NEEDS[side] if importlib.util.find_spec(name) is None]


def one_row(run: Run, tokens: int) -> list[int]:
    """Return the row that every side learns; with a single row, the order of rows cannot matter."""
    import torch

    vocabulary = our_stack.source_of(run).architecture["vocab_size"]
    generator = torch.Generator().manual_seed(_SEED)
    ids: list[int] = torch.randint(3, vocabulary, (tokens,), generator=generator).tolist()
    return ids


def step_flop(run: Run, rows: int, tokens: int) -> float:
    """Return the floating-point operations of one optimiser step on one micro-batch.

    A frozen linear multiplies three times: in forward, in recomputation, and for the gradient of
    its input. The head multiplies twice, because it is not recomputed. Causal attention computes
    half of two T × T products: in forward, in recomputation, and in backward 2.5 times as much.
    LoRA and everything else are left out (below 1 %).
    """
    from qlora_kit.layers.projections import projections
    from qlora_kit.model.architecture import build_skeleton

    skeleton = build_skeleton(our_stack.architecture_of(run))
    text: Any = skeleton.config.get_text_config()
    linear = sum(m.in_features * m.out_features for m in projections(skeleton).values())
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = text.num_attention_heads * head_size
    attention = text.num_hidden_layers * 2 * tokens * width * (1 + 1 + 2.5)
    return float(rows * tokens * (6 * linear + 4 * text.vocab_size * text.hidden_size + attention))


@contextlib.contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Let attention run on one kernel: "flash" or "cudnn"; with "default" torch chooses.

    Raises:
        RuntimeError: inside the block, where the kernel cannot run here.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name == "default":
        yield
        return
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    with sdpa_kernel(kernels[name]):
        yield


# ---------------------------------------------------------------- ours


def our_adapter(run: Run, base: Any = None, seed: int = 0) -> Any:
    """Return an adapter of the run, on a base that is loaded for it unless one is given."""
    import qlora_kit as qk

    if base is None:
        base = our_stack.load(run, qk.choose_hardware(dtype="bfloat16"))
    return qk.attach(base, qk.LoraSpec.of(our_stack.config_of(run)), seed)


def our_steps(
    adapter: Any,
    row: list[int],
    rows: int,
    steps: int,
    clock: Clock,
    *,
    after_step: Callable[[int], None] = lambda step: None,
    **options: Any,
) -> Timed:
    """Take optimiser steps by `train_adapter`.

    Args:
        adapter: the adapter, which is trained in place.
        row: token ids of the row; the batch has it `rows` times.
        rows: rows of the batch.
        steps: number of steps to take.
        clock: a clock for the device.
        after_step: called after each step, with its number.
        **options: options of `TrainConfig`, beside those that all sides share.
    """
    import qlora_kit as qk
    from qlora_kit.events import Event, RunStarted, StepFinished

    losses: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, RunStarted):
            clock.mark()
        elif isinstance(event, StepFinished):
            clock.mark()
            losses.append(event.loss)
            after_step(event.optimizer_step)

    config = qk.TrainConfig(
        batch_size=rows, gradient_accumulation_steps=1, max_steps=steps, max_length=len(row),
        learning_rate=LEARNING_RATE, scheduler="constant", warmup_ratio=0,
        max_grad_norm=MAX_GRAD_NORM, **options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row, "row": index} for index in range(rows)]
    qk.train_adapter(adapter, data, config, announce=listen)
    return Timed(clock.seconds(), losses)


def ours(run: Run, clock: Clock) -> Take:
    """The kit, through its API."""
    adapter = our_adapter(run)

    def take(rows: int, tokens: int, steps: int, **options: Any) -> Timed:
        return our_steps(adapter, one_row(run, tokens), rows, steps, clock, **options)

    return take


# ---------------------------------------------------------------- the peers'


def peers_base(run: Run) -> Any:
    """Return the peers' model with the same weights as the kit's, ready for an adapter."""
    import torch
    from peers_model import empty_model, fill

    from qlora_kit.model.architecture import build_skeleton
    from qlora_kit.model.load import RANDOM_SEED
    from qlora_kit.model.random_weights import RandomWeights

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    architecture = our_stack.architecture_of(run)
    weights = RandomWeights(build_skeleton(architecture), RANDOM_SEED, device)
    model = empty_model(architecture, run["bits"])
    fill(model, device, drawn=lambda name, *_: weights.read(name).to(torch.bfloat16))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def peft(run: Run, clock: Clock) -> Take:
    """A plain loop of transformers + peft + bitsandbytes, with the model's own loss."""
    import torch
    from peers_model import lora_config
    from peft import get_peft_model

    model = get_peft_model(peers_base(run), lora_config(run)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=device.type == "cuda"
    )

    def take(rows: int, tokens: int, steps: int) -> Timed:
        ids = torch.tensor([one_row(run, tokens)] * rows, device=device)
        losses = []
        clock.mark()
        for _ in range(steps):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock.mark()
            losses.append(loss.detach())
            del loss
        return Timed(clock.seconds(), torch.stack(losses).float().tolist())

    return take


def peft_with_liger(run: Run, clock: Clock) -> Take:
    """The loop of `peft` over liger-kernel's Llama."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return peft(run, clock)


def trl(run: Run, clock: Clock) -> Take:
    """The `SFTTrainer` of trl, with its defaults except for the settings that all sides share."""
    import datasets
    import torch
    from peers_model import lora_config
    from peers_stack import tokenizer
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            clock.mark()

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            clock.mark()

    model, lora = peers_base(run), lora_config(run)

    def take(rows: int, tokens: int, steps: int) -> Timed:
        nonlocal model, lora
        data = [one_row(run, tokens)] * (rows * steps)
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=rows,
                gradient_accumulation_steps=1, max_length=tokens, learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant", max_grad_norm=MAX_GRAD_NORM, bf16=True,
                use_cpu=not torch.cuda.is_available(), gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False}, logging_steps=1,
                save_strategy="no", report_to="none", disable_tqdm=True,
            )  # fmt: skip
            trainer = SFTTrainer(
                model=model, args=config, processing_class=tokenizer(), peft_config=lora,
                train_dataset=datasets.Dataset.from_dict({"input_ids": data}), callbacks=[Marks()],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        # From the second call on, the model carries the adapter already.
        model, lora = trainer.model, None
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return Timed(clock.seconds(), losses)

    return take


SIDES: dict[str, Side] = {
    "ours": ours, "peft": peft, "peft + liger": peft_with_liger, "trl": trl,
}  # fmt: skip
_NEEDS = {
    "ours": ("bitsandbytes",),
    "peft": ("bitsandbytes", "peft"),
    "peft + liger": ("bitsandbytes", "peft", "liger_kernel"),
    "trl": ("bitsandbytes", "peft", "trl", "datasets"),
}
