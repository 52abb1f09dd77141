"""A frozen weight multiplies correctly, packed in any way, as buffers or as parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import relative_error, run_python
from torch import Tensor

from qlora_kit.layers.purpose import UNPACKED, announce, heard_by, purpose
from qlora_kit.layers.quantize import Quantization
from qlora_kit.layers.weight import FrozenWeight, HeldWeight

K, D = 128, 64


@pytest.fixture(params=[4, 8, 16])
def weight(request: pytest.FixtureRequest) -> FrozenWeight:
    values = torch.randn(K, D, generator=torch.Generator().manual_seed(0))
    return Quantization(request.param).freeze(values)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(size, generator=generator) for size in ((3, 5, D), (3, 5, K), (K,)))


def test_both_products_are_those_of_the_unpacked_weight(weight: FrozenWeight) -> None:
    x, grad_y, bias = inputs()
    wide = weight.dequantize(torch.float32).double()
    y = x.double() @ wide.T + bias.double()
    assert relative_error(weight.product(x, bias), y) <= 1e-6
    assert relative_error(weight.product_back(grad_y), grad_y.double() @ wide) <= 1e-6


def test_a_bias_of_another_dtype_is_cast(weight: FrozenWeight) -> None:
    x, _, bias = inputs()
    y = weight.product(x.bfloat16(), bias)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, weight.product(x, bias)) < 1e-2


def test_its_tensors_can_be_parameters_without_gradient(weight: FrozenWeight) -> None:
    x, _, _ = inputs()
    before, names = weight.product(x), list(weight.state_dict())
    size = weight.stored_bytes
    assert weight.as_parameters() is weight
    assert list(weight.state_dict()) == names
    assert not list(weight.buffers())
    assert not any(parameter.requires_grad for parameter in weight.parameters())
    assert torch.equal(weight.product(x), before)
    assert (weight.stored_bytes, weight.device.type) == (size, "cpu")


def test_a_held_weight_is_unpacked_once(weight: FrozenWeight) -> None:
    x, grad_y, _ = inputs()
    heard = _Heard()
    with heard_by(heard):
        held = HeldWeight(weight)
        assert not heard.purposes, "nothing is unpacked before it is needed"
        assert torch.equal(held.product(x), weight.product(x))
        assert torch.equal(held.product_back(grad_y), weight.product_back(grad_y))
    own = 0 if weight.bits == 16 else 2  # and once for the held one
    assert heard.purposes.count(UNPACKED) == (own + 1 if own else 0)


# ---------------------------------------------------------------- the compiler

IMPORTED = """
import torch
before = torch.compile
import qlora_kit.layers.weight
print(torch.compile is before, "torch._dynamo" in sys.modules)
"""

ODD = """
import torch
from qlora_kit.layers.quantize import Quantization
for quant_type in ("nf4", "fp4"):
    for shape in ((33, 65), (5, 1)):
        weight = Quantization(4, quant_type, False).freeze(torch.randn(shape))
        with torch.compiler.set_stance("force_eager"):
            plain = weight.dequantize(torch.float32)
        torch.testing.assert_close(weight.dequantize(torch.float32), plain)
from torch._dynamo.utils import counters
print(counters["stats"]["unique_graphs"])
"""


def test_importing_loads_no_compiler_and_leaves_torch_its_own() -> None:
    assert run_python(IMPORTED).split() == ["True", "False"]


@pytest.mark.slow
def test_odd_shapes_are_unpacked_the_same_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    assert int(run_python(ODD)) >= 2, "nothing was compiled"


# ---------------------------------------------------------------- purposes


class _Heard:
    def __init__(self) -> None:
        self.purposes: list[str] = []
        self.claimed: list[tuple[Any, str]] = []

    @contextlib.contextmanager
    def purpose(self, name: str) -> Iterator[None]:
        self.purposes.append(name)
        yield

    def claim(self, tensor: Tensor, purpose: str) -> None:
        self.claimed.append((tensor, purpose))


def test_one_listener_hears_and_the_one_before_it_again() -> None:
    first, second, tensor = _Heard(), _Heard(), torch.ones(1)
    with purpose("nobody hears this"):
        announce(tensor, "nor this")
    with heard_by(first):
        with pytest.raises(RuntimeError, match="inside"), heard_by(second), purpose("two"):
            raise RuntimeError("inside")
        with purpose("one"):
            announce(tensor, "one")
    assert (first.purposes, second.purposes) == (["one"], ["two"])
    assert first.claimed == [(tensor, "one")]
    assert not second.claimed
