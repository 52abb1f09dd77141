"""The rates of a device: measured, kept, measured again, taken from data sheets."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_kit.errors import ConfigError
from qlora_kit.model import ceilings as module
from qlora_kit.model.cards import KNOWN, ceilings_of_card
from qlora_kit.model.ceilings import Ceilings, ceilings_of, measured, proposing_bfloat16
from qlora_kit.model.hardware import choose_hardware

CPU = torch.device("cpu")
SOME = Ceilings(
    device="some CPU",
    flop_per_second={"float32": 1e11, "bfloat16": 2.6e11},
    bytes_per_second=((1000, 1e9), (1_000_000, 3e9)),
    unpacked_per_second={"float32": 2e10},
    link_bytes_per_second=None,
    call_seconds=1e-6,
    is_measured=True,
)


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Stand in for the measurement, which takes a second; the list has its calls."""
    calls: list[torch.device] = []

    def fake(device: torch.device) -> Ceilings:
        calls.append(device)
        return SOME

    monkeypatch.setattr(module, "measured", fake)
    return calls


def test_a_cpu_is_measured() -> None:
    found = measured(CPU)
    assert found.is_measured
    assert not found.is_of_gpu
    rates = [*found.flop_per_second.values(), *found.unpacked_per_second.values()]
    # Slower than any CPU that runs torch, and faster than any that there is.
    assert all(1e8 < rate < 1e15 for rate in rates)
    assert all(1e8 < rate < 1e13 for _, rate in found.bytes_per_second)
    assert found.call_seconds is not None
    assert 1e-8 < found.call_seconds < 1e-3
    assert found.gain("float32") == 1


def test_measuring_draws_nothing_from_the_generator_of_a_run() -> None:
    before = torch.random.get_rng_state()
    measured(CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_rates_are_kept_and_read_again(tmp_path: Path, measurements: list[torch.device]) -> None:
    assert ceilings_of(CPU, cache=tmp_path) == ceilings_of(CPU, cache=tmp_path) == SOME
    assert measurements == [CPU]


@pytest.mark.parametrize(
    ("home", "name", "value"),
    [(torch, "get_num_threads", 77), (importlib.metadata, "version", "9.9")],
)
def test_another_torch_or_number_of_threads_is_measured_anew(
    home: Any, name: str, value: Any, tmp_path: Path, measurements: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ceilings_of(CPU, cache=tmp_path)
    monkeypatch.setattr(home, name, lambda *_: value)
    ceilings_of(CPU, cache=tmp_path)
    ceilings_of(CPU, cache=tmp_path)
    assert len(measurements) == 2


def _without(content: dict[str, Any], name: str) -> dict[str, Any]:
    del content["ceilings"][name]
    return content


def _with(content: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    content["ceilings"][name] = value
    return content


@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: "",
        lambda content: json.dumps(content)[:-9],
        lambda content: "[]",
        lambda content: json.dumps(_without(content, "call_seconds")),
        lambda content: json.dumps(_with(content, "call_seconds", -1e-6)),
        lambda content: json.dumps(_with(content, "bytes_per_second", [])),
        lambda content: json.dumps(_with(content, "bytes_per_second", [[1, "fast"]])),
        lambda content: json.dumps(_with(content, "flop_per_second", {"float32": "fast"})),
        lambda content: json.dumps(content | {"key": "another"}),
    ],
)
def test_a_damaged_file_is_measured_again(
    damaged: Any, tmp_path: Path, measurements: list[torch.device]
) -> None:
    ceilings_of(CPU, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_text(encoding="utf-8")
    file.write_text(damaged(json.loads(whole)), encoding="utf-8")
    assert ceilings_of(CPU, cache=tmp_path) == SOME
    assert len(measurements) == 2
    assert file.read_text(encoding="utf-8") == whole


def test_a_cache_that_cannot_be_written_is_no_failure(
    tmp_path: Path, measurements: list[torch.device]
) -> None:
    in_the_way = tmp_path / "cache"
    in_the_way.write_text("a file where the folder should be")
    assert ceilings_of(CPU, cache=in_the_way) == SOME
    assert ceilings_of(CPU, cache=in_the_way) == SOME
    assert len(measurements) == 2


def test_a_pass_has_the_rate_of_its_size() -> None:
    assert SOME.pass_seconds(10) == pytest.approx(10 / 1e9)
    assert SOME.pass_seconds(1000) == pytest.approx(1000 / 1e9)
    # Halfway between the two sizes on the scale of logarithms.
    assert SOME.pass_seconds(31_623) == pytest.approx(31_623 / 2e9, rel=1e-4)
    assert SOME.pass_seconds(50_000_000) == pytest.approx(50_000_000 / 3e9)


# ---------------------------------------------------------------- bfloat16 on a CPU


@pytest.mark.parametrize(("rate", "is_said"), [(2.6e11, True), (1.4e11, False), (5e9, False)])
def test_bfloat16_is_proposed_where_it_is_much_faster(
    rate: float, is_said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"float32": 1e11, "bfloat16": rate}
    monkeypatch.setattr(module, "ceilings_of", lambda _: replace(SOME, flop_per_second=rates))
    before = choose_hardware("cpu")
    found = proposing_bfloat16(before)
    assert found.dtype == torch.float32
    assert ("--dtype bfloat16 multiplies 2.6 times as fast" in found.reason) == is_said
    assert is_said or found == before


def test_what_was_asked_for_is_not_commented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ceilings_of", lambda _: SOME)
    hardware = choose_hardware("cpu", "bfloat16")
    assert proposing_bfloat16(hardware) == hardware


# ---------------------------------------------------------------- data sheets


@pytest.mark.parametrize("name", ["RTX 4090", "rtx-4090", "NVIDIA GeForce RTX 4090"])
def test_a_card_answers_to_what_people_call_it(name: str) -> None:
    found = ceilings_of_card(name)
    assert found.device == "RTX 4090"
    assert found.is_of_gpu
    assert not found.is_measured
    # No card reaches the rates of its data sheet.
    assert 100e12 < found.flop_per_second["bfloat16"] < 165e12
    assert found.call_seconds is None


def test_every_card_has_sound_rates() -> None:
    found = [ceilings_of_card(name) for name in KNOWN]
    for card in found:
        json.dumps(asdict(card))
        assert card.gain("bfloat16") > 1.9, card.device
        # Operations a byte: a slip of a digit in one of the two rates would show.
        intensity = card.flop_per_second["bfloat16"] / card.bytes_per_second[0][1]
        assert 50 < intensity < 450, card.device


def test_an_unknown_card_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="--card RTX 1: its rates are not known") as raised:
        ceilings_of_card("RTX 1")
    assert "RTX 4090" in str(raised.value)
    assert "leave --card out" in str(raised.value)
