"""report.html, the model card, and the curves of a run."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_kit.config import TrainConfig
from qlora_kit.report import card, plot, run_page
from qlora_kit.report.facts import RunSummary, speed

SECRET = "hf_" + "abcDEF123" * 4
HOSTILE = '<script>alert("x")</script><img src="https://evil.example/x.png">'
FACTS = (("model", "tiny, 100 parameters"), ("data", HOSTILE))
RESULTS = (("training loss", "1.0000 in the last step"),)
SAMPLES = [(("prompt", f"Q {HOSTILE}"), ("in the data", "A"), ("before", SECRET), ("after", "b"))]


def log_rows(steps: int = 40) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows.append({
            "optimizer_step": step, "epoch": step / 10, "loss": 3 / step, "learning_rate": 1e-4,
            "grad_norm": 0.1, "supervised_tokens": 8, "tokens": 20, "step_seconds": 0.1,
            "memory_bytes": 10**9 + step,
        })  # fmt: skip
        if step % 20 == 0:
            rows.append({"optimizer_step": step, "epoch": step / 10, "eval_loss": 2 / step,
                         "is_best": True, "seconds": 0.1})  # fmt: skip
    return rows


INCIDENTS = [
    {"optimizer_step": 3, "epoch": 0.3, "loss": "nan", "grad_norm": "inf", "rows": [4, 5]},
    {"optimizer_step": 7, "rows_asked": 8, "rows_now": 4},
]


def summary(**changes: Any) -> RunSummary:
    config = TrainConfig(rank=8, learning_rate=1e-3, output=Path("runs/mine"), **changes)
    return RunSummary.of(
        config, "tiny", FACTS, RESULTS, {"torch": "2.13.0"}, ("qlora-kit generate --adapter x",)
    )


def write(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> str:
    plot.draw_loss(rows, folder / plot.NAME)
    arguments: dict[str, Any] = {
        "samples": SAMPLES, "loss_picture": folder / plot.NAME, "step_picture": folder / "no.png",
        "on_gpu": False, "predicted_bytes": None,
    }  # fmt: skip
    run_page.write_run_page(folder, summary(), rows, **{**arguments, **changes})
    return (folder / run_page.NAME).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects the tags of a page with their attributes, and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    page = Page(write(tmp_path, log_rows()))
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    sources = [given[name] for _, given in page.tags for name in ("src", "href") if name in given]
    pictures = [re.fullmatch("data:image/png;base64,(.+)", source or "") for source in sources]
    assert len(pictures) == 2
    for picture in pictures:
        assert picture is not None
        assert base64.b64decode(picture[1], validate=True).startswith(b"\x89PNG")


def test_the_page_says_all_there_is_to_say(tmp_path: Path) -> None:
    text = write(tmp_path, log_rows() + INCIDENTS)
    for words in (
        "LoRA adapter for tiny", "100 parameters", "1.0000 in the last step", "2.13.0",
        "qlora-kit generate --adapter x", "Evaluations (2)", "0.1000", "<h2>Samples</h2>",
        "<td>rank</td><td>8</td>", "anonymous memory of the process",
        "skipped: loss nan, gradient norm inf, on rows 4, 5",
        "out of memory: 4 row(s) at a time from here, of 8",
    ):  # fmt: skip
        assert words in text, words
    changed = text.split("not at their default")[1].split("<details>")[0]
    assert re.findall(r"<tr><td>(\w+)</td>", changed) == ["rank", "learning_rate", "output"]


def test_each_evaluation_has_all_that_was_measured(tmp_path: Path) -> None:
    found = {"epoch": 1.0, "is_best": False, "seconds": 0.1}
    rows = [
        *log_rows(10),
        {"optimizer_step": 5, "eval_loss": 0.5, **found},
        {"optimizer_step": 9, "eval_loss": "nan", "eval_macro_f1": 0.75, **found, "is_best": True},
    ]
    table = write(tmp_path, rows).split("Evaluations (2)")[1].split("</table>")[0]
    assert re.findall(r"<th>(.*?)</th>", table) == [
        "step", "epoch", "validation loss", "macro f1", "",
    ]  # fmt: skip
    assert re.findall(r"<td[^>]*>(.*?)</td>", table) == [
        "5", "1.00", "0.5000", "", "", "9", "1.00", "nan", "0.7500", "best so far",
    ]  # fmt: skip


def test_strangers_text_is_escaped_and_secrets_are_not_there(tmp_path: Path) -> None:
    text = write(tmp_path, log_rows())
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert SECRET not in text
    assert "[redacted]" in text


def test_a_run_without_validation_or_samples_says_so(tmp_path: Path) -> None:
    rows = [row for row in log_rows(1) if "loss" in row]
    text = write(tmp_path, rows, samples=[])
    assert "No validation rows" in text
    assert "<h2>Samples</h2>" not in text
    assert "What went otherwise" not in text


def test_on_a_gpu_the_memory_is_held_against_the_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, int]] = []

    def curve(rows: Any, levels: dict[str, int]) -> bytes:
        seen.append(levels)
        return b"\x89PNG"

    monkeypatch.setattr(run_page, "memory_curve", curve)
    assert "allocated on the device" in write(tmp_path, [], on_gpu=True, predicted_bytes=5)
    write(tmp_path, [], on_gpu=False, predicted_bytes=5)
    assert seen == [{"predicted peak": 5}, {}]


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("rows", [[], log_rows(1), log_rows(200), INCIDENTS])
def test_pictures_can_be_drawn_of_any_log(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    plot.draw_loss(rows, tmp_path / plot.NAME)
    assert (tmp_path / plot.NAME).read_bytes().startswith(b"\x89PNG")
    assert plot.memory_curve(rows, {"predicted peak": 10**9}).startswith(b"\x89PNG")


def test_the_loss_picture_has_every_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: figures.append(figure))
    plot.draw_loss(log_rows() + INCIDENTS, tmp_path / plot.NAME)
    losses, rate = figures[0].axes
    curves = {line.get_label(): line for line in losses.get_lines()}
    assert list(curves) == [
        "training, each step", "training, smoothed", "validation", "skipped: not finite",
    ]  # fmt: skip
    assert list(curves["validation"].get_ydata()) == [0.1, 0.05]
    assert list(curves["skipped: not finite"].get_xdata()) == [3]
    assert list(rate.get_lines()[0].get_ydata()) == [1e-4] * 40


def test_pictures_leave_the_drawing_of_the_process_alone(tmp_path: Path) -> None:
    """A notebook that trains keeps its own backend and its own open figures."""
    program = (
        "import sys; from pathlib import Path; from qlora_kit.report import memory, merge, plot;"
        "path = Path(sys.argv[1]); plot.draw_loss([], path); plot.memory_curve([], {});"
        "memory.draw_timeline([[1]], ['a'], {}, '', path);"
        "memory.draw_memory({'step': {'a': 1}}, ['a'], '', path);"
        "merge.draw_layers("
        "{'layers': [], 'is_requantized': False, 'merged_over': '', 'dtype': ''}, path);"
        "assert 'matplotlib.figure' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "picture.png")], check=True)


def test_smoothing_keeps_a_constant_and_follows_a_short_run() -> None:
    assert plot.smooth([2.0] * 500) == pytest.approx([2.0] * 500)
    assert plot.smooth([5.0, 1.0, 3.0]) == [5.0, 1.0, 3.0]
    smoothed = plot.smooth([1.0, 3.0] * 100)
    assert max(smoothed[50:]) - min(smoothed[50:]) < 0.5


# ---------------------------------------------------------------- the card


def test_the_card_has_what_others_need_and_nothing_private(tmp_path: Path) -> None:
    card.write_card(tmp_path, summary(data=f"/home/me/{SECRET}.jsonl", chat_template="/home/me/t"))
    text = (tmp_path / card.NAME).read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "peft"
    for words in ("# LoRA adapter for tiny", "AutoPeftModelForCausalLM", "100 parameters",
                  "1.0000 in the last step", "| rank | 8 |", "| learning_rate | 0.001 |",
                  "![loss](loss.png)", "| torch | 2.13.0 |"):  # fmt: skip
        assert words in body, words
    assert SECRET not in text
    assert "/home/me" not in text
    assert "| output |" not in text


def test_a_base_on_the_hub_is_linked(tmp_path: Path) -> None:
    card.write_card(tmp_path, replace(summary(), base="owner/base"))
    assert yaml.safe_load((tmp_path / card.NAME).read_text().split("---\n")[1])["base_model"] == (
        "owner/base"
    )


def test_a_cell_of_the_card_stays_in_its_row(tmp_path: Path) -> None:
    card.write_card(tmp_path, replace(summary(), facts=(("data", "a|b\nc"),)))
    assert "| data | a\\|b c |" in (tmp_path / card.NAME).read_text()


def test_speed_is_of_the_steps_alone() -> None:
    assert speed(log_rows() + INCIDENTS) == (("speed", "200 tokens/s"),)
    assert speed(INCIDENTS) == ()
