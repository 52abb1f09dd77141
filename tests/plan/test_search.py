"""With a budget, the plan chooses settings that fit, do the least work, and keep the user's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run, slow

import qlora_kit as qk
from qlora_kit.config import PlanConfig, TrainConfig
from qlora_kit.errors import ConfigError
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.model.architecture import build_skeleton
from qlora_kit.model.cards import ceilings_of_card
from qlora_kit.model.ceilings import Ceilings
from qlora_kit.model.names import find_model
from qlora_kit.plan import budget as budget_module
from qlora_kit.plan.budget import Budget, budget_of
from qlora_kit.plan.duration import seconds_of
from qlora_kit.plan.ledger import Work
from qlora_kit.plan.planning import Plan, make_plan
from qlora_kit.plan.search import search
from qlora_kit.plan.simulate import BatchShape, simulated_run
from qlora_kit.plan.subject import RowSizes, Subject, planned_hardware

pytestmark = pytest.mark.usefixtures("simulated_once")

GIB = 1 << 30
LAYERS = 8


# By the device of a plan: a card that computes fast beside a slow host, and a CPU.
RATES = {
    "auto": replace(ceilings_of_card("RTX 4090"), call_seconds=5e-6),
    "cpu": Ceilings("a CPU", {"float32": 1e11}, ((1, 1e10),), {"float32": 2e10}, None, 1e-6, True),
}


def planned(
    config: TrainConfig, rows: RowSizes | None = None, ceilings: Ceilings | None = None
) -> Subject:
    source = find_model(config.model)
    if config.model != "deepseek-7b":
        fewer = {**(source.architecture or {}), "num_hidden_layers": LAYERS}
        source = replace(source, architecture=fewer)
    spec = qk.BaseSpec(source, None, qk.Quantization(config.bits), random=True)
    rows = rows or RowSizes(config.max_length)
    subject = Subject(spec, LoraSpec.of(config), planned_hardware(config), rows)
    return subject if ceilings is None else replace(subject, ceilings=ceilings)


def step_taken(config: TrainConfig, tokens: int) -> tuple[int, Work]:
    """Return the peak of a step of the whole model, and its work."""
    what = planned(config)
    skeleton = build_skeleton(what.spec.architecture())
    with simulated_run(what, config, skeleton) as run:
        run.step(config, BatchShape(config.batch_size, tokens))
        peak = max(run.device[phase].bytes for phase in ("forward", "backward"))
        return peak, run.work


def plan_of(config: TrainConfig, card_bytes: int, **rows: Any) -> Plan:
    return make_plan(config, planned(config, **rows), Budget(card_bytes))


SMALL = PlanConfig(model="smollm2-135m", bits=4, max_length=512, eval_batch_size=1)


# Simulating the whole model takes long, so by default only three choices are tested: the first, the
# last, and one between.
@pytest.mark.parametrize(
    ("device", "recompute", "parts"),
    [("auto", True, 2), ("cpu", True, 2),
     *slow(("auto", True, 5), ("cpu", True, 5), ("cpu", False, 5))],
)  # fmt: skip
def test_what_is_extrapolated_from_three_layers_is_what_the_whole_model_takes(
    device: str, recompute: bool, parts: int
) -> None:
    effective = {"batch_size": 2, "gradient_accumulation_steps": 4}
    config = SMALL.model_copy(update={"device": device, "recompute": recompute, **effective})
    what = planned(config, ceilings=RATES[device])
    found = search(what, config, Budget(4 * GIB, on_gpu=device != "cpu"))
    assert found.ranked_by == "time"
    for choice in found.fitting[:: max(1, (len(found.fitting) - 1) // parts)]:
        peak, work = step_taken(choice.setting.applied(config), config.max_length)
        assert 0.97 * peak < choice.needs.peak_bytes < 1.08 * peak, choice.setting
        assert choice.needs.work.flop == pytest.approx(work.flop, rel=1e-6), choice.setting
        seconds, whole = choice.needs.seconds, seconds_of(work, RATES[device])
        assert seconds is not None
        # Settings are ranked by it; the time itself is that of a simulation of the whole model.
        assert seconds.device == pytest.approx(whole.device, rel=0.15), choice.setting
        assert seconds.host == pytest.approx(whole.host, rel=0.15), choice.setting
        assert seconds.link == pytest.approx(whole.link, rel=0.1, abs=1e-4), choice.setting


def test_the_choice_fits_and_does_less_work_the_larger_the_budget() -> None:
    costs = []
    for budget in (int(0.98e9), int(1.22e9), int(2.32e9)):
        plan = plan_of(SMALL, budget)
        assert plan.fits
        assert plan.card_bytes <= budget
        assert plan.found is not None
        costs.append(plan.found.fitting[0].cost)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.8 * costs[0]


def test_where_the_host_is_the_limit_more_rows_go_at_a_time() -> None:
    config = SMALL.model_copy(update={"gradient_accumulation_steps": 4, "max_length": 32})
    slow_host = replace(RATES["auto"], call_seconds=1e-4)
    found = search(planned(config, ceilings=slow_host), config, Budget(80 * GIB))
    best = found.fitting[0]
    assert best.needs.seconds is not None
    assert best.needs.seconds.bound == "host"
    assert (best.setting.rows, best.micro_batches) == (4, 1)
    # By its work, one row at a time would hardly be slower.
    assert found.asked.cost > 3 * best.cost
    assert "the least time of" in found.why


def test_with_memory_to_spare_nothing_is_recomputed_nor_copied() -> None:
    plan = plan_of(SMALL, 80 * GIB)
    assert plan.config.keep_layers == plan.config.unpacked_layers == LAYERS
    assert not plan.config.embedding_on_cpu
    assert plan.found is not None
    assert plan.found.fitting[0].needs.work.crossing_bytes == 0


def test_the_effective_batch_and_what_the_user_set_stay() -> None:
    asked = SMALL.model_copy(
        update={"batch_size": 6, "gradient_accumulation_steps": 4, "mlp_tile_tokens": 1024}
        | {"offload_checkpoints": False, "keep_layers": 3}
    )
    config = plan_of(asked, int(1.82e9)).config
    assert config.batch_size * config.gradient_accumulation_steps == 24
    assert config.mlp_tile_tokens == 1024
    assert config.offload_checkpoints is False
    assert config.keep_layers == 3


def test_host_memory_is_kept_to_as_well() -> None:
    config = SMALL.model_copy(update={"model": "tinyllama", "gradient_accumulation_steps": 2})
    card, host = int(1.72e9), int(0.7e9)
    plan = make_plan(config, planned(config), Budget(card))
    assert plan.config.embedding_on_cpu
    assert plan.budget.taken_of_host(plan.prediction.host_peak.bytes, 0) > host
    plan = make_plan(config, planned(config), Budget(card, host))
    assert not plan.config.embedding_on_cpu
    assert plan.fits


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [6, 8, 10, 12, 16, 24])
def test_the_headline_model_gets_settings_for_each_card(gigabytes: int) -> None:
    config = PlanConfig(model="deepseek-7b", max_length=2048)
    plan = plan_of(config, gigabytes * 10**9)
    assert plan.fits
    assert plan.card_bytes > 0.85 * gigabytes * 10**9 or plan.config.keep_layers == 30


# ---------------------------------------------------------------- the command


def test_ranked_choices_are_shown_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("plan", "--model", "demo", "--vram", "920MB", capsys=capsys)
    assert code == 0
    assert "settings for 0.92 GB of the card" in out
    assert "the least work of" in out
    code, out, _ = run("plan", "--model", "demo", "--vram", "920MB", "--json", capsys=capsys)
    found = json.loads(out)
    assert found["fits"] is True
    costs = [choice["relative_cost"] for choice in found["choices"]]
    assert costs[0] == 1.0
    assert costs == sorted(costs)
    assert found["choices"][0]["rows"] == found["settings"]["batch_size"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--vram", "825MB"), "takes 0.8"),
        (("--vram", "300MB"), "no more than the 0.82 GB of context"),
        (("--vram", "10 bananas"), "expected a number with a unit"),
        (("--vram", "10XB"), "expected a number with a unit"),
        (("--vram", "auto"), "no GPU here to ask"),
        (("--ram", "10MB"), "no more than the 0.60 GB of the process itself"),
        (("--vram", "0GB"), "no more than the"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_one_line(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("plan", "--model", "demo", *arguments, capsys=capsys)
    assert code == 2
    assert expected in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_the_context_is_measured_where_there_is_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    options = PlanConfig(model="demo", vram="8GB")
    assumed = budget_of(options, on_gpu=True)
    assert assumed.allocatable_bytes == 8 * 10**9 - 820_000_000
    assert assumed.describe_beside() == "0.82 GB of context, assumed"
    # A card of 10 GB: 0.6 of context, 1.4 of others, 0.2 reserved by torch.
    grown: list[bool] = []
    monkeypatch.setattr(budget_module, "_grow_context", lambda: grown.append(True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    free = 10**10 - 2_200_000_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free if grown else 10**10, 10**10))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 200_000_000)
    found = budget_of(options, on_gpu=True)
    assert found.allocatable_bytes == 6 * 10**9
    assert found.taken_of_card(10**9) == 2 * 10**9 + 1_050_000_000
    assert found.describe_beside() == "2.00 GB of context and other processes, measured"
    whole = budget_of(options.model_copy(update={"vram": "auto"}), on_gpu=True)
    assert whole.card_bytes == 10**10
    with pytest.raises(ConfigError, match=r"1\.50 GB are no more than the 2\.00 GB of context"):
        budget_of(options.model_copy(update={"vram": 1_500_000_000}), on_gpu=True)


@pytest.mark.slow
def test_when_nothing_fits_it_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ("plan", "--model", "smollm2-135m", "--max-length", "4096", "--bits", "16")
    code, _, err = run(*plan, "--vram", "1GB", capsys=capsys)
    assert code == 2
    assert "would fit: " in err
    assert "--max-length 2048" in err or "--max-length 1024" in err


def test_layers_that_stay_unquantised_are_refused_before_anything_is_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = {
        "model_type": "jetmoe", "architectures": ["JetMoeForCausalLM"], "vocab_size": 320,
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    for more in ((), ("--vram", "10GB")):
        code, _, err = run("plan", "--model", str(tmp_path), *more, capsys=capsys)
        assert code == 2
        assert err.count("\n") == 1
        assert "would stay unquantised (largest: " in err
