"""A real fine-tune: a pretrained story teller learns Shakespeare, as well as with PEFT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity_peft import peft_twin, their_loss, twin_parameters

import qlora_kit as qk
from qlora_kit import recipe
from qlora_kit.data.batch import collate, epoch_batches
from qlora_kit.train.optimizer import learning_rate_at, set_learning_rate

# The settings of the command in docs/finetune.md, cut to the steps of a test.
SETTINGS: dict[str, Any] = {
    "bits": 4,
    "targets": ("all-linear",),
    "max_length": 512,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-3,
    "max_grad_norm": 1.0,
    "validation_fraction": 0,
    "max_steps": 60,
}
HELD_OUT_CHARACTERS = 60_000
BASE_PERPLEXITY = 141.4


def split_shakespeare(assets: Path, folder: Path) -> tuple[Path, Path]:
    """Write the first nine tenths and the first 60,000 characters of the last."""
    text = (assets / "data" / "tinyshakespeare.txt").read_text()
    cut = len(text) * 9 // 10
    train, test = folder / "train.txt", folder / "test.txt"
    train.write_text(text[:cut])
    test.write_text(text[cut : cut + HELD_OUT_CHARACTERS])
    return train, test


def perplexity(stories: Path, test: Path, adapter: Path | None = None, bits: int = 4) -> float:
    config = qk.EvaluateConfig(
        model=str(stories), data=str(test), adapter=adapter, bits=bits, max_length=512
    )
    return float(recipe.evaluate(config)["perplexity"])


def test_the_perplexity_of_the_base_is_the_known_one(
    stories: Path, assets: Path, tmp_path: Path
) -> None:
    _, test = split_shakespeare(assets, tmp_path)
    assert perplexity(stories, test, bits=16) == pytest.approx(BASE_PERPLEXITY, rel=0.01)


@pytest.mark.slow
def test_shakespeare_is_learnt_as_well_as_with_peft(
    stories: Path, assets: Path, tmp_path: Path
) -> None:
    train, test = split_shakespeare(assets, tmp_path)
    output = tmp_path / "run"
    config = qk.TrainConfig(model=str(stories), data=str(train), output=output, **SETTINGS)
    recipe.train(config)
    ours = perplexity(stories, test, output)
    theirs = train_with_peft(config, stories, tmp_path, test)
    assert ours < 0.5 * BASE_PERPLEXITY
    assert ours <= 1.01 * theirs


def train_with_peft(config: qk.TrainConfig, stories: Path, folder: Path, test: Path) -> float:
    """Take the same steps on the same rows with PEFT and bitsandbytes' own layers."""
    opened = qk.open_base(qk.BaseModelOptions(model=str(stories), bits=4))
    adapter = qk.attach(opened.base, qk.LoraSpec(targets=config.targets), config.seed)
    twin = peft_twin(stories, 4, adapter)
    rows = qk.load_data(config.data, opened.tokenizer, config).rows
    batches = epoch_batches(rows, config.batch_size, config.seed, 0)
    parameters = list(twin_parameters(twin, adapter).values())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    twin.train()
    steps = config.max_steps or 0
    for step, indices in enumerate(batches[:steps], 1):
        set_learning_rate(optimizer, learning_rate_at(step, steps, config))
        their_loss(twin, collate([rows[i] for i in indices], 0)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    # Not in evaluation mode: there bitsandbytes' layer repacks its weights on some CPUs and
    # computes in bf16. Without dropout the two modes are the same.
    held_out = qk.load_data(str(test), opened.tokenizer, config).rows
    total, count = 0.0, 0
    for row in held_out:
        batch = collate([row], 0)
        with torch.no_grad():
            total += float(their_loss(twin, batch)) * batch.supervised_tokens
        count += batch.supervised_tokens
    return math.exp(total / count)
