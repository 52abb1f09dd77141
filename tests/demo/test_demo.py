"""The demo is as its page says: small and disjoint, impossible before training and easy after."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

import qlora_kit as qk
from qlora_kit import recipe
from qlora_kit.data.samples import BUILT_IN
from qlora_kit.demo import corpus
from qlora_kit.model.names import find_model

Row = dict[str, str]


def rows_of(split: str) -> list[Row]:
    return [json.loads(line) for line in BUILT_IN[split].read_text().splitlines()]


def test_the_held_out_rows_share_neither_prompt_nor_answer_with_training() -> None:
    train, test = rows_of("train"), rows_of("test")
    assert len(test) >= 500
    for key in ("prompt", "completion"):
        assert not {row[key] for row in train} & {row[key] for row in test}, key


def test_no_answer_can_be_guessed() -> None:
    answers = Counter(row["completion"] for row in rows_of("test"))
    assert len(answers) >= 100
    assert max(answers.values()) <= 0.05 * sum(answers.values())


def test_the_shipped_rows_are_those_the_script_makes() -> None:
    train, test = rows_of("train"), rows_of("test")
    assert corpus.task_rows(0, len(train), len(test)) == (train, test)


def test_the_pretraining_text_never_shows_the_task() -> None:
    for text in itertools.islice(corpus.documents(0), 3000):
        assert not any(word in text for word in corpus.FORBIDDEN)


def test_numbers_are_said_as_people_say_them() -> None:
    assert corpus.number_words(3012) == "three thousand and twelve"
    assert corpus.number_words(742) == "seven hundred and forty-two"
    assert corpus.ordinal_words(22) == "twenty-second"
    assert corpus.ordinal_words(30) == "thirtieth"
    assert corpus.year_words(1984) == "nineteen eighty-four"


def test_the_weights_are_small() -> None:
    folder = find_model("demo").folder
    assert folder is not None
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000


def test_the_base_cannot_do_the_task() -> None:
    result = recipe.evaluate(qk.EvaluateConfig(exact_match=True, max_rows=100, max_new_tokens=24))
    assert result["exact_match"] <= 0.05


@pytest.mark.slow
def test_fine_tuning_teaches_the_task_and_the_merged_model_keeps_it(tmp_path: Path) -> None:
    """The test runs the commands of `make train`."""
    settings = find_model("demo").settings
    output, merged = tmp_path / "run", tmp_path / "merged"
    recipe.train(qk.TrainConfig(output=output, **settings))
    after = recipe.evaluate(qk.EvaluateConfig(adapter=output, exact_match=True))
    assert after["rows"] >= 500
    assert after["exact_match"] >= 0.9
    recipe.export(qk.ExportConfig(adapter=output, to=merged))
    config = qk.EvaluateConfig(model=str(merged), bits=16, exact_match=True)
    assert recipe.evaluate(config)["exact_match"] >= after["exact_match"] - 0.005
