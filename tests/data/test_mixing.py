"""Rows of several sources are mixed by weights: in an epoch, in every step, and without repeats."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qlora_kit as qk
from qlora_kit.data.batch import TokenRows, epoch_batches, plan_windows
from qlora_kit.data.mixing import Mixture, epoch_windows
from qlora_kit.data.packing import Fill, packed
from qlora_kit.train.loop import plan_steps

SIZES = st.lists(st.integers(1, 400), min_size=2, max_size=5)


def mixtures() -> Any:
    """Mixtures of any sizes and weights."""
    weights = st.floats(0.01, 100, allow_nan=False)
    return SIZES.flatmap(
        lambda sizes: st.builds(
            Mixture,
            st.just(tuple(sizes)),
            st.lists(weights, min_size=len(sizes), max_size=len(sizes)).map(tuple),
        )
    )


def rows_of(sizes: tuple[int, ...], weights: tuple[float, ...] | None) -> TokenRows:
    """Token rows whose first id is the number of their source; the second source's are long."""
    rows = [
        {"input_ids": [source] * (3 + row % 7 + 20 * (source == 1)), "labels": [], "row": row}
        for source, size in enumerate(sizes)
        for row in range(size)
    ]
    return TokenRows(rows, None if weights is None else Mixture(sizes, weights))


def sources_in(rows: TokenRows, window: Any) -> Counter[int]:
    return Counter(rows[index]["input_ids"][0] for batch in window for index in batch)


@given(mixtures())
def test_an_epoch_has_the_weights_shares_and_ends_with_the_first_source(mixture: Mixture) -> None:
    counts = mixture.rows_of_sources
    exact = min(size / share for size, share in zip(mixture.sizes, mixture.shares, strict=True))
    for size, share, count in zip(mixture.sizes, mixture.shares, counts, strict=True):
        assert count <= size
        assert abs(count - share * exact) <= 0.5 + 1e-6
    assert any(count == size for count, size in zip(counts, mixture.sizes, strict=True))
    if mixture.rows >= 400:  # a row is a quarter of a per cent
        for share, count in zip(mixture.shares, counts, strict=True):
            assert abs(count / mixture.rows - share) < 0.01


@given(mixtures(), st.integers(0, 3))
def test_no_row_of_a_source_comes_again_before_all_have_come(mixture: Mixture, seed: int) -> None:
    if not all(mixture.rows_of_sources):
        return
    first = 0
    orders = [mixture.order(seed, epoch) for epoch in range(4)]
    for size, count in zip(mixture.sizes, mixture.rows_of_sources, strict=True):
        of_epochs = [[row for row in order if first <= row < first + size] for order in orders]
        assert all(len(rows) == count for rows in of_epochs)
        drawn = [row for rows in of_epochs for row in rows]
        for start in range(0, len(drawn), size):
            one_pass = drawn[start : start + size]
            assert len({*one_pass}) == len(one_pass)
        first += size


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = [
        Mixture((60, 30), (3, 1)).order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)
    ]
    assert len({*map(tuple, orders)}) == 6
    # An epoch needs none before it, as after a resume; and the unit of weights does not matter.
    assert Mixture((60, 30), (3, 1)).order(1, 2) == orders[5]
    assert Mixture((60, 30), (0.75, 0.25)).order(1, 2) == orders[5]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 9.0), (0.5, 0.3, 0.2), (6.0, 1.0, 1.0)])
def test_every_step_has_about_the_shares(
    weights: tuple[float, ...], by_length: bool, packing: bool
) -> None:
    rows = rows_of((900, 700, 400)[: len(weights)], weights)
    config = qk.TrainConfig(
        batch_size=4, gradient_accumulation_steps=8, group_by_length=by_length, packing=packing
    )
    assert rows.mixture is not None
    lengths, seen = rows.lengths(), Counter[int]()
    for epoch in range(3):
        windows = epoch_windows(rows, config, epoch)
        assert len(windows) == plan_steps(rows.rows_an_epoch, config).per_epoch
        for window in windows:
            batches = packed(window, lengths, 4 * max(lengths)) if packing else window
            found = sources_in(rows, batches)
            seen += found
            for source, share in enumerate(rows.mixture.shares):
                assert abs(found[source] - share * found.total()) <= len(weights)
    for source, share in enumerate(rows.mixture.shares):
        assert abs(seen[source] / seen.total() - share) < 0.01


def test_rows_are_grouped_by_length_within_their_step() -> None:
    rows = rows_of((400, 400), (1.0, 1.0))
    found = {}
    for by_length in (False, True):
        config = qk.TrainConfig(
            batch_size=4, gradient_accumulation_steps=4, group_by_length=by_length
        )
        windows = epoch_windows(rows, config, 0)
        lengths = rows.lengths()
        padded = sum(
            len(batch) * max(lengths[i] for i in batch) for window in windows for batch in window
        )
        steps = [sorted(i for batch in window for i in batch) for window in windows]
        found[by_length] = steps, padded
    assert found[True][0] == found[False][0], "the same rows in each step"
    assert found[True][1] < 0.8 * found[False][1]


def test_the_last_step_of_an_epoch_may_be_short_and_loses_no_row() -> None:
    rows = rows_of((30, 10), (3.0, 1.0))
    config = qk.TrainConfig(batch_size=4, gradient_accumulation_steps=3)
    windows = epoch_windows(rows, config, 0)
    assert [sum(map(len, window)) for window in windows] == [12, 12, 12, 4]
    assert sorted(i for window in windows for batch in window for i in batch) == [*range(40)]


def test_without_weights_sources_are_one_list_of_rows() -> None:
    rows = rows_of((50, 30), None)
    config = qk.TrainConfig(batch_size=2, gradient_accumulation_steps=4)
    batches = epoch_batches(rows, 2, config.seed, 1, by_length=True)
    assert epoch_windows(rows, config, 1) == plan_windows(batches, 4)
    assert rows.rows_an_epoch == 80


def test_the_fill_of_packed_micro_batches_is_that_of_mixed_steps() -> None:
    config = qk.TrainConfig(batch_size=2, gradient_accumulation_steps=4, packing=True)
    mostly_short, mostly_long = (
        Fill.of(config, rows_of((300, 300), weights)) for weights in ((19.0, 1.0), (1.0, 19.0))
    )
    means = [fill.tokens / fill.steps for fill in (mostly_short, mostly_long)]
    assert all(second > 2 * first for first, second in pairwise(means))
