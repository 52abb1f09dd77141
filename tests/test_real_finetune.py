"""Real fine-tunes: pretrained models learn Shakespeare and instructions as well as with PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft_twin import peft_twin, their_loss, twin_parameters
from support import run

import qlora_kit as qk
from qlora_kit import recipe
from qlora_kit.data.batch import collate, epoch_batches
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.train.optimizer import learning_rate_at

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
    twin = train_with_peft(config, stories)
    theirs = math.exp(loss_of_twin(twin, stories, str(test), config))
    assert ours < 0.5 * BASE_PERPLEXITY
    assert ours <= 1.01 * theirs


def train_with_peft(config: qk.TrainConfig, folder: Path) -> Any:
    """Take the same steps on the same rows with PEFT and bitsandbytes' own layers."""
    opened = qk.open_base(qk.BaseModelOptions(model=str(folder), bits=4))
    adapter = qk.attach(opened.base, qk.LoraSpec.of(config), config.seed)
    twin = peft_twin(folder, 4, adapter)
    rows = qk.load_data(config.data, opened.tokenizer, config).rows
    batches = epoch_batches(rows, config.batch_size, config.seed, 0)
    parameters = list(twin_parameters(twin, adapter).values())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    twin.train()
    steps = config.max_steps or 0
    for step, indices in enumerate(batches[:steps], 1):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, steps, config)
        their_loss(twin, collate([rows[i] for i in indices], 0)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return twin


def loss_of_twin(twin: Any, folder: Path, data: str, config: qk.TrainConfig) -> float:
    """Return the mean loss of a file's supervised tokens, as transformers computes it."""
    # The twin stays in training mode: in evaluation mode bitsandbytes' layer repacks its weights on
    # some CPUs, and computes in bf16. Without dropout the two modes are the same.
    total, count = 0.0, 0
    for row in qk.load_data(data, load_tokenizer(folder), config).rows:
        batch = collate([row], 0)
        with torch.no_grad():
            total += float(their_loss(twin, batch)) * batch.weight
        count += batch.weight
    return total / count


# ---------------------------------------------------------------- a model that follows instructions

# The command in docs/finetune.md.
INSTRUCTIONS = (
    "--bits", "4", "--targets", "all-linear", "--max-length", "256", "--batch-size", "4",
    "--gradient-accumulation-steps", "1", "--learning-rate", "5e-4", "--max-steps", "40",
)  # fmt: skip
HELD_OUT_ROWS = 50


def split_alpaca(assets: Path, folder: Path) -> tuple[str, str]:
    """Write two files: all rows but the last fifty, and the last fifty."""
    rows = json.loads((assets / "data" / "alpaca_en_demo.json").read_text())
    parts = {"train": rows[:-HELD_OUT_ROWS], "test": rows[-HELD_OUT_ROWS:]}
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part))
    return str(folder / "train.json"), str(folder / "test.json")


@pytest.mark.slow
def test_instructions_are_learnt_as_well_as_with_peft(
    smollm2: Path, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = split_alpaca(assets, tmp_path)
    output, merged = tmp_path / "run", tmp_path / "merged"

    def kit(*arguments: object) -> str:
        code, out, err = run(*map(str, arguments), capsys=capsys)
        assert code == 0, err
        return out

    def loss(*of: object) -> float:
        found = kit("evaluate", *of, "--data", test, "--max-length", 256, "--json")
        return float(json.loads(found)["loss"])

    before = loss("--model", smollm2, "--bits", 4)
    kit("train", "--model", smollm2, "--data", train, "--validation", test,
        "--output", output, *INSTRUCTIONS)  # fmt: skip
    ours = loss("--adapter", output)
    kit("export", output, "--to", merged)
    assert loss("--model", merged, "--bits", 16) == pytest.approx(ours, rel=1e-3)
    question = ("--prompt", "Name three primary colours.", "--max-new-tokens", 32)
    assert kit("generate", "--adapter", output, *question).strip()

    config = qk.TrainConfig(**yaml.safe_load((output / "training_config.yaml").read_text()))
    theirs = loss_of_twin(train_with_peft(config, smollm2), smollm2, test, config)
    with capsys.disabled():
        print(f"\nloss: base {before:.4f}, ours {ours:.4f}, PEFT's {theirs:.4f}")  # noqa: T201
    assert ours < before
    assert ours == pytest.approx(theirs, rel=0.01)
