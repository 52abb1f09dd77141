"""Questions of a data file, what a model answers them, and what the answers are worth.

Takes samples that have a question and an answer; returns `Answers`, in the order of the samples.
One pass of greedy generation serves all metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.config import MetricName
from qlora_kit.data.asking import Asks
from qlora_kit.data.fields import Faults
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import Conversation, Pair, Preference, Sample, Shape
from qlora_kit.errors import DataError
from qlora_kit.events import Announce, silent
from qlora_kit.infer.generate import TOGETHER, Sampling, generate_all
from qlora_kit.infer.metrics import Figure, last_number, measure
from qlora_kit.lora.several import PerRow
from qlora_kit.model.load import Base


@dataclass(frozen=True)
class Question:
    """What is asked, and what is accepted as its answer.

    Attributes:
        place: of the sample, for errors and predictions.
        prompt: token ids, as training began its row.
        references: accepted answers, one or more, without the white space around them.
    """

    place: str
    prompt: Sequence[int]
    references: tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """Questions with the answers of a model.

    Attributes:
        questions: what was asked.
        texts: what was answered to each, without the white space around it.
    """

    questions: Sequence[Question]
    texts: Sequence[str]

    def of(self, rows: Sequence[int]) -> Answers:
        """Return some of them, in the given order."""
        return Answers([self.questions[row] for row in rows], [self.texts[row] for row in rows])

    def measured(self, metrics: Sequence[MetricName]) -> dict[str, Figure]:
        """Return the figures of the named metrics."""
        return measure(metrics, self.texts, [each.references for each in self.questions])

    def predictions(
        self, figures: Mapping[str, Figure], adapters: Sequence[str | None] | None = None
    ) -> list[dict[str, Any]]:
        """Return each answer with its place, what was expected, and its own figures.

        Args:
            figures: of these answers, see `measured`.
            adapters: who gave each answer, where several adapters are on the base.
        """
        return [
            {
                "place": question.place,
                **({} if adapters is None else {"adapter": adapters[row]}),
                "answer": text,
                "references": list(question.references),
                **{name: figure.by_row[row] for name, figure in figures.items()},
            }
            for row, (question, text) in enumerate(zip(self.questions, self.texts, strict=True))
        ]


def questions_of(
    samples: Samples, asks: Asks, metrics: Sequence[MetricName], asked_by: str
) -> list[Question]:
    """Return the last question of every sample.

    Args:
        samples: of any shape but plain text.
        asks: gives the ids of a prompt, as the task of the model trains on them.
        metrics: what is to be measured of the answers.
        asked_by: the option for which answers are generated, for errors.

    Raises:
        DataError: the samples are plain text, which asks nothing; or all that cannot be measured
            so, one a line: an answer without a text, one without a number where that is asked for.
    """
    if samples.shape is Shape.TEXT:
        raise DataError(
            f"{samples.source}: plain text, which asks nothing; expected questions with answers; "
            f"leave out {asked_by}"
        )
    questions, faults = [], Faults()
    for sample in samples.items:
        try:
            prompt, references = _question(sample, asks)
            _check_references(references, sample.place, metrics, asked_by)
            questions.append(Question(sample.place, prompt, references))
        except DataError as error:
            faults.add(*error.faults)
    faults.raise_if_any()
    return questions


def answer(
    base: Base,
    tokenizer: Any,
    questions: Sequence[Question],
    max_new_tokens: int,
    *,
    batch_size: int = TOGETHER,
    per_row: PerRow | None = None,
    announce: Announce = silent,
) -> Answers:
    """Answer questions greedily.

    Args:
        base: the model, with the adapter it may carry.
        tokenizer: its tokenizer.
        questions: what is asked.
        max_new_tokens: bound of an answer.
        batch_size: questions that are answered together; halved where memory runs out.
        per_row: the adapter of each question, where several are on the base.
        announce: receives that a batch was halved.

    Raises:
        OutOfMemory: even one question does not fit.
    """
    texts = generate_all(
        base,
        tokenizer,
        [question.prompt for question in questions],
        Sampling(max_new_tokens=max_new_tokens),
        batch_size,
        per_row,
        announce,
    )
    return Answers(questions, [text.strip() for text in texts])


def _question(sample: Sample, asks: Asks) -> tuple[Sequence[int], tuple[str, ...]]:
    """Return the ids of the prompt of a sample's last answer, and the answers that are accepted."""
    if isinstance(sample, Preference):
        sample, _ = sample.sides
    if isinstance(sample, Pair):
        return asks.ids(sample.prompt, sample.place), (sample.completion.strip(),)
    assert isinstance(sample, Conversation)
    prompt = asks.ids(sample.messages[:-1], sample.place, sample.tools)
    accepted = (sample.messages[-1].content, *sample.also_right)
    return prompt, tuple(text.strip() for text in accepted)


def _check_references(
    references: Sequence[str], place: str, metrics: Sequence[MetricName], asked_by: str
) -> None:
    if not all(references):
        raise DataError(
            f"{place}: the answer has no text, only calls of a tool; expected a text to compare "
            f"with; leave out {asked_by}, or the record"
        )
    if "final_number" in metrics and not any(last_number(text) for text in references):
        raise DataError(
            f"{place}: the answer has no number; expected one for final_number; leave out that "
            "metric, or the record"
        )
