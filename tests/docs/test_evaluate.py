"""docs/evaluate.md names every metric and every figure as the command has them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import PROJECT, run

from qlora_kit.infer.metrics import METRICS, measure

PAGE = (PROJECT / "docs" / "evaluate.md").read_text(encoding="utf-8")


def test_every_metric_has_its_row_with_its_figures() -> None:
    table = PAGE.partition("| metric |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE)
    assert [name for name, _ in rows] == list(METRICS)
    for name, figures in rows:
        found = METRICS[name](["1"], [["1"]])
        signed = [f"{key}_signature" for key, figure in found.items() if figure.signature]
        assert re.findall(r"`(\w+)`", figures) == [*found, *signed]


def test_a_line_of_predictions_is_as_it_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = re.findall(r'^\{"place".*\}$', PAGE, re.MULTILINE)
    shown = json.loads(line)
    figures = measure(["bleu", "chrf"], [shown["answer"]], [shown["references"]])
    assert {name: figure.by_row[0] for name, figure in figures.items()} == pytest.approx(
        {name: shown[name] for name in figures}
    )
    file = tmp_path / "p.jsonl"
    given = ("--max-rows", "1", "--max-new-tokens", "2", "--metrics", "bleu,chrf")
    code, _, err = run("evaluate", *given, "--predictions", str(file), capsys=capsys)
    assert code == 0, err
    assert list(json.loads(file.read_text())) == list(shown)
