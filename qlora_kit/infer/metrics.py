"""What is measured of answers: figures of a metric, over all answers and of each alone.

Takes answers and, for each, the references it may equal; returns figures. A metric knows neither
models nor files. sacrebleu is imported where it is used.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import zip_longest
from typing import Any, Literal

from qlora_kit.config import MetricName

References = Sequence[Sequence[str]]
"""What each answer is compared with: one text, or several of which the best counts."""


@dataclass(frozen=True)
class Figure:
    """One figure of some answers.

    Attributes:
        words: its name for people.
        value: over all answers: a share of 1, or points of 100.
        by_row: the same of each answer alone; a yes or no where `kind` is "count".
        kind: what the value is: the share of answers that are right, which can be counted; a
            mean share; or points, as sacrebleu gives them.
        signature: how it was computed, as sacrebleu says it; "" where there is one way only.
    """

    words: str
    value: float
    by_row: Sequence[float]
    kind: Literal["count", "share", "points"]
    signature: str = ""

    def in_short(self) -> str:
        """Return the value for people."""
        return f"{self.value:.2f}" if self.kind == "points" else f"{self.value:.1%}"

    def in_full(self) -> str:
        """Return the value for people, with the counts behind it where there are some."""
        if self.kind != "count":
            return self.in_short()
        return f"{sum(self.by_row)} of {len(self.by_row)} ({self.in_short()})"


Metric = Callable[[Sequence[str], References], dict[str, Figure]]


def measure(
    metrics: Sequence[MetricName], answers: Sequence[str], references: References
) -> dict[str, Figure]:
    """Return the figures of the named metrics, by the names they have outside.

    Args:
        metrics: names in `METRICS`.
        answers: one or more.
        references: as many; each has one text or more.
    """
    figures: dict[str, Figure] = {}
    for name in metrics:
        figures |= METRICS[name](answers, references)
    return figures


# ---------------------------------------------------------------- right or wrong


def exact_match(answers: Sequence[str], references: References) -> dict[str, Figure]:
    """Measure which answers equal a reference; white space around them does not count."""
    right = [
        answer.strip() in {text.strip() for text in accepted}
        for answer, accepted in zip(answers, references, strict=True)
    ]
    return {"exact_match": _counted("exact match", right)}


def final_number(answers: Sequence[str], references: References) -> dict[str, Figure]:
    """Measure which answers end with the number that a reference ends with.

    The last number of a text is taken, whatever stands after it: `#### 42`, `42.`, `$42` and
    `42.0` are one number, and so are `1,234` and `1234`. An answer without a number is wrong.

    Source: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems" (GSM8K), whose
    answers end with `#### ` and the number.
    """
    right = [
        number is not None and number in [last_number(text) for text in accepted]
        for answer, accepted in zip(answers, references, strict=True)
        for number in [last_number(answer)]
    ]
    return {"final_number": _counted("final number", right)}


# Thousands may be divided by commas, in groups of three. A minus is a number's own where it joins
# it to nothing before it: "3-5" ends with 5.
_NUMBER = re.compile(
    r"((?<![\w)])[-−])?\$?"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text; None where it has none."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    minus, digits = numbers[-1]
    number = Decimal(digits.replace(",", ""))
    return -number if minus else number


def _counted(words: str, right: Sequence[bool]) -> Figure:
    return Figure(words, _mean(right), right, "count")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------- question answering

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad(answers: Sequence[str], references: References) -> dict[str, Figure]:
    """Measure exact match and F1 as SQuAD v1.1 does, each the best over an answer's references.

    Texts are compared as lists of words, in lower case, without ASCII punctuation and articles.

        F1 = 2 · common words / (words of the answer + words of the reference)

    As in the official script, two texts of which no word is left match exactly, and have an F1
    of 0.

    Source: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text",
    section 6.1; the normalisation is that of `evaluate-v1.1.py`.
    """
    exact, f1 = [], []
    for answer, accepted in zip(answers, references, strict=True):
        words, others = _squad_words(answer), [_squad_words(text) for text in accepted]
        exact.append(words in others)
        f1.append(max(_f1(words, other) for other in others))
    return {
        "squad_exact_match": _counted("SQuAD exact match", exact),
        "squad_f1": Figure("SQuAD F1", _mean(f1), f1, "share"),
    }


def _squad_words(text: str) -> list[str]:
    # Punctuation first: "a." is an article.
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(words: Sequence[str], other: Sequence[str]) -> float:
    common = (Counter(words) & Counter(other)).total()
    return 2 * common / (len(words) + len(other)) if common else 0.0


# ---------------------------------------------------------------- translation


def bleu(answers: Sequence[str], references: References) -> dict[str, Figure]:
    """Measure BLEU of the corpus, in points; of an answer alone, sentence BLEU.

    Sentence BLEU stops at the longest n-gram that matches (`effective_order`), as sacrebleu
    recommends: the corpus's BLEU is not its mean.

    Source: Papineni et al. 2002, "BLEU"; Post 2018, "A Call for Clarity in Reporting BLEU Scores",
    as sacrebleu computes it with its defaults.
    """
    from sacrebleu.metrics import BLEU

    # `force` keeps sacrebleu from logging that a text looks tokenised; it changes no figure.
    of_all, of_one = BLEU(force=True), BLEU(effective_order=True)
    return {"bleu": _points("BLEU", of_all, of_one, answers, references)}


def chrf(answers: Sequence[str], references: References) -> dict[str, Figure]:
    """Measure chrF of the corpus, in points, and of each answer alone.

    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation", as
    sacrebleu computes it with its defaults.
    """
    from sacrebleu.metrics import CHRF

    return {"chrf": _points("chrF", CHRF(), CHRF(), answers, references)}


def _points(
    words: str, of_all: Any, of_one: Any, answers: Sequence[str], references: References
) -> Figure:
    """Score answers with one of sacrebleu's metrics for the corpus, with another for each."""
    # sacrebleu takes the first references of all answers, then the second; None where there is
    # no further one.
    whole = of_all.corpus_score(list(answers), list(zip_longest(*references)))
    by_row = [
        float(of_one.sentence_score(answer, list(accepted)).score)
        for answer, accepted in zip(answers, references, strict=True)
    ]
    return Figure(words, float(whole.score), by_row, "points", str(of_all.get_signature()))


METRICS: Mapping[MetricName, Metric] = {
    "exact_match": exact_match,
    "squad": squad,
    "bleu": bleu,
    "chrf": chrf,
    "final_number": final_number,
}
