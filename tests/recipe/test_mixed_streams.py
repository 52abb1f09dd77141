"""Several sources streamed together, as a user runs them: check, train, resume, and what fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from safetensors.torch import load_file
from support import as_if_killed_at, run
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from qlora_kit.data import streamed_samples
from qlora_kit.recipe import streaming

pytestmark = pytest.mark.usefixtures("simulated_once")

NUMBERS = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 1,
    "initializer_range": 0.1,
}  # fmt: skip
STEPS = (
    "--device", "cpu", "--batch-size", "2", "--gradient-accumulation-steps", "4", "--max-length",
    "64", "--learning-rate", "0.01", "--no-rehearse", "--samples", "0", "--lora-dropout", "0.1",
    "--data-workers", "0", "--bits", "16",
)  # fmt: skip
MIX = """\
data:
  - {path: c.jsonl, weight: 2, columns: {question: q, answer: a}, chat_template: vicuna}
  - {path: a.jsonl, weight: 3}
"""


def model_in(folder: Path, kind: str, loaded_as: Any) -> str:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **NUMBERS, vocab_size=len(tokenizer))
    loaded_as.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_in(tmp_path_factory.mktemp("llama"), "llama", AutoModelForCausalLM)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_in(tmp_path_factory.mktemp("bert"), "bert", AutoModel)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sources; a, b and c have rows, some have faults."""
    folder = tmp_path_factory.mktemp("data")
    files: dict[str, list[Any]] = {
        "a.jsonl": [{"question": f"one {i}", "answer": f"{i} dollars"} for i in range(160)],
        "b.jsonl": [
            {"question": f"two {i}", "answer": "to play " * (1 + i % 5)} for i in range(60)
        ],
        "c.jsonl": [{"q": f"two {i}", "a": f"{i}"} for i in range(40)],
        "texts.jsonl": [{"text": f"story {i}"} for i in range(40)],
        "tiny.jsonl": [{"question": "one", "answer": "two"}] * 2,
        "faulty.jsonl": [{"question": f"one {i}", "answer": "$"} for i in range(30)] + [{"x": 1}],
        "films.jsonl": [{"text": f"good {i}", "label": i % 2} for i in range(30)],
        "more.jsonl": [{"text": f"the end {i}", "label": 1} for i in range(9)],
        "pairs.jsonl": [{"text_a": "x", "text_b": "y", "label": each} for each in (0, 1)],
    }
    for name, records in files.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "empty.jsonl").write_text("")
    (folder / "mix.yaml").write_text(MIX)
    (folder / "list.json").write_text('[{"question": "one", "answer": "two"}]')
    return folder


@pytest.fixture
def in_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the folder of the sources, of which ten records are looked at before training."""
    monkeypatch.setattr(streamed_samples, "HEAD_RECORDS", 10)
    monkeypatch.chdir(data)
    return data


def started(
    model: str, output: Path, *more: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    where = ("--model", model, "--output", str(output))
    code, out, err = run("train", *where, *STEPS, *more, capsys=capsys)
    return code, " ".join(out.split()), err


def log_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]


def identity_of(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())["identity"]
    return found


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(each / "adapter_model.safetensors") for each in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


STREAM = ("--stream-data", "--shuffle-buffer", "16")
TWO = ("--data", "a.jsonl", "--data", "b.jsonl")
MIXED = (*TWO, "--data-weights", "3,1")


# ---------------------------------------------------------------- a run


def test_a_run_tells_how_it_mixes_and_the_loss_of_each_source(
    in_data: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run"
    more = ("--epochs", "1", "--logging-steps", "4", "--save-steps", "8")
    code, out, err = started(model, own, *STREAM, *MIXED, *more, capsys=capsys)
    assert (code, err) == (0, "")
    for words in (
        "note: data: what is looked at before training, a.jsonl: 10 qa rows;",
        "note: data: a.jsonl: 160 qa rows",
        "note: data: b.jsonl: 60 qa rows",
        "note: validation: 11 rows held out of the data",
        "data a.jsonl, b.jsonl, streamed, 203 rows an epoch",
        "stream drawn from 16 samples of each source, tokenised between the steps",
        "a.jsonl 152 qa rows; 152 (74.9%) of an epoch's 203 rows; validation 8 rows",
        "b.jsonl 57 qa rows; 51 (25.1%) of an epoch's 203 rows; all seen after 1.12 epochs; "
        "validation 3 rows",
        "training: 26 optimiser steps, 1.00 epochs",
        "streamed a.jsonl 15",
    ):
        assert words in out, words
    assert re.search(r"step 26/26 loss \S+ lr \S+ \S+ tokens/s \S+ GB a.jsonl \S+ b.jsonl ", out)
    rows = log_of(own)
    assert rows[-1]["eval_loss_a.jsonl"] > 0
    steps = [row for row in rows if "learning_rate" in row]
    assert [row["optimizer_step"] for row in steps] == [1, 4, 8, 12, 16, 20, 24]
    assert all([*row["source_losses"]] == ["a.jsonl", "b.jsonl"] for row in steps)
    page = (own / "report.html").read_text(encoding="utf-8")
    assert "The training loss of each source" in page
    assert f"{steps[-1]['source_losses']['b.jsonl']:.4f}" in page


def test_the_rows_that_are_held_out_are_those_of_a_run_that_reads_all_first(
    in_data: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, flags in (("streamed", STREAM), ("whole", ("--no-stream-data",))):
        more = (*flags, *MIXED, "--max-steps", "1", "--validation-fraction", "0.05")
        assert started(model, tmp_path / name, *more, capsys=capsys)[0] == 0
        found[name] = identity_of(tmp_path / name / "checkpoint-1")
        assert log_of(tmp_path / name)[-1]["eval_loss_b.jsonl"] > 0
    assert found["streamed"]["validation"] == found["whole"]["validation"] is not None


def test_without_weights_every_row_comes_once_an_epoch(
    in_data: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So the sources are counted, also where the number of steps is given."""
    more = ("--max-steps", "1", "--validation-fraction", "0")
    code, out, err = started(model, tmp_path / "run", *STREAM, *TWO, *more, capsys=capsys)
    assert code == 0, err
    assert "note: data: a.jsonl: 160 qa rows" in out
    assert "data a.jsonl, b.jsonl, streamed, 220 rows an epoch" in out
    assert "a.jsonl 160 qa rows; 160 (72.7%) of an epoch's 220 rows; no validation" in out


def test_with_weights_and_steps_nothing_is_counted(
    in_data: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text of unknown length goes with chats, and the run ends in its steps."""
    own = tmp_path / "run"
    sources = ("--data", "tiny.jsonl", "--data", "texts.jsonl", "--data-weights", "1,3")
    more = ("--max-steps", "6", "--json")
    where = ("--model", model, "--output", str(own))
    code, out, err = run("train", *where, *STEPS, *STREAM, *sources, *more, capsys=capsys)
    assert code == 0, err
    first, second = json.loads(out)["sources"]
    assert (first["token_rows"], first["rows_an_epoch"], first["share"]) == (None, None, 0.25)
    assert second["is_streamed"]
    place = json.loads((own / "checkpoint-6" / "state.json").read_text())["progress"]["place"]
    # An epoch has two rows of one source, and six of the other; the first has four, as it begins.
    assert [each["taken"] for each in place["sources"]] == [12, 34]
    assert [row["epoch"] for row in log_of(own)] == [0, 1, 2, 3, 4, 5]


def test_classifiers_learn_from_several_streams(
    in_data: Path, bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = ("--data", "films.jsonl", "--data", "more.jsonl", "--data-weights", "2,1")
    task = ("--task", "classify", "--labels", "bad,good", "--epochs", "1")
    code, out, err = started(bert, tmp_path / "run", *STREAM, *sources, *task, capsys=capsys)
    assert code == 0, err
    assert "more.jsonl 9 classify rows; 9 (33.3%) of an epoch's 27 rows" in out
    assert [*log_of(tmp_path / "run")[0]["source_losses"]] == ["films.jsonl", "more.jsonl"]


def test_check_shows_the_first_records_of_each(
    in_data: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run("check", "--model", model, *STEPS, *STREAM, *MIXED, capsys=capsys)
    assert code == 0, err
    assert "data: a.jsonl, b.jsonl, the first records of each" in out
    assert "b.jsonl  57 qa rows; 51 (25.1%)" in out


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_a_resumed_run_has_the_bits_of_the_unbroken_one(
    in_data: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], packing: str
) -> None:
    """Each source has columns and a chat template of its own."""
    options = ("--config", "mix.yaml", *STREAM, packing, "--validation", "tiny.jsonl")
    more = (*options, "--epochs", "1.5", "--save-steps", "5")
    assert started(model, tmp_path / "whole", *more, capsys=capsys)[0] == 0
    assert started(model, tmp_path / "part", *more, capsys=capsys)[0] == 0
    as_if_killed_at(tmp_path / "part", 5)
    again = ("--output", str(tmp_path / "part"), "--resume")
    code, _, err = run("train", *again, capsys=capsys)
    assert code == 0, err
    assert same_weights(tmp_path / "whole", tmp_path / "part")
    losses = [[row.get("loss") for row in log_of(tmp_path / each)] for each in ("whole", "part")]
    assert losses[0] == losses[1]
    for changed, fault in (
        (("--data-weights", "1,1"), "data_weights was [2.0, 3.0] and is now [1.0, 1.0]"),
        (
            ("--data", "b.jsonl", "--data", "a.jsonl", "--data-weights", "2,3"),
            "the training data changed",
        ),
    ):
        code, _, err = run("train", *again, "--epochs", "2", *changed, capsys=capsys)
        assert (code, err.count("\n")) == (2, 1), err
        assert f"--resume: {fault}; " in err
    code, _, err = run(
        "train", *again, "--epochs", "2", *changed, "--allow-change", "data", capsys=capsys
    )
    assert code == 0, err


# ---------------------------------------------------------------- by default


def test_several_large_sources_are_streamed_by_default(
    in_data: Path,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    size = sum((in_data / name).stat().st_size for name in ("a.jsonl", "b.jsonl"))
    monkeypatch.setattr(streaming, "LARGE_BYTES", size)
    code, out, err = started(model, tmp_path / "a", *MIXED, "--max-steps", "1", capsys=capsys)
    assert code == 0, err
    assert "stream drawn from all samples, tokenised between the steps; by default, as" in out
    monkeypatch.setattr(streaming, "LARGE_BYTES", size + 1)
    code, out, err = started(model, tmp_path / "b", *MIXED, "--max-steps", "1", capsys=capsys)
    assert (code, "stream drawn" in out) == (0, False), err
    # Text is split by its length, so it would have to be tokenised to be counted.
    monkeypatch.setattr(streaming, "LARGE_BYTES", 1)
    sources = ("--data", "a.jsonl", "--data", "texts.jsonl")
    code, out, err = started(model, tmp_path / "c", *sources, "--epochs", "0.1", capsys=capsys)
    assert (code, "stream drawn" in out) == (0, False), err


# ---------------------------------------------------------------- what is refused

BAD = {
    "a source twice": (("a.jsonl", "a.jsonl"), (), "--data: a.jsonl stands twice;"),
    "a weight too few": (
        ("a.jsonl", "b.jsonl"), ("--data-weights", "3"), "expected 2 numbers, one for each source",
    ),
    "a list": (
        ("a.jsonl", "list.json"), (), "--stream-data: list.json: a .json file is one list, which",
    ),
    "a missing file": (("a.jsonl", "none.jsonl"), (), "none.jsonl: no such file"),
    "an empty file": (("a.jsonl", "empty.jsonl"), (), "empty.jsonl: no records; expected at"),
    "unknown fields": (("a.jsonl", "c.jsonl"), (), "c.jsonl:1: keys q, a; expected one of"),
    "a fault behind the first records": (
        ("a.jsonl", "faulty.jsonl"), (), "faulty.jsonl:31: no \"question\"; expected it as in the",
    ),
    "a short epoch": (
        ("a.jsonl", "tiny.jsonl"), ("--data-weights", "1,9"), "has 2 rows and none of a.jsonl;",
    ),
    "pairs beside texts": (
        ("films.jsonl", "pairs.jsonl"), ("--task", "classify", "--labels", "no,yes"),
        "pairs.jsonl: classify-pair records, and films.jsonl has classify records",
    ),
    "no labels": (
        ("films.jsonl", "more.jsonl"), ("--task", "classify"), "--task classify without --labels;",
    ),
    "all held out": (
        ("a.jsonl", "b.jsonl"), ("--validation-fraction", "0.999"), "holds out every row; expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sources", "more", "fault"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_one_line(
    in_data: Path,
    model: str,
    bert: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sources: tuple[str, ...],
    more: tuple[str, ...],
    fault: str,
) -> None:
    named = [each for source in sources for each in ("--data", source)]
    base = bert if "--task" in more else model
    code, _, err = started(base, tmp_path / "run", *STREAM, *named, *more, capsys=capsys)
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert (code, len(errors)) == (2, 1), err
    assert fault in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_set_of_the_hub_needs_weights_and_steps(
    in_data: Path,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import datasets

    real = datasets.load_dataset_builder
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes((in_data / "b.jsonl").read_bytes())
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *asked: real(str(folder), cache_dir=str(tmp_path))
    )
    sources = ("--data", "a.jsonl", "--data", "owner/name", *STREAM)
    steps, weighed = ("--max-steps", "3"), ("--data-weights", "1,1")
    for more, fault in (
        (
            steps,
            "--stream-data: 2 sources without weights, and one is a data set of the hub, whose",
        ),
        (weighed, "--stream-data: owner/name is a data set of the hub, and to count its rows"),
    ):
        code, _, err = started(model, tmp_path / "run", *sources, *more, capsys=capsys)
        assert (code, err.count("\n")) == (2, 1), err
        assert fault in err
    code, out, err = started(model, tmp_path / "run", *sources, *steps, *weighed, capsys=capsys)
    assert code == 0, err
    assert "data a.jsonl, owner/name, streamed, rows not counted an epoch" not in out
    assert "data a.jsonl, owner/name, streamed, rows not counted" in out
    assert "name qa rows, not counted; 50.0% of the rows" in out
