"""The `plan` command says how much memory a run needs, and which settings fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import run

from qlora_kit.model.names import find_model, known_models

LAYERS = 4


@pytest.fixture(autouse=True)
def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every known model with four layers: each is simulated, and all are alike."""
    models = {
        name: replace(
            source, architecture={**(source.architecture or {}), "num_hidden_layers": LAYERS}
        )
        for name, source in known_models().items()
    }
    monkeypatch.setattr("qlora_kit.model.names.known_models", lambda: models)


# ---------------------------------------------------------------- the command


def test_a_plan_for_programs_has_every_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plan.png"
    code, out, _ = run(
        "plan", "--model", "smollm2-135m", "--bits", "8", "--max-length", "256", "--plot",
        str(picture), "--json", capsys=capsys,
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert found.keys() >= {
        "predicted_peak_bytes", "host_peak_bytes", "phase_peaks_bytes", "breakdown_bytes",
        "settings", "fits", "budget_bytes", "warnings",
    }  # fmt: skip
    phases = found["phase_peaks_bytes"]
    assert found["predicted_peak_bytes"] == max(v for k, v in phases.items() if k != "merge")
    for phase, parts in found["breakdown_bytes"].items():
        assert sum(parts.values()) == phases[phase], phase
    assert picture.stat().st_size > 10_000


def test_a_plan_needs_no_more_than_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = dict(find_model("smollm2-135m").architecture or {})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(numbers))
    peaks = []
    for model in (str(file), str(tmp_path), "smollm2-135m"):
        code, out, err = run(
            "plan", "--model", model, "--max-length", "128", "--batch-size", "2",
            "--gradient-accumulation-steps", "2", "--targets", "all-linear", "--json",
            capsys=capsys,
        )  # fmt: skip
        assert code == 0, err
        peaks.append(json.loads(out)["predicted_peak_bytes"])
    assert peaks[0] == peaks[1] == peaks[2]


def test_more_tokens_than_positions_are_planned_and_warned_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run("plan", "--model", "tinyllama", "--max-length", "3000", "--json",
                       capsys=capsys)  # fmt: skip
    assert code == 0
    assert "more than the model's 2,048 positions" in json.loads(out)["warnings"][0]


@pytest.mark.usefixtures("simulated_once")
def test_a_budget_is_kept_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ("plan", "--model", "smollm2-135m", "--max-length", "128", "--batch-size", "2",
            "--gradient-accumulation-steps", "1", "--json")  # fmt: skip
    code, out, _ = run(*plan, "--vram", "8GiB", capsys=capsys)
    found = json.loads(out)
    assert (code, found["fits"], found["budget_bytes"]) == (0, True, 8 << 30)
    assert found["predicted_peak_bytes"] < found["card_bytes"] < 8 << 30
    code, _, err = run(*plan, "--vram", "850MB", capsys=capsys)
    assert code == 2
    assert err.startswith("error: --vram: smollm2-135m with 4 bits and rows of 128 tokens takes 0.")
    code, _, err = run(*plan, "--vram", "10 bananas", capsys=capsys)
    assert code == 2
    assert "expected a number with a unit" in err


def test_a_quantised_checkpoint_is_planned_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = dict(find_model("smollm2-135m").architecture or {})
    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    peaks = []
    for name, more, bits in (("plain", {}, ("--bits", "8")),
                             ("stored", {"quantization_config": stored}, ())):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**numbers, **more}))
        plan = ("plan", "--model", str(folder), "--max-length", "128", "--json")
        code, out, err = run(*plan, *bits, capsys=capsys)
        assert code == 0, err
        assert json.loads(out)["settings"]["bits"] == 8
        peaks.append(json.loads(out)["predicted_peak_bytes"])
    assert peaks[0] == peaks[1]
    code, _, err = run(*plan, "--bits", "4", capsys=capsys)
    assert code == 2
    assert "quantised to 8 bits already" in err
