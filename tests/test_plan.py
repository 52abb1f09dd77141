"""The plan predicts what the allocator records, of the code that trains, and says what fits."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run
from torch.profiler import ProfilerActivity, profile

import qlora_kit as qk
from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import collate
from qlora_kit.model.head import head_of
from qlora_kit.model.names import ModelSource, known_models
from qlora_kit.plan.simulate import Prediction, predict
from qlora_kit.step.forward import loss_sum, scores
from qlora_kit.step.reducers import apply, resolve
from qlora_kit.train.optimizer import build_optimizer


def small(name: str, scale: int = 8, layers: int = 3) -> ModelSource:
    """A known architecture with a fraction of its width and vocabulary."""
    source = known_models()[name]
    numbers = dict(source.architecture or {})
    for key in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"):
        numbers[key] = max(1, numbers[key] // scale)
    numbers["num_key_value_heads"] = max(1, numbers["num_key_value_heads"] // scale)
    numbers |= {"num_hidden_layers": layers, "torch_dtype": "float32"}
    if "layer_types" in numbers:
        numbers["layer_types"] = numbers["layer_types"][:layers]
    numbers |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return dataclasses.replace(source, architecture=numbers, folder=None)


# ---------------------------------------------------------------- the allocator's own record


def recorded_peak(work: Any) -> int:
    """Run `work` and return the most bytes that it held at one time, as the allocator says."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = record.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate((change for _, change in sorted(changes)), initial=0))


def held(tensors: list[torch.Tensor]) -> int:
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def measured(
    spec: qk.BaseSpec, lora: qk.LoraSpec, config: TrainConfig, tokens: int
) -> dict[str, int]:
    """Take real steps on the CPU and return the peak of the phases that a plan has."""
    base = qk.load_base(spec, qk.choose_hardware("cpu"))
    adapter = qk.attach(base, lora)
    parameters = list(adapter.parameters().values())
    optimizer = build_optimizer(parameters, config)
    head = head_of(base.model)
    apply(base.model, resolve(config, base.hardware), base.hardware)
    base.model.train()

    def batch_of(rows: int) -> Any:
        ids = torch.randint(0, head.linear.out_features, (rows, tokens)).tolist()
        return collate([{"input_ids": i, "labels": i, "row": 0} for i in ids], 0)

    def step() -> None:
        batch = batch_of(config.batch_size)
        loss = loss_sum(base.model, batch, head, chunk_tokens=config.loss_chunk_tokens)
        (loss / tokens).backward()

    def static() -> int:
        state = [v for s in optimizer.state.values() for v in s.values()]
        tensors = [t for t in state if isinstance(t, torch.Tensor)]
        tensors += [p.grad for p in parameters if p.grad is not None]
        return held([*tensors, *base.model.parameters(), *base.model.buffers()])

    step()
    optimizer.step()
    optimizer.zero_grad()
    if config.gradient_accumulation_steps > 1:
        step()  # later micro-batches find the gradients of the earlier ones
    found = {"step": static() + recorded_peak(step)}
    optimizer.zero_grad()
    base.model.eval()
    batch = batch_of(config.eval_batch_size)
    found["evaluation"] = static() + recorded_peak(
        lambda: scores(base.model, batch, head, config.loss_chunk_tokens)
    )
    return found


def predicted(found: Prediction) -> dict[str, int]:
    step = max(found.device[phase].bytes for phase in ("forward", "backward"))
    return {"step": step, "evaluation": found.device["evaluation"].bytes}


CASES = [
    # name, bits, tokens, rows, accumulation, recompute, targets, changes
    ("deepseek-7b", 4, 256, 1, 2, True, "attention", {}),
    ("llama-3.1-8b", 8, 160, 2, 1, True, "all-linear", {}),
    ("gemma-2-9b", 4, 128, 1, 2, True, "mlp", {}),
    ("smollm2-135m", 16, 200, 2, 2, False, "attention", {"scale": 3}),
    ("qwen3-8b", 4, 96, 4, 1, True, "attention", {"layers": 5}),
    ("phi-4-mini", 8, 128, 1, 2, True, "all-linear", {}),
]
MORE = [
    (
        name,
        bits,
        tokens,
        rows,
        1 + index % 2,
        recompute,
        ("attention", "all-linear")[index % 2],
        {"scale": 4} if name == "qwen2.5-7b" else {},
    )
    for index, (name, bits, (tokens, rows), recompute) in enumerate(
        itertools.product(
            ("deepseek-7b", "mistral-7b", "qwen2.5-7b"),
            (4, 8, 16),
            ((384, 1), (96, 3)),
            (True, False),
        )
    )
]


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)],
    ids=lambda case: "-".join(str(part) for part in case[:7]),
)
def test_the_prediction_is_what_the_allocator_records(case: Any) -> None:
    name, bits, tokens, rows, accumulation, recompute, targets, changes = case
    spec = qk.BaseSpec(small(name, **changes), None, qk.Quantization(bits), random=True)
    lora = qk.LoraSpec(rank=8, targets=(targets,))
    config = TrainConfig(
        bits=bits, batch_size=rows, gradient_accumulation_steps=accumulation,
        recompute=recompute, eval_batch_size=2 * rows, loss_chunk_tokens=64, device="cpu",
    )  # fmt: skip
    real = measured(spec, lora, config, tokens)
    found = predicted(predict(spec, lora, config, qk.choose_hardware("cpu"), tokens))
    for phase, peak in real.items():
        assert found[phase] == pytest.approx(peak, rel=0.02), phase


# ---------------------------------------------------------------- the command


def test_a_plan_for_programs_has_every_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plan.png"
    code, out, _ = run(
        "plan", "--model", "smollm2-135m", "--bits", "8", "--max-length", "256", "--plot",
        str(picture), "--json", capsys=capsys,
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert found.keys() >= {
        "predicted_peak_bytes", "host_peak_bytes", "phase_peaks_bytes", "breakdown_bytes",
        "settings", "fits", "budget_bytes", "warnings",
    }  # fmt: skip
    phases = found["phase_peaks_bytes"]
    assert found["predicted_peak_bytes"] == max(v for k, v in phases.items() if k != "merge")
    for phase, parts in found["breakdown_bytes"].items():
        assert sum(parts.values()) == phases[phase], phase
    assert picture.stat().st_size > 10_000


def test_a_plan_needs_no_more_than_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = dict(known_models()["smollm2-135m"].architecture or {})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(numbers))
    peaks = []
    for model in (str(file), str(tmp_path), "smollm2-135m"):
        code, out, err = run(
            "plan", "--model", model, "--max-length", "128", "--batch-size", "2",
            "--gradient-accumulation-steps", "2", "--targets", "all-linear", "--json",
            capsys=capsys,
        )  # fmt: skip
        assert code == 0, err
        peaks.append(json.loads(out)["predicted_peak_bytes"])
    assert peaks[0] == peaks[1] == peaks[2]


def test_more_tokens_than_positions_are_planned_and_warned_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run("plan", "--model", "tinyllama", "--max-length", "3000", "--json",
                       capsys=capsys)  # fmt: skip
    assert code == 0
    assert "more than the model's 2,048 positions" in json.loads(out)["warnings"][0]


def test_a_budget_is_kept_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ("plan", "--model", "smollm2-135m", "--max-length", "128", "--json")
    code, out, _ = run(*plan, "--vram", "8GiB", capsys=capsys)
    found = json.loads(out)
    assert (code, found["fits"], found["budget_bytes"]) == (0, True, 8 << 30)
    assert found["predicted_peak_bytes"] < found["card_bytes"] < 8 << 30
    code, _, err = run(*plan, "--vram", "600MB", capsys=capsys)
    assert code == 2
    assert err.startswith("error: --vram: the run takes 0.")
    code, _, err = run(*plan, "--vram", "10 bananas", capsys=capsys)
    assert code == 2
    assert "expected a number with a unit" in err
