"""Figures of answers equal those of sacrebleu's command, of SQuAD's definition, of gsm8k."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import typing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import run_python

from qlora_kit.config import MetricName
from qlora_kit.infer.metrics import METRICS, References, last_number, measure

# Words that what is compared must not see a difference in, and some that it must.
WORDS = st.sampled_from(
    "the The a An an cat Cat cat, (cat) 'cat' cats sat sat. on-mat mat 3.5 35 it's Zürich ZÜRICH "
    "ananas theatre \u2014 ! \u00a0".split(" ")
)  # fmt: skip
TEXTS = st.lists(WORDS, max_size=6).map(" ".join)
ROWS = st.lists(
    st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=5
).map(lambda rows: tuple(map(list, zip(*rows, strict=True))))


def test_options_and_metrics_have_the_same_names() -> None:
    assert list(METRICS) == list(typing.get_args(MetricName))


def test_sacrebleu_is_not_imported_before_it_is_used() -> None:
    code = (
        "from qlora_kit.infer.metrics import measure\n"
        "measure(['exact_match', 'squad', 'final_number'], ['1'], [['1']])\n"
        "print('sacrebleu' in sys.modules, 'torch' in sys.modules)\n"
        "measure(['bleu'], ['1'], [['1']])\n"
        "print('sacrebleu' in sys.modules)\n"
    )
    assert run_python(code).split() == ["False", "False", "True"]


# ---------------------------------------------------------------- sacrebleu's own command


def sacrebleu(folder: Path, answers: list[str], references: References, *given: str) -> str:
    """Return what the command prints for texts of one line, with equally many references."""
    (folder / "answers").write_text("".join(f"{text}\n" for text in answers))
    files = []
    for number, texts in enumerate(zip(*references, strict=True)):
        files.append(folder / f"references{number}")
        files[-1].write_text("".join(f"{text}\n" for text in texts))
    command = [sys.executable, "-m", "sacrebleu", *map(str, files), "-i", str(folder / "answers")]
    done = subprocess.run([*command, "-w", "6", *given], capture_output=True, text=True, check=True)
    return done.stdout


def of_corpus(folder: Path, answers: list[str], references: References) -> list[dict[str, Any]]:
    """Return BLEU and chrF as the command gives them."""
    found: list[dict[str, Any]] = json.loads(
        sacrebleu(folder, answers, references, "-m", "bleu", "chrf")
    )
    assert [each["name"] for each in found] == ["BLEU", "chrF2"]
    return found


def of_rows(folder: Path, answers: list[str], references: References, metric: str) -> list[float]:
    """Return the command's score of each answer."""
    given = ("-m", metric, "--sentence-level")
    lines = sacrebleu(folder, answers, references, *given).splitlines()
    return [float(line.partition(" = ")[2].split()[0]) for line in lines]


SPOKEN = [
    ("The cat sat on the mat.", "The cat is on the mat.", "There is a cat on the mat."),
    ("Ein Hund läuft durch den Schnee", "Ein Hund rennt durch den Schnee.", "Der Hund läuft."),
    ("", "Something was expected", "or something else"),
    ("Prices rose by 3.5% (“sharply”), he said.", "Prices rose 3.5%, he said.", "He said: 3.5%."),
]


@pytest.mark.parametrize("count", [1, 2])
def test_bleu_and_chrf_are_those_of_sacrebleus_command(tmp_path: Path, count: int) -> None:
    answers = [answer for answer, *_ in SPOKEN]
    references = [list(accepted[:count]) for _, *accepted in SPOKEN]
    figures = measure(["bleu", "chrf"], answers, references)
    theirs = of_corpus(tmp_path, answers, references)
    for figure, their in zip(figures.values(), theirs, strict=True):
        assert figure.value == pytest.approx(their["score"], abs=1e-6)
        assert figure.signature == their["signature"]
        assert f"nrefs:{count}|" in figure.signature
        assert 0 < figure.value < 100
    for name, figure in figures.items():
        alone = of_rows(tmp_path, answers, references, name)
        assert figure.by_row == pytest.approx(alone, abs=1e-6)


def test_a_translation_of_real_text_has_the_figures_of_sacrebleu(
    assets: Path, tmp_path: Path
) -> None:
    file = assets / "data" / "multi30k" / "multi30k_val.de.gz"
    references = gzip.decompress(file.read_bytes()).decode().splitlines()[:300]
    # Answers that lose every fifth word, and their last word goes to the front.
    answers = []
    for text in references:
        kept = [word for number, word in enumerate(text.split(), 1) if number % 5]
        answers.append(" ".join([kept[-1], *kept[:-1]]))
    figures = measure(["bleu", "chrf"], answers, [[text] for text in references])
    theirs = of_corpus(tmp_path, answers, [[text] for text in references])
    assert [f.value for f in figures.values()] == pytest.approx([t["score"] for t in theirs])


def test_answers_may_have_unequal_numbers_of_references() -> None:
    answers = [answer for answer, *_ in SPOKEN]
    first = [[SPOKEN[0][1]], *(list(accepted) for _, *accepted in SPOKEN[1:])]
    # A reference twice is worth no more than once.
    filled = [first[0] * 2, *first[1:]]
    found, same = (
        measure(["bleu", "chrf"], answers, first),
        measure(["bleu", "chrf"], answers, filled),
    )
    for name in found:
        assert found[name].value == same[name].value
        assert found[name].by_row == same[name].by_row
    assert "nrefs:var" in found["bleu"].signature


def test_a_hundred_tokenised_answers_log_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    measure(["bleu"], ["so it is ."] * 120, [["so it is."]] * 120)
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- SQuAD


def by_definition(answer: str, accepted: list[str]) -> tuple[bool, float]:
    """Return SQuAD's exact match and F1, computed letter by letter from what it is defined as."""

    def words(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
        return [word for word in kept.split() if word not in ("a", "an", "the")]

    def f1(own: list[str], other: list[str]) -> float:
        left, common = list(other), 0
        for word in own:
            if word in left:
                left.remove(word)
                common += 1
        if not common:
            return 0.0
        precision, recall = common / len(own), common / len(other)
        return 2 * precision * recall / (precision + recall)

    own, others = words(answer), [words(text) for text in accepted]
    return any(own == other for other in others), max(f1(own, other) for other in others)


@given(rows=ROWS)
@settings(max_examples=300, deadline=None)
def test_squad_is_what_its_definition_says(rows: tuple[list[str], list[list[str]]]) -> None:
    answers, references = rows
    figures = measure(["squad"], answers, references)
    expected = [by_definition(*row) for row in zip(answers, references, strict=True)]
    assert figures["squad_exact_match"].by_row == [exact for exact, _ in expected]
    assert figures["squad_f1"].by_row == pytest.approx([f1 for _, f1 in expected])
    assert figures["squad_f1"].value == pytest.approx(sum(f for _, f in expected) / len(expected))


@pytest.mark.parametrize(
    ("answer", "accepted", "exact", "f1"),
    [
        ("the Denver Broncos.", ["Denver Broncos"], True, 1.0),
        ("Denver", ["Denver Broncos", "The Denver Broncos"], False, 2 / 3),
        ("Broncos of Denver", ["Carolina", "Denver Broncos"], False, 0.8),
        ("ananas", ["an anas"], False, 0.0),
        ("well-known", ["well known"], False, 0.0),
        ("U.S.A.", ["usa"], True, 1.0),
        ("", ["something"], False, 0.0),
        # As in the official script: nothing equals nothing, and shares no word with it.
        ("the", ["A."], True, 0.0),
        ("to be or not to be", ["to be"], False, 0.5),
    ],
)
def test_squad_of_known_answers(answer: str, accepted: list[str], exact: bool, f1: float) -> None:
    figures = measure(["squad"], [answer], [accepted])
    assert figures["squad_exact_match"].value == exact
    assert figures["squad_f1"].value == pytest.approx(f1)


# ---------------------------------------------------------------- the final number


@pytest.mark.parametrize(
    "answer",
    [
        "#### 1234", "1234.", "1,234", "$1,234", "1234.0", "1234.00!", "so 5 + 7 = 1,234 dollars",
        "**1,234**", "1234\n", "(1234)", "a-1234", "7-1234", "£1234", "1234€", "x=1234",
    ],
)  # fmt: skip
def test_a_number_is_the_same_however_it_is_written(answer: str) -> None:
    assert measure(["final_number"], [answer], [["It is\n#### 1234"]])["final_number"].value == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-5", "-5"), ("$-5", "-5"), ("-$5", "-5"), ("\u22125", "-5"), ("3-5", "5"), (".5", "0.5"),
        ("1,2345", "2345"), ("12,34", "34"), ("1,234,567.5", "1234567.5"), ("1, 2, 3", "3"),
        ("50%", "50"), ("0.30", "0.3"), ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "#### ", "$", ",", ".", "-", "²", "٣"])
def test_a_text_without_a_number_has_none_and_is_wrong(text: str) -> None:
    assert last_number(text) is None
    assert measure(["final_number"], [text], [["0"]])["final_number"].value == 0


@given(number=st.decimals(-(10**9), 10**9, places=2), before=st.text())
def test_a_number_is_found_behind_any_text(number: Decimal, before: str) -> None:
    for written in (f"{number}", f"{number:,}", f"{number:,}."):
        assert last_number(f"{before} {written}") == number


@given(st.text(alphabet="0123456789,.-$ \u2212a", max_size=60))
def test_any_text_has_a_number_or_none(text: str) -> None:
    found = last_number(text)
    assert (found is None) is not any(c.isdigit() for c in text)


def test_the_answers_of_gsm8k_end_with_their_number(assets: Path) -> None:
    lines = (assets / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    marked = [answer.rpartition("#### ")[2] for answer in answers]
    assert len(marked) > 100
    figure = measure(["final_number"], marked, [[answer] for answer in answers])["final_number"]
    assert figure.value == 1
    # Told apart from the number of another question.
    others = [[answer] for answer in [*answers[1:], answers[0]]]
    assert measure(["final_number"], marked, others)["final_number"].value < 0.2


SCRIPT = Path(__file__).parent / "gsm8k_script.py"


def of_script(folder: Path, answers: list[str], references: References) -> dict[str, float]:
    """Return what the reference script counts in a file of predictions."""
    file = folder / "predictions.jsonl"
    pairs = zip(answers, references, strict=True)
    lines = [json.dumps({"answer": answer, "references": list(texts)}) for answer, texts in pairs]
    file.write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    counted: dict[str, float] = json.loads(done.stdout)
    return counted


def test_a_reference_script_counts_the_same_answers_of_gsm8k(assets: Path, tmp_path: Path) -> None:
    lines = (assets / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()
    expected = [json.loads(line)["answer"] for line in lines]
    # Right, of another question, right without the mark, and without a number at the end.
    ways = (
        lambda at: expected[at],
        lambda at: expected[at - 1],
        lambda at: f"I think it is ${expected[at].rpartition('#### ')[2]}.",
        lambda at: "I do not know.",
    )
    answers = [ways[at % len(ways)](at) for at in range(len(expected))]
    references = [[text] for text in expected]
    figure = measure(["final_number"], answers, references)["final_number"]
    counted = of_script(tmp_path, answers, references)
    assert figure.value == counted["last_number"]
    assert 0.5 < figure.value < 0.6
    # The published extraction wants the mark.
    assert counted["marked_number"] < figure.value
    marked = [answer for at, answer in enumerate(answers) if at % len(ways) < 2]
    own = [texts for at, texts in enumerate(references) if at % len(ways) < 2]
    figure = measure(["final_number"], marked, own)["final_number"]
    assert figure.value == of_script(tmp_path, marked, own)["marked_number"]


# ---------------------------------------------------------------- all of them


@given(rows=ROWS)
@settings(deadline=None)
def test_whole_and_rows_agree_and_their_order_does_not_matter(
    rows: tuple[list[str], list[list[str]]],
) -> None:
    answers, references = rows
    figures = measure(list(METRICS), answers, references)
    backwards = measure(list(METRICS), answers[::-1], references[::-1])
    for name, figure in figures.items():
        assert list(backwards[name].by_row) == list(figure.by_row)[::-1]
        assert backwards[name].value == pytest.approx(figure.value)
        most = 100 if figure.kind == "points" else 1
        assert all(0 <= value <= most + 1e-9 for value in (figure.value, *figure.by_row))
        if figure.kind != "points":
            assert figure.value == pytest.approx(sum(figure.by_row) / len(answers))


@given(rows=ROWS, more=TEXTS)
@settings(deadline=None)
def test_a_further_reference_never_makes_an_answer_worse(
    rows: tuple[list[str], list[list[str]]], more: str
) -> None:
    answers, references = rows
    names: list[MetricName] = ["exact_match", "squad", "final_number", "chrf"]
    before = measure(names, answers, references)
    after = measure(names, answers, [[*accepted, more] for accepted in references])
    for name in before:
        pairs = zip(before[name].by_row, after[name].by_row, strict=True)
        assert all(new >= old - 1e-9 for old, new in pairs), name


def test_the_expected_answer_is_worth_everything() -> None:
    text = "It costs $1,234.50 today, they said."
    for name, figure in measure(list(METRICS), [f" {text}\n"], [["no", text]]).items():
        assert figure.value == pytest.approx(100 if figure.kind == "points" else 1), name


def test_figures_for_people() -> None:
    figures = measure(["exact_match", "squad", "chrf"], ["a b", "c"], [["a b"], ["d"]])
    assert {figure.words: figure.in_full() for figure in figures.values()} == {
        "exact match": "1 of 2 (50.0%)",
        "SQuAD exact match": "1 of 2 (50.0%)",
        "SQuAD F1": "50.0%",
        "chrF": figures["chrf"].in_short(),
    }
    assert figures["exact_match"].in_short() == "50.0%"
