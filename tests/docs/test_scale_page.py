"""docs/scale.md has the figures of the saved simulation, and says that they are computed."""

from __future__ import annotations

import json
import re
from typing import Any

from support import PROJECT

PAGE = (PROJECT / "docs" / "scale.md").read_text(encoding="utf-8")
SAVED = json.loads((PROJECT / "benchmarks" / "results" / "scale_simulated.json").read_text())
COMPUTED = re.split(r"^## From 1 to 512 GPUs, computed$", PAGE, flags=re.MULTILINE)[1]
STEPS: dict[Any, dict[str, Any]] = {
    (row["model"], row["network"], row["gpus"], row["form"]): row for row in SAVED["steps"]
}


def cells(model: str, gpus: int) -> list[str]:
    found = [model, str(gpus)]
    for form in ("replicated", "sharded", "2-D"):
        fast, slow = (STEPS[model, name, gpus, form] for name in ("infiniband", "ethernet"))
        found.append(f"{fast['step_seconds']:.3g} / {slow['step_seconds']:.3g}")
        if form != "replicated":
            found.append(f"{fast['sent_bytes'] / 1e9:,.0f}")
        found.append(f"{fast['card_bytes'] / 1e9:.1f}{'' if fast['fits'] else ' !'}")
    return found


def test_each_row_is_as_saved() -> None:
    shown = re.findall(r"^\| (llama[^|]+) \| (\d+) \| .*$", COMPUTED, re.MULTILINE)
    assert len(shown) == 12
    for model, gpus in shown:
        assert f"| {' | '.join(cells(model, int(gpus)))} |" in COMPUTED


def test_a_step_of_one_gpu_is_as_saved() -> None:
    seconds = [
        STEPS[model, "infiniband", 1, "replicated"]["step_seconds"]
        for model in ("llama-2-7b", "llama-2-13b", "llama-3.1-70b", "llama-3.1-405b")
    ]
    told = re.search(
        r"takes (\d+) s\s\(7B\), (\d+) s \(13B\), (\d+) s \(70B\) and, .*? ([\d,]+) s \(405B\)",
        COMPUTED, re.DOTALL,
    )  # fmt: skip
    assert told is not None
    assert [float(each.replace(",", "")) for each in told.groups()] == [
        float(f"{each:.3g}") if each > 1000 else round(each) for each in seconds
    ]


def test_where_a_form_stops_is_as_saved() -> None:
    """The first number of GPUs, of those computed, at which a form no longer pays."""
    counts = sorted({row["gpus"] for row in SAVED["steps"]})
    names = {"7B": "llama-2-7b", "13B": "llama-2-13b", "70B": "llama-3.1-70b"}
    for name, model in names.items():
        (line,) = re.findall(rf"^\| {name} \| ([^|]+) \| ([^|]+) \|$", COMPUTED, re.MULTILINE)
        for network, told in zip(("infiniband", "ethernet"), line, strict=True):
            for form in ("replicated", "sharded", "2-D"):
                part = told
                if "the others" in told:
                    part = told.split(";")[0 if form == "sharded" else 1]
                end = next(n for n in counts if STEPS[model, network, n, form]["efficiency"] < 0.5)
                assert f"at {end} GPUs" in part, (name, network, form)


def test_the_page_says_that_nothing_was_measured() -> None:
    assert "Nothing in this section has been measured on several GPUs" in COMPUTED
    assert "not measured" in SAVED["what"]
    assert SAVED["command"].startswith("python benchmarks/scale_simulated.py --json ")
