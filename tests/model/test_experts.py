"""A mixture's stacked experts are linear layers like all others, and a stack again in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from merging import difference, plain, save, spec_of
from safetensors import safe_open
from support import recorded_peak, relative_error
from tiny_models import OTHERS, fill_lora, load_folder, save_model
from transformers import AutoModelForCausalLM

import qlora_kit as qk
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.export.verify import verify_merge
from qlora_kit.layers.projections import projections, stacks
from qlora_kit.model.names import ModelSource
from qlora_kit.plan.simulate import predict
from qlora_kit.plan.subject import RowSizes, Subject
from qlora_kit.step.reducers import apply, resolve
from qlora_kit.tasks.causal import CausalObjective

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
# Stacked alone; transposed, with biases and a gate of its own as well.
KINDS = ("mixtral", "gpt-oss")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp(request.param), OTHERS[request.param])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_experts_compute_what_their_unpacked_twins_do(folder: Path, bits: int) -> None:
    base = load_folder(folder, bits)
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, each in projections(base.model).items():
            weight = each.frozen.weight.dequantize(torch.float32)
            if not each.is_expert:
                twin.get_submodule(path).weight.copy_(weight)
                continue
            stack_path, _, number = path.rpartition(".")
            stacked = twin.get_parameter(stack_path)[int(number)]
            is_transposed = stacks(base.model)[stack_path].is_transposed
            stacked.copy_(weight.T if is_transposed else weight)
    assert any(each.is_expert for each in projections(base.model).values())
    assert all(each.frozen.weight.bits == bits for each in projections(base.model).values())
    assert relative_error(logits(base.model), logits(twin)) <= 1e-5


@pytest.mark.parametrize("bits", [16, 4])
def test_a_merge_has_its_stacks_again(folder: Path, tmp_path: Path, bits: int) -> None:
    adapter = qk.attach(load_folder(folder, bits), qk.LoraSpec(rank=4))
    fill_lora(adapter, std=0.05)
    stored = qk.read_adapter(save(adapter, tmp_path / "adapter"))
    qk.merge_to(
        tmp_path / "merged", stored, spec_of(folder, bits), make_tokenizer(),
        dtype=torch.float32, check=lambda merge, made: verify_merge(merge, made) and None,
    )  # fmt: skip
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.1.mlp.experts.down_proj" in names
    assert not any(".down_proj.0" in name for name in names)
    assert "qlora_kit" not in (tmp_path / "merged" / "config.json").read_text()
    assert difference(adapter, plain(tmp_path / "merged")) <= 1e-5
    again = load_folder(tmp_path / "merged", 16)
    assert relative_error(logits(again.model), logits(adapter.base.model)) <= 1e-5


def test_experts_carry_no_lora_yet(folder: Path) -> None:
    base = load_folder(folder, 16)
    adapter = qk.attach(base, qk.LoraSpec(targets=("all-linear",)))
    assert {path.rsplit(".", 1)[-1] for path in adapter.layers} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
    qk.detach(adapter)
    for target in ("mlp", r".*experts.*"):
        with pytest.raises(ConfigError, match=r"names experts of a mixture.*expected .*q_proj"):
            qk.attach(base, qk.LoraSpec(targets=(target,)))


def test_a_checkpoint_of_bitsandbytes_cannot_hold_a_stack(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"keeps its experts stacked .*gate_up_proj.* expected"):
        qk.quantize_to(tmp_path / "q", spec_of(folder, 16), qk.Quantization(4), make_tokenizer())
    assert not (tmp_path / "q").exists()


def test_the_plan_of_a_step_is_what_it_takes() -> None:
    """The plan spreads the tokens evenly over the experts; the router nearly does."""
    numbers = {**OTHERS["mixtral"], "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    source = ModelSource("mixtral", architecture={**numbers, "max_position_embeddings": 512})
    spec = qk.BaseSpec(source, None, qk.Quantization(4), random=True)
    hardware, lora = qk.choose_hardware("cpu"), qk.LoraSpec(rank=4)
    config = qk.TrainConfig(batch_size=2, gradient_accumulation_steps=1, device="cpu")
    found = predict(Subject(spec, lora, hardware, RowSizes(256)), config)
    adapter = qk.attach(qk.load_base(spec, hardware), lora)
    model = adapter.base.model
    apply(model, resolve(config, hardware), hardware)
    model.train()
    objective = CausalObjective(adapter.base)
    ids = [3 + n % 90 for n in range(256)]
    batch = objective.batch([{"input_ids": ids, "labels": ids, "row": 0}] * 2)

    def step() -> None:
        (objective.loss_sum(batch) / batch.weight).backward()

    step()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [
        *model.parameters(), *model.buffers(), *(p.grad for p in adapter.parameters().values()),
    ]}  # fmt: skip
    taken = sum(held.values()) + recorded_peak(step)
    moments = 2 * sum(parameter.nbytes for parameter in adapter.parameters().values())
    predicted = max(found.device[phase].bytes for phase in ("forward", "backward"))
    assert predicted == pytest.approx(taken + moments, rel=0.05)
