"""Preferences against trl's own trainers: losses, rewards and gradients of the same pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from peft_twin import twin_parameters
from support import relative_error
from tiny_models import fill_lora, save_model, tiny_numbers
from training import make_adapter, make_pairs, options

import qlora_kit as qk
from qlora_kit.config import PreferenceLoss
from qlora_kit.data.batch import TokenRows
from qlora_kit.errors import ConfigError
from qlora_kit.events import Event, MicroBatchHalved, StepFinished
from qlora_kit.infer.evaluate import evaluate
from qlora_kit.tasks.preference import (
    LOGPROBS,
    METRICS,
    PreferenceObjective,
    preference,
    referring,
)

LOSSES: tuple[PreferenceLoss, ...] = ("dpo", "ipo", "orpo")
BETA = 0.3
Pairs = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), tiny_numbers("tinyllama"))


@pytest.fixture
def adapter(folder: Path) -> qk.Adapter:
    made = make_adapter(folder, bits=16)
    fill_lora(made, std=0.3)
    return made


def compared(adapter: qk.Adapter, pairs: Sequence[dict[str, Any]]) -> Pairs:
    """Return pairs with what the base without its adapter says of them."""
    with adapter.disabled():
        found = evaluate(adapter.base, list(pairs), task=referring(preference("dpo", BETA)))
    both = found.details[LOGPROBS].tolist()
    return [{**pair, "reference": own} for pair, own in zip(pairs, both, strict=True)]


def gradients(adapter: qk.Adapter) -> torch.Tensor:
    found = [p.grad.flatten() for p in adapter.parameters().values() if p.grad is not None]
    return torch.cat(found)


def whole_step(objective: PreferenceObjective, pairs: Pairs) -> Any:
    """Return pairs as the only micro-batch of a step."""
    batch = objective.batch(pairs)
    return objective.within_step(batch, objective.step_figures([batch]))


# ---------------------------------------------------------------- trl


def _theirs(kind: str, folder: Path, output: Path, adapter: qk.Adapter) -> tuple[Any, Any]:
    """Return trl's trainer with the same adapter on the same base, and its model."""
    trl = pytest.importorskip("trl", reason="trl is the reference of this test")
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    spec = adapter.spec
    lora = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, target_modules=sorted(adapter.layers),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    common: dict[str, Any] = {
        "output_dir": str(output), "use_cpu": True, "bf16": False, "report_to": [],
        "gradient_checkpointing": False, "beta": BETA, "max_length": 256,
    }  # fmt: skip
    row = {"prompt": ["one"], "chosen": [" two"], "rejected": [" six"]}
    if kind == "orpo":
        orpo = pytest.importorskip("trl.experimental.orpo", reason="trl has no ORPO trainer here")
        trainer, args = orpo.ORPOTrainer, orpo.ORPOConfig(**common)
    else:
        of = {"dpo": "sigmoid", "ipo": "ipo"}[kind]
        trainer, args = trl.DPOTrainer, trl.DPOConfig(loss_type=of, **common)
    made = trainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=args, train_dataset=Dataset.from_dict(row), processing_class=make_tokenizer(),
        peft_config=lora,
    )  # fmt: skip
    model = made.model.eval()
    for path, layer in adapter.layers.items():
        theirs = model.get_submodule(f"base_model.model.{path}")
        theirs.lora_A["default"].weight.data.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.data.copy_(layer.lora_B)
    return made, model


def _their_batch(kind: str, pairs: Pairs) -> Any:
    """Return pairs as trl's own collators lay them."""
    made = []
    for pair in pairs:
        cut = pair["chosen_tokens"]
        sides = {"chosen": slice(0, cut), "rejected": slice(cut, None)}
        ids = {name: pair["input_ids"][part] for name, part in sides.items()}
        labels = {name: pair["labels"][part] for name, part in sides.items()}
        prompt = labels["chosen"].count(-100)
        if kind == "orpo":
            made.append(
                {f"{name}_{what}": value for name in sides for what, value in (
                    ("input_ids", ids[name]), ("labels", labels[name]),
                    ("attention_mask", [1] * len(ids[name])),
                )}
            )  # fmt: skip
        else:
            answers = {f"{name}_ids": own[prompt:] for name, own in ids.items()}
            made.append({"prompt_ids": ids["chosen"][:prompt], **answers})
    if kind == "orpo":
        from trl.experimental.utils import DPODataCollatorWithPadding

        return DPODataCollatorWithPadding(0)(made)
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    return DataCollatorForPreference(pad_token_id=0)(made)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_rewards_and_gradients_are_those_of_trl(
    kind: PreferenceLoss, folder: Path, adapter: qk.Adapter, tmp_path: Path
) -> None:
    pairs = make_pairs(5)
    trainer, model = _theirs(kind, folder, tmp_path, adapter)
    expected = trainer.compute_loss(model, _their_batch(kind, pairs))
    expected.backward()

    rows = compared(adapter, pairs)
    objective = PreferenceObjective(adapter.base, kind=kind, beta=BETA)
    loss, metrics = objective.loss_and_metrics(whole_step(objective, rows))
    (loss / len(pairs)).backward()
    assert float(loss) / len(pairs) == pytest.approx(float(expected), rel=1e-4)
    named = {"accuracies": "accuracy", "margins": "margin", "chosen": "chosen_reward",
             "rejected": "rejected_reward"}  # fmt: skip
    sums = dict(zip(METRICS, metrics.tolist(), strict=True))
    if kind == "orpo":
        told = {name: values[-1] for name, values in trainer._stored_metrics["train"].items()}
    else:
        told = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    for theirs, ours in named.items():
        assert sums[ours] / len(pairs) == pytest.approx(told[f"rewards/{theirs}"], abs=1e-4), ours
    both = twin_parameters(model, adapter)
    for name, parameter in adapter.parameters().items():
        assert parameter.grad is not None
        assert both[name].grad is not None, name
        assert relative_error(parameter.grad, both[name].grad) < 1e-4, name


# ---------------------------------------------------------------- the same step, otherwise cut


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("cut", [(5, 1), (2, 3), (1, 5)], ids=str)
def test_a_step_does_not_depend_on_its_micro_batches(
    kind: PreferenceLoss, cut: tuple[int, int], folder: Path
) -> None:
    rows, accumulation = cut
    found = []
    for at_once, micro_batches in ((5, 1), (rows, accumulation)):
        adapter = make_adapter(folder, bits=16, dropout=0.2)
        events: list[Event] = []
        config = options(
            max_steps=3, batch_size=at_once, gradient_accumulation_steps=micro_batches,
            lora_dropout=0.2, group_by_length=False,
        )  # fmt: skip
        pairs = compared(adapter, make_pairs(5))
        qk.train_adapter(
            adapter, pairs, config, task=preference(kind, BETA), announce=events.append
        )
        steps = [event for event in events if isinstance(event, StepFinished)]
        found.append([(each.loss, each.metrics["margin"]) for each in steps])
    assert len(found[0]) == 3
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_halving_changes_no_loss(
    kind: PreferenceLoss, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A micro-batch of more than two pairs runs out of memory."""
    computes = PreferenceObjective.loss_and_metrics
    found = []
    for most in (4, 2):
        adapter = make_adapter(folder, bits=16)
        pairs = compared(adapter, make_pairs(4))

        def short(self: PreferenceObjective, batch: Any, most: int = most) -> Any:
            if batch.units > most:
                raise torch.OutOfMemoryError
            return computes(self, batch)

        monkeypatch.setattr(PreferenceObjective, "loss_and_metrics", short)
        events: list[Event] = []
        qk.train_adapter(
            adapter, pairs, options(max_steps=3, batch_size=4, learning_rate=1e-3),
            task=preference(kind, BETA), announce=events.append,
        )  # fmt: skip
        assert any(isinstance(event, MicroBatchHalved) for event in events) is (most == 2)
        found.append([event.loss for event in events if isinstance(event, StepFinished)])
    assert found[0] == pytest.approx(found[1], rel=1e-6, abs=1e-6)


def test_the_fresh_adapter_is_its_own_reference(folder: Path) -> None:
    """Before the first step no answer has moved: dpo is log 2, ipo (1 / 2β)²."""
    adapter = make_adapter(folder, bits=4)
    rows = compared(adapter, make_pairs(3))
    for kind, expected in (("dpo", math.log(2)), ("ipo", (1 / (2 * BETA)) ** 2)):
        objective = PreferenceObjective(adapter.base, kind=kind, beta=BETA)
        loss, metrics = objective.loss_and_metrics(objective.batch(rows))
        assert float(loss.detach()) / 3 == pytest.approx(expected, rel=1e-5)
        assert metrics[1:].abs().max() < 1e-4


def test_a_disabled_adapter_is_back_bit_for_bit(adapter: qk.Adapter) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    model = adapter.base.model.eval()
    before = model(input_ids=ids).logits
    with adapter.disabled():
        base = model(input_ids=ids).logits
        with pytest.raises(KeyError), adapter.disabled():
            raise KeyError
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.allclose(base, before)
    assert torch.equal(qk.detach(adapter).model(input_ids=ids).logits, base)


def test_evaluation_gives_the_loss_and_the_rewards(adapter: qk.Adapter) -> None:
    rows = compared(adapter, make_pairs(5))
    task = preference("dpo", BETA)
    found = evaluate(adapter.base, rows, batch_size=2, task=task)
    objective = PreferenceObjective(adapter.base, kind="dpo", beta=BETA)
    loss, metrics = objective.loss_and_metrics(objective.batch(rows))
    assert found.loss == pytest.approx(float(loss.detach()) / 5, rel=1e-5)
    for name, value in zip(METRICS, metrics.tolist(), strict=True):
        assert found.metrics[name] == pytest.approx(value / 5, rel=1e-5), name
    assert found.weight == found.rows == 5


def test_the_length_of_a_pair_is_that_of_its_longer_sequence() -> None:
    pair = {"input_ids": [1] * 9, "labels": [1] * 9, "chosen_tokens": 3, "row": 0}
    assert TokenRows([pair, {**pair, "chosen_tokens": 5}]).lengths() == [6, 5]


def test_a_loss_of_ones_own_is_refused(folder: Path) -> None:
    adapter = make_adapter(folder, bits=16)
    own: Callable[..., Any] = torch.nn.functional.cross_entropy
    with pytest.raises(ConfigError, match="compares two"):
        qk.train_adapter(adapter, make_pairs(2), options(), task=preference("dpo", BETA), loss=own)


def test_two_sequences_of_a_pair_get_masks_of_their_own(folder: Path) -> None:
    """Of a pair of equal answers dropout makes two, as it does of two rows."""
    adapter = make_adapter(folder, bits=16, dropout=0.5)
    fill_lora(adapter)
    ids = list(range(3, 15))
    pair = {"input_ids": ids * 2, "labels": ([-100] * 2 + ids[2:]) * 2, "chosen_tokens": 12,
            "row": 0, "reference": [0.0, 0.0]}  # fmt: skip
    margins = []

    def taken(event: Event) -> None:
        if isinstance(event, StepFinished):
            margins.append(event.metrics["margin"])

    qk.train_adapter(
        adapter, [pair], options(max_steps=1), task=preference("dpo", BETA), announce=taken
    )
    assert margins[0] != 0
