"""What each start gains on a real model, at step 0 and soon after; `-s` prints the figures."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import load_folder

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import collate
from qlora_kit.lora.attach import attach
from qlora_kit.lora.spec import LoraSpec, Variant
from qlora_kit.lora.starts.loading import FreshStart, KnownStart
from qlora_kit.lora.targets import targeted_paths
from qlora_kit.model.load import Base, load_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.train.first_rows import pairs_of_gradients, pairs_of_inputs
from qlora_kit.train.loop import train_adapter

TOKENS, ROWS = 64, 64


def spec_of(init: str) -> LoraSpec:
    return LoraSpec(rank=8, alpha=16.0, targets=("all-linear",), variant=Variant(init=init))


def begun(folder: Path, init: str, bits: int = 4) -> tuple[Base, FreshStart]:
    plain = load_folder(folder, bits)
    lora = spec_of(init)
    start = FreshStart(lora, targeted_paths(plain.model, lora), bits=bits, seed=1)
    return load_base(replace(plain.spec, start=start), plain.hardware), start


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_starts_of_weights_lower_what_quantising_loses(stories: Path, init: str) -> None:
    base, start = begun(stories, init)
    attach(base, spec_of(init))
    found = start.errors
    assert found is not None
    sys.stdout.write(
        f"\n{init} on stories260K, rank 8, 4 bits: loses {found.start:.4f} of the norm of W, plain "
        f"QLoRA {found.plain:.4f}; as rank-2R adapter on the base as stored {found.peft:.4f} away\n"
    )
    if init != "olora":
        assert found.start < 0.97 * found.plain


@pytest.mark.slow
def test_starts_of_rows_learn_beside_plain_lora(stories: Path, assets: Path) -> None:
    tokenizer = load_tokenizer(stories)
    tokenizer.model_max_length = 1 << 20  # the text is cut into rows here
    ids = tokenizer((assets / "data" / "tinyshakespeare.txt").read_text()[:7_000])["input_ids"]
    parts = [ids[at : at + TOKENS] for at in range(0, ROWS * TOKENS, TOKENS)]
    rows = [{"input_ids": each, "labels": each, "row": row} for row, each in enumerate(parts)]
    config = TrainConfig(max_steps=16, batch_size=4, learning_rate=1e-3, rehearse=False)
    held_out = [{"input_ids": p, "labels": p, "row": 0} for p in parts[48:]]
    losses = {}
    plain = CAUSAL.objective(load_folder(stories, 4), 0, 256, None)
    with torch.no_grad():
        untrained = collate(held_out, 0)
        before = float(plain.loss_sum(untrained)) / untrained.weight
    for init in ("kaiming", "eva", "lora-ga"):
        base, lora = load_folder(stories, 4), spec_of(init)
        objective = CAUSAL.objective(base, 0, 256, None)
        shown = [collate(rows[at : at + 4], 0) for at in range(0, 32, 4)]
        if init == "eva":
            pairs = pairs_of_inputs(base, lora, objective, iter(shown), 1)
            base = replace(base, spec=replace(base.spec, start=KnownStart(pairs, lora)))
        if init == "lora-ga":
            pairs = pairs_of_gradients(base, lora, objective, shown, config, 1)
            start = FreshStart(lora, [*pairs], bits=4, seed=1, given=pairs)
            base = load_base(replace(base.spec, start=start), base.hardware)
        train_adapter(attach(base, lora, 1), rows[:48], config)
        measured = CAUSAL.objective(base, 0, 256, None)
        batch = collate(held_out, 0)
        with torch.no_grad():
            losses[init] = float(measured.loss_sum(batch)) / batch.weight
    sys.stdout.write(f"\nheld-out loss on stories260K after 16 steps: {losses}\n")
    assert max(losses["eva"], losses["lora-ga"]) < before
