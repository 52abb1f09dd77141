"""`evaluate` lets a model answer: in batches, in order, and what is written is what is measured."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run

from qlora_kit.config import BaseModelOptions
from qlora_kit.data.encode import prompt_ids
from qlora_kit.data.samples import BUILT_IN
from qlora_kit.errors import OutOfMemory
from qlora_kit.events import Event, Notice
from qlora_kit.infer import generate as module
from qlora_kit.infer.generate import Sampling, generate, generate_all
from qlora_kit.infer.metrics import METRICS, measure
from qlora_kit.model import load
from qlora_kit.opening.model import open_tokenizer

ALL = ",".join(METRICS)
SHORT = ("--device", "cpu", "--max-new-tokens", "8")
PROMPTS = [
    "Spoken: two dollars\nWritten:",
    "one",
    "Spoken: nine hundred and fifty-three dollars and ten cents, no more and no less\nWritten:",
    "Spoken: the fifth of May\nWritten:",
    "two words",
    "Spoken: six\nWritten:",
    "Spoken: half past ten in the evening\nWritten:",
]


@pytest.fixture(scope="module")
def opened() -> Any:
    """The demo's base and tokenizer."""
    options = BaseModelOptions(model="demo", device="cpu")
    opened = open_tokenizer(options)
    return opened.load(options, lambda event: None), opened.tokenizer


def ids_of(tokenizer: Any) -> list[list[int]]:
    return [prompt_ids(tokenizer, text) for text in PROMPTS]


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_answers_come_in_the_order_of_their_prompts(opened: Any, batch_size: int) -> None:
    base, tokenizer = opened
    prompts, sampling = ids_of(tokenizer), Sampling(max_new_tokens=12)
    alone = [next(iter(generate(base, tokenizer, [ids], sampling))) for ids in prompts]
    assert len(set(alone)) > 4, "the answers tell the prompts apart"
    assert generate_all(base, tokenizer, prompts, sampling, batch_size) == alone


def test_prompts_of_similar_length_share_a_batch(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer = opened
    lengths: list[list[int]] = []

    def empty(base: Any, tokenizer: Any, prompts: Sequence[Any], sampling: Any) -> list[str]:
        lengths.append([len(ids) for ids in prompts])
        return [""] * len(prompts)

    monkeypatch.setattr(module, "_generate_batch", empty)
    prompts = ids_of(tokenizer)
    generate_all(base, tokenizer, prompts, batch_size=2)
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted((len(ids) for ids in prompts), reverse=True)
    assert [len(batch) for batch in lengths] == [2, 2, 2, 1]


def test_the_keys_of_earlier_tokens_are_kept(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tokenizer = opened
    widths: list[int] = []
    model = base.model
    forward = model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    prompts = ids_of(tokenizer)
    generate_all(base, tokenizer, prompts, Sampling(max_new_tokens=5))
    assert widths == [max(map(len, prompts)), 1, 1, 1, 1]


def memory_for(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory run out where more prompts than these are continued together."""
    real = module._generate_batch

    def limited(base: Any, tokenizer: Any, prompts: Sequence[Any], sampling: Any) -> list[str]:
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(base, tokenizer, prompts, sampling)

    monkeypatch.setattr(module, "_generate_batch", limited)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_memory_that_runs_out_halves_the_batch_and_loses_no_answer(
    opened: Any, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    base, tokenizer = opened
    prompts, sampling = ids_of(tokenizer), Sampling(max_new_tokens=12)
    expected = generate_all(base, tokenizer, prompts, sampling)
    memory_for(most, monkeypatch)
    heard: list[Event] = []
    found = generate_all(base, tokenizer, prompts, sampling, announce=heard.append)
    assert found == expected
    told = [event.text for event in heard if isinstance(event, Notice)]
    halves = {1: (4, 2, 1), 2: (4, 2), 3: (4, 2)}[most]
    assert told == [f"out of memory in generation: {n} prompt(s) a batch from here" for n in halves]


def test_a_prompt_that_does_not_fit_alone_is_one_line(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer = opened
    memory_for(0, monkeypatch)
    prompts = ids_of(tokenizer)
    longest = max(map(len, prompts))
    with pytest.raises(OutOfMemory, match=rf"after a prompt of {longest} tokens; expected it to"):
        generate_all(base, tokenizer, prompts)
    assert not base.model.training


# ---------------------------------------------------------------- the command


def evaluated(*given: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code, out, err = run("evaluate", *SHORT, *given, "--json", capsys=capsys)
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_pass_of_generation_serves_all_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    real = module._generate_batch

    def counted(base: Any, tokenizer: Any, prompts: Sequence[Any], sampling: Any) -> list[str]:
        batches.append(len(prompts))
        return real(base, tokenizer, prompts, sampling)

    monkeypatch.setattr(module, "_generate_batch", counted)
    file = tmp_path / "predictions.jsonl"
    given = ("--max-rows", "40", "--metrics", ALL, "--predictions", str(file))
    found = evaluated(*given, capsys=capsys)
    assert batches == [32, 8]
    rows = read(file)
    lines = BUILT_IN["test"].read_text().splitlines()[:40]
    assert [row["place"] for row in rows] == [f"test.jsonl:{n}" for n in range(1, 41)]
    assert [row["references"] for row in rows] == [
        [json.loads(line)["completion"].strip()] for line in lines
    ]
    assert found["predictions"] == str(file)
    answers = [row["answer"] for row in rows]
    assert len(set(answers)) > 20
    # What the file holds gives the figures that were told.
    again = measure(list(METRICS), answers, [row["references"] for row in rows])
    for name, figure in again.items():
        assert found[name] == figure.value
        assert [row[name] for row in rows] == list(figure.by_row)
        assert found.get(f"{name}_signature", "") == figure.signature
    assert set(rows[0]) == {"place", "answer", "references", *again}
    assert found["rows"] == 40
    assert found["loss"] > 0


def test_the_flag_of_old_is_a_metric(capsys: pytest.CaptureFixture[str]) -> None:
    old = evaluated("--max-rows", "9", "--exact-match", capsys=capsys)
    new = evaluated("--max-rows", "9", "--metrics", "exact_match", capsys=capsys)
    both = ("--max-rows", "9", "--exact-match", "--metrics", "chrf,exact_match,chrf")
    assert old == new
    assert list(old)[-1] == "exact_match"
    assert list(evaluated(*both, capsys=capsys))[-3:] == ["exact_match", "chrf", "chrf_signature"]
    assert "exact_match" not in evaluated("--max-rows", "9", capsys=capsys)


def test_figures_are_told_to_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.jsonl"
    given = ("--max-rows", "9", "--metrics", ALL, "--predictions", str(file))
    code, out, err = run("evaluate", *SHORT, *given, capsys=capsys)
    assert code == 0, err
    shown = [line.split("  ")[0] for line in out.splitlines()]
    for words in ("exact match", "SQuAD exact match", "SQuAD F1", "BLEU", "chrF", "final number"):
        assert shown.count(words) == 1
    assert "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in out
    assert "0 of 9 (0.0%)" in out
    assert str(file) in out.replace("\n", "")
    assert read(file)[0]["references"][0] not in out, "text of the data is in the file only"


def test_answers_without_a_metric_are_written_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.jsonl"
    found = evaluated("--max-rows", "3", "--predictions", str(file), capsys=capsys)
    assert [set(row) for row in read(file)] == [{"place", "answer", "references"}] * 3
    assert found["predictions"] == str(file)


def test_a_batch_size_that_is_asked_for_is_that_of_generation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_for(4, monkeypatch)
    asked = ("--max-rows", "9", "--metrics", "chrf", "--batch-size", "4")
    code, out, err = run("evaluate", *SHORT, *asked, "--json", capsys=capsys)
    assert code == 0
    assert "out of memory" not in err
    code, halved, err = run("evaluate", *SHORT, *asked[:-2], "--json", capsys=capsys)
    assert "out of memory in generation: 3 prompt(s) a batch from here" in err
    assert json.loads(halved)["chrf"] == json.loads(out)["chrf"]


def test_secrets_are_left_out_of_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_" + "Abcdefghij" * 4
    data, file = tmp_path / "a.jsonl", tmp_path / "p.jsonl"
    data.write_text(json.dumps({"prompt": "key:", "completion": f"my {secret}"}) + "\n")
    evaluated("--data", str(data), "--predictions", str(file), capsys=capsys)
    assert secret not in file.read_text()
    assert read(file)[0]["references"][0].startswith("my ")


def test_several_right_answers_are_all_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file = tmp_path / "a.jsonl", tmp_path / "p.jsonl"
    data.write_text(json.dumps({"question": "one dollar", "answer": ["$1.00"]}) + "\n")
    evaluated("--data", str(data), "--predictions", str(file), capsys=capsys)
    given = read(file)[0]["answer"]
    assert given not in ("", "$1.00")
    data.write_text(json.dumps({"question": "one dollar", "answer": ["$1.00", given, "1"]}) + "\n")
    found = evaluated("--data", str(data), "--metrics", "exact_match,squad", capsys=capsys)
    assert (found["exact_match"], found["squad_exact_match"]) == (1, 1)
    alone = evaluated("--data", str(data), "--metrics", "exact_match", capsys=capsys)
    assert alone["exact_match"] == 1


# ---------------------------------------------------------------- what is written, whole or not


def test_a_full_disk_leaves_the_file_that_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("kept\n")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    given = ("--max-rows", "2", "--predictions", str(file), "--overwrite")
    code, out, err = run("evaluate", *SHORT, *given, capsys=capsys)
    assert code == 3
    assert "no space left" in err
    assert "perplexity" in out, "the figures were told before"
    assert file.read_text() == "kept\n"
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_an_older_file_is_replaced_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("older\n")
    given = ("--max-rows", "2", "--predictions", str(file))
    code, _, err = run("evaluate", *SHORT, *given, capsys=capsys)
    assert code == 2
    assert f"--predictions: {file} exists; expected a new file; pass --overwrite to" in err
    evaluated(*given, "--overwrite", capsys=capsys)
    assert len(read(file)) == 2


# ---------------------------------------------------------------- bad input

TEXT = {"text": "Once upon a time."}
QA = {"question": "one dollar", "answer": "a dollar"}


@pytest.mark.parametrize(
    ("record", "given", "expected"),
    [
        (QA, "--metrics blue", r"--metrics: found blue; expected 'exact_match', 'squad', 'bleu', "
         r"'chrf' or 'final_number'$"),
        (QA, "--metrics bleu,rouge", "--metrics: found rouge; expected 'exact_match', "),
        (QA, "--metrics BLEU", "--metrics: found BLEU; expected"),
        (TEXT, "--metrics bleu", r"a.jsonl: plain text, which asks nothing; expected questions "
         r"with answers; leave out --metrics$"),
        (TEXT, "--exact-match", "plain text, which asks nothing; .* leave out --exact-match$"),
        (TEXT, "--predictions p.jsonl", "plain text, which .*; leave out --predictions$"),
        (QA, "--metrics final_number", r"a.jsonl:1: the answer has no number; expected one for "
         r"final_number; leave out that metric, or the record$"),
        (QA, "--metrics squad --max-new-tokens 5000", r"--max-new-tokens: found 5000 after a "
         r"question of \d+ tokens \(a.jsonl:1\), and the model has 512 positions; expected \d+ or "
         r"less; pass --max-new-tokens \d+$"),
        (QA, "--metrics bleu --max-new-tokens 0", "--max-new-tokens: found 0; expected greater"),
        (QA, "--predictions p.txt", r"--predictions: found p.txt; expected a file name that ends "
         r"in .jsonl; correct it$"),
        (QA, "--predictions none/p.jsonl", "--predictions: no folder none; expected one; make it$"),
        (QA, "--predictions folder.jsonl", "--predictions: found folder.jsonl; expected a file"),
        (QA, "--predictions a.jsonl --overwrite", r"--predictions: a.jsonl is of the data that is "
         r"measured; expected a new file; name another$"),
        (QA, "--predictions linked.jsonl --overwrite", "linked.jsonl is of the data that is"),
        ({**QA, "answer": []}, "--metrics squad", r'a.jsonl:1: "answer" is an empty list; '
         r"expected one text or more; fill it in or remove the record$"),
        ({**QA, "answer": ["a", " "]}, "--metrics squad", 'jsonl:1: text 2: "answer" is empty; '),
        ({**QA, "answer": ["a", 7]}, "--metrics squad", 'jsonl:1: text 2: "answer" is a number; '),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_a_weight_is_read(
    record: dict[str, Any],
    given: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "load_base", lambda *_: pytest.fail("weights were read"))
    Path("a.jsonl").write_text(json.dumps(record) + "\n")
    Path("folder.jsonl").mkdir()
    Path("linked.jsonl").symlink_to("a.jsonl")
    code, out, err = run("evaluate", "--data", "a.jsonl", *given.split(), capsys=capsys)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(expected, line), line
    assert "evaluation" not in out
    assert not Path("p.jsonl").exists()


def test_aligned_data_is_not_overwritten_by_its_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, answered = tmp_path / "a.en", tmp_path / "b.jsonl"
    asked.write_text("one\n")
    answered.write_text("eins\n")
    given = ("--data", f"{asked}+{answered}", "--predictions", str(answered), "--overwrite")
    code, _, err = run("evaluate", *given, capsys=capsys)
    assert code == 2
    assert "is of the data that is measured" in err
    assert answered.read_text() == "eins\n"


def test_no_file_in_a_folder_of_data_is_overwritten_by_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(QA) + "\n")
    given = ("--data", str(tmp_path), "--predictions", str(file), "--overwrite")
    code, _, err = run("evaluate", *given, capsys=capsys)
    assert code == 2
    assert f"{file} is of the data that is measured" in err


@pytest.mark.parametrize("data", ["x" * 300, "none+none", "+", "owner/" + "n" * 300])
def test_data_that_is_not_there_is_told_as_ever(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("older\n")
    alone = run("evaluate", "--data", data, capsys=capsys)
    given = ("--data", data, "--predictions", str(file), "--overwrite")
    assert run("evaluate", *given, capsys=capsys) == alone
    assert alone[0] in (2, 3)


def test_a_question_without_room_for_an_answer_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "a.jsonl"
    rows = [{"prompt": "one", "completion": "1"}, {"prompt": "one two " * 400, "completion": "12"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--data", str(data), "--metrics", "squad", "--max-length", "64")
    code, _, err = run("evaluate", *given, capsys=capsys)
    assert code == 2
    assert re.search(
        r"a.jsonl:2: the question has \d{3,} tokens and the model only 512 positions; expected "
        r"room for an answer; leave the record out$",
        err.strip(),
    )


def test_an_answer_that_only_calls_a_tool_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "write", "arguments": {"sum": 1}}]}
    data, template = tmp_path / "a.jsonl", tmp_path / "calls.jinja"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "one"}, call]}) + "\n")
    template.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    given = ("--data", str(data), "--chat-template", str(template), "--metrics", "bleu")
    code, _, err = run("evaluate", *given, capsys=capsys)
    assert code == 2
    assert err.strip().endswith(
        "a.jsonl:1: the answer has no text, only calls of a tool; expected a text to compare with; "
        "leave out --metrics, or the record"
    )


def test_all_answers_that_cannot_be_measured_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "a.jsonl"
    answers = ["no", "7", "none", ["no", "8"]]
    lines = [json.dumps({"question": "how many?", "answer": answer}) for answer in answers]
    data.write_text("".join(f"{line}\n" for line in lines))
    given = ("--data", str(data), "--metrics", "final_number")
    code, _, err = run("evaluate", *given, capsys=capsys)
    assert code == 2
    faults = [line for line in err.splitlines() if "the answer has no number" in line]
    assert [line.split(": ")[1].rpartition(":")[2] for line in faults] == ["1", "3"]


# ---------------------------------------------------------------- line-aligned files, end to end

SPOKEN = ["one dollar", "two dollars", "three dollars", "four dollars"]
WRITTEN = ["$1.00", "$2.00", "$3.00", "$4.00"]


def aligned(folder: Path, compressed: bool) -> str:
    names = []
    for suffix, lines in (("spoken", SPOKEN), ("written", WRITTEN)):
        content = "".join(f"{line}\n" for line in lines).encode()
        name = f"train.{suffix}.gz" if compressed else f"train.{suffix}"
        (folder / name).write_bytes(gzip.compress(content) if compressed else content)
        names.append(str(folder / name))
    return "+".join(names)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with a chat template of its own."""
    folder = tmp_path_factory.mktemp("model") / "chat"
    shutil.copytree(Path(module.__file__).parent.parent / "demo" / "model", folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return folder


@pytest.mark.parametrize(("kind", "compressed"), [("base", True), ("chat", False)])
def test_translation_is_learnt_from_aligned_files_and_measured(
    kind: str,
    compressed: bool,
    chat_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(chat_model) if kind == "chat" else "demo"
    data, output = aligned(tmp_path, compressed), tmp_path / "run"
    trained = ("train", "--model", model, "--data", data, "--output", str(output), "--device",
               "cpu", "--max-steps", "60", "--learning-rate", "5e-3", "--batch-size", "4",
               "--gradient-accumulation-steps", "1", "--targets", "all-linear", "--samples", "0",
               "--no-rehearse")  # fmt: skip
    code, _, err = run(*trained, capsys=capsys)
    assert code == 0, err
    template = (output / "chat_template.jinja").read_text()
    assert ("[assistant]" in template) == (kind == "chat")
    file = tmp_path / "p.jsonl"
    given = ("--data", data, "--metrics", "exact_match,bleu,chrf", "--predictions", str(file))
    found = evaluated("--adapter", str(output), *given, capsys=capsys)
    assert [row["answer"] for row in read(file)] == WRITTEN
    assert (found["exact_match"], found["chrf"]) == (1, pytest.approx(100))
    first = data.partition("+")[0]
    assert [row["place"] for row in read(file)] == [f"{first}:{n}" for n in range(1, 5)]
