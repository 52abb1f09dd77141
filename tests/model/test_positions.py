"""Rotary scaling in a model's config.json is honoured, and where rows are too long it is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_error, run
from tiny_models import load_folder
from transformers import AutoModelForCausalLM

from qlora_kit.layers.head import Head
from qlora_kit.model.architecture import architecture_from
from qlora_kit.model.head import head_of
from qlora_kit.model.names import find_model
from qlora_kit.model.positions import alike_positions, positions_of, scaling_for

Tiny = Callable[..., Path]

HALF = 8  # of the 16 numbers of a head of the tiny models
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with its own attention": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
        "attention_factor": 0.7, "beta_fast": 16, "beta_slow": 2,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.1] * HALF, "long_factor": [3.0] * HALF,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def numbers_with(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Return the architecture of a model that has 64 positions before they are scaled."""
    return {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
        "max_position_embeddings": 64, "rope_theta": 500.0, "rope_scaling": scaling,
    }  # fmt: skip


@torch.no_grad()
def logits_of(model: Any, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 96, (1, length), generator=generator) for length in lengths]
    return [model(input_ids=each).logits[0] for each in ids]


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_positions_are_those_of_transformers(save_tiny: Tiny, name: str) -> None:
    folder = save_tiny(rope_scaling=SCALINGS[name])
    lengths = (21, 60, 150, 30, 100)
    expected = logits_of(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), lengths
    )
    base = load_folder(folder)
    with base.in_evaluation():
        found = logits_of(base.model, lengths)
    for each, wanted in zip(found, expected, strict=True):
        assert relative_error(each, wanted) <= 1e-6
    plain = load_folder(save_tiny())
    with plain.in_evaluation():
        unscaled = logits_of(plain.model, lengths)
    assert relative_error(found[2], unscaled[2]) > 1e-2


@pytest.mark.parametrize("name", SCALINGS)
def test_gradients_through_scaled_positions_are_those_of_transformers(
    save_tiny: Tiny, name: str
) -> None:
    folder = save_tiny(rope_scaling=SCALINGS[name])
    ids = torch.randint(3, 96, (1, 120), generator=torch.Generator().manual_seed(2))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    base = load_folder(folder)
    base.model.train()
    head: Head = head_of(base.model)
    found = []
    for model in (theirs, base.model):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        states = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = head.logits(states[0])
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
        found.append(torch.autograd.grad(loss, embedded)[0])
    assert relative_error(found[1], found[0]) <= 1e-5


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        (None, 64),
        (SCALINGS["linear"], 256),
        (SCALINGS["yarn"], 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        # What these reach is what the configuration says already.
        (SCALINGS["llama3"], 64),
        (SCALINGS["longrope"], 64),
        # Its frequencies depend on the rows before.
        (SCALINGS["dynamic"], 64),
    ],
)
def test_scaling_multiplies_the_positions(scaling: dict[str, Any] | None, positions: int) -> None:
    assert positions_of(architecture_from(numbers_with(scaling))) == positions


@pytest.mark.parametrize(
    ("name", "alike"),
    [("linear", 256), ("yarn", 256), ("llama3", 64), ("longrope", 32), ("dynamic", 64)],
)
def test_rows_of_a_batch_are_alike_where_no_longer_one_changes_their_positions(
    name: str, alike: int
) -> None:
    architecture = architecture_from(numbers_with(SCALINGS[name]))
    assert alike_positions(architecture, positions_of(architecture)) == alike
    assert alike_positions(architecture, None) is None


def test_a_model_is_told_the_scaling_that_its_rows_need() -> None:
    entry = scaling_for(architecture_from(numbers_with(None)), 200)
    assert entry is not None
    scaled = json.loads(f"{{{entry}}}")["rope_scaling"]
    assert (scaled["factor"], scaled["rope_theta"]) == (4.0, 500.0)
    # Of the two names of the entry, config.json may have the other already.
    both = {**numbers_with(scaled), "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}
    assert architecture_from(both).rope_parameters == scaled
    assert positions_of(architecture_from(numbers_with(scaled))) == 256
    # A model that is scaled already is scaled from its own positions.
    again = scaling_for(architecture_from(numbers_with(SCALINGS["yarn"])), 300)
    assert again is not None
    assert json.loads(f"{{{again}}}")["rope_scaling"]["factor"] == 5.0
    learnt = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_positions": 64}
    assert scaling_for(architecture_from(learnt), 200) is None


def test_rows_beyond_the_positions_are_learnt_as_the_error_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    source = find_model("demo").folder
    assert source is not None
    shutil.copytree(source, folder)
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "one " * 600, "completion": "two"}) + "\n")
    asked = ("evaluate", "--model", str(folder), "--data", str(data), "--max-length", "4096")
    code, _, err = run(*asked, capsys=capsys)
    assert code == 2
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "pass --max-length 512 or less, with --long-samples split to keep all of them" in line
    found = re.search(r'in its config\.json: "rope_scaling": (\{.*\})$', line)
    assert found is not None
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = json.loads(found[1])
    (folder / "config.json").write_text(json.dumps(config))
    code, out, err = run(*asked, capsys=capsys)
    assert code == 0, err
    assert "loss" in out
