"""The same training as PEFT 0.21.2 on a real model, and adapters that load both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_twin import peft_twin, their_loss, transformers_model, twin_parameters
from support import relative_error
from tiny_models import fill_lora, load_folder, mask_of
from torch import Tensor

from qlora_kit.data.batch import Batch, collate
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.lora.attach import Adapter, attach
from qlora_kit.lora.files import BaseRecord
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.lora.writing import save_adapter
from qlora_kit.model.head import head_of
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.tasks.causal import loss_sum

STEPS = 20
TOLERANCE = 1e-5
TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "A dog ran to the park.",
    "Tom had a big red ball and he did not want to share it with Sam.",
    "The sun was hot. Mom said, let us swim!",
)

SPECS = {
    "plain": LoraSpec(rank=5, alpha=20.0, targets=("all-linear",)),
    "attention": LoraSpec(rank=4, alpha=8.0, targets=("attention",)),
    "rslora": LoraSpec(rank=6, alpha=9.0, targets=("all-linear",), rslora=True),
    "patterns": LoraSpec(
        rank=4,
        alpha=8.0,
        targets=("all-linear",),
        rank_pattern={r"layers\.1\.mlp\.down_proj": 7, "q_proj": 3},
        alpha_pattern={"v_proj": 24.0, r"layers\.[02]\..*up_proj": 2.0},
    ),
}


@pytest.fixture(scope="module")
def batches(stories: Path) -> list[Batch]:
    """Two padded micro-batches of real text; part of the prompt is not supervised."""
    tokenizer = load_tokenizer(stories)
    rows = []
    for index, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        labels = [-100] * index + ids[index:]
        rows.append({"input_ids": ids, "labels": labels, "row": index})
    return [collate(rows[:2], 0), collate(rows[2:], 0)]


def our_loss(adapter: Adapter, batch: Batch) -> Tensor:
    model = adapter.base.model
    return loss_sum(model, batch, head_of(model), chunk_tokens=7) / batch.weight


@pytest.mark.parametrize("bits", [16, 4])
def test_first_gradients_equal_those_of_peft(
    stories: Path, batches: list[Batch], bits: int
) -> None:
    adapter = attach(load_folder(stories, bits), SPECS["patterns"])
    fill_lora(adapter)
    twin = peft_twin(stories, bits, adapter)
    adapter.base.model.train()
    twin.train()
    our_loss(adapter, batches[0]).backward()
    their_loss(twin, batches[0]).backward()
    ours, theirs = adapter.parameters(), twin_parameters(twin, adapter)
    trained = {name for name, parameter in twin.named_parameters() if parameter.requires_grad}
    assert len(ours) == len(theirs) == len(trained) == 2 * 7 * 5
    errors = {name: relative_error(ours[name].grad, theirs[name].grad) for name in ours}
    assert max(errors.values()) <= TOLERANCE, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("bits", [16, 4])
def test_losses_of_twenty_steps_equal_those_of_peft(
    stories: Path, batches: list[Batch], bits: int
) -> None:
    adapter = attach(load_folder(stories, bits), SPECS["plain"])
    twin = peft_twin(stories, bits, adapter)
    adapter.base.model.train()
    twin.train()
    optimizers = [
        torch.optim.AdamW(parameters.values(), lr=1e-3)
        for parameters in (adapter.parameters(), twin_parameters(twin, adapter))
    ]
    curves: list[list[float]] = [[], []]
    for step in range(STEPS):
        batch = batches[step % 2]
        losses = (our_loss(adapter, batch), their_loss(twin, batch))
        for loss, optimizer, curve in zip(losses, optimizers, curves, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
    ours, theirs = torch.tensor(curves, dtype=torch.float64)
    assert theirs[-2:].mean() < theirs[:2].mean() - 0.1  # it did learn
    assert ((ours - theirs).abs() / theirs).max() <= TOLERANCE


# The files do not depend on the bits, so one adapter at 4 bits is enough.
@pytest.mark.parametrize(("name", "bits"), [*((name, 16) for name in SPECS), ("patterns", 4)])
def test_our_adapter_loads_in_peft(
    stories: Path, batches: list[Batch], tmp_path: Path, name: str, bits: int
) -> None:
    adapter = attach(load_folder(stories, bits), SPECS[name])
    fill_lora(adapter)
    save_adapter(adapter, tmp_path, BaseRecord.of(adapter.base))
    theirs = PeftModel.from_pretrained(transformers_model(stories, bits), tmp_path)
    # In evaluation, bitsandbytes repacks its 4-bit weights on some CPUs, and computes in bf16.
    theirs.train(bits == 4)
    inputs = {"input_ids": batches[1].input_ids, "attention_mask": mask_of(batches[1])}
    with torch.no_grad():
        found, expected = adapter.base.model(**inputs).logits, theirs(**inputs).logits
        plain = theirs.get_base_model()
        with theirs.disable_adapter():
            assert relative_error(expected, plain(**inputs).logits) > 1e-2  # it does something
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", SPECS)
def test_an_adapter_of_peft_loads_in_ours(
    stories: Path, batches: list[Batch], tmp_path: Path, name: str
) -> None:
    spec = SPECS[name]
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        target_modules=attention if name == "attention" else "all-linear",
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(3)
    theirs = get_peft_model(transformers_model(stories, 16), config).eval()
    theirs.save_pretrained(tmp_path)
    base = load_folder(stories)
    inputs = {"input_ids": batches[1].input_ids, "attention_mask": mask_of(batches[1])}
    with torch.no_grad():
        plain = base.model(**inputs).logits
        adapter = load_adapter(base, tmp_path)
        found, expected = base.model(**inputs).logits, theirs(**inputs).logits
    assert len(adapter.layers) == (20 if name == "attention" else 35)
    assert relative_error(plain, expected) > 1e-2
    assert relative_error(found, expected) <= TOLERANCE
