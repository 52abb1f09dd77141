"""Samples before and after training: the prompts chosen, and a run that they leave unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run

from qlora_kit.config import BaseModelOptions
from qlora_kit.events import Event, Notice
from qlora_kit.infer import samples as module
from qlora_kit.infer.samples import NAME, SampleAccount, choose_prompts
from qlora_kit.opening.model import open_tokenizer
from qlora_kit.train.random_states import random_states, seed_everything

pytestmark = pytest.mark.usefixtures("simulated_once", "few_rows")

SHORT = ("--max-steps", "4", "--save-steps", "2", "--device", "cpu", "--lora-dropout", "0.1",
         "--no-rehearse")  # fmt: skip
IGNORED = -100


def row(prompt: int, answer: int) -> dict[str, list[int]]:
    """Return a token row with `prompt` prompt tokens and `answer` answer tokens."""
    ids = list(range(10, 10 + prompt + answer))
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


# ---------------------------------------------------------------- prompts


def test_a_prompt_ends_where_the_first_answer_begins() -> None:
    two_answers = row(3, 7)
    two_answers["labels"][6:8] = [IGNORED, IGNORED]
    (prompt,) = choose_prompts([two_answers], 3, 256)
    assert prompt.ids == (10, 11, 12)
    assert prompt.following == (13, 14, 15)


@pytest.mark.parametrize("bos", [0, 1])
def test_plain_text_is_continued_after_its_opening(bos: int) -> None:
    (long,) = choose_prompts([row(bos, 100)], 1, 256)
    (short,) = choose_prompts([row(bos, 10 - bos)], 1, 256)
    assert (len(long.ids), len(short.ids)) == (32, 5)
    assert long.following[0] == long.ids[-1] + 1


def test_prompts_are_spread_over_the_rows_and_long_ones_passed_over() -> None:
    rows = [row(4, 2) for _ in range(9)]
    rows[3] = row(300, 2)
    for index, each in enumerate(rows):
        each["input_ids"][0] = index
    assert [prompt.ids[0] for prompt in choose_prompts(rows, 3, 256)] == [0, 6, 1]
    assert len(choose_prompts(rows, 20, 256)) == 8
    assert choose_prompts([row(300, 2)], 3, 256) == []


# ---------------------------------------------------------------- an account


@pytest.fixture(scope="module")
def opened() -> Any:
    """The demo's base and tokenizer."""
    options = BaseModelOptions(model="demo", device="cpu")
    opened = open_tokenizer(options, lambda event: None)
    return opened.load(options, lambda event: None), opened.tokenizer


@pytest.fixture
def account(opened: Any, tmp_path: Path) -> Iterator[Any]:
    base, tokenizer = opened
    heard: list[Event] = []
    account = SampleAccount(tmp_path, base, tokenizer, heard.append)
    yield account, heard
    assert all(isinstance(event, Notice) for event in heard)


def test_all_random_states_are_left_as_they_were(account: Any) -> None:
    seed_everything(3)
    torch.rand(5)
    device = torch.device("cpu")
    before = random_states(device)
    account[0].begin(2, [row(4, 3)] * 5, 100)
    account[0].close()
    after = random_states(device)
    assert account[0].samples
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_model_is_left_in_the_mode_it_was_in(account: Any) -> None:
    account[0].base.model.train()
    account[0].begin(1, [row(4, 3)], 100)
    assert account[0].base.model.training
    account[0].base.model.eval()


def test_before_and_after_are_the_same_where_nothing_was_trained(account: Any) -> None:
    account[0].begin(3, [row(4, 3), row(9, 2), row(20, 60)], 1)
    samples = account[0].close()
    assert len(samples) == 3
    assert account[1] == [], "none of them failed"
    assert all(sample.before == sample.after for sample in samples)
    stored = json.loads((account[0].output / NAME).read_text())
    assert [item["after"] for item in stored["samples"]] == [sample.after for sample in samples]


def test_how_many_prompts_go_together_changes_no_answer(account: Any, tmp_path: Path) -> None:
    rows = [row(4, 3), row(9, 2), row(20, 60)]
    account[0].begin(3, rows, 1)
    alone = account[0].samples
    (tmp_path / NAME).unlink()
    account[0].begin(3, rows, 10_000)
    assert account[0].samples == alone


def test_none_are_made_where_none_are_asked_for(account: Any) -> None:
    account[0].begin(0, [row(4, 3)], 100)
    assert account[0].close() == ()
    assert not (account[0].output / NAME).exists()


def test_a_failure_is_a_notice_and_the_run_goes_on(
    account: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> Iterator[str]:
        raise RuntimeError("secret text of the data")
        yield ""

    account[0].begin(1, [row(4, 3)], 100)
    monkeypatch.setattr(module, "generate", fails)
    (sample,) = account[0].close()
    assert sample.after is None
    assert ("after", "not generated") in sample.rows()
    assert [event.text for event in account[1]] == [
        "no samples: generating them failed (RuntimeError)"
    ]


@pytest.mark.parametrize(("seconds", "tokens"), [(0.001, 64), (1.5, 10), (20.0, None)])
def test_few_or_none_are_made_where_it_takes_long(
    account: Any, monkeypatch: pytest.MonkeyPatch, seconds: float, tokens: int | None
) -> None:
    monkeypatch.setattr(SampleAccount, "_seconds_of_a_token", lambda *given: seconds)
    account[0].begin(2, [row(4, 3)] * 4, 1)
    if tokens is None:
        assert account[0].close() == ()
        assert "a token takes 20.0 s" in account[1][0].text
    else:
        assert json.loads((account[0].output / NAME).read_text())["max_new_tokens"] == tokens


@pytest.mark.parametrize("damage", [
    "{", "[]", '{"samples": []}',
    '{"asked_for": 1, "max_new_tokens": 4, "samples": [{"prompt_ids": [10000000], '
    '"prompt": "", "expected": "", "before": "kept"}]}',
    '{"asked_for": 1, "max_new_tokens": 1e999, "samples": [{"prompt_ids": [4], '
    '"prompt": "", "expected": "", "before": "kept"}]}',
    '{"asked_for": 2, "max_new_tokens": 4, "samples": [{"prompt_ids": [4], '
    '"prompt": "", "expected": "", "before": "kept"}]}',
])  # fmt: skip
def test_a_file_that_is_not_of_this_run_is_made_anew(account: Any, damage: str) -> None:
    (account[0].output / NAME).write_text(damage)
    account[0].begin(1, [row(4, 3)], 100)
    assert account[0].samples[0].prompt_ids == (10, 11, 12, 13)
    assert account[0].samples[0].before != "kept"


# ---------------------------------------------------------------- in a run


def test_a_run_has_the_same_bits_with_and_without_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = []
    for number in ("0", "2"):
        output = tmp_path / number
        arguments = ("train", "--output", str(output), *SHORT, "--samples", number)
        code, _, _ = run(*arguments, capsys=capsys)
        assert code == 0
        assert (output / NAME).exists() == (number == "2")
        assert ("<h2>Samples</h2>" in (output / "report.html").read_text()) == (number == "2")
        names = ("adapter_model.safetensors", "checkpoint-4/optimizer.safetensors",
                 "checkpoint-4/random.safetensors", "checkpoint-2/random.safetensors")  # fmt: skip
        content.append([(output / name).read_bytes() for name in names])
    assert content[0] == content[1]


def test_a_resumed_run_keeps_how_it_began(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    arguments = ("train", "--output", str(output), *SHORT)
    run(*arguments, capsys=capsys)
    file = output / NAME
    stored = json.loads(file.read_text())
    afterwards = [item["after"] for item in stored["samples"]]
    for number, item in enumerate(stored["samples"]):
        item |= {"before": f"how it began {number}", "after": None}
    file.write_text(json.dumps(stored))
    (output / "adapter_model.safetensors").unlink()
    code, _, _ = run(*arguments, "--resume", capsys=capsys)
    assert code == 0
    again = json.loads(file.read_text())["samples"]
    assert [item["before"] for item in again] == [f"how it began {i}" for i in range(3)]
    assert [item["after"] for item in again] == afterwards
    assert "how it began 2" in (output / "report.html").read_text()


@pytest.mark.parametrize("part", ["run_page.write_run_page", "card.write_card"])
def test_a_run_ended_while_its_pages_were_written_is_finished_by_resume(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "run"
    arguments = ("train", "--output", str(output), *SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"qlora_kit.report.{part}", ended)
        code, _, _ = run(*arguments, capsys=capsys)
    assert code == 130
    assert not (output / "adapter_model.safetensors").exists()
    assert run(*arguments, "--resume", capsys=capsys)[0] == 0
    last = (output / "checkpoint-4" / "adapter_model.safetensors").read_bytes()
    assert (output / "adapter_model.safetensors").read_bytes() == last
    assert (output / "report.html").is_file()
    assert (output / "README.md").is_file()
