"""The nearest codes are those of a search among the bounds, and of bitsandbytes' kernel."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qlora_kit.layers.nearest import nearest_codes

QuantType = Literal["nf4", "fp4"]
BOOKS = pytest.mark.parametrize("name", ["nf4", "fp4"])


def book_of(name: QuantType) -> Tensor:
    book: Tensor = bnb.get_4bit_type(name, device="cpu")
    return book


def searched(scaled: Tensor, book: Tensor) -> Tensor:
    """Return the codes of scaled values by a search among the bounds."""
    ordered, order = book.sort(stable=True)
    return order[torch.bucketize(scaled, (ordered[1:] + ordered[:-1]) / 2)]


@BOOKS
def test_every_float_around_a_bound_has_its_code(name: QuantType) -> None:
    book = book_of(name)
    ordered = book.sort().values
    bounds = torch.cat([(ordered[1:] + ordered[:-1]) / 2, ordered, torch.tensor([0.0])])
    near = [bounds]
    for to in (-2.0, 2.0):
        each = bounds
        for _ in range(200):
            each = torch.nextafter(each, torch.tensor(to))
            near.append(each)
    values = torch.cat(near).view(1, -1)
    found = nearest_codes(values, torch.ones(1), book)
    assert torch.equal(found.long(), searched(values, book))


@BOOKS
def test_every_border_of_its_table_has_its_code(name: QuantType) -> None:
    book = book_of(name)
    borders = torch.arange(4096) * (2 / 4095) - 1
    around = [torch.nextafter(borders, torch.tensor(to)) for to in (-2.0, 2.0)]
    values = torch.stack([borders, *around])
    found = nearest_codes(values, torch.ones(3), book)
    assert torch.equal(found.long(), searched(values, book))


@BOOKS
def test_the_codes_are_those_of_bitsandbytes(name: QuantType) -> None:
    values = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.quantize_4bit(values, blocksize=64, quant_type=name)
    expected = torch.stack((codes.view(-1) >> 4, codes.view(-1) & 15), 1).view(values.shape)
    found = nearest_codes(values, state.absmax, book_of(name))
    book = book_of(name)
    # fp4 has two codes of zero.
    assert torch.equal(book[found.int()], book[expected.int()])
    if name == "nf4":
        assert torch.equal(found, expected)


@BOOKS
def test_what_is_beyond_the_book_has_its_last_value(name: QuantType) -> None:
    book = book_of(name)
    values = torch.tensor([[1e30, -1e30, 2.0, -2.0], [0.0, 0.0, 0.0, 0.0]])
    found = book[nearest_codes(values, torch.tensor([1.0, 0.0]), book).int()]
    assert found[0].tolist() == [1.0, -1.0, 1.0, -1.0]
    assert found[1].tolist() == [0.0] * 4
