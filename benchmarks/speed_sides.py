"""The sides of a comparison of speed: the kit, and the peers' stacks as their own classes run them.

Each side is a function that builds the model and returns a `Take`. A `Take` takes optimiser steps
on a batch that repeats one row, and returns the time of each step. All sides compute in one dtype
with the same NF4 or int8 weights, recompute every layer where the comparison recomputes, clip the
gradient, and move by AdamW with fp32 state at the same learning rate.

- `ours`: `qlora_kit.train_adapter` with its defaults, which are its most frugal settings.
- `ours fastest`: the same with nothing recomputed and nothing in host memory.
- `peft`: transformers + peft + bitsandbytes in a plain loop, under autocast as the Trainer has it.
- `peft + liger`: the same with liger-kernel's fused norms, RoPE, SwiGLU and loss.
- `trl`: `SFTTrainer` on the same model.
- `unsloth`: its `FastLanguageModel` in the plain loop; it reads checkpoints only.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import our_stack
from clocks import Clock

Run = dict[str, Any]
"""`model`, `scaled`, `weights`, `bits`, `rank`, `targets`, `setting`: see `our_stack`; and `dtype`,
bf16 unless it is given, and `recompute`, on unless it is given."""

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


Around = Callable[[int], AbstractContextManager[Any]]
"""Returns the block that a step runs in, given its number from 1."""


class Steps(Protocol):
    """Takes optimiser steps."""

    def __call__(
        self, rows: int, tokens: int, steps: int, around: Around = nullcontext, **options: Any
    ) -> Timed:
        """Take steps on `rows` rows of `tokens` tokens; only the kit takes options, by name."""
        ...


@dataclass(frozen=True)
class Take:
    """A side that is built.

    Attributes:
        model: transformers' model inside it.
        steps: takes optimiser steps.
    """

    model: Any
    steps: Steps


Side = Callable[[Run, Clock], Take]


def left_out(side: str, run: Run) -> str | None:
    """Return the reason that a side cannot be measured here; None if it can."""
    needed = SIDES[side].needs
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        return f"not installed: {', '.join(missing)}"
    if side == "unsloth" and our_stack.spec_of(run).random:
        return "reads checkpoints only; give the folder of a model, and --weights pretrained"
    return None


def import_packages(side: str) -> None:
    """Import everything that a side will need, so that its memory leaves the imports out."""
    for name in SIDES[side].imports:
        importlib.import_module(name)


def one_row(run: Run, tokens: int) -> list[int]:
    """Return the row that every side learns; with a single row, the order of rows cannot matter."""
    import torch

    text: Any = our_stack.spec_of(run).architecture().get_text_config()
    generator = torch.Generator().manual_seed(_SEED)
    ids: list[int] = torch.randint(3, text.vocab_size, (tokens,), generator=generator).tolist()
    return ids


def step_flop(run: Run, rows: int, tokens: int, *, recompute: bool = True) -> float:
    """Return the floating-point operations of one optimiser step on one micro-batch.

    A frozen linear multiplies in forward, for the gradient of its input, and once more where its
    layer is recomputed. The head multiplies twice, because it is not recomputed. Causal attention
    computes half of two T × T products: in forward, in recomputation, and in backward 2.5 times as
    much. LoRA and everything else are left out (below 1 %).
    """
    from qlora_kit.layers.projections import projections

    skeleton = our_stack.spec_of(run).skeleton()
    text: Any = skeleton.config.get_text_config()
    linear = sum(m.in_features * m.out_features for m in projections(skeleton).values())
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = text.num_attention_heads * head_size
    again = int(recompute)
    attention = text.num_hidden_layers * 2 * tokens * width * (1 + again + 2.5)
    linears, head = (4 + 2 * again) * linear, 4 * text.vocab_size * text.hidden_size
    return float(rows * tokens * (linears + head + attention))


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


def dtype_of(run: Run) -> Any:
    """Return the compute dtype of a run."""
    import torch

    return getattr(torch, run.get("dtype", "bfloat16"))


# ---------------------------------------------------------------- ours


def our_adapter(run: Run, base: Any = None, seed: int = 0) -> Any:
    """Return an adapter of the run, on a base that is loaded for it unless one is given."""
    import qlora_kit as qk

    if base is None:
        base = our_stack.load(run, qk.choose_hardware(dtype=run.get("dtype", "bfloat16")))
    return qk.attach(base, qk.LoraSpec.of(our_stack.config_of(run)), seed)


def our_steps(
    adapter: Any,
    row: list[int],
    rows: int,
    steps: int,
    clock: Clock,
    *,
    around: Around = nullcontext,
    **options: Any,
) -> Timed:
    """Take optimiser steps by `train_adapter`.

    Args:
        adapter: the adapter, which is trained in place.
        row: token ids of the row; the batch has it `rows` times.
        rows: rows of the batch.
        steps: number of steps to take.
        clock: a clock for the device.
        around: the block that each step runs in.
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

    config = qk.TrainConfig(
        batch_size=rows, gradient_accumulation_steps=1, max_steps=steps, max_length=len(row),
        learning_rate=LEARNING_RATE, scheduler="constant", warmup_ratio=0,
        max_grad_norm=MAX_GRAD_NORM, **options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row, "row": index} for index in range(rows)]
    qk.train_adapter(adapter, data, config, around_step=around, announce=listen)
    return Timed(clock.seconds(), losses)


def ours(run: Run, clock: Clock) -> Take:
    """The kit, through its API."""
    adapter = our_adapter(run)
    always = our_stack.SETTINGS[run["setting"]]
    always = always if run.get("recompute", True) else {**always, "recompute": False}

    def take(
        rows: int, tokens: int, steps: int, around: Around = nullcontext, **options: Any
    ) -> Timed:
        row = one_row(run, tokens)
        return our_steps(adapter, row, rows, steps, clock, around=around, **(always | options))

    return Take(adapter.base.model, take)


def ours_fastest(run: Run, clock: Clock) -> Take:
    """The kit with nothing computed twice and nothing fetched from the host."""
    return ours(run | {"setting": "no reducers", "recompute": False}, clock)


# ---------------------------------------------------------------- the peers'


def peers_base(run: Run) -> Any:
    """Return the peers' model with the same weights as the kit's, ready for an adapter."""
    import torch
    from peers_model import empty_model, fill, quantization_of
    from transformers import AutoModelForCausalLM

    from qlora_kit.model.load import open_tensors

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    spec, dtype = our_stack.spec_of(run), dtype_of(run)
    if spec.random:
        skeleton = spec.skeleton()
        weights, tied = open_tensors(spec, skeleton, device), skeleton.all_tied_weights_keys or {}
        model = empty_model(spec.architecture(), run["bits"], dtype)
        fill(model, device, drawn=lambda name, *_: weights.read(tied.get(name, name)).to(dtype))
    else:
        model = AutoModelForCausalLM.from_pretrained(
            spec.folder, quantization_config=quantization_of(run["bits"], dtype), dtype=dtype,
            device_map={"": device},
        )  # fmt: skip
        model.requires_grad_(False)
    if run.get("recompute", True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    return model


def peft(run: Run, clock: Clock) -> Take:
    """A plain loop of transformers + peft + bitsandbytes, with the model's own loss."""
    from peers_model import lora_config
    from peft import get_peft_model

    return plain_loop(get_peft_model(peers_base(run), lora_config(run)), run, clock)


def plain_loop(model: Any, run: Run, clock: Clock) -> Take:
    """Return a side that trains a model of peft in a plain loop."""
    import torch

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    device, dtype = parameters[0].device, dtype_of(run)
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=device.type == "cuda"
    )

    def step(ids: Any) -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def take(
        rows: int, tokens: int, steps: int, around: Around = nullcontext, **options: Any
    ) -> Timed:
        ids = torch.tensor([one_row(run, tokens)] * rows, device=device)
        losses = []
        clock.mark()
        for number in range(1, steps + 1):
            with around(number):
                losses.append(step(ids))
            clock.mark()
        return Timed(clock.seconds(), torch.stack(losses).float().tolist())

    return Take(model.get_base_model(), take)


def peft_with_liger(run: Run, clock: Clock) -> Take:
    """The loop of `peft` over liger-kernel's Llama."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return peft(run, clock)


def unsloth(run: Run, clock: Clock) -> Take:
    """The plain loop over unsloth's model, with its own recomputation."""
    # It has to be imported before transformers, which it changes.
    from unsloth import FastLanguageModel  # isort: skip
    from peers_model import lora_config

    lora, recompute = lora_config(run), run.get("recompute", True)
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(our_stack.spec_of(run).folder), dtype=dtype_of(run),
        load_in_4bit=run["bits"] == 4, load_in_8bit=run["bits"] == 8,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules,
        lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth" if recompute else False,
    )  # fmt: skip
    return plain_loop(model, run, clock)


def trl(run: Run, clock: Clock) -> Take:
    """The `SFTTrainer` of trl, with its defaults except for the settings that all sides share."""
    import datasets
    import torch
    from peers_model import lora_config
    from peers_stack import tokenizer
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    base, lora = peers_base(run), lora_config(run)
    model, recompute = base, run.get("recompute", True)

    def take(
        rows: int, tokens: int, steps: int, around: Around = nullcontext, **options: Any
    ) -> Timed:
        nonlocal model, lora
        data = [one_row(run, tokens)] * (rows * steps)
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=rows,
                gradient_accumulation_steps=1, max_length=tokens, learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant", max_grad_norm=MAX_GRAD_NORM,
                bf16=dtype_of(run) == torch.bfloat16, use_cpu=not torch.cuda.is_available(),
                gradient_checkpointing=recompute,
                gradient_checkpointing_kwargs={"use_reentrant": False} if recompute else None,
                logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            )  # fmt: skip
            trainer = SFTTrainer(
                model=model, args=config, processing_class=tokenizer(), peft_config=lora,
                train_dataset=datasets.Dataset.from_dict({"input_ids": data}),
                callbacks=[_marks(clock, around)],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        # From the second call on, the model carries the adapter already.
        model, lora = trainer.model, None
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return Timed(clock.seconds(), losses)

    # peft puts its layers into the model that it is given.
    return Take(base, take)


def _marks(clock: Clock, around: Around) -> Any:
    """Return a callback of transformers' trainer that marks each step, and runs it in a block."""
    from transformers import TrainerCallback

    block = contextlib.ExitStack()

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            clock.mark()

        def on_step_begin(self, args: Any, state: Any, *rest: Any, **options: Any) -> None:
            block.enter_context(around(state.global_step + 1))

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            block.close()
            clock.mark()

    return Marks()


@dataclass(frozen=True)
class Kind:
    """One side of the comparison.

    Attributes:
        build: builds it.
        needs: modules that must be installed.
        imports: modules that are imported before its memory is measured.
    """

    build: Side
    needs: tuple[str, ...]
    imports: tuple[str, ...]


_PEERS = ("bitsandbytes", "peft")
_THEIRS = ("bitsandbytes", "transformers", "peers_model")
_OURS = ("bitsandbytes", "qlora_kit.train.loop", "qlora_kit.model.load", "qlora_kit.tasks.causal")
SIDES = {
    "ours": Kind(ours, ("bitsandbytes",), _OURS),
    "ours fastest": Kind(ours_fastest, ("bitsandbytes",), _OURS),
    "peft": Kind(peft, _PEERS, _THEIRS),
    "peft + liger": Kind(
        peft_with_liger, (*_PEERS, "liger_kernel"), (*_THEIRS, "liger_kernel.transformers")
    ),
    "trl": Kind(trl, (*_PEERS, "trl", "datasets"), (*_THEIRS, "peers_stack")),
    "unsloth": Kind(unsloth, (*_PEERS, "unsloth"), ("unsloth", *_THEIRS)),
}
