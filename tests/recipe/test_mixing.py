"""Several sources end to end, as a user runs them: check, train, resume, export, and what fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from data_fixtures import make_tokenizer
from safetensors.torch import load_file
from support import as_if_killed_at, run
from t5_models import save_t5, t5_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from qlora_kit.train.resume import differences

pytestmark = pytest.mark.usefixtures("simulated_once")

NUMBERS = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 1,
    "initializer_range": 0.1,
}  # fmt: skip
STEPS = (
    "--device", "cpu", "--batch-size", "2", "--gradient-accumulation-steps", "4", "--max-length",
    "64", "--learning-rate", "0.01", "--no-rehearse", "--samples", "0", "--lora-dropout", "0.1",
)  # fmt: skip


def model_in(folder: Path, kind: str, loaded_as: Any) -> str:
    """Save a tiny random model with a tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **NUMBERS, vocab_size=len(tokenizer))
    loaded_as.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random Llama with a tokenizer."""
    return model_in(tmp_path_factory.mktemp("llama"), "llama", AutoModelForCausalLM)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random BERT with a tokenizer."""
    return model_in(tmp_path_factory.mktemp("bert"), "bert", AutoModel)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sources of many kinds, good ones and bad ones."""
    folder = tmp_path_factory.mktemp("data")
    files: dict[str, list[Any]] = {
        "a.jsonl": [{"question": f"one {i}", "answer": f"{i} dollars"} for i in range(160)],
        "b.jsonl": [{"text": f"story {i} " + "to play " * (i % 5)} for i in range(60)],
        "c.jsonl": [{"q": f"two {i}", "a": f"{i}"} for i in range(40)],
        "tiny.jsonl": [{"text": "one"}, {"text": "two"}],
        "films.jsonl": [{"text": f"good {i}", "label": "good"} for i in range(4)]
        + [{"text": f"bad {i}", "label": "bad"} for i in range(4)],
        "more.jsonl": [{"text": "a good end", "label": "good"}, {"text": "bad", "label": "bad"}],
        "words.jsonl": [{"text": "ok", "label": "positive"}, {"text": "no", "label": "bad"}],
        "pairs.jsonl": [{"text_a": "x", "text_b": "y", "label": each} for each in ("good", "bad")],
        "tags.jsonl": [{"tokens": ["Ann", "left"], "tags": ["B-PER", "O"]}] * 3,
        "others.jsonl": [{"tokens": ["Ann", "left"], "tags": ["B-PER", "B-LOC"]}],
    }
    for name, records in files.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "empty.jsonl").write_text("")
    return folder


@pytest.fixture
def in_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(data)
    return data


def trained(
    model: str, output: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> dict[str, Any]:
    code, out, err = run(
        "train", "--model", model, "--output", str(output), *STEPS, "--json", *more, capsys=capsys
    )
    assert code == 0, err
    outcome: dict[str, Any] = json.loads(out)
    return outcome


MIXED = ("--data", "a.jsonl", "--data", "b.jsonl", "--data-weights", "3,1")


# ---------------------------------------------------------------- what is told


def test_a_run_tells_the_rows_and_the_loss_of_each_source(
    in_data: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run"
    best = ("--best-metric", "loss_b.jsonl")
    found = trained(model, own, capsys, *MIXED, "--max-steps", "4", "--eval-steps", "2", *best)
    first, second = found["sources"]
    assert (first["name"], second["source"]) == ("a.jsonl", "b.jsonl")
    assert (first["token_rows"], second["token_rows"]) == (152, 57)
    assert (first["rows_an_epoch"], second["rows_an_epoch"]) == (152, 51)
    assert "152 (74.9%) of an epoch" in (own / "README.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (own / "trainer_log.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "eval_loss" in row]
    best_loss = min(row["eval_loss_b.jsonl"] for row in evaluated)
    assert found["progress"]["best_metric"] == best_loss
    last = evaluated[-1]
    assert last["eval_loss_a.jsonl"] == first["validation_loss"]
    weights = [each["validation"]["supervised_tokens"] for each in found["sources"]]
    losses = [each["validation_loss"] for each in found["sources"]]
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert last["eval_loss"] == pytest.approx(mean, rel=1e-6)
    assert "loss b.jsonl" in (own / "report.html").read_text(encoding="utf-8")
    assert "<h2>Sources</h2>" in (own / "data.html").read_text(encoding="utf-8")
    config = yaml.safe_load((own / "training_config.yaml").read_text())
    assert (config["data"], config["data_weights"]) == (["a.jsonl", "b.jsonl"], [3.0, 1.0])
    # The rows that were held out of each source are found again.
    code, out, err = run(
        "export", str(own), "--to", str(tmp_path / "merged"), "--verify-tokens", "64", "--json",
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["report"]["rows"] == "validation rows of the run"


def test_a_best_metric_that_no_source_has_is_refused(
    in_data: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(
        "check", "--model", model, *MIXED, "--best-metric", "loss_c.jsonl", capsys=capsys
    )
    assert code == 2
    assert "expected loss, loss_a.jsonl, loss_b.jsonl, token_accuracy" in err


def test_check_tells_each_source_of_a_file_of_options(
    in_data: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tmp_path / "mix.yaml"
    options.write_text(
        "data:\n"
        "  - path: a.jsonl\n"
        "    weight: 3\n"
        "  - path: c.jsonl\n"
        "    columns: {question: q, answer: a}\n"
        "    chat_template: vicuna\n"
        "  - b.jsonl\n"
    )
    checked = ("check", "--model", model, "--config", str(options), "--max-length", "64")
    code, out, err = run(*checked, capsys=capsys)
    assert code == 0, err
    said = " ".join(out.split())
    assert "c.jsonl 38 qa rows" in said
    assert "60.0%) of an epoch's 190 rows" in said
    assert "c.jsonl has its own chat template, vicuna; the run's is saved" in said
    code, out, err = run(*checked, "--data-weights", "1,1,2", "--json", capsys=capsys)
    assert code == 0, err
    assert [each["rows_an_epoch"] for each in json.loads(out)["sources"]] == [28, 28, 57]


def test_one_source_is_recorded_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("train", "--data", "a.jsonl", "--dry-run", capsys=capsys)
    assert code == 0
    assert yaml.safe_load(out)["data"] == "a.jsonl"
    assert differences({"data_weights": []}, {}) == ([], []), "a run that was made before resumes"


# ---------------------------------------------------------------- resume


def test_a_resumed_run_has_the_bits_of_the_unbroken_one(
    in_data: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tmp_path / "mix.yaml"
    options.write_text(
        "data:\n  - {path: c.jsonl, weight: 2, columns: {question: q, answer: a}}\n  - b.jsonl\n"
    )
    # An epoch has 8 steps: the run is broken before its end, and goes on after it.
    mixed = ("--config", str(options), "--validation", "tiny.jsonl", "--packing")
    for name, steps in (("whole", ()), ("part", ("--save-steps", "5"))):
        trained(model, tmp_path / name, capsys, *mixed, "--max-steps", "10", *steps)
    as_if_killed_at(tmp_path / "part", 5)
    code, _, err = run("train", "--output", str(tmp_path / "part"), "--resume", capsys=capsys)
    assert code == 0, err
    whole, part = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "part")
    )
    assert all(torch.equal(part[name], each) for name, each in whole.items())


def test_a_run_does_not_resume_with_other_sources_or_weights(
    in_data: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run"
    trained(model, own, capsys, *MIXED, "--max-steps", "2")
    for changed, fault in (
        (("--data-weights", "1,1"), "data_weights was [3.0, 1.0] and is now [1.0, 1.0]"),
        (("--data", "b.jsonl", "--data", "a.jsonl"), "the training data changed"),
    ):
        again = ("train", "--output", str(own), "--resume", "--max-steps", "3", *changed)
        code, _, err = run(*again, capsys=capsys)
        assert code == 2
        assert f"--resume: {fault}; " in err
        assert "--allow-change data" in err
    code, _, err = run(*again, "--allow-change", "data", capsys=capsys)
    assert code == 0, err


# ---------------------------------------------------------------- tasks


def test_classifiers_learn_from_several_sources(
    in_data: Path, bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = ("--data", "films.jsonl", "--data", "more.jsonl", "--data-weights", "2,1")
    task = ("--task", "classify", "--validation", "films.jsonl", "--max-steps", "2")
    found = trained(bert, tmp_path / "run", capsys, *sources, *task)
    assert [each["rows_an_epoch"] for each in found["sources"]] == [4, 2]
    assert [each["training"]["labels"] for each in found["sources"]] == [8, 2]


def test_tags_and_sources_with_targets_are_mixed_too(
    in_data: Path, bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = t5_tokenizer("one two dollars")
    t5 = save_t5(tmp_path / "t5", "t5", vocab_size=len(tokenizer) + 4)
    tokenizer.save_pretrained(t5)
    tags = ("--data", "tags.jsonl", "--data", "others.jsonl", "--labels", "O,B-PER,B-LOC")
    qa = ("--data", "a.jsonl", "--data", "c.jsonl", "--data-weights", "1,1")
    for task, model, sources in (("tag", bert, tags), ("seq2seq", str(t5), qa)):
        options = tmp_path / f"{task}.yaml"
        options.write_text(
            "data:\n  - a.jsonl\n  - {path: c.jsonl, columns: {question: q, answer: a}}\n"
            if task == "seq2seq"
            else ""
        )
        named = sources if task == "tag" else ("--config", str(options), *sources[4:])
        code, out, err = run(
            "check", "--task", task, "--model", model, *named, "--json", capsys=capsys
        )
        assert code == 0, err
        assert len(json.loads(out)["sources"]) == 2


# ---------------------------------------------------------------- what is refused

BAD = {
    "a weight too few": (("a.jsonl", "b.jsonl"), "3", "found 3; expected 2 numbers, one for each"),
    "a weight too many": (("a.jsonl", "b.jsonl"), "3,1,1", "found 3,1,1; expected 2 numbers"),
    "a weight of 0": (("a.jsonl", "b.jsonl"), "3,0", "found 0; expected greater than 0"),
    "a negative weight": (("a.jsonl", "b.jsonl"), "3,-1", "found -1; expected greater than 0"),
    "no number": (("a.jsonl", "b.jsonl"), "3,NaN", "found NaN; expected a finite number"),
    "no end": (("a.jsonl", "b.jsonl"), "inf,1", "found inf; expected a finite number"),
    "a word": (("a.jsonl", "b.jsonl"), "much,1", "found much; expected a number"),
    "weights of one": (("a.jsonl",), "3,1", "found 3,1, and 1 source of data; expected several"),
    "weights of none": ((), "3,1", "found 3,1, and no source of data; expected several"),
    "the same file": (("a.jsonl", "a.jsonl"), "", "--data: a.jsonl stands twice"),
    "a missing file": (("a.jsonl", "none.jsonl"), "", "none.jsonl: no such file"),
    "an empty file": (("a.jsonl", "empty.jsonl"), "", "empty.jsonl: no records"),
    "unknown fields": (("a.jsonl", "c.jsonl"), "", "c.jsonl:1: keys q, a; expected one of"),
    "a short epoch": (
        ("a.jsonl", "tiny.jsonl"), "1,9", "has 2 rows and none of a.jsonl; expected one at least",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sources", "weights", "fault"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_one_line(
    in_data: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
    sources: tuple[str, ...],
    weights: str,
    fault: str,
) -> None:
    named = [each for source in sources for each in ("--data", source)]
    weighed = ["--data-weights", weights] if weights else []
    code, _, err = run("check", "--model", model, *named, *weighed, capsys=capsys)
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert (code, len(errors)) == (2, 1)
    assert fault in errors[0]


BAD_LABELS = {
    "another label": ("words.jsonl", (), "films.jsonl: no record has the label positive of the"),
    "a label that is not named": (
        "words.jsonl", ("--labels", "good,bad"), "words.jsonl:1: the label positive that is none",
    ),
    "no label": ("a.jsonl", (), "a.jsonl:1: keys question, answer; expected"),
    "pairs": ("pairs.jsonl", (), "pairs.jsonl: classify-pair records, and films.jsonl has"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "more", "fault"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_labelled_sources_go_together_or_are_refused(
    in_data: Path,
    bert: str,
    capsys: pytest.CaptureFixture[str],
    source: str,
    more: tuple[str, ...],
    fault: str,
) -> None:
    code, _, err = run(
        "check", "--task", "classify", "--model", bert, "--data", "films.jsonl", "--data", source,
        *more, capsys=capsys,
    )  # fmt: skip
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert (code, len(errors)) == (2, 1)
    assert fault in errors[0]


BAD_FILES = {
    "an unknown key": (
        "[{path: a.jsonl, wieght: 3}, b.jsonl]",
        "data: source 1: wieght: unknown key; did you mean weight?",
    ),
    "no path": ("[{weight: 3}, b.jsonl]", "data: source 1: no path; expected the file"),
    "a weight of 0": (
        "[{path: a.jsonl, weight: 0}, b.jsonl]",
        "data: source 1: weight: found 0; expected greater than 0",
    ),
    "a weight of one": ("{path: a.jsonl, weight: 2}", "expected several sources where one has"),
    "a template of one": ("{path: a.jsonl, chat_template: vicuna}", "write chat_template beside"),
    "an unknown format": (
        "[{path: a.jsonl, format: chatty}, b.jsonl]",
        "data: source 1: format: found chatty; expected",
    ),
    "nothing": ("[]", "expected a file, folder or hub id, or a list of these"),
    "a list in a list": ("[[a.jsonl], b.jsonl]", "expected a file, folder or hub id, or a list"),
    "a key twice": (
        "[{path: a.jsonl, data-weights: 3}, b.jsonl]",
        "data: source 1: data_weights: unknown key",
    ),
}


@pytest.mark.parametrize(("text", "fault"), BAD_FILES.values(), ids=BAD_FILES)
def test_what_is_wrong_in_a_file_of_options_is_one_line(
    in_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, fault: str
) -> None:
    options = tmp_path / "mix.yaml"
    options.write_text(f"data: {text}\n")
    code, _, err = run("train", "--config", str(options), capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {options}: data")
    assert fault in err
