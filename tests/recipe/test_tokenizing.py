"""Data that are read first and tokenised beside the training, as a user runs it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from safetensors.torch import load_file
from support import as_if_killed_at, run, slow
from tiny_models import SIZES, save_model
from transformers import AutoConfig, AutoModel

from qlora_kit.config import TrainConfig, read_config_file, resolve
from qlora_kit.data import stream_worker, streamed_samples
from qlora_kit.data.sources import load_training
from qlora_kit.data.stream_worker import Beside, Chunk, Made
from qlora_kit.recipe import streaming, tokenizing
from qlora_kit.recipe.foreseeing import Foreseen
from qlora_kit.recipe.tokenizing import tokenized_later
from qlora_kit.report.memory import size_text

pytestmark = pytest.mark.usefixtures("simulated_once")

STEPS = (
    "--device", "cpu", "--bits", "16", "--samples", "0", "--no-rehearse", "--batch-size", "2",
    "--gradient-accumulation-steps", "2", "--max-length", "64", "--learning-rate", "0.01",
    "--lora-dropout", "0.1", "--data-workers", "0",
)  # fmt: skip
LATER = "--no-tokenize-first"
ROWS = 80
"""of the larger source: three chunks of those that a process tokenises at a time"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    save_model(folder, {"model_type": "llama", **SIZES, "vocab_size": len(tokenizer)})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sources, each as lines and as one list."""
    folder = tmp_path_factory.mktemp("data")
    sources: dict[str, list[Any]] = {
        "a": [{"question": f"one {n}", "answer": "to play " * (1 + n % 5)} for n in range(ROWS)],
        "b": [{"question": f"two {n}", "answer": f"{n} dollars"} for n in range(30)],
        "texts": [{"text": f"the girl {n} " * (1 + n % 5)} for n in range(30)],
    }
    for name, records in sources.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(autouse=True)
def _in_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the folder of the sources, of which ten records are looked at before training."""
    monkeypatch.setattr(streamed_samples, "HEAD_RECORDS", 10)
    monkeypatch.chdir(data)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any text be large enough not to be tokenised first."""
    monkeypatch.setattr(tokenizing, "SOON_BYTES", 1)


def started(
    model: Path, output: Path, *more: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    where = ("--model", str(model), "--output", str(output))
    code, out, err = run("train", *where, *STEPS, *more, capsys=capsys)
    return code, " ".join(out.split()), err


def log_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(each / "adapter_model.safetensors") for each in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- the first step


class _HeldBack(Beside):
    """Other processes that have nothing but the first samples until a step is in the log."""

    log: Path
    waited: int

    def ask(self, chunk: Chunk, source: int = 0) -> Callable[[], Made]:
        """See `Tokenizes`; all chunks behind the first wait for the step."""
        made, is_first = super().ask(chunk, source), not self.asked
        self.asked.append(len(chunk))
        return made if is_first else lambda: self._after_a_step(made)

    def _after_a_step(self, made: Callable[[], Made]) -> Made:
        until = time.monotonic() + 60
        while not (self.log.is_file() and self.log.stat().st_size):
            assert time.monotonic() < until, "the first step waits for rows behind it"
            time.sleep(0.01)
        type(self).waited += 1
        return made()

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[int] = []


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    "options",
    [
        ("--data", "a.json"),
        ("--data", "a.jsonl", "--stream-data"),
        *slow((("--data", "a.jsonl", "--no-stream-data", "--max-steps", "12"),)),
    ],
)
def test_the_first_step_is_taken_while_rows_are_still_to_be_tokenised(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: Sequence[str],
) -> None:
    """Streamed or not; what is in the log is a step that was finished."""
    held_back: Any = type("HeldBack", (_HeldBack,), {})
    held_back.log, held_back.waited = tmp_path / "run" / "trainer_log.jsonl", 0
    monkeypatch.setattr(stream_worker, "Beside", held_back)
    more = (*options, "--data-workers", "1", "--validation-fraction", "0", "--epochs", "1")
    code, out, err = started(model, tmp_path / "run", *more, capsys=capsys)
    assert code == 0, err
    assert held_back.waited >= 1
    assert f"{ROWS if '--max-steps' not in options else 48} qa rows;" in out


# ---------------------------------------------------------------- the order of rows


@pytest.mark.parametrize(
    ("files", "options"),
    [
        (("a", "b"), ("--data-weights", "3,1", "--epochs", "1.5")),
        *slow(
            (("a",), ("--epochs", "1.5")),
            (("a", "b"), ("--epochs", "1.5", "--packing")),
            (("a",), ("--validation", "b")),
        ),
    ],
)
def test_rows_come_in_the_order_of_a_stream_that_is_shuffled_whole(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    files: Sequence[str],
    options: Sequence[str],
) -> None:
    """To the bit: reading first, or the number of processes, changes nothing."""

    def trained(name: str, suffix: str, *more: str) -> Path:
        sources = [each for file in files for each in ("--data", f"{file}.{suffix}")]
        given = [f"b.{suffix}" if option == "b" else option for option in options]
        code, _, err = started(model, tmp_path / name, *sources, *given, *more, capsys=capsys)
        assert code == 0, err
        return tmp_path / name

    streamed = trained("streamed", "jsonl", "--stream-data")
    later = trained("later", "json", LATER, "--data-workers", "2")
    assert same_weights(streamed, later)
    assert [row.get("loss") for row in log_of(streamed)] == [
        row.get("loss") for row in log_of(later)
    ]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("sources", [("a.json", "b.json"), *slow((("a.json",),))])
def test_a_resumed_run_has_the_bits_of_the_unbroken_one(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sources: Sequence[str],
) -> None:
    """Wherever the border lies when it goes on."""
    weights = ("--data-weights", "2,3") if len(sources) > 1 else ()
    more = [*(each for name in sources for each in ("--data", name)), *weights]
    for name in ("whole", "part"):
        code, _, err = started(
            model, tmp_path / name, *more, "--epochs", "1.5", "--save-steps", "5", capsys=capsys
        )
        assert code == 0, err
    as_if_killed_at(tmp_path / "part", 5)
    monkeypatch.setattr(tokenizing, "SOON_BYTES", 10**9)
    code, _, err = run("train", "--output", str(tmp_path / "part"), "--resume", capsys=capsys)
    assert code == 0, err
    assert same_weights(tmp_path / "whole", tmp_path / "part")
    losses = [[row.get("loss") for row in log_of(tmp_path / each)] for each in ("whole", "part")]
    assert losses[0] == losses[1]
    again = ("train", "--output", str(tmp_path / "part"), "--resume", "--epochs", "2")
    code, _, err = run(*again, "--tokenize-first", capsys=capsys)
    assert (code, err.count("\n")) == (2, 1), err
    assert "error: --resume: tokenize_first was False and is now True; pass the stored one" in err


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("kept", "streams"), [((), False), *slow((("--stream-data",), True))])
def test_a_run_from_before_goes_on_as_it_was(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kept: Sequence[str],
    streams: bool,
) -> None:
    output = tmp_path / "run"
    first = kept or ("--tokenize-first",)
    more = ("--data", "a.jsonl", "--max-steps", "2", "--save-steps", "1", *first)
    code, _, err = started(model, output, *more, capsys=capsys)
    assert code == 0, err
    as_if_killed_at(output, 1)
    stored = output / "training_config.yaml"
    stored.write_text(re.sub("tokenize_first: .*\n", "", stored.read_text()))
    state = output / "checkpoint-1" / "state.json"
    assert '"tokenize_first"' in state.read_text()
    code, out, err = run("train", "--output", str(output), "--resume", capsys=capsys)
    assert code == 0, err
    assert ("tokenised between the steps" in " ".join(out.split())) == streams


# ---------------------------------------------------------------- what decides


def test_large_data_are_tokenised_beside_the_training_by_default(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ("--data", "a.json", "--max-steps", "2", "--data-workers", "2")
    code, out, err = started(model, tmp_path / "small", *more, capsys=capsys)
    assert code == 0, err
    assert "beside the training" not in out
    assert "note: --data-workers has no effect without --stream-data" in out
    monkeypatch.setattr(tokenizing, "SOON_BYTES", (data / "a.json").stat().st_size // 4)
    code, out, err = started(model, tmp_path / "large", *more, capsys=capsys)
    assert code == 0, err
    assert (
        f"data a.json, {ROWS} rows, tokenised by 2 processes beside the training; --tokenize-first "
        "makes all tokens before the first step" in out
    )
    assert "has no effect" not in out
    assert "note: data: what is looked at before training, 10 qa rows;" in out
    assert "tokenised 8 qa rows;" in out
    code, out, err = started(model, tmp_path / "first", *more, "--tokenize-first", capsys=capsys)
    assert (code, "beside the training" in out) == (0, False), err
    assert same_weights(tmp_path / "first", tmp_path / "small")


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("options", "is_later"),
    [
        (("--data", "texts.json"), False),
        (("--data", "a.json", "--max-length", "4096"), False),
        *slow(
            (("--data", "texts.json", "--max-steps", "1", "--validation-fraction", "0"), True),
            (("--data", "a.json", "--long-samples", "drop"), False),
            (("--data", "a.json", "--long-samples", "error"), True),
            (("--data", "a.json", "--data", "texts.json"), False),
            (("--data", "a.jsonl", "--tokenize-first"), False),
        ),
    ],
)
def test_what_has_to_know_all_tokens_has_them_first(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: Sequence[str],
    is_later: bool,
) -> None:
    monkeypatch.setattr(streaming, "LARGE_BYTES", 1)
    more = ("--epochs", "0.1", *options)
    code, out, err = started(model, tmp_path / "run", *more, capsys=capsys)
    assert code == 0, err
    assert ("tokenised between the steps" in out) == is_later


def test_small_data_are_seen_whole(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their size, or because what is looked at before training is all there is."""
    config = TrainConfig(data=str(data / "a.json"), max_length=64)
    samples = load_training(config)

    def is_first() -> bool:
        return tokenized_later(samples, config, chooses=True) is samples

    assert is_first()
    monkeypatch.setattr(tokenizing, "SOON_BYTES", samples.text_bytes)
    assert not is_first()
    monkeypatch.setattr(tokenizing, "SOON_BYTES", samples.text_bytes + 1)
    assert is_first()
    monkeypatch.setattr(tokenizing, "SOON_BYTES", 1)
    monkeypatch.setattr(streamed_samples, "HEAD_RECORDS", ROWS)
    assert is_first()
    monkeypatch.setattr(streamed_samples, "HEAD_CHARACTERS", 500)
    first = tokenized_later(samples, config, chooses=True)
    assert 1 < len(first.items) < ROWS
    assert first.source.endswith(f"a.json, the first {len(first.items)} records")


@pytest.mark.usefixtures("large")
def test_a_sweep_foresees_the_plan_of_such_a_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--data", "a.json", "--max-steps", "1", "--seed", "5")
    code, _, err = started(model, tmp_path / "run", *more, capsys=capsys)
    assert code == 0, err
    planned = json.loads((tmp_path / "run" / "memory.json").read_text())["predicted"]
    stored = read_config_file(tmp_path / "run" / "training_config.yaml")
    config = resolve(TrainConfig, [stored]).model_copy(
        update={"tokenize_first": None, "stream_data": None, "packing": None}
    )
    found = dict(Foreseen.of([config]).rows())
    of_run = size_text(planned["predicted_peak_bytes"])
    assert found["predicted peak"] == f"{of_run}, of the largest"


@pytest.mark.usefixtures("large")
def test_check_looks_at_all_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("check", "--data", "a.json", "--max-length", "64", capsys=capsys)
    assert code == 0
    assert f"training    {ROWS} qa rows\n" in out
    code, out, _ = run("check", "--data", "a.json", "--max-length", "64", LATER, capsys=capsys)
    assert code == 0
    assert "training    10 qa rows\n" in out


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    folder, tokenizer = tmp_path / "bert", make_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, vocab_size=len(tokenizer), initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("large")
def test_labels_are_those_of_all_samples(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stream would have to be told them; here one comes behind the first records only."""
    names = ["bad"] * 20 + ["good"] * 9 + ["fair"]
    records = [{"text": f"the girl {n}", "label": name} for n, name in enumerate(names)]
    file = tmp_path / "films.json"
    file.write_text(json.dumps(records))
    more = ("--task", "classify", "--data", str(file), "--class-weights", "balanced")
    code, out, err = started(
        bert, tmp_path / "run", *more, "--targets", "all-linear", "--max-steps", "2", capsys=capsys
    )
    assert code == 0, err
    found = re.search("note: labels: (.*?) note: ", out)
    assert found
    assert {"bad", "good", "fair"} <= {*re.findall(r"\w+", found[1])}, found[1]
    assert "tokenised between the steps" in out


def test_what_cannot_be_tokenised_later_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"prompt": "one", "chosen": "two", "rejected": "x"}] * 9
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    of_pairs = ("--task", "preference", "--data", str(tmp_path / "pairs.json"), LATER)
    for options, fault in (
        (of_pairs, "--no-tokenize-first: --task preference asks the reference of every pair"),
        (
            ("--data", "a.jsonl", "--stream-data", "--tokenize-first"),
            "--tokenize-first: with --stream-data samples are tokenised as they are read;",
        ),
        (
            ("--data", "a.json", LATER, "--max-length", "4096"),
            "--max-length 4096: a row ",
        ),
    ):
        code, _, err = started(model, tmp_path / "run", *options, capsys=capsys)
        assert (code, err.count("\n")) == (2, 1), err
        assert f"error: {fault}" in err
        assert not (tmp_path / "run").exists()
