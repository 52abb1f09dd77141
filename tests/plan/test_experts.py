"""The plan of a mixture: one expert stands for all that are alike, and what is predicted is so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import recorded_peak, run
from tiny_models import MIXTURES, OTHERS
from torch import Tensor

import qlora_kit as qk
from qlora_kit.config import TrainConfig
from qlora_kit.layers import experts
from qlora_kit.layers.purpose import EXPERTS
from qlora_kit.model.names import ModelSource
from qlora_kit.plan.simulate import Prediction, predict
from qlora_kit.plan.subject import RowSizes, Subject
from qlora_kit.step.reducers import apply, resolve
from qlora_kit.tasks.causal import CausalObjective

TOKENS = 256


def spec_of(numbers: dict[str, Any], bits: Any = 4) -> qk.BaseSpec:
    source = ModelSource("mixture", architecture={**numbers, "max_position_embeddings": 512})
    return qk.BaseSpec(source, None, qk.Quantization(bits), random=True)


def predicted(
    spec: qk.BaseSpec, targets: tuple[str, ...], config: TrainConfig, dtype: str = "float32"
) -> Prediction:
    lora, hardware = qk.LoraSpec(rank=4, targets=targets), qk.choose_hardware("cpu", dtype)
    return predict(Subject(spec, lora, hardware, RowSizes(TOKENS)), config)


def one_by_one(call: Any, order: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    for number, part in enumerate(order.split(call.counts)):
        if len(part):
            yield number, 1, part


@pytest.mark.parametrize("kept", [0, 1])
def test_one_expert_stands_for_all_that_are_alike(
    monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """Bytes and work are those of a simulation of each expert; 512 tokens choose 2 of 5."""
    spec = spec_of({**OTHERS["mixtral"], "num_local_experts": 5})
    config = TrainConfig(batch_size=2, device="cpu", keep_layers=kept)
    short = predicted(spec, ("attention", "experts"), config)
    monkeypatch.setattr(experts._Call, "parts", one_by_one)
    whole = predicted(spec, ("attention", "experts"), config)
    assert short.device == whole.device
    assert short.host == whole.host
    assert short.step == whole.step


def taken(spec: qk.BaseSpec, targets: tuple[str, ...], config: TrainConfig) -> int:
    """Return the most bytes of a real step, with the optimiser's state, by the allocator."""
    hardware = qk.choose_hardware("cpu")
    adapter = qk.attach(qk.load_base(spec, hardware), qk.LoraSpec(rank=4, targets=targets))
    model = adapter.base.model
    apply(model, resolve(config, hardware), hardware)
    model.train()
    objective = CausalObjective(adapter.base)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 96, (TOKENS,), generator=generator).tolist()
    batch = objective.batch([{"input_ids": ids, "labels": ids, "row": 0}] * config.batch_size)

    def step() -> None:
        (objective.loss_sum(batch) / batch.weight).backward()

    step()
    trained = list(adapter.parameters().values())
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [
        *model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None),
    ]}  # fmt: skip
    moments = 2 * sum(parameter.nbytes for parameter in trained)
    return sum(held.values()) + recorded_peak(step) + moments


WIDE = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.02}


MIXTRAL = {**OTHERS["mixtral"], **WIDE, "intermediate_size": 512}
QWEN = {
    **MIXTURES["qwen3-moe"], **WIDE, "num_experts": 8, "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "targets", "bits"),
    [
        (MIXTRAL, ("attention",), 4),
        (QWEN, ("attention",), 16),
        (QWEN, ("attention", "experts"), 4),
        (MIXTRAL, ("experts",), 8),
    ],
)
def test_the_predicted_peak_is_what_the_allocator_records(
    numbers: dict[str, Any], targets: tuple[str, ...], bits: int
) -> None:
    config = TrainConfig(batch_size=2, gradient_accumulation_steps=2, device="cpu")
    spec = spec_of(numbers, bits)
    found = predicted(spec, targets, config)
    most = max(found.device[phase].bytes for phase in ("forward", "backward"))
    assert most == pytest.approx(taken(spec, targets, config), rel=0.02)


def test_a_plan_has_a_line_for_the_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = {**MIXTURES["qwen3-moe"], **WIDE, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    plan = ("plan", "--model", str(tmp_path), "--max-length", "64", "--targets", "experts")
    code, out, err = run(*plan, "--json", capsys=capsys)
    assert code == 0, err
    found = json.loads(out)
    weights = 2 * 4 * 3 * 256 * 48
    assert found["experts_bytes"] == found["breakdown_bytes"]["backward"][EXPERTS]
    assert 4 / 8 * weights < found["experts_bytes"] < 6 / 8 * weights
    code, shown, err = run(*plan, capsys=capsys)
    assert code == 0, err
    assert "packed experts" in shown
    assert "all beside them" in shown
    rank, ends = 16, 2 * 4 * (256 + 2 * 48 + 48 + 256)
    assert f"{rank * ends:,} parameters" in shown
