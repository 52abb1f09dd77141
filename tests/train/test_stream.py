"""Training on a stream: resume to the bit, other processes, and data that fails on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_fixtures import open_stream, records_of, streamed_rows, write_records
from training import losses, make_adapter, options, record, weights_of

import qlora_kit as qk
from qlora_kit.data import streamed_samples
from qlora_kit.data.stream import StreamedRows
from qlora_kit.errors import DataError
from qlora_kit.events import CheckpointSaved, Event, RunStarted, StepFinished
from qlora_kit.train.checkpoint import read_state
from qlora_kit.train.loop import Saving

Run = tuple[dict[str, torch.Tensor], list[Event]]


@pytest.fixture
def model(save_tiny: Callable[..., Path]) -> Path:
    return save_tiny(vocab_size=512)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_records(tmp_path / "big.jsonl", records_of(30))


def train(
    model: Path, rows: StreamedRows, output: Path, resume: Path | None = None, **changes: Any
) -> Run:
    """Train on a stream; return the weights and the events."""
    adapter = make_adapter(model, dropout=0.2)
    output.mkdir(exist_ok=True)
    saving = Saving(output, qk.BaseRecord.of(adapter.base), resume)
    config = options(**{"gradient_accumulation_steps": 4, "save_steps": 1, **changes})
    events: list[Event] = []
    with closing(rows):
        qk.train_adapter(adapter, rows, config, saving=saving, announce=record(events))
    return weights_of(adapter), events


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("made", "changes"),
    [
        ({}, {}),
        (
            {"max_length": 24, "long_samples": "drop", "without": frozenset({0, 8, 29})},
            {"batch_size": 3},
        ),
        ({"workers": 1}, {"batch_size": 2, "gradient_accumulation_steps": 2, "packing": True}),
    ],
)
def test_a_resumed_stream_has_the_bits_of_the_unbroken_one(
    model: Path, data: Path, tmp_path: Path, made: dict[str, Any], changes: dict[str, Any]
) -> None:
    def rows() -> StreamedRows:
        return streamed_rows(open_stream(data), **{"buffer": 16, "max_length": 48, **made})

    whole, told = train(model, rows(), tmp_path / "whole", max_steps=12, **changes)
    last = read_state(tmp_path / "whole" / "checkpoint-12").progress
    assert last.epoch >= 1, "the end of a pass lies between"
    for step in (3, 8, 11):
        part, again = train(
            model, rows(), tmp_path / f"from-{step}", tmp_path / "whole" / f"checkpoint-{step}",
            max_steps=12, **changes,
        )  # fmt: skip
        assert_equal(part, whole)
        assert losses(again) == losses(told)[step:]
        state = read_state(tmp_path / f"from-{step}" / "checkpoint-12").progress
        assert state == last, "with the counts of all passes"


def test_rows_of_a_step_are_the_same_in_any_order_of_length(
    model: Path, data: Path, tmp_path: Path
) -> None:
    def losses_of(**changes: Any) -> list[float]:
        rows = streamed_rows(open_stream(data), buffer=8, max_length=48)
        adapter = make_adapter(model)
        events: list[Event] = []
        config = options(batch_size=4, gradient_accumulation_steps=2, max_steps=4, **changes)
        qk.train_adapter(adapter, rows, config, announce=record(events))
        return losses(events)

    assert losses_of() == pytest.approx(losses_of(group_by_length=False), rel=1e-5)


def test_epochs_of_a_stream_are_told_as_far_as_they_are_known(
    model: Path, data: Path, tmp_path: Path
) -> None:
    _, events = train(model, streamed_rows(open_stream(data)), tmp_path / "a", max_steps=9)
    (started,) = (event for event in events if isinstance(event, RunStarted))
    assert started.epochs is None
    epochs = [event.epoch for event in events if isinstance(event, StepFinished)]
    assert epochs == [0.0] * 8 + [1.0]
    counted = streamed_rows(open_stream(data))
    counted.in_pass = 30
    _, events = train(model, counted, tmp_path / "b", max_steps=None, epochs=2, save_steps=None)
    (started,) = (event for event in events if isinstance(event, RunStarted))
    assert (started.total_steps, started.epochs) == (16, 2.0)
    epochs = [event.epoch for event in events if isinstance(event, StepFinished)]
    assert epochs[3] == 0.5
    saved = [event.optimizer_step for event in events if isinstance(event, CheckpointSaved)]
    assert saved == [8, 16], "at the end of each pass"


def test_a_fault_on_the_way_saves_what_was_trained_and_can_be_skipped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[Any] = records_of(80)
    records[70] = {"question": "only"}
    data = write_records(tmp_path / "big.jsonl", records)
    monkeypatch.setattr(streamed_samples, "HEAD_RECORDS", 5)

    def rows(**skip: bool) -> StreamedRows:
        return streamed_rows(open_stream(data, **skip), buffer=4)

    with pytest.raises(DataError, match=r'big\.jsonl:71: no "answer"; expected it as in the qa'):
        train(model, rows(), tmp_path / "run", max_steps=22, save_steps=None)
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    state = json.loads((saved / "state.json").read_text())
    assert state["progress"]["optimizer_step"] == 15, "of the chunks before that of the fault"
    assert not state["progress"]["finished"]
    skips = {"skip_bad_lines": True}
    found, _ = train(model, rows(**skips), tmp_path / "more", saved, max_steps=22)
    expected, _ = train(model, rows(**skips), tmp_path / "anew", max_steps=22)
    assert_equal(found, expected)


def test_a_file_that_is_cut_while_training_saves_what_was_trained(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_records(tmp_path / "big.jsonl", records_of(3000))
    size = data.stat().st_size
    rows = streamed_rows(open_stream(data), buffer=1900)
    from qlora_kit.train import loop

    take = loop.OptimizerStep.take

    def cutting(step: Any, window: Any, rate: float, number: int = 0, *more: Any) -> Any:
        if number == 3:
            os.truncate(data, size - size // 4)
        return take(step, window, rate, number, *more)

    monkeypatch.setattr(loop.OptimizerStep, "take", cutting)
    with pytest.raises(DataError) as caught:
        train(model, rows, tmp_path / "run", max_steps=600, save_steps=None)
    (line,) = caught.value.faults
    assert line == (
        f"{data}: {size:,} bytes when it was opened, and {size - size // 4:,} now; expected a file "
        "that stays as it is; restore it and go on with --resume, or start a new run"
    )
    assert (tmp_path / "run" / "last").is_file()
