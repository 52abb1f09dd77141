"""A command that a task cannot do is refused by name, before a weight is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qlora_kit import recipe
from qlora_kit.config import EvaluateConfig, GenerateConfig
from qlora_kit.errors import ConfigError
from qlora_kit.model import load
from qlora_kit.tasks import CAUSAL


@pytest.fixture(autouse=True)
def _a_task_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = replace(CAUSAL, name="silent", generates=False)
    monkeypatch.setattr("qlora_kit.opening.tasks.asked_task", lambda: silent)
    monkeypatch.setattr(load, "load_base", lambda *_: pytest.fail("weights were read"))


def test_generating_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"generate: a model of task silent writes no text; exp"):
        recipe.generate(GenerateConfig(model="demo", prompt="one"))


@pytest.mark.parametrize(
    ("flag", "asked"),
    [
        ("--exact-match", {"exact_match": True}),
        ("--metrics", {"metrics": ("bleu",)}),
        ("--predictions", {"predictions": "answers.jsonl"}),
    ],
)
def test_measuring_answers_is_refused(flag: str, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{flag}: a model of task silent writes no text"):
        recipe.evaluate(EvaluateConfig(model="demo", **asked))
