"""The rows of a step, divided over processes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as some
from training import options

from qlora_kit.parallel.division import divided, share_of

LENGTHS = some.lists(some.integers(1, 2000), min_size=1, max_size=70)


@given(LENGTHS, some.integers(1, 9), some.integers(1, 8))
def test_every_row_has_one_process_and_shares_are_alike(
    lengths: list[int], count: int, batch_size: int
) -> None:
    rows = range(len(lengths))
    window = [tuple(rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)]
    shares = divided(window, lengths.__getitem__, count)
    assert Counter(row for share in shares for row in share) == Counter(rows)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    tokens = [sum(lengths[row] for row in share) for share in shares]
    assert max(tokens) - min(tokens) <= 2 * max(lengths), "about as many tokens each"
    for share in shares:
        assert [lengths[row] for row in share] == sorted(
            (lengths[row] for row in share), reverse=True
        )


def test_a_row_that_stands_twice_in_a_step_is_computed_twice() -> None:
    assert divided([(3, 3), (1,)], lambda row: row, 2) == [(3,), (3, 1)]


def test_few_rows_leave_processes_without_any() -> None:
    assert divided([(7,)], lambda row: 5, 3) == [(7,), (), ()]


@pytest.mark.parametrize(
    ("asked", "count", "expected"),
    [
        ((2, 8), 1, (2, 8)), ((2, 8), 2, (2, 4)), ((2, 8), 4, (2, 2)), ((8, 1), 2, (4, 1)),
        ((8, 1), 3, (3, 1)), ((4, 3), 2, (4, 2)), ((1, 1), 4, (1, 1)), ((2, 5), 4, (2, 2)),
    ],
)  # fmt: skip
def test_the_share_of_a_process_is_planned(
    asked: tuple[int, int], count: int, expected: tuple[int, int]
) -> None:
    config = options(batch_size=asked[0], gradient_accumulation_steps=asked[1])
    share = share_of(config, count)
    assert (share.batch_size, share.gradient_accumulation_steps) == expected
