"""Batching: every row comes once, padding is little, and only tokens are supervised."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from data_fixtures import make_tokenizer, samples_of
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_numbers

from qlora_kit.config import TokenOptions
from qlora_kit.data.batch import (
    TokenRows,
    TokenTable,
    collate,
    epoch_batches,
    largest_batch,
    plan_windows,
)
from qlora_kit.data.shapes import Pair
from qlora_kit.data.tokens import tokenize
from qlora_kit.model.architecture import architecture_from
from qlora_kit.model.width import batch_width


def _rows(*lengths: int) -> list[dict[str, Any]]:
    return [
        {"input_ids": list(range(5, 5 + n)), "labels": [-100, *range(6, 5 + n)], "row": index}
        for index, n in enumerate(lengths)
    ]


LENGTHS = st.lists(st.integers(1, 60), max_size=300)


@given(lengths=LENGTHS, size=st.integers(1, 9), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_has_every_row_once(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    rows = TokenRows(_rows(*lengths))
    batches = epoch_batches(rows, size, seed, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    assert len(batches) == -(-len(rows) // size)
    assert sum(len(batch) != size for batch in batches) == (len(rows) % size > 0)
    assert batches == epoch_batches(rows, size, seed, epoch)


@pytest.mark.parametrize("size", [1, 4])
def test_order_depends_on_seed_and_epoch(size: int) -> None:
    rows = TokenRows(_rows(*range(1, 101)))
    orders = [epoch_batches(rows, size, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_grouping_by_length_saves_padding() -> None:
    source = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 500, (2000,), generator=source).tolist()
    rows = TokenRows([{"input_ids": [0] * n} for n in lengths])

    def padded(batches: list[tuple[int, ...]]) -> int:
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)

    order = [index for (index,) in epoch_batches(rows, 1, 0, 0)]
    plain = [tuple(order[start : start + 8]) for start in range(0, len(order), 8)]
    assert sum(lengths) / padded(epoch_batches(rows, 8, 0, 0)) > 0.97
    assert sum(lengths) / padded(plain) < 0.65
    # Long and short batches come mixed: otherwise the loss would swing with the length.
    longest = [max(lengths[i] for i in batch) for batch in epoch_batches(rows, 8, 0, 0)]
    assert max(longest[:50]) > 400
    assert min(longest[:50]) < 100


def test_lengths_of_a_dataset_follow_its_selection() -> None:
    items = [Pair("q", "z" * n, f"x:{n}") for n in range(1, 7)]
    made = tokenize(samples_of(*items), make_tokenizer(), TokenOptions(), cache=False)
    expected = [len(ids) for ids in made.rows["input_ids"]]
    assert made.rows.lengths() == expected
    assert made.rows.select([4, 0, 2]).lengths() == [expected[i] for i in (4, 0, 2)]
    assert sorted(i for batch in epoch_batches(made.rows, 4, 0, 0) for i in batch) == [*range(6)]


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12), data=st.data())
def test_a_list_and_a_table_of_the_same_rows_say_the_same(
    lengths: list[int], data: st.DataObject
) -> None:
    rows = _rows(*lengths)
    plain, table = TokenRows.of(rows), TokenRows.of(datasets.Dataset.from_list(rows))
    assert isinstance(table, TokenTable)
    assert TokenRows.of(table) is table
    assert list(plain) == list(table) == rows
    assert len(plain) == len(table) == len(rows)
    assert plain.lengths() == table.lengths() == lengths
    assert plain.largest_token() == table.largest_token() == max(lengths) + 4
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    some = table.select(indices)
    assert list(some) == [rows[index] for index in indices]
    assert some["row"][:] == indices
    assert some.lengths() == [lengths[index] for index in indices]
    of_each = [index > 0 for length in some.lengths() for index in range(length)]
    assert some.is_supervised().tolist() == of_each


def test_the_hash_of_rows_is_of_their_ids_and_labels_and_of_where_each_ends() -> None:
    def hash_of(*rows: tuple[list[int], list[int]]) -> str:
        table = [{"input_ids": ids, "labels": labels} for ids, labels in rows]
        return TokenTable(datasets.Dataset.from_list(table)).content_hash()

    one, two = ([5, 6, 7], [-100, 6, 7]), ([8], [8])
    other_ids, other_labels = ([5, 6, 9], one[1]), (one[0], [-100, 6, 9])
    moved = ([5, 6], [-100, 6]), ([7, 8], [7, 8])
    tables = ((one, two), (two, one), (one,), (other_ids, two), (other_labels, two), moved)
    different = [hash_of(*rows) for rows in tables]
    assert len({*different}) == len(different)
    whole = [{"input_ids": ids, "labels": labels} for ids, labels in (two, one, two)]
    part = TokenTable(datasets.Dataset.from_list(whole)).select([1, 2])
    assert part.content_hash() == hash_of(one, two), "however the rows are held"


def test_rows_that_are_no_sequence_of_pythons_are_taken_as_they_are() -> None:
    class Rows:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, Any]:
            return _rows(2, 4, 3)[index]

    rows: Any = Rows()
    assert TokenRows.of(rows).lengths() == [2, 4, 3]


@given(count=st.integers(0, 50), accumulation=st.integers(1, 9))
def test_windows_keep_the_order(count: int, accumulation: int) -> None:
    batches = [(index,) for index in range(count)]
    windows = plan_windows(batches, accumulation)
    assert [batch for window in windows for batch in window] == batches
    assert all(len(window) == accumulation for window in windows[:-1])


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_collating_pads_on_the_right(lengths: list[int]) -> None:
    rows = _rows(*lengths)
    batch = collate(rows, pad_token_id=5)
    assert batch.input_ids.shape == batch.labels.shape == (len(rows), max(lengths))
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.rows == tuple(range(len(rows)))
    assert (batch.lengths, batch.longest) == (tuple(lengths), max(lengths))
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        assert batch.input_ids[index, :length].tolist() == row["input_ids"]
        assert batch.labels[index, :length].tolist() == row["labels"]
        assert (batch.input_ids[index, length:] == 5).all()
        assert (batch.labels[index, length:] == -100).all()
    assert batch.tokens == sum(lengths)
    assert batch.weight == sum(lengths) - len(lengths)


def test_a_batch_moves_but_for_its_ids() -> None:
    batch = collate(_rows(2, 3), 0)
    moved = batch.to("meta")
    assert (moved.rows, moved.lengths) == (batch.rows, batch.lengths)
    assert moved.input_ids is batch.input_ids
    assert moved.labels.device.type == moved.positions.device.type == "meta"


def test_a_supervised_end_survives_padding_with_the_same_token() -> None:
    tokenizer = make_tokenizer()
    items = [Pair("q", "z", "x:1"), Pair("q", "zzzz", "x:2")]
    made = tokenize(samples_of(*items), tokenizer, TokenOptions(), cache=False)
    batch = collate(list(made.rows), tokenizer.pad_token_id)
    assert batch.labels[0].tolist().count(tokenizer.eos_token_id) == 1
    assert batch.weight == made.counts.weight
    assert batch.tokens == made.counts.tokens


@pytest.mark.parametrize(
    ("lengths", "count", "expected"),
    [
        ([3, 9, 5], 1, (1,)),
        ([3, 9, 5], 2, (1, 2)),
        ([9, 3, 9, 9, 5], 2, (0, 2)),
        ([9, 3, 9, 9, 5], 4, (0, 2, 3, 4)),
        ([7, 7, 7], 2, (0, 1)),
        ([7, 4], 5, (0, 1)),
    ],
)
def test_the_largest_batch_is_of_the_longest_rows(
    lengths: list[int], count: int, expected: tuple[int, ...]
) -> None:
    assert largest_batch(lengths, count) == expected


# ---------------------------------------------------------------- width

CPU, GPU = torch.device("cpu"), torch.device("meta")


def _architecture(**numbers: Any) -> Any:
    return architecture_from({**tiny_numbers("tinyllama"), **numbers})


def test_a_batch_is_as_wide_as_it_is_told() -> None:
    rows = _rows(3, 5)
    narrow, wide = collate(rows, 0), collate(rows, 7, lambda longest: longest + 4)
    assert wide.input_ids.shape == wide.labels.shape == (2, 9)
    assert (wide.input_ids[:, 5:] == 7).all()
    assert (wide.tokens, wide.longest) == (narrow.tokens, narrow.longest)
    found, expected = (
        batch.labels.flatten()[batch.positions + 1].tolist() for batch in (wide, narrow)
    )
    assert found == expected


def test_an_epoch_has_few_widths_on_a_gpu_and_every_length_on_a_cpu() -> None:
    lengths = [*range(1, 1025)]
    rows = TokenRows(_rows(*lengths))
    architecture = _architecture(max_position_embeddings=4096)
    widths: dict[torch.device, list[int]] = {CPU: [], GPU: []}
    for device, found in widths.items():
        for indices in epoch_batches(rows, 2, seed=0, epoch=0):
            longest = max(lengths[index] for index in indices)
            found.append(batch_width(longest, architecture, device))
            assert longest <= found[-1] < longest + 64
    assert {*widths[GPU]} == {64 * multiple for multiple in range(1, 17)}
    assert len({*widths[CPU]}) == 512


@pytest.mark.parametrize(
    ("numbers", "tokens", "expected"),
    [
        ({"max_position_embeddings": 100}, 90, 100),
        ({"max_position_embeddings": 100}, 100, 100),
        ({"max_position_embeddings": 100}, 101, 128),  # such a row is refused elsewhere
        ({"max_position_embeddings": 100}, 20, 64),
        ({"model_type": "mistral", "sliding_window": 128}, 90, 127),
        ({"model_type": "mistral", "sliding_window": 128}, 128, 128),
        ({"model_type": "mistral", "sliding_window": None}, 90, 128),
    ],
)
def test_no_batch_is_widened_to_where_the_model_computes_something_else(
    numbers: dict[str, Any], tokens: int, expected: int
) -> None:
    architecture = _architecture(**{"max_position_embeddings": 999, **numbers})
    assert batch_width(tokens, architecture, GPU) == expected


def test_a_batch_is_not_widened_to_where_long_frequencies_begin() -> None:
    numbers = tiny_numbers("phi-4-mini")
    numbers |= {"max_position_embeddings": 999, "original_max_position_embeddings": 100}
    numbers["sliding_window"] = 998
    numbers["rope_scaling"] = {**numbers["rope_scaling"], "original_max_position_embeddings": 100}
    architecture = architecture_from(numbers)
    assert batch_width(90, architecture, GPU) == 100
    assert batch_width(101, architecture, GPU) == 128
