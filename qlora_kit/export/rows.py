"""The rows that a merge is verified on: a few rows of the run's own data, or built-in prompts.

Takes token rows or a tokenizer; returns one padded batch of a bounded number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_kit.data.batch import Batch, collate
from qlora_kit.data.encode import IGNORED, prompt_ids

_MOST_ROW_TOKENS = 256
_PROMPTS = (
    "Once upon a time there was a small town by the sea, where everybody knew the baker.",
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def add(first, second):\n    return first + second\n\nprint(add(2, 3))",
    "Question: If a train leaves at noon and takes three hours, when does it arrive?\n"
    "Answer: It arrives at three o'clock in the afternoon.",
    "Dear Sir or Madam,\n\nI am writing to ask about the position that you advertised.",
    "Water boils at 100 degrees Celsius at sea level, and at less on a mountain.",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "1. Wash the rice. 2. Boil the water. 3. Add salt. 4. Let it stand for ten minutes.",
)


@dataclass(frozen=True)
class VerificationRows:
    """Rows that a merge is verified on.

    Attributes:
        batch: the rows, padded.
        source: the source of the rows, in words.
        of_task: whether the rows are of the task that the adapter was trained for, so that a
            lower loss on them is better.
    """

    batch: Batch
    source: str
    of_task: bool


def some_rows(
    rows: Iterable[Mapping[str, Any]], tokens: int, pad_token_id: int, source: str
) -> VerificationRows:
    """Return the first rows of the task that together have `tokens` tokens.

    Args:
        rows: rows with `input_ids`, `labels` and `row`; at least one.
        tokens: the number of tokens after which no further row is taken.
        pad_token_id: pads shorter rows.
        source: the source of the rows, in words.
    """
    taken: list[dict[str, Any]] = []
    count = 0
    for row in rows:
        taken.append(_cut_row(row))
        count += len(taken[-1]["input_ids"])
        if count >= tokens:
            break
    return VerificationRows(collate(taken, pad_token_id), source, of_task=True)


def built_in_rows(tokenizer: Any) -> VerificationRows:
    """Return built-in prompts. They belong to no task: they only show how far apart models are."""
    encoded = [prompt_ids(tokenizer, prompt) for prompt in _PROMPTS]
    rows = [{"input_ids": ids, "labels": ids, "row": row} for row, ids in enumerate(encoded)]
    return VerificationRows(collate(rows, tokenizer.pad_token_id), "built-in prompts", False)


def _cut_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Cut a row so that supervised tokens are left; where its start has none, keep its end."""
    labels, most = list(row["labels"]), _MOST_ROW_TOKENS
    has_some = any(label != IGNORED for label in labels[1:most])
    part = slice(0, most) if has_some else slice(max(0, len(labels) - most), None)
    return {
        "input_ids": list(row["input_ids"])[part],
        "labels": labels[part],
        "row": row["row"],
    }
