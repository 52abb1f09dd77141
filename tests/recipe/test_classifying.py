"""Classification end to end, as a user runs it: train, resume, evaluate, generate, export."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from safetensors.torch import load_file
from support import as_if_killed_at, run
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

GOOD, BAD = ("one two three", "two four six"), ("nine eight seven", "eight five nine")
STEPS = (
    "--task", "classify", "--batch-size", "4", "--gradient-accumulation-steps", "1",
    "--learning-rate", "0.01", "--max-length", "48", "--targets", "all-linear",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT with a tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    numbers = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    AutoModel.from_config(AutoConfig.for_model("bert", **numbers)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "films.tsv"
    rows = [f"{text}\t{label}" for texts, label in ((GOOD, "good"), (BAD, "bad")) for text in texts]
    file.write_text("\n".join(["sentence\tlabel", *(rows * 8)]), encoding="utf-8")
    return file


def trained(
    model: Path, data: Path, output: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> Path:
    code, _, err = run(
        "train", "--model", str(model), "--data", str(data), "--validation", str(data),
        "--output", str(output), *STEPS, *more, capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    return output


def test_from_a_table_to_a_merged_model(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = trained(
        model, data, tmp_path / "run", capsys, "--max-steps", "24", "--best-metric", "accuracy"
    )
    record = json.loads((own / "qlora_kit.json").read_text())
    assert (record["labels"], record["label_kind"]) == (["bad", "good"], "single")
    memory = json.loads((own / "memory.json").read_text())["rehearsal"]
    assert abs(memory["difference"]) < 0.02
    page = (own / "report.html").read_text(encoding="utf-8")
    assert "Confusion matrix" in page
    assert "bad" in page
    tables = json.loads((own / "labels.json").read_text())
    assert sum(map(sum, tables["confusion"])) == 32
    card = (own / "README.md").read_text(encoding="utf-8")
    assert "AutoPeftModelForSequenceClassification" in card
    assert "bad, good" in card

    code, out, _ = run(
        "evaluate", "--adapter", str(own), "--data", str(data), "--json", capsys=capsys
    )
    assert code == 0
    found = json.loads(out)
    assert found["accuracy"] == 1.0, "it learnt"
    assert found["labels"] == found["rows"] == 32
    assert [row["label"] for row in found["per_class"]] == ["bad", "good"]
    assert found["confusion"] == [[16, 0], [0, 16]]

    code, out, _ = run(
        "generate", "--adapter", str(own), "--prompt", GOOD[0], "--json", capsys=capsys
    )
    answer = json.loads(out)
    assert code == 0
    assert answer["label"] == "good"
    assert sum(answer["probabilities"].values()) == pytest.approx(1)

    merged = tmp_path / "merged"
    code, out, err = run("export", str(own), "--to", str(merged), "--json", capsys=capsys)
    assert code == 0, err
    report = json.loads(out)["report"]
    written = next(each for each in report["variants"] if each["variant"] == "written")
    assert written["top1_agreement"] == 1.0
    code, out, _ = run(
        "evaluate", "--model", str(merged), "--bits", "16", "--data", str(data), "--json",
        capsys=capsys,
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["loss"] == pytest.approx(found["loss"], abs=1e-3)


def test_a_resumed_run_has_the_bits_of_the_unbroken_one_and_may_be_profiled(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert AutoConfig.from_pretrained(model).hidden_dropout_prob > 0, "it has its own dropout"
    whole = trained(model, data, tmp_path / "whole", capsys, "--max-steps", "6")
    parts = tmp_path / "parts"
    trained(model, data, parts, capsys, "--max-steps", "6", "--save-steps", "3")
    as_if_killed_at(parts, 3)
    again = ("train", "--output", str(parts), "--resume", "--profile", "1")
    code, _, err = run(*again, capsys=capsys)
    assert code == 0, err
    assert json.loads((parts / "profile" / "summary.json").read_text())["steps"] == [6]
    ours, theirs = (load_file(each / "adapter_model.safetensors") for each in (parts, whole))
    assert ours.keys() == theirs.keys()
    assert any("classifier" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_a_classifier_is_written_as_can_be_measured(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = trained(model, data, tmp_path / "run", capsys, "--max-steps", "24")
    merged, packed, again = (tmp_path / name for name in ("merged", "packed", "again"))
    for command in (
        ("export", str(own), "--to", str(merged), "--base", "original"),
        ("export", str(own), "--to", str(packed), "--requantize"),
        ("quantize", "--model", str(merged), "--bits", "8", "--to", str(again)),
    ):
        code, out, err = run(*command, capsys=capsys)
        assert code == 0, err
    assert "qlora-kit train --task classify --model" in out
    for folder, bits in ((merged, "16"), (packed, "4"), (again, "8")):
        code, out, err = run(
            "evaluate", "--model", str(folder), "--bits", bits, "--data", str(data), "--json",
            capsys=capsys,
        )  # fmt: skip
        assert code == 0, err
        assert json.loads(out)["accuracy"] > 0.9, folder.name
        assert [row["label"] for row in json.loads(out)["per_class"]] == ["bad", "good"]


def test_what_training_would_be_is_told_without_it(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--task", "classify", "--model", str(model), "--max-length", "48")
    code, out, err = run("plan", *asked, "--device", "cpu", "--json", capsys=capsys)
    assert code == 0, err
    assert json.loads(out)["predicted_peak_bytes"] > 0
    page = tmp_path / "data.html"
    code, _, err = run("check", *asked, "--data", str(data), "--html", str(page), capsys=capsys)
    assert code == 0, err
    assert "good" in page.read_text(encoding="utf-8")


def test_a_plan_has_no_longer_rows_than_an_encoder_has_positions(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for length in ("64", "4096"):
        code, out, err = run(
            "plan", "--task", "classify", "--model", str(model), "--device", "cpu", "--max-length",
            length, "--json", capsys=capsys,
        )  # fmt: skip
        assert code == 0, err
        found.append(json.loads(out)["predicted_peak_bytes"])
    assert found[0] == found[1]
    assert "planned with rows of 64 tokens instead of --max-length 4,096" in err


def test_a_prompt_is_a_text_and_is_not_cut_without_a_word(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = trained(model, data, tmp_path / "run", capsys, "--max-steps", "1")
    code, _, err = run("generate", "--adapter", str(own), "--prompt", " \n", capsys=capsys)
    assert code == 2
    assert err == (
        "error: --prompt: no word, or one that the tokenizer has no token for; expected words to "
        "label; correct it\n"
    )
    code, out, err = run(
        "generate", "--adapter", str(own), "--prompt", "one two " * 60, capsys=capsys
    )
    assert code == 0, err
    assert "note: 1 of 1 texts are cut: the model reads 64 tokens at most" in out


@pytest.mark.parametrize(
    ("loads", "labels", "said"),
    [
        (AutoModelForSequenceClassification, ("bad", "good"), ""),
        (AutoModelForSequenceClassification, ("good", "bad"), "note: *outputs have other names*"),
        (
            AutoModelForSequenceClassification, ("a", "b", "c"),
            "error: *: a classifier that labels texts and has 3 outputs, while the data asks for "
            "one that labels texts with 2; expected the same of both; name the model it *",
        ),
        (
            AutoModelForTokenClassification, ("bad", "good"),
            "error: *: a classifier that tags words and has 2 outputs, while the data asks for one "
            "that labels texts with 2; *",
        ),
    ],
)  # fmt: skip
def test_a_head_that_a_model_has_already_must_fit_the_labels(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    loads: Any,
    labels: tuple[str, ...],
    said: str,
) -> None:
    config = AutoConfig.from_pretrained(model, id2label=dict(enumerate(labels)))
    loads.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    code, out, err = run(
        "check", "--task", "classify", "--model", str(tmp_path), "--data", str(data),
        capsys=capsys,
    )  # fmt: skip
    assert code == (2 if said.startswith("error") else 0), err
    lines = [line for line in (out + err).splitlines() if "a classifier" in line]
    assert fnmatch.filter(lines, said or "*") == lines
    assert len(lines) == bool(said)


def test_an_encoder_by_itself_is_not_quantised(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "packed"
    code, _, err = run("quantize", "--model", str(model), "--to", str(to), capsys=capsys)
    assert code == 2
    assert "bert: reads whole texts and writes none" in err
    assert "train a classifier of it with `train --task classify`" in err
    assert not to.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--best-metric", "f1"),
            "--best-metric f1: is not measured here; expected loss, accuracy",
        ),
        (("--targets", "classifier"), "'classifier' names classifier, the head"),
        (("--long-samples", "split"), "--long-samples split: a label is of a whole text"),
        (("--labels", "good"), "label"),
        (("--task", "causal"), "keys sentence, label; expected one of"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    code, _, err = run(
        "train", "--model", str(model), "--data", str(data), "--validation", str(data),
        "--output", str(tmp_path / "run"), *STEPS, "--max-steps", "1", *more, capsys=capsys,
    )  # fmt: skip
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1
    assert not [*(tmp_path / "run").glob("*")], "the command can be corrected and given again"


def test_an_encoder_is_told_apart_from_a_language_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "one", "completion": "two"}\n')
    for command in (
        ("generate", "--model", str(model), "--prompt", "one"),
        ("check", "--model", str(model), "--data", str(pairs)),
    ):
        code, _, err = run(*command, capsys=capsys)
        assert code == 2
        assert "bert: reads whole texts and writes none" in err
