"""The kit's side of `peak_vram.py`: it measures a configuration, and predicts the same one."""

from __future__ import annotations

import dataclasses
from typing import Any

from meters import Meter

OFF: dict[str, Any] = {
    "embedding_on_cpu": False, "offload_checkpoints": False, "mlp_tile_tokens": 0,
}  # fmt: skip
# Options that lower the memory, by their name in a table; all of them keep the loss exact.
SETTINGS: dict[str, dict[str, Any]] = {"default": {}, "no reducers": OFF}
# Two micro-batches, so that the second finds the gradients of the first.
ACCUMULATION = 2
# Peaks that belong to a training step.
STEP_PHASES = ("micro_batches", "optimizer", "second_step")
_SCALE, _LAYERS = 8, 4


def source_of(run: dict[str, Any]) -> Any:
    """Return a run's model; `scaled` has an eighth of the width and vocabulary, and four layers."""
    import qlora_kit as qk

    source = qk.find_model(run["model"])
    if not run["scaled"]:
        return source
    numbers = dict(source.architecture)
    for name in (
        "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads",
        "num_key_value_heads",
    ):  # fmt: skip
        numbers[name] = max(1, numbers[name] // _SCALE)
    numbers["num_hidden_layers"] = _LAYERS
    if "layer_types" in numbers:
        numbers["layer_types"] = numbers["layer_types"][:_LAYERS]
    numbers |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return dataclasses.replace(source, architecture=numbers, folder=None)


def architecture_of(run: dict[str, Any]) -> Any:
    """Return the architecture of a run's model, as transformers has it."""
    import qlora_kit as qk

    spec = qk.BaseSpec(source_of(run), None, qk.Quantization(run["bits"]), random=True)
    return spec.architecture()


def spec_of(run: dict[str, Any]) -> Any:
    """Return the base of a run; it is on the disk only where pretrained weights are asked for."""
    import qlora_kit as qk
    from qlora_kit.model.fetch import fetch

    source = source_of(run)
    is_random = run["weights"] == "random" or run["scaled"]
    folder = fetch(source, random=is_random).folder
    return qk.BaseSpec(source, folder, qk.Quantization(run["bits"]), is_random)


def config_of(run: dict[str, Any]) -> Any:
    """Return the options of a run; every option that is not named has the kit's default."""
    import qlora_kit as qk

    return qk.TrainConfig(
        model=run["model"], bits=run["bits"], rank=run["rank"], targets=(run["targets"],),
        batch_size=run["batch_size"], eval_batch_size=run["batch_size"],
        gradient_accumulation_steps=ACCUMULATION, max_length=run["length"],
        **SETTINGS[run["setting"]],
    )  # fmt: skip


# ---------------------------------------------------------------- measured


def load(run: dict[str, Any], hardware: Any) -> Any:
    """Load the base of a run without its digest, which needs every tensor on the host.

    Copying and hashing the 14 GB of a 7B takes longer than everything else. On the device there is
    no difference.
    """
    from unittest import mock

    import qlora_kit as qk
    from qlora_kit.model.load import Digest, Placement

    # No mock object, which would keep every tensor it is called with.
    with mock.patch.object(Digest, "add", _not_hashed):
        return qk.load_base(spec_of(run), hardware, placement=Placement.of(config_of(run)))


def _not_hashed(digest: Any, name: str, tensor: Any) -> None:
    """Stand in for `Digest.add`."""


def measure(run: dict[str, Any], meter: Meter) -> None:
    """Load, take two optimiser steps and evaluate, each as one phase of the meter.

    Args:
        run: `model`, `scaled`, `weights`, `bits`, `rank`, `targets`, `batch_size`, `length`,
            and `setting` (one of `SETTINGS`).
        meter: notes the peaks.
    """
    import qlora_kit as qk
    from qlora_kit.model.head import head_of
    from qlora_kit.model.load import Placement
    from qlora_kit.step.settle import settle
    from qlora_kit.tasks.causal import loss_sum, scores
    from qlora_kit.train.optimizer import build_optimizer

    config = config_of(run)
    hardware = qk.choose_hardware(dtype="bfloat16")
    placement = Placement.of(config)
    base = meter.phase("load", lambda: qk.load_base(spec_of(run), hardware, placement=placement))
    adapter = meter.phase("attach", lambda: qk.attach(base, qk.LoraSpec.of(config)))
    parameters = list(adapter.parameters().values())
    optimizer = build_optimizer(parameters, config)
    head = head_of(base.model)
    settle(base.model, config, hardware)
    batch = random_batch(run, head.linear.out_features).to(hardware.device)

    def micro_batches() -> None:
        base.model.train()
        for _ in range(ACCUMULATION):
            loss: Any = loss_sum(base.model, batch, head, chunk_tokens=config.loss_chunk_tokens)
            (loss / batch.weight).backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    meter.phase("micro_batches", micro_batches)
    meter.phase("optimizer", step)
    # From now on Adam's state exists, so this step is like every later one.
    meter.phase("second_step", lambda: (micro_batches(), step()))
    base.model.eval()
    meter.phase("evaluation", lambda: scores(base.model, batch, head, config.loss_chunk_tokens))


def random_batch(run: dict[str, Any], vocabulary: int) -> Any:
    """Return one micro-batch of a run, with every token supervised."""
    import torch

    from qlora_kit.data.batch import collate

    shape = (run["batch_size"], run["length"])
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0)).tolist()
    return collate([{"input_ids": row, "labels": row, "row": 0} for row in ids], 0)


# ---------------------------------------------------------------- predicted


def predicted(run: dict[str, Any]) -> dict[str, int]:
    """Return the predicted peak of a training step and of an evaluation, in bytes.

    A `scaled` run is measured on a CPU, so it is planned for a CPU. Any other run is planned for a
    GPU, whether there is one or not. Both compute in bf16.
    """
    return peaks(source_of(run), config_of(run), for_gpu=not run["scaled"])


def phase_peaks(run: dict[str, Any]) -> dict[str, int]:
    """Return the predicted peak of every phase on the device, in bytes."""
    from qlora_kit.plan.simulate import predict

    config = config_of(run)
    found = predict(_planned(source_of(run), config, for_gpu=not run["scaled"]), config)
    return {phase: peak.bytes for phase, peak in found.device.items()}


def step_work(run: dict[str, Any]) -> Any:
    """Return the work of one micro-batch, counted on fake tensors: a `plan.ledger.Work`."""
    from qlora_kit.model.architecture import build_skeleton
    from qlora_kit.plan.simulate import BatchShape, simulated_run

    config = config_of(run)
    subject = _planned(source_of(run), config, for_gpu=not run["scaled"])
    skeleton = build_skeleton(subject.spec.architecture())
    with simulated_run(subject, config, skeleton) as simulated:
        simulated.step(config, BatchShape(run["batch_size"], run["length"]))
        return simulated.work


def peaks(source: Any, config: Any, *, for_gpu: bool) -> dict[str, int]:
    """Return the predicted peaks of a step, on device and host, and of an evaluation."""
    from qlora_kit.plan.simulate import predict

    found = predict(_planned(source, config, for_gpu=for_gpu), config)
    step = ("forward", "backward", "optimizer")
    return {
        "step": max(found.device[phase].bytes for phase in step),
        "host": max(found.host[phase].bytes for phase in step),
        "evaluation": found.device["evaluation"].bytes,
    }


def _planned(source: Any, config: Any, *, for_gpu: bool) -> Any:
    """Return the `Subject` of a run in bf16 with random weights."""
    import torch

    import qlora_kit as qk
    from qlora_kit.model.hardware import Hardware
    from qlora_kit.plan.subject import RowSizes, Subject

    hardware = Hardware(torch.device("meta" if for_gpu else "cpu"), torch.bfloat16, "planned")
    spec = qk.BaseSpec(source, None, qk.Quantization(config.bits), random=True)
    return Subject(spec, qk.LoraSpec.of(config), hardware, RowSizes(config.max_length))
