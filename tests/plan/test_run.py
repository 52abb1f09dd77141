"""A run keeps its prediction: rehearsed before the first step, undone, and never exceeded."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import recorded_peak, run

import qlora_kit as qk
from qlora_kit.data.batch import TokenRows
from qlora_kit.errors import ConfigError
from qlora_kit.events import Event, Notice
from qlora_kit.model.hardware import choose_hardware
from qlora_kit.plan import run as plan_module
from qlora_kit.plan import subject as subject_module
from qlora_kit.plan.ledger import Ledger
from qlora_kit.plan.rehearsal import rehearse
from qlora_kit.plan.run import plan_run
from qlora_kit.plan.subject import RowSizes, Subject
from qlora_kit.plan.watch import PURPOSES
from qlora_kit.train.optimizer_step import OptimizerStep


def rows_of(lengths: list[int], vocabulary: int = 96, seed: int = 0) -> list[dict[str, Any]]:
    source = random.Random(seed)
    rows = []
    for index, length in enumerate(lengths):
        ids = [source.randrange(3, vocabulary) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": ids, "row": index})
    return rows


def loaded(folder: Path, bits: int = 4) -> qk.Adapter:
    spec = qk.BaseSpec(qk.find_model(str(folder)), folder, qk.Quantization(bits))
    base = qk.load_base(spec, choose_hardware("cpu"))
    return qk.attach(base, qk.LoraSpec(rank=4, targets=("all-linear",)))


def options(**changes: Any) -> qk.TrainConfig:
    given = {"max_steps": 4, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    return qk.TrainConfig(**{**given, "batch_size": 2, "device": "cpu", **changes})


def state_of(step: OptimizerStep) -> dict[str, torch.Tensor]:
    found = {f"weight {i}": p.detach().clone() for i, p in enumerate(step.parameters)}
    for i, parameter in enumerate(step.parameters):
        for name, value in step.optimizer.state.get(parameter, {}).items():
            found[f"state {i} {name}"] = torch.as_tensor(value).clone()
    found["random"] = torch.random.get_rng_state()
    return found


# ---------------------------------------------------------------- the rehearsal


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_rehearsed_run_has_the_bits_of_one_that_was_not(
    optimizer: str, save_tiny: Callable[..., Path]
) -> None:
    rows = rows_of([7, 9, 12, 5, 8, 11, 6, 10] * 4)
    ends = []
    for is_rehearsed in (True, False):
        adapter = loaded(save_tiny("deepseek-7b"))
        qk.train_adapter(
            adapter, rows, options(optimizer=optimizer, lora_dropout=0.1),
            before_first_step=(lambda step: rehearse(step, 2)) if is_rehearsed else None,
        )  # fmt: skip
        ends.append({name: p.detach().clone() for name, p in adapter.parameters().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged-adamw8bit"])
def test_in_the_middle_of_a_run_all_is_put_back(
    optimizer: str, save_tiny: Callable[..., Path]
) -> None:
    found: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def after_some_steps(step: OptimizerStep) -> None:
        for index in range(3):
            step.take([(index, index + 1)], 1e-2)
        before = state_of(step)
        rehearse(step, 2)
        found.append((before, state_of(step)))

    qk.train_adapter(
        loaded(save_tiny("deepseek-7b")), rows_of([7, 9, 12, 5]), options(optimizer=optimizer),
        before_first_step=after_some_steps,
    )  # fmt: skip
    before, after = found[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_rehearsal_takes_the_longest_rows_and_tells_what_is_what(
    save_tiny: Callable[..., Path],
) -> None:
    found = []
    qk.train_adapter(
        loaded(save_tiny("deepseek-7b")), rows_of([7, 30, 12, 29, 8]), options(),
        before_first_step=lambda step: found.append(rehearse(step, 2)),
    )  # fmt: skip
    (rehearsal,) = found
    assert (rehearsal.rows, rehearsal.tokens) == (2, 30)
    largest = max(rehearsal.timeline, key=sum)
    # The allocator also counts the temporary memory of operations.
    assert 0.7 * rehearsal.peak_bytes < sum(largest) <= rehearsal.peak_bytes
    shown = {name for name, size in zip(PURPOSES, largest, strict=True) if size}
    assert {"base weights", "LoRA", "gradients", "optimizer", "activations"} <= shown


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_no_step_of_mixed_lengths_takes_more_than_the_rehearsal(
    steps: int, save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random.Random(1)
    lengths = [source.choice([4, 6, 9, 15, 22, 31, 48, 60]) for _ in range(4 * steps)]
    peaks: list[int] = []
    rehearsed: list[int] = []
    real = OptimizerStep.take

    def measured_take(self: OptimizerStep, *arguments: Any, **named: Any) -> Any:
        held = Ledger("cpu")
        tensors = [*self.model.parameters(), *self.model.buffers()]
        state = [v for s in self.optimizer.state.values() for v in s.values()]
        for tensor in [*tensors, *(v for v in state if isinstance(v, torch.Tensor))]:
            held.book(tensor, "held")
        taken: list[Any] = []
        peak = recorded_peak(lambda: taken.append(real(self, *arguments, **named)))
        peaks.append(held.live_bytes + peak)
        return taken[0]

    def before(step: OptimizerStep) -> None:
        rehearsed.append(rehearse(step, 2).peak_bytes)
        monkeypatch.setattr(OptimizerStep, "take", measured_take)

    qk.train_adapter(
        loaded(save_tiny("deepseek-7b")), rows_of(lengths), options(max_steps=steps, batch_size=2),
        before_first_step=before,
    )  # fmt: skip
    assert len(peaks) == steps
    assert max(peaks) <= rehearsed[0]
    assert max(peaks) > 0.9 * rehearsed[0]


# ---------------------------------------------------------------- a run and its account


def train(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    return run("train", "--model", "demo", "--max-steps", "2", "--validation-fraction", "0",
               *arguments, capsys=capsys)  # fmt: skip


def test_every_run_ends_with_predicted_measured_and_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    code, out, err = train("--batch-size", "4", "--gradient-accumulation-steps", "4",
                           "--max-steps", "4", "--output", str(output), capsys=capsys)  # fmt: skip
    assert code == 0, err
    assert "4 steps" in out
    assert "rates measured on this device" in " ".join(out.split())
    assert re.search(r"predicted step +about [\d.]+ s\n", out)
    assert re.search(r"measured step +[\d.]+ s, mean of 2 after the first 2 \([+-]\d+%\)\n", out)
    assert "measured step" in (output / "report.html").read_text()
    assert "rehearsed a step on the longest rows, 4 × 56 tokens" in out + err
    assert "predicted peak" in out
    assert "measured peak" in out
    content = json.loads((output / "memory.json").read_text())
    assert content["predicted"]["time"]["steps"] == 4
    # Rows have 38 tokens in the mean, and 16 of them make a step.
    assert 500 < content["predicted"]["time"]["tokens_per_step"] < 700
    assert abs(content["rehearsal"]["difference"]) < 0.02
    assert content["run"]["peak_anonymous_bytes"] > content["rehearsal"]["measured_peak_bytes"]
    assert len(content["rehearsal"]["timeline_bytes"]) > 100
    assert (output / "memory.png").stat().st_size > 10_000


def test_a_budget_is_kept_by_the_run_and_its_choice_by_a_resumed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "run")
    budget = ("--vram", "30MB", "--save-steps", "1", "--output", output)
    code, out, err = train(*budget, capsys=capsys)
    assert code == 0, err
    assert "settings for 30.0 MB of memory" in out
    content = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert content["predicted"]["predicted_peak_bytes"] <= 30_000_000
    assert content["rehearsal"]["measured_peak_bytes"] <= 30_000_000
    chosen = content["predicted"]["settings"]
    assert chosen["batch_size"] * chosen["gradient_accumulation_steps"] == 16
    code, out, err = train(*budget, "--max-steps", "3", "--resume", capsys=capsys)
    assert code == 0, err
    assert "settings for" not in out
    content = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert content["predicted"]["settings"]["batch_size"] == chosen["batch_size"]


def test_nothing_is_created_when_nothing_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    code, _, err = train("--vram", "3MB", "--output", str(output), capsys=capsys)
    assert code == 2
    assert "expected to fit 3.0 MB of memory" in err
    assert not output.exists()


def plan_tiny(folder: Path, announce: Callable[[Event], None], **changes: Any) -> Any:
    spec = qk.BaseSpec(qk.find_model(str(folder)), folder, qk.Quantization(4))
    config = options(**changes)
    rows = RowSizes.of(TokenRows(rows_of([9, 20, 14])), None, config)
    hardware = choose_hardware(config.device, config.dtype)
    return plan_run(config, Subject(spec, qk.LoraSpec.of(config), hardware, rows), announce)


def test_a_device_that_cannot_be_measured_costs_only_the_time(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: torch.device) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(subject_module, "ceilings_of", fails)
    plan = plan_tiny(save_tiny("deepseek-7b"), lambda _: None)
    assert plan.time_rows() == (
        ("time", "not predicted: the device could not be measured (RuntimeError)"),
    )
    assert plan.prediction.peak.bytes > 0


def test_settings_that_do_not_fit_what_is_free_are_refused(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "free_bytes", lambda device, processes: 1000)
    with pytest.raises(ConfigError, match="MB of memory are free; expected it to fit"):
        plan_tiny(save_tiny("deepseek-7b"), lambda event: None)


def test_a_run_that_cannot_be_simulated_still_runs_unless_a_budget_was_asked_for(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("no such op")

    monkeypatch.setattr(plan_module, "plan_ways", broken)
    said: list[Event] = []
    assert plan_tiny(save_tiny("deepseek-7b"), said.append) is None
    assert any("is not predicted (RuntimeError)" in e.text for e in said if isinstance(e, Notice))
    with pytest.raises(RuntimeError, match="no such op"):
        plan_tiny(save_tiny("deepseek-7b"), said.append, vram="1GB")


def test_the_dtype_that_was_chosen_is_kept_by_a_resumed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--batch-size", "2", "--gradient-accumulation-steps", "1", "--samples", "0",
             "--no-rehearse", "--output", str(tmp_path / "run"))  # fmt: skip
    code, out, err = train(*asked, "--dtype", "bfloat16", capsys=capsys)
    assert code == 0, err
    assert "bfloat16 (as asked)" in out
    code, out, err = train(*asked, "--max-steps", "3", "--resume", capsys=capsys)
    assert code == 0, err
    assert "bfloat16 (as asked)" in out
