"""`--rank-budget`: ranks by the gradients of the first rows, with a given sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support import relative_error
from tiny_models import fill_lora, load_folder
from torch import Tensor
from training import make_rows, options
from transformers import AutoModelForCausalLM

import qlora_kit as qk
from qlora_kit.data.batch import TokenRows
from qlora_kit.errors import ConfigError
from qlora_kit.layers.projections import projections
from qlora_kit.lora.ranks import allotted, largest_ranks, most_rank
from qlora_kit.lora.spec import LoraSpec, Variant
from qlora_kit.plan.simulate import predict
from qlora_kit.plan.subject import RowSizes, Subject
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.train.rank_budget import decided

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
BUDGET = 40
SPEC = LoraSpec(
    rank=4, alpha=6.0, targets=("all-linear",), variant=Variant(rank_budget=BUDGET), dropout=0.1
)


def ranks_of(base: Any, spec: LoraSpec = SPEC, **changes: Any) -> LoraSpec:
    config = options(batch_size=2, **changes)
    return decided(base, spec, TokenRows(make_rows(6)), config, CAUSAL, 0)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def full_gradients(base: Any) -> dict[str, Tensor]:
    """Return the gradient of each weight of a base, from its unquantised values."""
    layers = {path: each.frozen for path, each in projections(base.model).items()}
    captured: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def forward(_: Any, given: tuple[Tensor], y: Tensor) -> None:
            x = given[0].detach().flatten(0, -2)

            def backward(grad: Tensor) -> None:
                captured[path] = captured.get(path, torch.zeros(())) + grad.flatten(0, -2).T @ x

            y.register_hook(backward)

        return forward

    handles = [layer.register_forward_hook(hook(path)) for path, layer in layers.items()]
    base.model.get_input_embeddings().weight.requires_grad_(True)
    objective = CAUSAL.objective(base, 0, 256, None)
    rows = make_rows(6)
    for start in range(0, 6, 2):
        objective.loss_sum(objective.batch(rows[start : start + 2])).backward()
    for handle in handles:
        handle.remove()
    base.model.get_input_embeddings().weight.requires_grad_(False)
    return captured


def test_ranks_follow_the_singular_values_of_the_full_gradients(
    save_tiny: Callable[..., Path],
) -> None:
    """Two passes find what a decomposition of the whole gradients would, nearly everywhere."""
    folder = save_tiny("tinyllama")
    found = ranks_of(load_folder(folder, 16)).rank_pattern
    gradients = full_gradients(load_folder(folder, 16))
    assert found.keys() == gradients.keys()
    most = most_rank(BUDGET, len(found))
    exact = {path: torch.linalg.svdvals(each)[:most].tolist() for path, each in gradients.items()}
    expected = allotted({path: exact[path] for path in found}, BUDGET, most)
    assert sum(found.values()) == BUDGET
    assert len(set(found.values())) > 2
    assert sum(abs(found[path] - expected[path]) for path in found) <= 4


def test_deciding_leaves_the_base_as_it_was_and_repeats(save_tiny: Callable[..., Path]) -> None:
    base = load_folder(save_tiny("tinyllama"), 4)
    before = logits(base.model)
    first = ranks_of(base)
    assert torch.equal(logits(base.model), before)
    assert ranks_of(base) == first
    assert first.variant.rank_budget is None
    assert first.rank_of("lm_head") == SPEC.rank
    for path in first.rank_pattern:
        assert first.scaling_of(path) == pytest.approx(SPEC.alpha / SPEC.rank)
    rooted = ranks_of(base, replace(SPEC, rslora=True))
    for path in rooted.rank_pattern:
        assert rooted.scaling_of(path) == pytest.approx(SPEC.alpha / 2)


def test_peft_opens_the_ranks(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_tiny("tinyllama")
    base = load_folder(folder)
    adapter = qk.attach(base, ranks_of(base))
    fill_lora(adapter)
    qk.save_adapter(adapter, tmp_path, qk.BaseRecord.of(base))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    base.model.eval()
    assert relative_error(logits(base.model), logits(theirs.eval())) <= 1e-5


def test_experts_of_a_stack_share_a_rank(save_tiny: Callable[..., Path]) -> None:
    base = load_folder(save_tiny("qwen3-30b-a3b"))
    spec = replace(SPEC, targets=("experts", "q_proj"), dropout=0.0)
    found = ranks_of(base, spec)
    adapter = qk.attach(base, found)
    assert sum(found.rank_pattern.values()) <= BUDGET
    assert adapter.stacks.keys() < found.rank_pattern.keys()


def test_each_layer_has_one_rank_and_the_rest_go_where_they_are_used() -> None:
    uses = {"a": [5.0, 4.0, 3.0, 2.0], "b": [1.0, 0.5], "c": [3.5, 3.5, 3.5, 3.5]}
    assert allotted(uses, 3, 9) == {"a": 1, "b": 1, "c": 1}
    assert allotted(uses, 6, 9) == {"a": 2, "b": 1, "c": 3}
    assert allotted(uses, 6, 2) == {"a": 2, "b": 2, "c": 2}
    assert allotted(uses, 99, 9) == {"a": 4, "b": 2, "c": 4}
    equal = {"a": [1.0] * 3, "b": [1.0] * 3}
    assert allotted(equal, 3, 9) == {"a": 2, "b": 1}


def test_a_plan_takes_the_most_that_the_ranks_can_take(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("tinyllama")
    base = load_folder(folder, 4)
    most = largest_ranks(SPEC, base.model)
    assert sum(most.rank_pattern.values()) == BUDGET
    spec = qk.BaseSpec(qk.find_model(str(folder)), folder, qk.Quantization(4))
    subject = Subject(spec, most, qk.choose_hardware("cpu"), RowSizes(24))
    planned = predict(subject, qk.TrainConfig()).trainable
    assert qk.attach(base, ranks_of(base)).trainable <= planned
    with pytest.raises(ConfigError, match="found 13, and --targets names 14 layers"):
        largest_ranks(replace(SPEC, variant=Variant(rank_budget=13)), spec.skeleton())


def test_undecided_ranks_cannot_be_attached(save_tiny: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="--rank-budget 40: the ranks are not decided"):
        qk.attach(load_folder(save_tiny("tinyllama")), SPEC)
