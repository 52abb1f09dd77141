"""Real data files: each has its stated outcome, through the command line, with real tokenizers."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import slow

from qlora_kit.cli import main
from qlora_kit.config import RecordOptions, TokenOptions
from qlora_kit.data.read import read_records
from qlora_kit.data.samples import Samples, load_samples

KNOWN = (
    "messages, conversations, instruction + output, prompt + completion, question + answer, text"
)


@dataclass(frozen=True)
class Trains:
    """The notice on a file that is read, its options, and the number of its samples."""

    file: str
    told: str
    count: int
    columns: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    train_on: str = "completion"
    """with few positions, a prompt with tools leaves no room for an answer"""
    warned: str = ""


@dataclass(frozen=True)
class Refused:
    """The one line that refuses a file, after its path."""

    file: str
    line: str
    options: tuple[str, ...] = ()


TRAINS = [
    Trains("alpaca_en_demo.json", "999 alpaca records (instruction, input, output)", 999),
    Trains("alpaca_zh_demo.json", "1,000 alpaca records (instruction, input, output)", 1000),
    Trains(
        "identity.json",
        "91 alpaca records (instruction, input, output)",
        91,
        warned="85 of 91 records hold a placeholder ({{name}}, {{author}}) that nothing fills in; "
        "replace it, or it is learnt",
    ),
    Trains(
        "glaive_toolcall_en_demo.json",
        "300 sharegpt records (conversations, tools)",
        300,
        chat_template="Qwen-Qwen2.5-7B-Instruct.jinja",
        train_on="all",
    ),
    Trains("gsm8k/train_2000.jsonl", "2,000 qa records (question, answer)", 2000),
    Trains("gsm8k/test.jsonl", "1,319 qa records (question, answer)", 1319),
    Trains(
        "gsm8k/test_chat.parquet",
        "1,319 chat-pair records (prompt, completion from extra_info.answer); not read: ability, "
        "data_source, reward_model",
        1319,
        {"prompt": "prompt", "completion": "extra_info.answer"},
    ),
    Trains(
        "sst2/train.tsv",
        "6,735 qa records (question from sentence, answer from label)",
        6735,
        {"question": "sentence", "answer": "label"},
    ),
    Trains(
        "sst2/test.tsv",
        "872 text records (text from sentence); not read: label",
        872,
        {"text": "sentence"},
    ),
    Trains(
        "multi30k/multi30k_val.en.gz+multi30k/multi30k_val.de.gz",
        "1,014 qa records (question, answer)",
        1014,
    ),
    Trains(
        "multi30k/multi30k_val.de.gz+multi30k/multi30k_val.en.gz",
        "1,014 qa records (question, answer)",
        1014,
    ),
    Trains("tinyshakespeare.txt", "1 text record (text)", 1),
    Trains("axolotl/conversation.json", "1 sharegpt record (conversations)", 1),
]

REFUSED = [
    Refused(
        "gsm8k/test_chat.parquet",
        " record 1: keys data_source, prompt, ability, reward_model, extra_info; expected one of: "
        f"{KNOWN}; rename the fields, or pass --columns prompt=prompt,completion=extra_info.answer",
    ),
    Refused(
        "sst2/train.tsv",
        f":2: keys sentence, label; expected one of: {KNOWN}; rename the fields, or pass --columns "
        "question=sentence,answer=label",
    ),
    Refused(
        "sst2/test.tsv",
        f":2: keys sentence, label; expected one of: {KNOWN}; rename the fields, or pass --columns "
        "question=sentence,answer=label",
    ),
    Refused(
        "sst2/train.tsv",
        ':2: no "label.name" but keys sentence, label; expected what --columns names; correct it, '
        "or pass --skip-bad-lines",
        ("--columns", "text=label.name"),
    ),
    *(
        Refused(
            f"multi30k/multi30k_val.{language}.gz",
            f': suffix ".{language}"; expected one of .jsonl, .json, .csv, .tsv, .parquet, .txt, '
            ".conll, .conllu, each also as .gz; convert or rename the file, or name two "
            "line-aligned ones as FILE+FILE",
        )
        for language in ("en", "de")
    ),
    Refused(
        "axolotl/conversation.missingturns.json",
        ':1 (record 1): turn 2: "value" is empty; expected text; fill it in or remove the record',
    ),
    Refused(
        "axolotl",
        ": a folder; expected a test file in it, such as test.jsonl; name a file in it, or rename "
        "one",
    ),
]


def test_every_file_has_an_outcome(assets: Path) -> None:
    data = assets / "data"
    files = {str(path.relative_to(data)) for path in data.rglob("*") if path.is_file()}
    stated = {name for case in (*TRAINS, *REFUSED) for name in case.file.split("+")}
    assert files <= stated


def _path(assets: Path, file: str) -> str:
    return "+".join(str(assets / "data" / name) for name in file.split("+"))


def _run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.mark.parametrize("case", TRAINS, ids=lambda case: case.file)
def test_a_file_is_read_as_stated(
    assets: Path, stories: Path, case: Trains, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _path(assets, case.file)
    options = ["--columns", ",".join(f"{k}={v}" for k, v in case.columns.items())]
    template = ["--chat-template", str(assets / "templates" / str(case.chat_template))]
    code, out, err = _run(
        "evaluate", "--model", str(stories), "--bits", "16", "--data", path, "--json",
        "--max-rows", "1", "--max-length", "512", "--long-samples", "truncate",
        "--train-on", case.train_on,
        *(options if case.columns else ()), *(template if case.chat_template else ()),
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["rows"] == 1
    assert f"note: {path}: {case.told}\n" in err
    assert ("placeholder" in err) == bool(case.warned)
    assert case.warned in err


@pytest.mark.parametrize("case", TRAINS, ids=lambda case: case.file)
def test_a_file_is_checked_as_stated(
    assets: Path, stories: Path, case: Trains, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _path(assets, case.file)
    options = ["--columns", ",".join(f"{k}={v}" for k, v in case.columns.items())]
    template = ["--chat-template", str(assets / "templates" / str(case.chat_template))]
    code, out, err = _run(
        "check", "--model", str(stories), "--data", path, "--json", "--rows", "2",
        "--max-length", "512", "--train-on", case.train_on,
        *(options if case.columns else ()), *(template if case.chat_template else ()),
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert f"note: {path}: {case.told}\n" in err
    found = json.loads(out)
    assert found["training"]["rows_read"] == case.count
    held_out = (found["validation"] or {"rows_kept": 0})["rows_kept"]
    left, dropped = found["training"]["rows_kept"], found["training"]["rows_dropped"]
    if case.count > 1:
        assert left + dropped + held_out == case.count
        assert sum(each["rows"] for each in found["lengths"]["histogram"]) == left + dropped
    assert found["prompts"]["differing"] == 0
    assert 0 < found["supervised_share"] <= 1


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: " ".join([case.file, *case.options]))
def test_a_file_is_refused_with_one_line(
    assets: Path,
    stories: Path,
    case: Refused,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(assets / "data" / case.file)
    model = ("--model", str(stories), "--data", path)
    code, out, err = _run("evaluate", *model, *case.options, capsys=capsys)
    assert (code, out, err) == (2, "", f"error: {path}{case.line}\n")
    for command in (("train", "--output", "run"), ("check", "--html", "page.html")):
        code, out, err = _run(*command, *model, *case.options, capsys=capsys)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert not [*tmp_path.rglob("*")], "nothing is created for data that cannot be used"


def test_a_template_without_tools_refuses_the_tools_by_name(
    assets: Path, stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(assets / "data" / "glaive_toolcall_en_demo.json")
    code, _, err = _run("evaluate", "--model", str(stories), "--data", path, capsys=capsys)
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 21
    assert all(f"{path}:" in line and "tools" in line for line in errors[:20])


# ---------------------------------------------------------------- every row, both tokenizers


SMALL_TOKENIZER, LARGE_TOKENIZER = "models/stories260K", "tokenizers/deepseek-llm-7b"
# Each kind of file once; more rows of the same kinds take the large tokenizer seconds.
BOTH_READ = {
    "glaive_toolcall_en_demo.json",
    "identity.json",
    "sst2/test.tsv",
    "axolotl/conversation.json",
}


@pytest.fixture(scope="module")
def tokenizer_of(assets: Path) -> Callable[[str], Any]:
    from qlora_kit.model.tokenizer import load_tokenizer

    return functools.cache(lambda name: load_tokenizer(assets / name))


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((SMALL_TOKENIZER, case) for case in TRAINS),
        *((LARGE_TOKENIZER, case) for case in TRAINS if case.file in BOTH_READ),
        *slow(*((LARGE_TOKENIZER, case) for case in TRAINS if case.file not in BOTH_READ)),
    ],
    ids=lambda value: value.file if isinstance(value, Trains) else value,
)
def test_every_row_becomes_tokens(
    assets: Path, tokenizer_of: Callable[[str], Any], name: str, case: Trains
) -> None:
    from qlora_kit.data.tokens import tokenize

    tokenizer = tokenizer_of(name)
    samples = _load(_path(assets, case.file), case)
    assert len(samples.items) == case.count
    before = tokenizer.chat_template
    if case.chat_template:
        tokenizer.chat_template = (assets / "templates" / case.chat_template).read_text()
    try:
        counts = tokenize(samples, tokenizer, TokenOptions(max_length=8192), cache=False).counts
    finally:
        tokenizer.chat_template = before
    assert (counts.rows_read, counts.rows_kept) == (case.count, case.count)
    assert counts.weight > case.count


def _load(path: Path | str, case: Trains) -> Samples:
    return load_samples(path, options=RecordOptions(columns=dict(case.columns)))


@pytest.mark.parametrize(
    "case", [case for case in TRAINS if "+" not in case.file], ids=lambda case: case.file
)
def test_neither_compression_nor_the_order_of_columns_changes_a_sample(
    assets: Path, tmp_path: Path, case: Trains
) -> None:
    path = assets / "data" / case.file
    samples = _load(path, case)
    packed = tmp_path / f"{path.name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    assert _load(packed, case).content_hash() == samples.content_hash()
    if path.suffix != ".txt":
        turned = tmp_path / path.name
        _write_turned(path, turned)
        assert _load(turned, case).content_hash() == samples.content_hash()


def _write_turned(path: Path, to: Path) -> None:
    """Write the same records with their columns in the opposite order."""
    rows = [dict(reversed(record.content.items())) for record in read_records(path)]
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), to)
    elif path.suffix == ".tsv":
        lines = [[*rows[0]], *(row.values() for row in rows)]
        to.write_text("".join("\t".join(line) + "\n" for line in lines))
    elif path.suffix == ".json":
        to.write_text(json.dumps(rows))
    else:
        to.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_line_aligned_files_need_no_compression(assets: Path, tmp_path: Path) -> None:
    data = assets / "data" / "multi30k"
    packed = [data / f"multi30k_val.{language}.gz" for language in ("en", "de")]
    plain = [tmp_path / path.stem for path in packed]
    for one, other in zip(packed, plain, strict=True):
        other.write_bytes(gzip.decompress(one.read_bytes()))
    whole = load_samples("+".join(map(str, packed)))
    for one, other in ((0, plain), (1, [plain[0], packed[1]])):
        assert load_samples("+".join(map(str, other))).content_hash() == whole.content_hash(), one
    swapped = load_samples("+".join(map(str, packed[::-1])))
    for there, back in zip(whole.items, swapped.items, strict=True):
        turns = [message.content for message in there.messages]  # type: ignore[union-attr]
        assert [message.content for message in back.messages] == turns[::-1]  # type: ignore[union-attr]
