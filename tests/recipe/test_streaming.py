"""Data larger than memory end to end, as a user runs it: train, resume, count, check, faults."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from support import as_if_killed_at, run, slow
from t5_models import save_t5, t5_tokenizer
from tiny_models import SIZES, save_model
from transformers import AutoConfig, AutoModel, AutoTokenizer

from qlora_kit.data import streamed_samples
from qlora_kit.data.samples import BUILT_IN
from qlora_kit.model.names import find_model
from qlora_kit.recipe import counting, streaming

pytestmark = pytest.mark.usefixtures("simulated_once")

STREAM = ("--stream-data", "--shuffle-buffer", "16", "--data-workers", "0")
PLAIN = ("--device", "cpu", "--bits", "16", "--samples", "0", "--no-rehearse")
STEPS = (
    "--batch-size", "1", "--gradient-accumulation-steps", "4", "--max-length", "64",
    "--learning-rate", "0.01",
)  # fmt: skip
ROWS = 30
"""rows of the file: with windows of four, seven steps and a shorter one are a pass"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with the tokenizer of the demo."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(find_model("demo").folder)
    save_model(folder, {"model_type": "llama", **SIZES, "vocab_size": len(tokenizer)})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = BUILT_IN["train"].read_text(encoding="utf-8").splitlines(keepends=True)
    file = tmp_path_factory.mktemp("data") / "big.jsonl"
    file.write_text("".join(lines[:ROWS]), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def _short_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ten records be looked at before training, so that the file is longer."""
    monkeypatch.setattr(streamed_samples, "HEAD_RECORDS", 10)


def train(
    model: Path,
    data: Path | str,
    output: Path,
    *more: str,
    capsys: pytest.CaptureFixture[str],
) -> tuple[int, str, str]:
    return started(model, data, output, *STREAM, *more, capsys=capsys)


def started(
    model: Path, data: Path | str, output: Path, *more: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Train with these options; return the exit code, the output in one line, and the errors."""
    where = ("--model", str(model), "--data", str(data), "--output", str(output))
    code, out, err = run("train", *where, *PLAIN, *STEPS, *more, capsys=capsys)
    return code, " ".join(out.split()), err


def log_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]


def weights(output: Path) -> bytes:
    return (output / "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------- a run


def test_a_streamed_run_says_how_it_reads(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    more = ("--max-steps", "9", "--samples", "2", "--data-workers", "1", "--rehearse")
    code, out, err = train(model, data, output, *more, capsys=capsys)
    assert (code, err) == (0, "")
    for words in (
        f"note: {data}, the first 10 records: 10 pair records (prompt, completion)",
        "note: no sample is held out: with --stream-data and --max-steps they are not counted;",
        "note: data: what is looked at before training, 10 pair rows;",
        f"data {data}, streamed, rows not counted",
        "stream drawn from 16 samples, tokenised by 1 process beside the training",
        "rehearsed a step on the longest rows, 1 × 64 tokens: ",
        "training: 9 optimiser steps step 1/9",
        "streamed 34 pair rows;",
    ):
        assert words in out, words
    assert [row["epoch"] for row in log_of(output)] == [0.0] * 8 + [1.0]
    assert "the first 10 records" in (output / "data.html").read_text()
    assert len(json.loads((output / "samples.json").read_text())["samples"]) == 2
    rehearsal = json.loads((output / "memory.json").read_text())["rehearsal"]
    assert rehearsal["tokens"] == 64
    assert abs(rehearsal["difference"]) < 0.1


def test_a_packed_stream_has_room_for_rows_of_max_length(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The header, `check` and the page say the same, whatever the first rows are."""
    _, out, _ = train(model, data, tmp_path / "run", "--max-steps", "1", "--packing", capsys=capsys)
    filled = re.search(r"packing (.*? of at most 64 tokens, \S+ full)", out)
    assert filled
    assert filled[1] in (tmp_path / "run" / "data.html").read_text()
    where = ("--model", str(model), "--data", str(data))
    _, out, _ = run("check", *where, *PLAIN, *STREAM, *STEPS, "--packing", capsys=capsys)
    assert filled[1] in " ".join(out.split())


# ---------------------------------------------------------------- counting


def test_without_a_number_of_steps_the_samples_are_counted_once(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    code, out, _ = train(model, data, tmp_path / "one", capsys=capsys)
    assert code == 0
    assert f"note: {data}: reading all samples to count them" in out
    assert f"note: data: {ROWS} pair rows data: " not in out
    assert f"note: data: {ROWS} pair rows " in out
    assert f"data {data}, streamed, {ROWS} rows" in out
    assert "training: 8 optimiser steps, 1.00 epochs" in out
    assert log_of(tmp_path / "one")[3]["epoch"] == 0.5
    code, out, _ = train(model, data, tmp_path / "two", "--epochs", "0.5", capsys=capsys)
    assert code == 0
    assert "reading all samples" not in out
    assert f"note: data: {ROWS} pair rows; counted before" in out
    assert "training: 4 optimiser steps, 0.50 epochs" in out


def check(model: Path, data: Path, *more: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what `check` says of a stream."""
    where = ("--model", str(model), "--data", str(data))
    code, out, err = run("check", *where, *PLAIN, *STREAM, *STEPS, *more, capsys=capsys)
    assert code == 0, err
    return " ".join(out.split())


def test_where_length_decides_the_rows_are_counted_by_tokenising(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for how, said in (
        ("split", "12 split into 24 chunks; "),
        ("drop", "lost: 12 rows, "),
        ("truncate", " "),
    ):
        more = ("--long-samples", how, "--max-length", "40")
        out = check(model, data, *more, capsys=capsys)
        assert ("as length decides how many rows a sample has" in out) == (how != "truncate")
        (line,) = re.findall(rf"note: data: ({ROWS} pair rows.*?)(?=note:|data:)", out)
        assert said in line


def test_a_pass_that_is_shorter_than_counted_is_followed_by_the_next(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a prompt that fills a row nothing is learnt, which only its tokens tell."""
    asked = [{"prompt": "one " * (40 if n in (3, 7) else 2), "completion": "$1"} for n in range(12)]
    file = tmp_path / "big.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in asked))
    more = ("--max-length", "24", "--epochs", "2", "--gradient-accumulation-steps", "2")
    code, out, _ = train(model, file, tmp_path / "run", *more, capsys=capsys)
    assert code == 0
    assert "streamed, 12 rows" in out
    assert "training: 12 optimiser steps, 2.00 epochs" in out
    # A pass has ten rows and so five steps, and the twelve steps go on into the third pass.
    epochs = [row["epoch"] for row in log_of(tmp_path / "run")]
    assert epochs == pytest.approx(
        [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 7 / 6, 8 / 6, 9 / 6, 10 / 6, 11 / 6, 13 / 6, 14 / 6]
    )


# ---------------------------------------------------------------- what is held out


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many rows that some are held out."""
    lines = BUILT_IN["train"].read_text(encoding="utf-8").splitlines(keepends=True)
    file = tmp_path_factory.mktemp("longer") / "big.jsonl"
    file.write_text("".join(lines[:240]), encoding="utf-8")
    return file


def identity_of(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())["identity"]
    return found


def test_the_rows_that_are_held_out_are_those_of_a_run_that_reads_all_first(
    model: Path, longer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also after a resume, which has the bits of the unbroken run."""
    more = ("--epochs", "0.05", "--save-steps", "1")
    code, out, _ = train(model, longer, tmp_path / "streamed", *more, capsys=capsys)
    assert code == 0
    assert "note: validation: 12 rows held out of the data" in out
    assert f"data {longer}, streamed, 228 rows" in out
    assert "validation 12 rows" in out
    assert "training: 3 optimiser steps, 0.05 epochs" in out
    assert "12 rows" in (tmp_path / "streamed" / "data.html").read_text()
    code, out, _ = train(
        model, longer, tmp_path / "whole", *more, "--no-stream-data", capsys=capsys
    )
    assert code == 0
    assert "note: validation: 12 rows held out of the data" in out
    streamed, whole = (
        identity_of(tmp_path / name / "checkpoint-3") for name in ("streamed", "whole")
    )
    assert streamed["validation"] == whole["validation"]
    assert (streamed["stream_data"], whole["stream_data"]) == (True, False)
    before, logged = weights(tmp_path / "streamed"), log_of(tmp_path / "streamed")
    as_if_killed_at(tmp_path / "streamed", 1)
    code, _, err = train(model, longer, tmp_path / "streamed", *more, "--resume", capsys=capsys)
    assert code == 0, err
    assert weights(tmp_path / "streamed") == before
    losses = [
        [row.get("eval_loss") for row in rows] for rows in (logged, log_of(tmp_path / "streamed"))
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] is not None
    code, _, err = train(
        model, longer, tmp_path / "streamed", *more, "--resume", "--validation-fraction", "0",
        capsys=capsys,
    )  # fmt: skip
    assert (code, err.count("\n")) == (2, 1), err
    assert "error: --resume: validation_fraction was 0.05 and is now 0.0" in err


def test_with_a_number_of_steps_a_share_is_held_out_only_if_it_is_asked_for(
    model: Path, longer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = check(model, longer, "--max-steps", "1", capsys=capsys)
    assert "note: no sample is held out: with --stream-data and --max-steps" in out
    assert "validation none" in out
    more = ("--max-steps", "1", "--validation-fraction", "0.05")
    out = check(model, longer, *more, capsys=capsys)
    assert "note: validation: 12 rows held out of the data" in out
    assert "validation 12 rows" in out
    assert "also trained on" not in out


def test_only_so_many_samples_are_held_out_by_default(
    model: Path, longer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(counting, "MOST_HELD_OUT", 5)
    out = check(model, longer, capsys=capsys)
    assert "note: validation: 5 rows held out of the data" in out
    out = check(model, longer, "--validation-fraction", "0.1", capsys=capsys)
    assert "note: validation: 24 rows held out of the data" in out


# ---------------------------------------------------------------- by default


def by_default(
    model: Path, data: Path | str, output: Path, *more: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    order = ("--data-workers", "0", "--shuffle-buffer", "4")
    return started(model, data, output, *order, *more, capsys=capsys)


def test_large_data_are_streamed_by_default(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ("--max-steps", "2", "--save-steps", "1")
    code, out, _ = by_default(model, data, tmp_path / "small", *more, capsys=capsys)
    assert code == 0
    assert "stream drawn" not in out
    monkeypatch.setattr(streaming, "LARGE_BYTES", data.stat().st_size)
    code, out, _ = by_default(model, data, tmp_path / "large", *more, capsys=capsys)
    assert code == 0
    assert (
        "stream drawn from 4 samples, tokenised between the steps; by default, as there are 0 MB "
        "of text; --no-stream-data reads and checks all of it first" in out
    )
    assert f"data {data}, streamed, {ROWS} rows" in out
    off = (*more, "--no-stream-data")
    code, out, _ = by_default(model, data, tmp_path / "off", *off, capsys=capsys)
    assert (code, "stream drawn" in out) == (0, False)
    assert weights(tmp_path / "off") == weights(tmp_path / "small")
    # A run keeps what it had, wherever the border lies when it goes on.
    code, out, _ = by_default(
        model, data, tmp_path / "small", "--max-steps", "3", "--resume", capsys=capsys
    )
    assert (code, "stream drawn" in out) == (0, False)
    monkeypatch.setattr(streaming, "LARGE_BYTES", 10**9)
    code, out, _ = by_default(
        model, data, tmp_path / "large", "--max-steps", "3", "--resume", capsys=capsys
    )
    assert code == 0
    assert "stream drawn from 4 samples, tokenised between the steps" in out


def test_a_run_from_before_goes_on_without_a_stream(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, _ = started(model, data, tmp_path / "run", "--max-steps", "1", capsys=capsys)
    assert code == 0
    stored = tmp_path / "run" / "training_config.yaml"
    older = re.sub("(stream_data|shuffle_buffer): .*\n", "", stored.read_text())
    assert "stream" not in older
    stored.write_text(older)
    monkeypatch.setattr(streaming, "LARGE_BYTES", 1)
    where = ("--output", str(tmp_path / "run"), "--resume", "--max-steps", "2")
    code, out, _ = run("train", *where, capsys=capsys)
    assert (code, "stream drawn" in out) == (0, False)


def test_the_first_step_does_not_wait_for_the_last_row(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What only tokenising finds in the last record ends the run after steps, not before them."""
    chats = [
        [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "$1"}]
        for n in range(99)
    ]
    records = [
        {"messages": chat} for chat in [*chats, [{"role": "system", "content": "S"}, *chats[0]]]
    ]
    file = tmp_path / "big.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    more = ("--chat-template", str(_template_without_system(tmp_path)))
    code, _, err = by_default(
        model, file, tmp_path / "whole", "--no-stream-data", *more, capsys=capsys
    )
    assert (code, err.count("\n")) == (2, 1)
    fault = f"{file}:100: the chat template leaves out"
    assert fault in err
    assert not (tmp_path / "whole").exists()
    monkeypatch.setattr(streaming, "LARGE_BYTES", 1)
    code, _, err = by_default(model, file, tmp_path / "streamed", *more, capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert fault in err
    assert [row["optimizer_step"] for row in log_of(tmp_path / "streamed")][:1] == [1]


def _template_without_system(folder: Path) -> Path:
    file = folder / "plain.jinja"
    file.write_text(
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return file


_TEXTS = [{"text": f"the girl {n} " * (1 + n % 5)} for n in range(30)]


@pytest.mark.parametrize(
    ("records", "options", "streams"),
    [
        (_TEXTS, (), False),
        (None, ("--max-length", "4096"), False),
        *slow(
            (_TEXTS, ("--max-steps", "1", "--validation-fraction", "0"), True),
            (None, ("--long-samples", "drop"), False),
            (None, ("--long-samples", "error"), True),
            (None, ("--data", str(BUILT_IN["test"])), True),
        ),
    ],
)
def test_what_a_stream_does_worse_is_not_streamed_by_default(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    records: list[Any] | None,
    options: Sequence[str],
    streams: bool,
) -> None:
    monkeypatch.setattr(streaming, "LARGE_BYTES", 1)
    file = tmp_path / "texts.jsonl"
    if records is not None:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = data if records is None else file
    more = ("--epochs", "0.1", *options)
    code, out, err = by_default(model, source, tmp_path / "run", *more, capsys=capsys)
    assert code == 0, err
    assert ("; by default, as there are 0 MB of text" in out) == streams


def test_check_looks_at_all_of_large_data(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streaming, "LARGE_BYTES", 1)
    code, out, _ = run("check", "--data", str(data), *STEPS, capsys=capsys)
    assert code == 0
    assert f"training    {ROWS} pair rows\n" in out


# ---------------------------------------------------------------- faults that a count finds


def test_counting_finds_every_fault_before_training(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = _with_fault(data, tmp_path)
    code, out, err = train(model, file, tmp_path / "run", capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f'error: {file}:71: no "completion"; expected it as in the pair record')
    assert "step 1" not in out
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- faults on the way


def _with_fault(data: Path, folder: Path) -> Path:
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True) * 3
    lines[70] = '{"prompt": "SECRET"}\n'
    file = folder / "faulty.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def test_a_fault_on_the_way_saves_what_was_trained_and_can_be_skipped(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = _with_fault(data, tmp_path)
    steps = ("--max-steps", "24", "--shuffle-buffer", "4")
    code, out, err = train(model, file, tmp_path / "run", *steps, capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f'error: {file}:71: no "completion"')
    assert "SECRET" not in out + err
    assert (tmp_path / "run" / "last").is_file()
    assert f"go on with: qlora-kit train --output {tmp_path / 'run'} --resume" in out
    skip = (*steps, "--skip-bad-lines")
    code, out, _ = train(model, file, tmp_path / "run", *skip, "--resume", capsys=capsys)
    assert code == 0
    assert "skipped 1 for a fault; the first: " in out


def test_a_file_that_changed_is_refused_at_resume(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "big.jsonl", tmp_path / "run"
    shutil.copy(data, file)
    assert train(model, file, output, "--max-steps", "2", capsys=capsys)[0] == 0
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join([*lines[1:], lines[0]]), encoding="utf-8")
    more = ("--max-steps", "4", "--resume")
    code, _, err = train(model, file, output, *more, capsys=capsys)
    assert (code, err) == (
        2,
        "error: --resume: the training data changed; restore what the run had, or pass "
        "--allow-change data to go on with other bits\n",
    )
    code, out, _ = train(model, file, output, *more, "--allow-change", "data", capsys=capsys)
    assert code == 0
    assert "resuming with a change: the training data changed" in out
    assert len(log_of(output)) == 4


def test_what_cannot_go_with_a_stream_is_one_line(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text('{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n')
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for source, more, said in (
        (empty, (), f"{empty}: no records; expected at least one"),
        (tmp_path / "none.jsonl", (), "none.jsonl: no such file"),
        (data, ("--max-length", "4096"), "--max-length 4096: a row of a stream may have as many"),
        (data, ("--shuffle-buffer", "0"), "--shuffle-buffer: found 0; expected"),
        (data, ("--data-workers", "-1"), "--data-workers: found -1; expected"),
        (data, ("--data-weights", "1"), "--data-weights: found 1, and 1 source of data; expected"),
        (data, ("--data", str(data)), f"--data: {data} stands twice; expected each source once"),
        (labelled, ("--task", "classify"), "--stream-data: --task classify without --labels;"),
        (labelled, ("--task", "tag"), "--stream-data: --task tag without --labels; expected the"),
        (
            labelled,
            ("--task", "classify", "--labels", "b,d", "--class-weights", "balanced"),
            "--class-weights balanced: a stream does not know how frequent labels are;",
        ),
        ("owner/name", (), "owner/name: no such file, and not loadable from the hub"),
    ):
        output = tmp_path / "run"
        code, _, err = train(model, source, output, *more, capsys=capsys)
        assert code == (3 if source == "owner/name" else 2), err
        assert err.count("\n") == 1
        assert said in err
        assert not output.exists()
    code, _, err = run("train", *STREAM, "--output", str(tmp_path / "run"), capsys=capsys)
    assert code == 2
    assert err.startswith("error: --stream-data: no --data; expected data that is larger than")


def test_a_hub_set_needs_a_number_of_steps(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import datasets

    real = datasets.load_dataset_builder
    folder = tmp_path / "set"
    folder.mkdir()
    shutil.copy(data, folder / "train.jsonl")
    shutil.copy(data, folder / "validation.jsonl")
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *asked: real(str(folder), cache_dir=str(tmp_path))
    )
    code, _, err = train(model, "owner/name", tmp_path / "run", capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "to count its rows would be to fetch all of it; expected a number of steps; pass" in err
    share = ("--max-steps", "4", "--validation-fraction", "0.2")
    code, _, err = train(model, "owner/name", tmp_path / "run", *share, capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "--validation-fraction 0.2: owner/name is a data set of the hub, and a share of" in err
    steps = ("--max-steps", "4", "--save-steps", "1")
    code, out, _ = train(model, "owner/name", tmp_path / "run", *steps, capsys=capsys)
    assert code == 0
    assert f"validation {ROWS} rows" in out
    before = weights(tmp_path / "run")
    as_if_killed_at(tmp_path / "run", 2)
    code, _, _ = train(model, "owner/name", tmp_path / "run", *steps, "--resume", capsys=capsys)
    assert code == 0
    assert weights(tmp_path / "run") == before


def test_options_of_streams_say_when_they_have_no_effect(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run("check", "--data", str(data), *STREAM, "--no-stream-data", capsys=capsys)
    assert code == 0
    for flag in ("--shuffle-buffer", "--data-workers"):
        assert f"note: {flag} has no effect without --stream-data" in " ".join(out.split())


# ---------------------------------------------------------------- other commands and tasks


def test_check_looks_at_the_first_records(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("check", "--data", str(data), *STREAM, *STEPS, capsys=capsys)
    assert code == 0
    assert f"data: {data}, the first 10 records\n" in out
    assert "training    10 pair rows\n" in out


def test_plan_takes_a_stream(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--model", str(model), "--data", str(data), "--max-steps", "50", *PLAIN, *STEPS)
    code, out, _ = run("plan", *more, *STREAM, "--json", capsys=capsys)
    assert code == 0
    assert json.loads(out)["predicted_peak_bytes"] > 0


def _tiny(kind: str, folder: Path) -> Path:
    if kind == "t5":
        tokenizer = t5_tokenizer("a b c d e f")
        save_t5(folder, "t5-v1.1", vocab_size=len(tokenizer) + 4)
    else:
        tokenizer = make_tokenizer()
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
        )  # fmt: skip
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_CLASSIFIED = [{"text": f"{'good' if n % 2 else 'bad'} {n}", "label": n % 2} for n in range(30)]
_SCORED = [{"text": f"the girl {n}", "label": n / 7} for n in range(30)]
_TAGGED = [{"tokens": ["the", "girl", str(n)], "tags": ["O", "B-X", "O"]} for n in range(30)]
_PAIRS = [{"prompt": "a b c " * (1 + n % 3), "completion": "c b"} for n in range(30)]


@pytest.mark.parametrize(
    ("kind", "records", "options"),
    [
        ("bert", _TAGGED, ("--task", "tag", "--labels", "O,B-X,I-X")),
        *slow(
            ("bert", _CLASSIFIED, ("--task", "classify", "--labels", "no,yes")),
            ("llama", _SCORED, ("--task", "classify", "--label-kind", "regression")),
            ("t5", _PAIRS, ("--task", "seq2seq")),
        ),
    ],
)
def test_every_task_streams(
    tmp_path: Path,
    kind: str,
    records: Sequence[Any],
    options: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "big.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    more = ("--targets", "all-linear", "--batch-size", "2", "--max-steps", "2", "--rehearse")
    own = _tiny(kind, tmp_path / "model")
    code, out, err = train(own, file, tmp_path / "run", *more, *options, capsys=capsys)
    assert code == 0, err
    assert "rehearsed a step on the longest rows, 2 × " in out
    assert "streamed 16 " in out


def test_a_label_that_is_not_known_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = _tiny("bert", tmp_path / "model")
    capsys.readouterr()  # what is told of the model's files
    file = tmp_path / "big.jsonl"
    records = [*_CLASSIFIED, {"text": "neither", "label": "unsure"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ("--task", "classify", "--labels", "no,yes", "--shuffle-buffer", "1")
    code, _, err = train(own, file, tmp_path / "run", *options, "--max-steps", "10", capsys=capsys)
    assert (code, err.count("\n")) == (2, 1), err
    assert f"{file}:31: the label unsure that is none of the 2 known ones" in err
