"""What the tests of a shared base compute in each of several processes; prints one JSON object.

Run by `test_sharded.py` under torch's launcher. Process 0 also computes with a base of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support import recorded_peak, relative_error
from t5_models import ROWS, objective_of, t5_spec
from tiny_models import fill_lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import make_rows
from transformers.modeling_layers import GradientCheckpointingLayer

import qlora_kit as qk
from qlora_kit.config import TrainConfig
from qlora_kit.infer.evaluate import evaluate_parts
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.projections import projections
from qlora_kit.layers.shards import held
from qlora_kit.layers.weight import gathered
from qlora_kit.model.load import BaseSpec, Placement
from qlora_kit.model.names import known_models
from qlora_kit.parallel.one import processes_of_this_run
from qlora_kit.parallel.sharded import Sharding, load_shared_base, shard_layers
from qlora_kit.plan.ledger import Ledger
from qlora_kit.plan.simulate import predict
from qlora_kit.plan.subject import RowSizes, Subject
from qlora_kit.step.kernels import Numbers
from qlora_kit.step.settle import settle
from qlora_kit.step.trials import Tried
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.tasks.tokens import packing
from qlora_kit.train.optimizer import build_optimizer

CPU = qk.choose_hardware("cpu", "float32")


def random_spec(name: str, bits: Any, scale: int = 16, layers: int = 3, **numbers: Any) -> BaseSpec:
    """Return random weights of a known architecture with a fraction of its width."""
    source = known_models()[name]
    found = dict(source.architecture or {})
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        found[key] = max(1, found[key] // scale)
    found |= {"num_hidden_layers": layers, "torch_dtype": "float32", "vocab_size": 515}
    found |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **numbers}
    return BaseSpec(
        replace(source, architecture=found, folder=None), None, qk.Quantization(bits), random=True
    )


def load(spec: BaseSpec, *, shared: bool, head_bits: Any = 16) -> qk.Base:
    placement = Placement(head_bits=head_bits)
    if not shared:
        return qk.load_base(spec, CPU, placement=placement)
    sharding = Sharding.of_this_run(CPU.device)
    base = qk.load_base(spec, CPU, placement=placement, shards=sharding.shards)
    shard_layers(base.model, sharding)
    return base


def with_lora(base: qk.Base) -> qk.Adapter:
    adapter = qk.attach(base, qk.LoraSpec(rank=4, alpha=8.0, targets=("all-linear",)), seed=1)
    fill_lora(adapter)
    return adapter


# ---------------------------------------------------------------- gradients


@dataclass(frozen=True)
class Step:
    """How two micro-batches are computed, of which the gradients are compared."""

    model: str = "llama-3.1-8b"
    bits: int = 4
    packs: bool = False
    head_bits: int = 16
    double_quant: bool = True
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        named = [f"{name}={value}" for name, value in self.options]
        kind = ["packed"] * self.packs + [f"head {self.head_bits}b"] * (self.head_bits < 16)
        kind += ["plain constants"] * (not self.double_quant)
        return " ".join([self.model, f"{self.bits}b", *kind, *named])


STEPS = (
    *(
        Step(bits=bits, options=(("recompute", recompute), ("mlp_tile_tokens", 0)))
        for bits in (4, 8)
        for recompute in (True, False)
    ),
    Step(packs=True),
    Step(options=(("mlp_tile_tokens", 8),)),
    Step("gemma-2-9b"),  # a head that is the embedding as well
    Step(bits=8, head_bits=4),
)
MORE_STEPS = (
    Step(bits=16),
    Step(bits=16, options=(("recompute", False),)),
    Step(options=(("keep_layers", 1),)),
    Step(double_quant=False),
    Step("qwen3-8b", packs=True),
    Step("mistral-7b", bits=8, options=(("mlp_tile_tokens", 8), ("recompute", False))),
)


def gradients(step: Step, *, shared: bool) -> dict[str, Tensor]:
    """Return the gradients of two micro-batches, and the loss and scores of the second."""
    spec = random_spec(step.model, step.bits)
    quantization = replace(spec.quantization, double_quant=step.double_quant)
    spec = replace(spec, quantization=quantization)
    base = load(spec, shared=shared, head_bits=step.head_bits)
    adapter = with_lora(base)
    settle(base.model, TrainConfig(**dict(step.options)), CPU)
    base.model.train()
    objective: Any = CAUSAL.objective(base, 0, 64, None)
    objective = packing(objective) if step.packs else objective
    rows = make_rows(6)
    for some in (rows[:3], rows[3:]):
        loss = objective.loss_sum(objective.batch(some))
        loss.backward()
    found: dict[str, Any] = {name: p.grad for name, p in adapter.parameters().items()}
    with base.in_evaluation():
        scores = objective.measured(objective.batch(rows[:3]))
    return {**found, "loss": loss.detach(), "logprobs": scores.logprobs}


def compared(step: Step) -> float:
    """Return the largest relative difference of what a shared and an own base give."""
    shared, own = gradients(step, shared=True), gradients(step, shared=False)
    return max(relative_error(shared[name], own[name]) for name in own)


# ---------------------------------------------------------------- what is held and received


class Received(TorchDispatchMode):
    """Counts the bytes that this process receives in gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in func.name():
            whole, own = args[0], args[1]
            self.bytes += whole.nbytes - own.nbytes
        return func(*args, **(kwargs or {}))


def packed_bytes(base: qk.Base, *, only_cut: bool) -> int:
    """Return the bytes of the whole tensors of all layers, or of those that are cut."""
    total = 0
    for projection in projections(base.model).values():
        weight = projection.frozen.weight
        with gathered(weight):
            names = weight.rows if only_cut else dict(weight.stored())
            total += sum(getattr(weight, name).nbytes for name in names)
    return total


def traffic(bits: int) -> dict[str, Any]:
    """Count what a micro-batch receives, forward and backward, beside what is to be received."""
    spec = random_spec("llama-3.1-8b", bits)
    base = load(spec, shared=True)
    with_lora(base)
    settle(base.model, TrainConfig(), CPU)
    base.model.train()
    objective: Any = CAUSAL.objective(base, 0, 64, None)
    batch = objective.batch(make_rows(2))
    objective.loss_sum(batch).backward()
    with Received() as received:
        objective.loss_sum(batch).backward()
    head = base.model.get_output_embeddings().weight
    whole_head = head.shape[0] * head.shape[1] * 4
    return {
        "received": received.bytes,
        "cut": packed_bytes(base, only_cut=True),
        "head": whole_head,
        "stored": sum(p.frozen.weight.stored_bytes for p in projections(base.model).values()),
        "whole": packed_bytes(base, only_cut=False),
        "planned": planned_received(spec),
    }


def subject_of(spec: BaseSpec, tokens: int) -> Subject:
    sharing = dist.get_world_size()
    lora = qk.LoraSpec(rank=4, targets=("all-linear",))
    return Subject(spec, lora, CPU, RowSizes(tokens), sharing=sharing)


def planned_received(spec: BaseSpec) -> int:
    config = TrainConfig(device="cpu", batch_size=1, bits=spec.quantization.bits)
    return predict(subject_of(spec, 16), config).step.micro_batch.received_bytes


def loading(bits: int) -> dict[str, int]:
    """Load a shared and an own base under a ledger; return what stays, and what is beside it.

    What lies beside the base while it is read is one tensor, and what its quantising takes.
    """
    spec = random_spec("llama-3.1-8b", bits, scale=8, layers=4)
    sharding = Sharding.of_this_run(CPU.device)
    found = {}
    for name, shards in (("shared", sharding.shards), ("own", None)):
        ledger = Ledger("cpu")
        with ledger:
            base = qk.load_base(spec, CPU, shards=shards)
        tensors = [*base.model.parameters(), *base.model.buffers()]
        found[f"{name}_stays"] = bytes_of(tensors)
        found[f"{name}_beside"] = ledger.peak().bytes - bytes_of(tensors)
    found["linear"] = packed_bytes(base, only_cut=False)
    return found


def bytes_of(tensors: list[Tensor]) -> int:
    """Return the bytes of the storages of tensors, or of the parts of them that are here."""
    storages = [held(tensor).untyped_storage() for tensor in tensors]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


# ---------------------------------------------------------------- memory of a step


def step_memory(bits: int) -> dict[str, int]:
    """Return the peak that the allocator records in a step, the planned peak, and the base."""
    tokens = 64
    spec = random_spec("llama-3.1-8b", bits, scale=4, layers=4)
    config = TrainConfig(bits=bits, device="cpu", loss_chunk_tokens=64, batch_size=1)
    base = load(spec, shared=True)
    lora = qk.LoraSpec(rank=4, targets=("all-linear",))
    parameters = list(qk.attach(base, lora).parameters().values())
    optimizer = build_optimizer(parameters, config)
    settle(base.model, config, CPU)
    base.model.train()
    objective: Any = CAUSAL.objective(base, 0, 64, None)

    def step() -> None:
        ids = torch.randint(3, 500, (tokens,)).tolist()
        objective.loss_sum(
            objective.batch([{"input_ids": ids, "labels": ids, "row": 0}])
        ).backward()

    step()
    optimizer.step()
    state = [v for kept in optimizer.state.values() for v in kept.values()]
    tensors = [v for v in state if isinstance(v, Tensor)] + [p.grad for p in parameters]
    tensors += [*base.model.parameters(), *base.model.buffers()]
    static = bytes_of(tensors)
    peak = static + recorded_peak(step)
    planned = predict(subject_of(spec, tokens), config)
    return {
        "peak": peak,
        "planned": max(planned.device[phase].bytes for phase in ("forward", "backward")),
        "base": packed_bytes(base, only_cut=False),
    }


# ---------------------------------------------------------------- bits


class OneLayer(GradientCheckpointingLayer):
    """A layer of one product, as large as is wanted."""

    def __init__(self, linear: FrozenLinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Stack(nn.Module):
    def __init__(self, layer: OneLayer) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def large_layer(rows: int, columns: int) -> dict[str, bool]:
    """Compare a large layer's gathered tensors and products with those of the whole layer."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(rows, columns, generator=generator, dtype=torch.bfloat16)
    quantization = qk.Quantization(4)
    own = quantization.freeze(values)
    linear = FrozenLinear(columns, rows, bias=False)
    linear.weight = quantization.freeze(values)
    del values
    sharding = Sharding.of_this_run(CPU.device)
    linear.weight.cut(sharding.shards)
    model = Stack(OneLayer(linear))
    shard_layers(model, sharding)
    with gathered(linear):
        pairs = zip(linear.weight.stored(), own.stored(), strict=True)
        tensors = {name: (mine, other) for (name, mine), (_, other) in pairs}
        tensors = {n: (getattr(linear.weight, n), getattr(own, n)) for n in tensors}
        bits = all(torch.equal(mine, other) for mine, other in tensors.values())
    x = torch.randn(2, columns, generator=generator).requires_grad_()
    y = model(x)
    grad_y = torch.randn(2, rows, generator=generator)
    y.backward(grad_y)
    return {
        "bits": bits,
        "product": torch.equal(y, own.product(x.detach())),
        "gradient": torch.equal(x.grad, own.product_back(grad_y)),
    }


def uneven() -> dict[str, bool]:
    """Gather tensors whose rows do not divide, or are fewer than the processes."""
    sharding = Sharding.of_this_run(CPU.device)
    found = {}
    for rows in (1, 5, 8):
        whole = torch.arange(rows * 3, dtype=torch.bfloat16).view(rows, 3)
        part = sharding.shards.part(whole)
        found[str(rows)] = torch.equal(sharding.shards.gathered(part, rows), whole)
    return found


def trials() -> dict[str, bool]:
    """Compare the trials of kernels, which multiply outside of a layer's forward."""
    spec = random_spec("llama-3.1-8b", 4)
    found: dict[str, list[Tensor]] = {}
    for shared in (True, False):
        base = load(spec, shared=shared)
        with_lora(base)
        tried = Tried(base.model, CPU, in_tiles=True)
        for kernel in ("nf4", "gate", "loss"):
            for number, trial in enumerate(tried.trials(kernel)):
                found.setdefault(f"{kernel} {number}", []).extend(trial(Numbers(CPU)))
    halves = {n: (r[: len(r) // 2], r[len(r) // 2 :]) for n, r in found.items()}
    return {
        name: all(torch.equal(a, b) for a, b in zip(shared, own, strict=True))
        for name, (shared, own) in halves.items()
    }


def same_files(folder: Path, output: Path) -> dict[str, bool]:
    """Load a model of a folder, save an adapter and write text; compare all with one process."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    spec = BaseSpec(qk.find_model(str(folder)), folder, qk.Quantization(4))
    texts, digests, files = [], [], []
    for shared in (True, False):
        base = load(spec, shared=shared)
        adapter = with_lora(base)
        digests.append(base.digest)
        prompts = [tokenizer("Once upon a time").input_ids, tokenizer("One").input_ids]
        sampling = qk.Sampling(max_new_tokens=12, temperature=0.0)
        texts.append(list(qk.generate(base, tokenizer, prompts, sampling)))
        place = output / f"{dist.get_rank()}-{shared}"
        place.mkdir(exist_ok=True)
        qk.save_adapter(adapter, place, qk.BaseRecord.of(base))
        files.append((place / "adapter_model.safetensors").read_bytes())
    return {
        "text": texts[0] == texts[1],
        "digest": digests[0] == digests[1],
        "adapter": files[0] == files[1],
    }


def kinds(folder: Path) -> dict[str, float]:
    """Compare logits of a mixture and a transposed model, gradients of LoRA on experts and T5."""
    found = {}
    for name in ("mixtral", "gpt2"):
        spec = BaseSpec(qk.find_model(str(folder / name)), folder / name, qk.Quantization(4))
        bases = [load(spec, shared=shared) for shared in (True, False)]
        found[name] = relative_error(*(b.model(torch.arange(3, 20)[None]).logits for b in bases))
        if name == "mixtral":
            pairs = zip(*map(expert_gradients, bases), strict=True)
            found["experts"] = max(relative_error(*pair) for pair in pairs)
    for name in ("t5", "t5-v1.1"):
        spec = t5_spec(folder / name, bits=4)
        shared, own = (t5_gradients(load(spec, shared=shared)) for shared in (True, False))
        found[name] = max(relative_error(*pair) for pair in zip(shared, own, strict=True))
    return found


def expert_gradients(base: qk.Base) -> list[Tensor]:
    """Return the gradients of LoRA on the experts of a mixture, recomputed."""
    adapter = qk.attach(base, qk.LoraSpec(rank=4, targets=("experts",)), seed=1)
    return _gradients(adapter, CAUSAL.objective(base, 0, 64, None), make_rows(3))


def t5_gradients(base: qk.Base) -> list[Tensor]:
    """Return the gradients of LoRA on both halves of an encoder-decoder, recomputed."""
    adapter = qk.attach(base, qk.LoraSpec(rank=4, targets=("all-linear",)), seed=1)
    return _gradients(adapter, objective_of(adapter), ROWS)


def _gradients(adapter: qk.Adapter, objective: Any, rows: Any) -> list[Tensor]:
    fill_lora(adapter)
    settle(adapter.base.model, TrainConfig(), CPU)
    adapter.base.model.train()
    objective.loss_sum(objective.batch(rows)).backward()
    return [p.grad for p in adapter.parameters().values() if p.grad is not None]


def training() -> dict[str, Any]:
    """Train with a base of each process and with a shared base, from rows that do not divide."""
    spec = random_spec("llama-3.1-8b", 4, layers=2)
    config = TrainConfig(
        max_steps=3, batch_size=2, gradient_accumulation_steps=2, learning_rate=5e-3,
        lora_dropout=0.1, packing=False,
    )  # fmt: skip
    weights, losses = [], []
    for loaded in (qk.load_base, load_shared_base):
        adapter = qk.attach(loaded(spec, CPU), qk.LoraSpec(rank=4, dropout=0.1), seed=1)
        rows = make_rows(7)
        result = qk.train_adapter(adapter, rows, config)
        weights.append([p.detach().clone() for p in adapter.parameters().values()])
        evaluated, _ = evaluate_parts(
            adapter.base, rows, {}, batch_size=2, processes=processes_of_this_run()
        )
        losses.append(evaluated.loss)
    return {
        "weights": all(torch.equal(*pair) for pair in zip(*weights, strict=True)),
        "losses": losses,
        "tokens": result.process_tokens,
        "refused": refusal(lambda: qk.merge(adapter)),
        "sharing": adapter.base.shards.count if adapter.base.shards else 1,
    }


class ShortInLast:
    """A loss for which memory runs out in the last process, in the midst of a step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2 and dist.get_rank() == dist.get_world_size() - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return nn.functional.cross_entropy(logits, targets, reduction="sum")


def short() -> tuple[str, int, str]:
    """Run out of memory in one process; return how this one ended. No other part can follow."""
    spec = random_spec("llama-3.1-8b", 4, layers=2)
    adapter = qk.attach(load_shared_base(spec, CPU), qk.LoraSpec(rank=4), seed=1)
    config = TrainConfig(
        max_steps=2, batch_size=1, gradient_accumulation_steps=8, packing=False
    )  # fmt: skip
    try:
        qk.train_adapter(adapter, make_rows(8), config, loss=ShortInLast())
    except qk.QloraKitError as error:
        return type(error).__name__, error.exit_code, str(error)
    return "not ended", 0, ""


def refusal(work: Callable[[], Any]) -> str:
    try:
        work()
    except qk.QloraKitError as error:
        return str(error)
    return "not refused"


def main() -> None:
    folder, output, stories = map(Path, sys.argv[1:4])
    if "ON_MACHINE" in os.environ:  # as if the processes were on several machines
        on_machine = int(os.environ["ON_MACHINE"])
        os.environ["LOCAL_WORLD_SIZE"] = str(on_machine)
        os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % on_machine)
    processes_of_this_run()
    parts: dict[str, Callable[[], Any]] = {
        "gradients": lambda: {str(step): compared(step) for step in STEPS},
        "traffic": lambda: traffic(4),
        "loading": lambda: loading(4),
        "memory": lambda: step_memory(4),
        "large": lambda: large_layer(4096, 2048),
        "uneven": uneven,
        "trials": trials,
        "files": lambda: same_files(stories, output),
        "kinds": lambda: kinds(folder),
        "training": training,
        "short": short,
    }
    slow: dict[str, Callable[[], Any]] = {
        "more gradients": lambda: {str(step): compared(step) for step in MORE_STEPS},
        "traffic at 8": lambda: traffic(8),
        "loading at 8": lambda: loading(8),
        "memory at 8": lambda: step_memory(8),
        # As large as the largest of a 70B.
        "very large": lambda: large_layer(28672, 8192),
    }
    chosen = sys.argv[4:] or list(parts)
    parts |= slow
    found = {}
    for name in chosen:
        found[name] = parts[name]()
        (output / f"{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
