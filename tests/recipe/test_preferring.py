"""Preferences end to end, as a user runs them: train, resume, evaluate, generate, export, start."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from safetensors.torch import load_file
from support import as_if_killed_at, run, run_well
from tiny_models import SIZES, save_model

from qlora_kit.recipe.references import NAME

STEPS = (
    "--batch-size", "2", "--gradient-accumulation-steps", "2", "--learning-rate", "0.01",
    "--max-length", "48", "--targets", "all-linear", "--rank", "4", "--samples", "0",
)  # fmt: skip
OF_PAIRS = ("--task", "preference", *STEPS)
ASKED = ("one", "two", "three", "four", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = make_tokenizer()
    save_model(folder, {**SIZES, "model_type": "llama", "vocab_size": len(tokenizer)})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"{a} ", "chosen": f"ten {a}", "rejected": f"{a} five"} for a in ASKED]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def told(*arguments: object, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that must end well; return what it prints as JSON, and its notices."""
    code, out, err = run(*map(str, arguments), "--json", capsys=capsys)
    assert code == 0, err
    return json.loads(out), err


def trained(
    model: Path, data: Path, output: Path, capsys: pytest.CaptureFixture[str], *more: object
) -> Any:
    given = ("--model", model, "--data", data, "--validation", data, "--output", output)
    found, _ = told("train", *given, *OF_PAIRS, *more, capsys=capsys)
    return found


def logged(output: Path) -> list[dict[str, Any]]:
    lines = (output / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def test_from_pairs_to_a_merged_model(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run"
    result = trained(
        model, data, own, capsys, "--max-steps", 16, "--eval-steps", 8, "--best-metric", "margin"
    )
    assert {*result["last_metrics"]} == {"accuracy", "margin", "chosen_reward", "rejected_reward"}
    steps = [row for row in logged(own) if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "nothing has moved: log 2"
    assert steps[0]["pairs"] == 4
    assert abs(steps[0]["margin"]) < 1e-4 < steps[-1]["margin"]
    evaluated = [row for row in logged(own) if "eval_loss" in row]
    assert evaluated[-1]["eval_margin"] > evaluated[0]["eval_margin"] > 0
    page = (own / "report.html").read_text(encoding="utf-8")
    assert "margin" in page
    assert "chosen reward" in page
    record = json.loads((own / "qlora_kit.json").read_text())
    assert (record["preference_loss"], record["preference_beta"]) == ("dpo", 0.1)
    assert json.loads((own / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    memory = json.loads((own / "memory.json").read_text())["rehearsal"]
    # Of 0.7 MB, where any run has as much: tests/plan/test_allocator.py has models of some size.
    assert abs(memory["difference"]) < 0.04

    found, notes = told("evaluate", "--adapter", own, "--data", data, capsys=capsys)
    assert "reference: the base without its adapter" in notes
    assert found["accuracy"] == 1.0, "it learnt"
    assert found["margin"] == pytest.approx(evaluated[-1]["eval_margin"], rel=1e-4)
    assert found["loss"] == pytest.approx(evaluated[-1]["eval_loss"], rel=1e-4)
    assert found["pairs"] == found["rows"] == len(ASKED)

    answer, _ = told("generate", "--adapter", own, "--prompt", "six ", capsys=capsys)
    assert isinstance(answer["text"], str)
    merged = tmp_path / "merged"
    report, _ = told("export", own, "--to", merged, "--data", data, capsys=capsys)
    assert report["report"]["rows"] == "pairs.jsonl"


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo"])
def test_a_resumed_run_has_the_bits_of_the_unbroken_one(
    loss: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--max-steps", 6, "--loss", loss, "--lora-dropout", 0.2)
    trained(model, data, whole, capsys, *options)
    trained(model, data, parts, capsys, *options, "--save-steps", 3)
    as_if_killed_at(parts, 3)
    _, notes = told("train", "--output", parts, "--resume", capsys=capsys)
    assert (NAME in [path.name for path in parts.iterdir()]) is (loss != "orpo")
    assert "asked once" not in notes, "the reference is read"
    ours, theirs = weights(parts), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [row["loss"] for row in logged(parts) if "loss" in row] == [
        row["loss"] for row in logged(whole) if "loss" in row
    ]


@pytest.mark.parametrize("harm", ["lost", "changed", "cut off", "of another run"])
def test_a_reference_that_is_not_the_runs_is_computed_again(
    harm: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run"
    trained(model, data, own, capsys, "--max-steps", 4, "--save-steps", 2)
    expected = weights(own)
    kept, about = own / NAME, own / "reference.json"
    if harm == "lost":
        kept.unlink()
    elif harm == "changed":
        kept.write_bytes(kept.read_bytes()[:-1] + b"\x01")
    elif harm == "cut off":
        about.write_text(about.read_text()[:20])
    else:
        content = json.loads(about.read_text())
        content["of"]["base"] = "0" * 64
        about.write_text(json.dumps(content))
    as_if_killed_at(own, 2)
    _, notes = told("train", "--output", own, "--resume", capsys=capsys)
    assert "computed again" in notes
    assert all(torch.equal(expected[name], value) for name, value in weights(own).items())
    assert json.loads(about.read_text())["of"]["base"] != "0" * 64


def test_another_loss_or_beta_cannot_be_resumed_silently(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run"
    trained(model, data, own, capsys, "--max-steps", 2, "--save-steps", 1)
    as_if_killed_at(own, 1)
    for option in (("--loss", "ipo"), ("--beta", "0.5")):
        code, _, err = run("train", "--output", str(own), "--resume", *option, capsys=capsys)
        assert code == 2
        assert f"{option[0][2:]} was" in err
        assert "--allow-change task" in err


# ---------------------------------------------------------------- starting from an adapter


@pytest.fixture(scope="module")
def learnt(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has learnt text, which lies beside it."""
    folder = tmp_path_factory.mktemp("learnt")
    rows = [{"prompt": f"{a} ", "completion": f"{a} six"} for a in ASKED]
    text = folder / "text.jsonl"
    text.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = ("--model", model, "--data", text, "--output", folder / "run", "--no-rehearse")
    run_well("train", *map(str, given), *STEPS, "--alpha", "8", "--max-steps", "4")
    return folder / "run"


def test_training_starts_from_an_adapter_which_is_the_reference(
    learnt: Path, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learnt = Path(shutil.copytree(learnt, tmp_path / "learnt"))
    own = tmp_path / "own"
    given = ("--adapter", learnt, "--data", data, "--output", own, "--max-length", 48)
    more = ("--task", "preference", "--gradient-accumulation-steps", 8, "--learning-rate", 0.005)
    settings, _ = told("train", *given, *more, "--max-steps", 3, "--dry-run", capsys=capsys)
    assert (settings["rank"], settings["alpha"]) == (4, 8)
    assert settings["model"] == str(model.resolve())
    told("train", *given, *more, "--max-steps", 3, "--samples", 0, capsys=capsys)
    steps = [row for row in logged(own) if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "it is compared with its start"
    assert steps[-1]["loss"] < steps[0]["loss"]
    before, after = weights(learnt), weights(own)
    assert before.keys() == after.keys()
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < moved < 0.05

    as_if_killed_at(own, 3)
    _, notes = told("train", "--output", own, "--resume", "--max-steps", 4, capsys=capsys)
    assert "asked once" not in notes
    first = learnt / "adapter_model.safetensors"
    first.write_bytes((own / "adapter_model.safetensors").read_bytes())
    code, _, err = run("train", "--output", str(own), "--resume", "--max-steps", "5", capsys=capsys)
    assert code == 2
    assert "the adapter that training starts from changed" in err


def test_text_is_learnt_on_from_an_adapter_too(
    learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, rate = tmp_path / "own", ("--learning-rate", 1e-9, "--no-rehearse")
    given = ("--adapter", learnt, "--data", learnt.parent / "text.jsonl", "--output", own)
    told("train", *given, *rate, "--max-steps", 1, "--samples", 0, capsys=capsys)
    before, after = weights(learnt), weights(own)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


CONTRADICTIONS: dict[str, tuple[str, ...]] = {
    "--rank": ("--rank", "8"),
    "--alpha": ("--alpha", "5"),
    "--rslora": ("--rslora",),
    "--targets": ("--targets", "attention"),
    "--bits": ("--bits", "8"),
    "--rank-pattern": ("--rank-pattern", "q_proj=2"),
}


@pytest.mark.parametrize("flag", CONTRADICTIONS)
def test_an_option_that_contradicts_the_adapter_is_one_line(
    flag: str, learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--adapter", str(learnt), "--data", str(learnt.parent / "text.jsonl"))
    output = ("--output", str(tmp_path / "own"), "--max-steps", "1")
    code, _, err = run("train", *given, *output, *CONTRADICTIONS[flag], capsys=capsys)
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert (code, len(lines)) == (2, 1), err
    assert lines[0].startswith(f"error: {flag}")
    assert "leave" in lines[0]


# ---------------------------------------------------------------- before any training


def test_a_plan_counts_two_sequences_a_pair(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("plan", "--model", model, "--max-length", 48, "--device", "cpu", "--batch-size")
    text, _ = told(*asked, 2, capsys=capsys)
    pairs, _ = told(*asked, 1, "--task", "preference", capsys=capsys)
    alone, _ = told(*asked, 1, capsys=capsys)
    peaks = [found["predicted_peak_bytes"] for found in (alone, text, pairs)]
    assert peaks[0] < peaks[1]
    assert peaks[2] == pytest.approx(peaks[1], rel=0.1)


def test_check_shows_both_answers(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "data.html"
    given = ("--model", str(model), "--data", str(data), "--html", str(page))
    code, out, err = run("check", *given, *OF_PAIRS, "--rows", "1", capsys=capsys)
    assert code == 0, err
    assert "8 preference records (prompt, chosen, rejected)" in out
    assert ", chosen" in out
    assert ", rejected" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_answers_of_a_real_model_move_to_what_is_preferred(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Boys become likelier than girls, against the base, on openings that were not trained on."""
    openings = ("Once upon a time, there was a", "One day, there was a", "Long ago, there was a",
                "In a small town, there was a", "Once there was a")  # fmt: skip
    unseen = ("There once was a", "In a big house there was a")
    boys, girls = ("Tim", "Ben", "Max", "Tom"), ("Lily", "Mia", "Sue", "Amy")
    train, test = (tmp_path / f"{name}.jsonl" for name in ("train", "test"))
    for file, starts in ((train, openings), (test, unseen)):
        rows = [
            {
                "prompt": start,
                "chosen": f" little boy named {he}.",
                "rejected": f" little girl named {she}.",
            }
            for start in starts
            for he, she in zip(boys, girls, strict=True)
        ]
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    own = tmp_path / "run"
    told(
        "train", "--model", stories, "--task", "preference", "--data", train,
        "--output", own, "--epochs", 8, "--gradient-accumulation-steps", 4, "--samples", 0,
        "--learning-rate", 0.001, "--targets", "all-linear", capsys=capsys,
    )  # fmt: skip
    found, _ = told("evaluate", "--adapter", own, "--data", test, capsys=capsys)
    # Before training every margin is 0, and no answer has the larger reward.
    assert found["accuracy"] == 1.0
    assert found["margin"] > 0


@pytest.mark.slow
def test_what_a_real_model_writes_moves_to_what_is_preferred(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A chat model is taught to dislike some things, and asked about others."""
    taught = (
        "the sea", "apples", "jazz", "snow", "cats", "chess", "spicy food", "trains", "rainy days",
        "poetry", "camping", "old films", "gardening", "coffee", "mountains", "loud parties",
        "long walks", "board games", "swimming", "museums", "tennis", "bread", "sunsets", "riddles",
    )  # fmt: skip
    others = ("dogs", "football", "summer", "tea", "painting", "winter", "books", "dancing")
    data, prompts = tmp_path / "pairs.jsonl", tmp_path / "prompts.jsonl"
    pairs = (
        {
            "prompt": [{"role": "user", "content": f"Do you like {thing}?"}],
            "chosen": [{"role": "assistant", "content": f"No, I do not like {thing}."}],
            "rejected": [{"role": "assistant", "content": f"Yes, I like {thing}."}],
        }
        for thing in taught
    )
    data.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    asked = ({"prompt": f"Do you like {thing}?"} for thing in others)
    prompts.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")

    def refusals(*of: Any) -> int:
        """Number of greedy answers that begin with No."""
        said, _ = told(
            "generate", *of, "--prompts", prompts, "--max-new-tokens", 8, "--temperature", 0,
            capsys=capsys,
        )  # fmt: skip
        return sum(each["text"].strip().startswith("No") for each in said["answers"])

    before = refusals("--model", smollm2, "--bits", 4)
    told(
        "train", "--model", smollm2, "--task", "preference", "--data", data, "--output",
        tmp_path / "run", "--epochs", 4, "--learning-rate", 3e-4, "--batch-size", 4,
        "--gradient-accumulation-steps", 1, "--samples", 0, "--no-rehearse", capsys=capsys,
    )  # fmt: skip
    after = refusals("--adapter", tmp_path / "run")
    with capsys.disabled():
        sys.stdout.write(f"\ngreedy answers that begin with No: {before} of 8, then {after}\n")
    assert before <= 1
    assert after >= 7
