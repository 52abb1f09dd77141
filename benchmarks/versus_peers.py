"""Compare a training step with the usual stack, on this machine's CPU.

    python benchmarks/versus_peers.py [--model smollm2,deep,wide] [--rounds 3] [--steps 4]

The sides are `ours`; `peft`, a plain loop of transformers + peft + bitsandbytes with
`F.cross_entropy`; and `trl`, its SFTTrainer on the same stack. They run in turn, each in its own
process, for several rounds. Our side begins as the command line does, with the heap settings that
`qlora-kit train` gives itself; the peers begin as Python does. Ratios are taken round by round, and
their median is quoted. Memory is the peak of the process's anonymous memory (mapped files do not
count), minus its anonymous memory after the imports.

The models are `smollm2`, the shape of SmolLM2-135M, a real model with tied weights and grouped
heads; `deep`, with a small vocabulary; and `wide`, four layers under DeepSeek's vocabulary of
102,400. All widths are multiples of 64: bitsandbytes' kernel for AVX-512 unpacks other widths
wrongly, and the peers depend on it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import AnonymousPeak, machine_and_command, matmul_flops, print_table, run_side

from qlora_kit.model.environment import restart_with_tight_heap

MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True, "batch": 2, "length": 256,
    },
    "deep": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192,
        "tie_word_embeddings": False, "batch": 4, "length": 256,
    },
    "wide": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 102400,
        "tie_word_embeddings": False, "batch": 2, "length": 512,
    },
}  # fmt: skip
SIDES = ("ours", "peft", "trl")
RANK, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LEARNING_RATE = 2e-4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=4, help="measured steps a round, after one warm-up"
    )
    parser.add_argument("--model", default=",".join(MODELS), help="shapes, separated by commas")
    parser.add_argument("--json", type=Path, help="file for every figure of every run")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        if arguments.side == "ours":
            restart_with_tight_heap()
        settings = json.loads(arguments.settings)
        print(json.dumps(_SIDES[arguments.side](settings)))
        return
    names = arguments.model.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--model: no shape {', '.join(unknown)}; expected {', '.join(MODELS)}")
    results = {}
    for name in names:
        results[name] = compare(name, arguments.rounds, arguments.steps)
        if arguments.json:
            # Written after each model, so that a run that is cut short keeps its figures.
            found = {**machine_and_command(), "models": results}
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def compare(name: str, rounds: int, steps: int) -> dict[str, Any]:
    """Run every side of one model in turn and print the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(MODELS[name], Path(folder))
        settings = {**MODELS[name], "folder": folder, "steps": steps}
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side in SIDES:
                runs[side].append(run_side(sys.argv[0], side, settings))
    rows = [_summary(side, runs) for side in SIDES]
    print(f"\n{name}: {json.dumps(MODELS[name])}")
    print_table(rows, list(rows[0]))
    return {"settings": MODELS[name], "sides": rows, "runs": runs}


def _summary(side: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    pairs = list(zip(runs["ours"], runs[side], strict=True))
    mine = runs[side]
    return {
        "side": side,
        "step_seconds": _median([run["step_seconds"] for run in mine]),
        "tokens_per_second": _median([run["tokens_per_second"] for run in mine]),
        "memory_mb": _median([run["memory_bytes"] / 1e6 for run in mine]),
        "share_of_matmul_rate": _median([run["share_of_matmul_rate"] for run in mine]),
        "our_speed_ratio": _median([b["step_seconds"] / a["step_seconds"] for a, b in pairs]),
        "our_memory_ratio": _median([a["memory_bytes"] / b["memory_bytes"] for a, b in pairs]),
        "first_loss": round(mine[-1]["losses"][0], 5),
        "last_loss": round(mine[-1]["losses"][-1], 5),
    }  # fmt: skip


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def save_model(settings: dict[str, Any], folder: Path) -> None:
    """Write a random fp32 Llama, which every side loads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    numbers = {k: v for k, v in settings.items() if k not in ("batch", "length")}
    config = LlamaConfig(**numbers, max_position_embeddings=2048)
    LlamaForCausalLM(config).save_pretrained(folder)


def token_rows(settings: dict[str, Any]) -> list[list[int]]:
    """Return one row as often as steps need it, so that sides that shuffle still learn the same."""
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (settings["length"],)
    row = torch.randint(3, settings["vocab_size"], shape, generator=generator).tolist()
    return [row] * (settings["batch"] * (settings["steps"] + 1))


def step_flops(settings: dict[str, Any]) -> float:
    """Return the floating-point operations of one step: those of the linear layers and the head.

    For each token and element of a linear weight there are 2 in forward, 2 in recomputation, and 2
    for the gradient of the input. For the head there are 4, because it is not recomputed. Frozen
    weights have no gradient. LoRA and attention are left out (below 5 %).
    """
    h, i = settings["hidden_size"], settings["intermediate_size"]
    narrow = h * settings["num_key_value_heads"] // settings["num_attention_heads"]
    linear = settings["num_hidden_layers"] * (2 * h * h + 2 * h * narrow + 3 * h * i)
    tokens = settings["batch"] * settings["length"]
    return float(tokens * (6 * linear + 4 * settings["vocab_size"] * h))


def _finding(
    settings: dict[str, Any], seconds: list[float], losses: list[float], memory: AnonymousPeak
) -> dict[str, Any]:
    # Read before the rate is measured, because measuring it takes memory too.
    growth = memory.growth_bytes
    step = statistics.median(seconds[1:])
    return {
        "step_seconds": step,
        "tokens_per_second": settings["batch"] * settings["length"] / step,
        "memory_bytes": growth,
        "after_imports_bytes": memory.start_bytes,
        "share_of_matmul_rate": step_flops(settings) / step / matmul_flops(),
        "losses": losses,
    }


# ---------------------------------------------------------------- sides


def run_ours(settings: dict[str, Any]) -> dict[str, Any]:
    """The kit, through its API."""
    import qlora_kit as qk
    from qlora_kit.events import Event, StepFinished
    from qlora_kit.model.names import find_model
    from qlora_kit.train.loop import train_adapter

    rows = [{"input_ids": r, "labels": r, "row": n} for n, r in enumerate(token_rows(settings))]
    memory = AnonymousPeak()
    source = find_model(settings["folder"])
    base = qk.load_base(
        qk.BaseSpec(source, source.folder, qk.Quantization(4)), qk.choose_hardware("cpu")
    )
    adapter = qk.attach(base, qk.LoraSpec(rank=RANK, alpha=ALPHA, targets=tuple(TARGETS)))
    seconds: list[float] = []
    losses: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepFinished):
            seconds.append(event.step_seconds)
            losses.append(event.loss)

    config = qk.TrainConfig(
        batch_size=settings["batch"],
        gradient_accumulation_steps=1,
        max_steps=settings["steps"] + 1,
        scheduler="constant",
        warmup_ratio=0,
        learning_rate=LEARNING_RATE,
    )
    train_adapter(adapter, rows, config, announce=listen)
    return _finding(settings, seconds, losses, memory)


def _peft_model(settings: dict[str, Any]) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        settings["folder"], quantization_config=quantization, dtype=torch.float32
    )
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return model, lora, get_peft_model


def run_peft(settings: dict[str, Any]) -> dict[str, Any]:
    """A plain loop: transformers + peft + bitsandbytes and `F.cross_entropy`."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    import torch.nn.functional as F
    import transformers  # noqa: F401

    rows = torch.tensor(token_rows(settings))
    memory = AnonymousPeak()
    model, lora, get_peft_model = _peft_model(settings)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    model = get_peft_model(model, lora)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    seconds, losses = [], []
    for ids in rows.split(settings["batch"]):
        start = time.perf_counter()
        logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    return _finding(settings, seconds, losses, memory)


def run_trl(settings: dict[str, Any]) -> dict[str, Any]:
    """TRL's SFTTrainer on the same stack, at its defaults."""
    import bitsandbytes  # noqa: F401
    import datasets
    import peft  # noqa: F401
    import transformers
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    rows = token_rows(settings)
    memory = AnonymousPeak()
    model, lora, _ = _peft_model(settings)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    times: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output, use_cpu=True, bf16=False, fp16=False,
            per_device_train_batch_size=settings["batch"], gradient_accumulation_steps=1,
            max_steps=settings["steps"] + 1, learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", max_length=settings["length"],
            gradient_checkpointing=True, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, max_grad_norm=0.3,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer, peft_config=lora, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return _finding(settings, times, losses, memory)


_SIDES = {"ours": run_ours, "peft": run_peft, "trl": run_trl}

if __name__ == "__main__":
    main()
