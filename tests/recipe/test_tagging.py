"""Token classification end to end, as a user runs it: train, resume, evaluate, generate, export."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from safetensors.torch import load_file
from support import as_if_killed_at, run
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification

import qlora_kit as qk
from qlora_kit.model.class_head import ClassHead
from qlora_kit.recipe.tagging import WordReader

PEOPLE, PLACES = ("ann", "bob ray", "eve"), ("rome", "new york", "oslo")
STEPS = (
    "--task", "tag", "--batch-size", "8", "--gradient-accumulation-steps", "1",
    "--learning-rate", "0.01", "--max-length", "64", "--targets", "all-linear",
)  # fmt: skip


@pytest.fixture(scope="module", params=["bert", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random encoder or decoder with a tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    numbers = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.1,
    }  # fmt: skip
    config = AutoConfig.for_model(request.param, **numbers)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(file: Path, seed: int, sentences: int) -> Path:
    draw, lines = random.Random(seed), []
    for _ in range(sentences):
        for text, kind in ((draw.choice(PEOPLE), "PER"), ("saw", ""), (draw.choice(PLACES), "LOC")):
            for number, word in enumerate(text.split()):
                tag = f"{'I' if number else 'B'}-{kind}" if kind else "O"
                lines.append(f"{word} {tag}")
        lines.append("")
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    return written(folder / "train.conll", 0, 40), written(folder / "test.conll", 1, 12)


def trained(
    model: Path,
    data: tuple[Path, Path],
    output: Path,
    capsys: pytest.CaptureFixture[str],
    *more: str,
) -> Path:
    code, out, err = run(
        "train", "--model", str(model), "--data", str(data[0]), "--validation", str(data[1]),
        "--output", str(output), *STEPS, *more, capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert "note: tags: scheme BIO, entities of 2 types" in out
    return output


def in_json(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code, out, err = run(*arguments, "--json", capsys=capsys)
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_program_opens_a_tagger(model: Path, data: tuple[Path, Path]) -> None:
    asked = qk.TrainConfig(
        model=str(model), data=str(data[0]), task="tag", device="cpu", targets=("all-linear",),
        max_length=64,
    )  # fmt: skip
    opened = qk.open_classifier(asked)
    assert opened.task.name == "tag"
    assert opened.lora.task_type == "TOKEN_CLS"
    found = qk.evaluate(
        opened.base, opened.data.rows, task=opened.task,
        pad_token_id=opened.tokenizer.pad_token_id,
    )  # fmt: skip
    assert set(found.details) == {"per_class"}


def test_files_of_two_tasks_are_refused(
    model: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = trained(model, data, tmp_path / "run", capsys, "--max-steps", "1")
    file = own / "adapter_config.json"
    for task, said in (("SEQ_CLS", "SEQ_CLS"), ("CAUSAL_LM", "CAUSAL_LM"), (None, "None")):
        file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": task}))
        code, _, err = run("evaluate", "--adapter", str(own), "--data", str(data[1]), capsys=capsys)
        assert code == 2
        assert (
            f"qlora_kit.json has tags of words, and adapter_config.json says task_type {said};"
            in err
        )


def test_from_columns_to_a_merged_model(
    model: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = trained(model, data, tmp_path / "run", capsys, "--max-steps", "40", "--best-metric", "f1")
    record = json.loads((own / "qlora_kit.json").read_text())
    assert record["labels"] == ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
    assert record["label_kind"] == "tags"
    peft = json.loads((own / "adapter_config.json").read_text())
    assert peft["task_type"] == "TOKEN_CLS"
    memory = json.loads((own / "memory.json").read_text())["rehearsal"]
    assert abs(memory["difference"]) < 0.02
    page = (own / "report.html").read_text(encoding="utf-8")
    assert "<th>entities</th>" in page.replace('<th scope="col">', "<th>")
    tables = json.loads((own / "labels.json").read_text())
    assert [row["label"] for row in tables["per_class"]] == ["LOC", "PER"]
    card = (own / "README.md").read_text(encoding="utf-8")
    assert "AutoPeftModelForTokenClassification" in card
    assert "token-classification" in card

    found = in_json("evaluate", "--adapter", str(own), "--data", str(data[1]), capsys=capsys)
    assert found["f1"] == found["macro_f1"] == found["token_accuracy"] == 1.0, "it learnt"
    assert [row["entities"] for row in found["per_class"]] == [12, 12]
    assert found["rows"] == 12

    text = "bob ray saw new york"
    answer = in_json("generate", "--adapter", str(own), "--prompt", text, capsys=capsys)
    spans = [(each["type"], text[each["start"] : each["end"]]) for each in answer["entities"]]
    assert spans == [("PER", "bob ray"), ("LOC", "new york")]
    assert all(0.5 < each["probability"] <= 1 for each in answer["entities"])
    code, _, err = run("generate", "--adapter", str(own), "--prompt", " ", capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "--prompt: no word, or one that the tokenizer has no token for; expected" in err
    long = " . ".join([text] * 8)
    answer = in_json("generate", "--adapter", str(own), "--prompt", long, capsys=capsys)
    assert {long[each["start"] : each["end"]] for each in answer["entities"]} >= {"bob ray"}
    assert max(each["end"] for each in answer["entities"]) > len(long) - 9, "all parts are read"

    merged = tmp_path / "merged"
    report = in_json("export", str(own), "--to", str(merged), capsys=capsys)["report"]
    whole = next(each for each in report["variants"] if each["variant"] == "written")
    assert whole["top1_agreement"] == 1.0
    again = in_json(
        "evaluate", "--model", str(merged), "--bits", "16", "--data", str(data[1]), capsys=capsys
    )
    assert again["loss"] == pytest.approx(found["loss"], abs=1e-3)
    plain = AutoModelForTokenClassification.from_pretrained(merged)
    assert plain.config.id2label == dict(enumerate(record["labels"]))


@pytest.mark.parametrize("most", [6, 1000])
@pytest.mark.parametrize(
    ("is_raw", "words"),
    [
        (
            False,
            ["Ann", "met", "O'Neil", "of", "AT&T", "in", "the", "U.S.", "(", "twice", ")", "."],
        ),
        (True, ["Ann", "met", "O'Neil", "of", "AT&T", "in", "the", "U.S.", "(twice)."]),
    ],
)
def test_a_text_is_divided_into_words(is_raw: bool, words: list[str], most: int) -> None:
    text = "Ann met O'Neil of AT&T in the U.S. (twice)."
    reader = WordReader(ClassHead("tags", ("O", "B-X")), make_tokenizer(), most, is_raw=is_raw)
    rows = reader.rows([text, " "])
    assert {row["row"] for row in rows} == {0}
    assert (len(rows) > 1) is (most == 6)
    # Every word is an entity of its own.
    found = reader.answer(0, [[[0.25, 0.75]] * len(row["input_ids"]) for row in rows])["entities"]
    assert [each["text"] for each in found] == words
    assert [text[each["start"] : each["end"]] for each in found] == words
    assert {each["probability"] for each in found} == {0.75}


def test_a_resumed_run_has_the_bits_of_the_unbroken_one_and_may_be_profiled(
    model: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert any("classifier" in name or "score" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_parts_of_a_long_sentence_are_measured_as_one(
    model: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = trained(model, data, tmp_path / "run", capsys, "--max-steps", "2")
    options = ("--adapter", str(own), "--data", str(data[1]), "--max-length", "4")
    found = in_json("evaluate", *options, capsys=capsys)
    code, out, _ = run("evaluate", *options, capsys=capsys)
    assert code == 0
    assert "split into" in out
    assert "lost: nothing" in out
    assert found["rows"] > 12
    assert sum(row["entities"] for row in found["per_class"]) == 24, "none is cut in two"


def test_tags_without_a_scheme_are_measured_word_by_word(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"tokens": ["ann", "saw", "rome"], "pos_tags": ["NOUN", "VERB", "NOUN"]},
        {"tokens": ["eve", "saw"], "pos_tags": ["NOUN", "VERB"]},
    ] * 12
    file = tmp_path / "pos.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    code, out, err = run(
        "train", "--model", str(model), "--data", str(file), "--validation", str(file),
        "--output", str(tmp_path / "run"), *STEPS, "--max-steps", "24", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert "no scheme of entities" in out
    own = ("--adapter", str(tmp_path / "run"))
    found = in_json("evaluate", *own, "--data", str(file), capsys=capsys)
    assert found["token_accuracy"] == found["macro_f1"] == 1.0
    assert found["confusion"] == [[36, 0], [0, 24]]
    assert [row["words"] for row in found["per_class"]] == [36, 24]
    answer = in_json("generate", *own, "--prompt", "eve saw", capsys=capsys)
    assert [each["tag"] for each in answer["words"]] == ["NOUN", "VERB"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--best-metric", "accuracy"), "--best-metric accuracy: is not measured here; expected"),
        (("--task", "causal"), "keys tokens, tags; expected one of"),
        (("--task", "classify"), "keys tokens, tags; expected one of"),
        (("--max-length", "2", "--long-samples", "drop"), "words, are too long and left out"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    model: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    code, _, err = run(
        "train", "--model", str(model), "--data", str(data[0]), "--validation", str(data[1]),
        "--output", str(tmp_path / "run"), *STEPS, "--max-steps", "1", *more, capsys=capsys,
    )  # fmt: skip
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1


def test_a_tag_that_training_never_had_is_refused(
    model: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = trained(model, data, tmp_path / "run", capsys, "--max-steps", "1")
    (tmp_path / "other.conll").write_text("ann B-PER\nsaw O\nit B-ORG\n")
    code, _, err = run(
        "evaluate", "--adapter", str(own), "--data", str(tmp_path / "other.conll"), capsys=capsys
    )
    assert code == 2
    assert "other.conll:1: word 3: the label B-ORG that is none of the 5 known ones" in err
