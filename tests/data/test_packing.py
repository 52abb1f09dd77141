"""Packing lays the rows of a step into few micro-batches, and neither drops nor repeats one."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import run

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import TokenRows, collate, collate_packed, epoch_batches
from qlora_kit.data.packing import Fill, packed

CAPACITY = 40


@given(
    lengths=st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60),
    size=st.integers(1, 5),
)
def test_the_rows_are_those_of_the_window_and_fit(lengths: list[int], size: int) -> None:
    rows = range(len(lengths))
    window = [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]
    found = packed(window, lengths, CAPACITY)
    assert sorted(row for indices in found for row in indices) == list(rows)
    tokens = [sum(lengths[row] for row in indices) for indices in found]
    assert max(tokens) <= CAPACITY
    assert all(list(indices) == sorted(indices) for indices in found)
    assert [indices[0] for indices in found] == sorted(indices[0] for indices in found)
    # Johnson's bound of best fit, and the one that holds of any two micro-batches.
    assert len(found) <= 11 / 9 * math.ceil(sum(lengths) / CAPACITY) * 2
    assert all(one + other > CAPACITY for one, other in pairwise(tokens))
    assert found == packed(window, lengths, CAPACITY)


def test_a_row_goes_where_the_least_room_is_left_over() -> None:
    lengths = [30, 25, 10, 15]
    assert packed([(0, 1), (2, 3)], lengths, CAPACITY) == [(0, 2), (1, 3)]


def test_the_fill_is_that_of_the_first_steps() -> None:
    rows = TokenRows([{"input_ids": [1] * n, "labels": [1] * n, "row": n} for n in (30, 25, 10, 5)])
    config = TrainConfig(batch_size=1, gradient_accumulation_steps=4)
    fill = Fill.of(config, rows)
    assert fill == Fill(steps=1, padded=4, micro_batches=3, tokens=70, capacity=30)
    assert fill.described() == (
        "3 micro-batches a step instead of 4, of at most 30 tokens, 78% full"
    )


def test_a_packed_batch_supervises_what_a_padded_one_does() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "row": 4},
        {"input_ids": [8], "labels": [8], "row": 2},
        {"input_ids": [9, 10], "labels": [-100, 10], "row": 7},
    ]
    batch = collate_packed(rows, 0, lambda tokens: tokens + 2)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 0, 0]]
    assert batch.segments == (3, 1, 2, 2)
    assert (batch.lengths, batch.rows, batch.tokens, batch.longest) == ((3, 1, 2), (4, 2, 7), 6, 3)
    padded = collate(rows, 0)
    assert batch.targets.tolist() == padded.targets.tolist() == [6, 7, 10]
    assert batch.place_of_sample.tolist() == [0, 0, 2]
    assert (padded.positions // padded.input_ids.shape[1]).tolist() == [0, 0, 2]
    assert torch.equal(batch.input_ids.flatten()[batch.positions + 1], batch.targets)


def test_an_epoch_need_not_be_sorted_by_length() -> None:
    rows = TokenRows([{"input_ids": [1] * n, "labels": [1] * n, "row": n} for n in range(1, 40)])
    lengths = rows.lengths()

    def spread(by_length: bool) -> int:
        batches = epoch_batches(rows, 4, 1, 0, by_length=by_length)
        assert sorted(row for batch in batches for row in batch) == list(range(39))
        return sum(
            max(lengths[r] for r in batch) - min(lengths[r] for r in batch) for batch in batches
        )

    assert spread(True) == 3 * 9 + 2
    assert spread(False) > 3 * spread(True)


def test_check_shows_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "a.jsonl"
    lines = [{"prompt": "x " * (1 + 12 * (n % 5)), "completion": "yes"} for n in range(40)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = tmp_path / "data.html"
    small = ("--batch-size", "1", "--gradient-accumulation-steps", "16")
    asked = ("check", "--data", str(data), "--json", *small)
    code, out, _ = run(*asked, "--html", str(page), capsys=capsys)
    assert code == 0
    step = json.loads(out)["packed"]
    samples = [sample for each in step["micro_batches"] for sample in each]
    assert len(samples) == 16
    assert len({sample["place"] for sample in samples}) == 16
    assert all(
        sum(sample["tokens"] for sample in each) <= step["capacity"]
        for each in step["micro_batches"]
    )
    strips = page.read_text().count('<div class="strip">')
    assert strips == len(step["micro_batches"]) < 16
    code, out, _ = run(*asked, "--no-packing", capsys=capsys)
    assert (code, json.loads(out)["packed"]) == (0, None)
    assert json.loads(out)["packing"] == "off: --no-packing"
