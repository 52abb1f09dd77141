"""A mixture of experts end to end, as a user runs it: train, resume, evaluate, generate, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data_fixtures import make_tokenizer
from safetensors.torch import load_file
from support import as_if_killed_at, run
from tiny_models import MIXTURES, save_model

STEPS = (
    "--batch-size", "2", "--gradient-accumulation-steps", "1", "--learning-rate", "0.003",
    "--max-length", "64", "--targets", "attention,experts", "--rank", "4", "--samples", "1",
    "--max-steps", "4", "--profile", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-MoE whose config.json asks for a load-balancing loss."""
    tokenizer = make_tokenizer()
    numbers = {
        **MIXTURES["qwen3-moe"], "vocab_size": len(tokenizer), "output_router_logits": True,
        "initializer_range": 0.02, "max_position_embeddings": 128,
    }  # fmt: skip
    folder = save_model(tmp_path_factory.mktemp("mixture"), numbers)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"What is {n} + 30?", "completion": f"It is {n + 30}."} for n in range(12)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_from_data_to_a_merged_model(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run"
    given = ("--model", str(model), "--data", str(data), "--output", str(own), *STEPS)
    code, shown, err = run("train", *given, "--save-steps", "2", capsys=capsys)
    assert code == 0, err
    assert "4 stacks of 4, none of them frozen; routers are frozen" in shown
    assert "in 8 layers and 4 stacks of experts" in shown
    assert "load-balancing loss (output_router_logits), which is left out" in shown + err
    memory = json.loads((own / "memory.json").read_text())["rehearsal"]
    # Of so few tokens, the busiest expert may have twice the share that a plan gives it.
    assert abs(memory["difference"]) < 0.08
    whole = load_file(own / "adapter_model.safetensors")
    assert any("experts.base_layer.lora_A" in name for name in whole)

    as_if_killed_at(own, 2)
    code, _, err = run("train", "--output", str(own), "--resume", capsys=capsys)
    assert code == 0, err
    again = load_file(own / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())

    code, out, err = run(
        "evaluate", "--adapter", str(own), "--data", str(data), "--json", capsys=capsys
    )
    assert code == 0, err
    loss = json.loads(out)["loss"]
    merged = tmp_path / "merged"
    exported = ("export", str(own), "--to", str(merged), "--dtype", "float32", "--json")
    code, out, err = run(*exported, capsys=capsys)
    assert code == 0, err
    report = json.loads(out)["report"]
    assert sum(".experts." in layer["path"] for layer in report["layers"]) == 2 * 2 * 4
    code, out, err = run(
        "evaluate", "--model", str(merged), "--bits", "16", "--data", str(data), "--json",
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["loss"] == pytest.approx(loss, abs=1e-5)
    assert json.loads((merged / "config.json").read_text())["output_router_logits"] is True
    answers = []
    for where in (("--adapter", str(own)), ("--model", str(merged), "--bits", "16")):
        asked = ("--prompt", "What is 2 + 30?", "--max-new-tokens", "8", "--json")
        code, out, err = run("generate", *where, *asked, capsys=capsys)
        assert code == 0, err
        answers.append(json.loads(out)["text"])
    assert all(isinstance(answer, str) and answer for answer in answers)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--targets", "experts.7"), "'experts.7' matches no linear layer; expected attention, "),
        (("--targets", "down_proj.9"), "names an expert of model.layers.0.mlp.experts.down_proj"),
        (("--targets", "router,gate"), "'gate' names a router, which stays frozen"),
        (("--targets", "mlp"), "'mlp' matches no linear layer; expected attention, experts, "),
        (("--lora-dropout", "0.1"), "--lora-dropout: 0.1, and --targets names experts"),
        (("--rank-pattern", "up_proj=2"), "'up_proj' names no targeted layer"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    says: str,
) -> None:
    given = ("--model", str(model), "--data", str(data), "--output", str(tmp_path / "run"), *STEPS)
    code, _, err = run("train", *given, *more, capsys=capsys)
    assert code == 2, err
    assert says in err
    assert "Traceback" not in err
