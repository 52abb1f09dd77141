"""Each start against PEFT's own code, or against the equations of its paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora import get_eva_state_dict
from peft.utils.loftq_utils import _low_rank_decomposition
from peft_twin import transformers_model
from support import relative_error
from tiny_models import load_folder
from torch import Tensor, nn

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import collate
from qlora_kit.lora.attach import attach
from qlora_kit.lora.spec import LoraSpec, Variant
from qlora_kit.lora.starts.eva import PrincipalInputs
from qlora_kit.lora.starts.loftq import loftq
from qlora_kit.lora.starts.lora_ga import lora_ga
from qlora_kit.lora.starts.olora import olora
from qlora_kit.lora.starts.pissa import pissa
from qlora_kit.lora.starts.residual import less, widened
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.train.first_rows import pairs_of_gradients, pairs_of_inputs

TOLERANCE = 1e-5
RANK, ALPHA = 6, 15.0
TEXTS = (
    "Once upon a time, there was a little girl named Lily. She liked to play with her red ball.",
    "A dog ran to the park. The dog was happy and saw a big tree with many birds.",
    "Tom had a big red ball and he did not want to share it with Sam. Sam was sad.",
    "The sun was hot. Mom said, let us swim! They all went to the lake and had fun.",
)


def weight_of(rows: int = 40, columns: int = 28) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


def peft_layer(weight: Tensor, init: str, **more: Any) -> Any:
    """Return PEFT's layer of a linear layer with this weight, after its own start."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data.copy_(weight)
    if init == "lora_ga":
        model[0]._peft_loraga_grad = more.pop("gradient")
        more["lora_ga_config"] = LoraGAConfig()
    named: Any = init
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=named, **more
    )
    return get_peft_model(model, config).base_model.model[0]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_of_weights_are_those_of_peft(init: str) -> None:
    weight, scaling = weight_of(), ALPHA / RANK
    theirs = peft_layer(weight, init)
    a, b = pissa(weight, RANK, scaling) if init == "pissa" else olora(weight, RANK)
    assert relative_error(a, theirs.lora_A["default"].weight.data) <= TOLERANCE
    assert relative_error(b, theirs.lora_B["default"].weight.data) <= TOLERANCE
    base = theirs.get_base_layer().weight.data
    assert relative_error(less(weight, a, b, scaling), base) <= TOLERANCE


def test_loftq_is_what_peft_fits_to_the_lost_part() -> None:
    weight = weight_of()
    quantized = weight.mul(4).round().div(4)
    theirs = _low_rank_decomposition(weight - quantized, reduced_rank=RANK)
    a, b = loftq(weight, quantized, RANK, 1.0)
    assert relative_error(a, theirs["R"]) <= TOLERANCE
    assert relative_error(b, theirs["L"]) <= TOLERANCE


def test_loftq_accounts_for_the_scaling() -> None:
    weight = weight_of()
    quantized = weight.mul(4).round().div(4)
    a, b = loftq(weight, quantized, RANK, 1.0)
    scaled_a, scaled_b = loftq(weight, quantized, RANK, 2.5)
    assert relative_error(2.5 * scaled_b @ scaled_a, b @ a) <= TOLERANCE


def test_lora_ga_is_that_of_peft() -> None:
    # Sizes that lie apart, so that directions are well defined.
    u = torch.linalg.qr(weight_of(40, 28))[0]
    v = torch.linalg.qr(weight_of(28, 28))[0].mT
    sizes = 2.0 ** -torch.arange(28)
    theirs = peft_layer(weight_of(), "lora_ga", gradient=(u * sizes) @ v)
    a, b = lora_ga(u, sizes, v, RANK)
    their_a, their_b = theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data
    # The sign of each direction is free.
    assert relative_error((a * their_a).sum(1).abs(), torch.ones(RANK)) <= TOLERANCE
    ours, own = b.norm(dim=0), their_b.norm(dim=0)
    assert relative_error(ours, own) <= TOLERANCE
    assert relative_error((b * their_b).sum(0).abs(), ours * own) <= TOLERANCE


def test_a_layer_that_is_too_small_starts_its_other_ranks_plainly() -> None:
    weight = weight_of(4, 28)
    a, b = widened(*pissa(weight, RANK, 1.0), RANK, seed=5)
    assert a.shape == (RANK, 28)
    assert b.shape == (4, RANK)
    assert relative_error(b @ a, weight) <= TOLERANCE
    assert not b[:, 4:].any()
    assert a[4:].abs().min() > 0


def test_a_weight_less_its_start_has_the_same_bits_in_slices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = weight_of(300, 64)
    a, b = pissa(weight, RANK, 2.0)
    whole = less(weight, a, b, 2.0)
    monkeypatch.setattr("qlora_kit.lora.starts.residual._SLICE", 64 * 7)
    assert torch.equal(less(weight, a, b, 2.0), whole)


# ---------------------------------------------------------------- of the first rows


def rows_of(stories: Path) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(stories)
    rows = []
    for index, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        # The first token is no target, so PEFT's mask and ours are the same.
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]], "row": index})
    return rows


def spec_of(init: str, rank: int = 4, **more: Any) -> LoraSpec:
    return LoraSpec(rank=rank, alpha=2.0 * rank, variant=Variant(init=init), **more)


def test_eva_is_that_of_peft(stories: Path) -> None:
    batches = [collate(rows_of(stories)[:2], 0), collate(rows_of(stories)[2:], 0)]
    base = load_folder(stories)
    spec = spec_of("eva", targets=("q_proj", "v_proj", "down_proj"))
    objective = CAUSAL.objective(base, 0, 256, None)
    ours = pairs_of_inputs(base, spec, objective, iter(batches * 40), 0)
    config = LoraConfig(
        r=4,
        target_modules=list(spec.targets),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
        task_type="CAUSAL_LM",
    )
    theirs = get_eva_state_dict(
        transformers_model(stories, 16),
        [
            {
                "input_ids": batch.input_ids,
                "labels": batch.labels,
                "attention_mask": (
                    torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
                ).long(),
            }
            for batch in batches
        ],
        config,
        show_progress_bar=False,
    )
    assert ours.keys() == {name.removeprefix("base_model.model.") for name in theirs}
    errors = {
        name: relative_error(ours[name.removeprefix("base_model.model.")][0], each)
        for name, each in theirs.items()
    }
    assert max(errors.values()) <= TOLERANCE, max(errors.items(), key=lambda item: item[1])
    assert not any(b.any() for _, b in ours.values())


def test_principal_inputs_of_batches_are_those_of_all_inputs_together() -> None:
    inputs = weight_of(60, 12) * 2.0 ** -torch.arange(12) + 3
    seen = PrincipalInputs(3)
    for start in range(0, 60, 20):
        seen.add(inputs[start : start + 20])
    components = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)[2][:3]
    assert seen.components is not None
    alike = (seen.components * components).sum(1).abs()
    assert relative_error(alike, torch.ones(3)) <= 1e-3


def test_lora_ga_sees_the_gradients_of_the_weights(stories: Path) -> None:
    batch = collate(rows_of(stories), 0)
    base = load_folder(stories)
    spec = spec_of("lora-ga", rank=16, targets=("q_proj", "down_proj"))
    before = {name: each.clone() for name, each in base.model.state_dict().items()}
    objective = CAUSAL.objective(base, 0, 256, None)
    ours = pairs_of_gradients(base, spec, objective, [batch], TrainConfig(), 1)
    twin = transformers_model(stories, 16)
    twin.train()
    mask = torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
    twin(input_ids=batch.input_ids, attention_mask=mask.long(), labels=batch.labels).loss.backward()
    assert base.model.state_dict().keys() == before.keys()
    for path, (a, b) in ours.items():
        gradient = twin.get_submodule(path).weight.grad
        u, sizes, v = torch.linalg.svd(gradient, full_matrices=False)
        their_a, their_b = lora_ga(u, sizes, v, 16)
        assert relative_error(a.mT @ a, their_a.mT @ their_a) <= 1e-3, path
        assert relative_error(b @ b.mT, their_b @ their_b.mT) <= 1e-3, path


def test_a_base_that_was_asked_is_as_it_was(stories: Path) -> None:
    batch = collate(rows_of(stories), 0)
    base = load_folder(stories, 4)
    objective = CAUSAL.objective(base, 0, 256, None)
    loss = objective.loss_sum(batch)
    for init, ask in (("eva", pairs_of_inputs), ("lora-ga", pairs_of_gradients)):
        batches: Any = iter([batch]) if init == "eva" else [batch]
        more: Any = () if init == "eva" else (TrainConfig(),)
        first = ask(base, spec_of(init), objective, batches, *more, 1)
        batches = iter([batch]) if init == "eva" else [batch]
        again = ask(base, spec_of(init), objective, batches, *more, 1)
        assert all(
            torch.equal(*each) for p in first for each in zip(first[p], again[p], strict=True)
        )
    assert torch.equal(objective.loss_sum(batch), loss)
    attach(base, LoraSpec(rank=2))
