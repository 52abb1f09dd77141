"""One LoRA layer: exact gradients, packed bases that equal unpacked ones, and no other memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.layers.draws import Draws
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.quantize import Quantization
from qlora_kit.layers.weight import FourBitWeight, Int8Weight, PlainWeight

SCHEMES = {
    "nf4-double": Quantization(4, "nf4", True),
    "nf4": Quantization(4, "nf4", False),
    "fp4-double": Quantization(4, "fp4", True),
    "fp4": Quantization(4, "fp4", False),
    "int8": Quantization(8),
    "plain": Quantization(16),
}
# (K, D); 252 · 123 and 1 · 3 are no multiple of the block of 64 weights.
SHAPES = [(252, 123), (64, 507), (33, 65), (1, 3), (5, 1)]
RANK, SCALING = 3, 1.7


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_layer(
    k: int,
    d: int,
    scheme: Quantization,
    *,
    bias: bool = True,
    dropout: float = 0.0,
    stored: torch.dtype = torch.float32,
) -> LoRALinear:
    """A layer with a random base and a random A and B."""
    frozen = FrozenLinear(d, k, bias=bias)
    frozen.weight = scheme.freeze(random(k, d).to(stored))
    if bias:
        frozen.bias = random(k, seed=1)
    layer = LoRALinear(frozen, rank=RANK, scaling=SCALING, dropout=dropout)
    layer.lora_A.data = random(RANK, d, seed=2)
    layer.lora_B.data = random(k, RANK, seed=3)
    return layer


def plain_lora(x: Tensor, weight: Tensor, layer: LoRALinear, kept: Tensor | None = None) -> Tensor:
    """Compute the layer's equation with plain autograd, on an unpacked weight."""
    dropped = x if kept is None else x * kept / (1 - layer.dropout)
    delta = (dropped @ layer.lora_A.T) @ layer.lora_B.T
    y = x @ weight.T + SCALING * delta
    return y if layer.frozen.bias is None else y + layer.frozen.bias


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """Collect every tensor that autograd saves for backward."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_exact_in_float64(bias: bool, dropout: float) -> None:
    layer = make_layer(5, 7, SCHEMES["plain"], bias=bias, dropout=dropout).double().train()
    x = random(2, 3, 7, seed=4).double().requires_grad_()
    a, b = layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_()

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same mask each time
        return functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert run(x, a, b).dtype == torch.float64
    assert torch.autograd.gradcheck(run, (x, a, b), fast_mode=False)


def test_frozen_layer_has_exact_input_gradients_in_float64() -> None:
    frozen = make_layer(5, 7, SCHEMES["plain"]).double().frozen
    x = random(2, 3, 7, seed=4).double().requires_grad_()
    assert torch.autograd.gradcheck(frozen, (x,))
    torch.testing.assert_close(frozen(x), F.linear(x, frozen.weight.values, frozen.bias))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_base_equals_its_unpacked_twin(scheme: str, shape: tuple[int, int]) -> None:
    k, d = shape
    layer = make_layer(k, d, SCHEMES[scheme])
    weight = layer.frozen.weight.dequantize(torch.float32)
    assert weight.shape == shape
    x = random(2, 5, d, seed=4).requires_grad_()
    target = random(2, 5, k, seed=5)
    inputs = (x, layer.lora_A, layer.lora_B)
    found, expected = layer(x), plain_lora(x, weight, layer)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((found * target).sum(), inputs)
    theirs = torch.autograd.grad((expected * target).sum(), inputs)
    assert max(map(relative_error, ours, theirs)) <= 1e-5

    frozen, plain = layer.frozen(x), F.linear(x, weight, layer.frozen.bias)
    torch.testing.assert_close(frozen, plain, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad((frozen * target).sum(), x)
    (wanted,) = torch.autograd.grad((plain * target).sum(), x)
    assert relative_error(grad, wanted) <= 1e-5


@pytest.mark.parametrize("scheme", ["nf4-double", "int8", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_give_16_bit_outputs_and_fp32_gradients(
    scheme: str, dtype: torch.dtype
) -> None:
    layer = make_layer(64, 507, SCHEMES[scheme], stored=torch.bfloat16)
    x = random(9, 507, seed=4).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    found = layer(x)
    expected = plain_lora(wide, layer.frozen.weight.dequantize(torch.float32), layer)
    found.float().square().sum().backward()
    grads = [p.grad.clone() for p in (layer.lora_A, layer.lora_B)]
    layer.zero_grad()
    expected.square().sum().backward()
    assert found.dtype == x.grad.dtype == dtype
    assert grads[0].dtype == grads[1].dtype == torch.float32
    # One rounding of the output, one of its gradient, one of the unpacked weight.
    tolerance = 4 * torch.finfo(dtype).eps
    assert relative_error(found, expected) <= tolerance
    assert relative_error(x.grad, wide.grad) <= tolerance
    assert relative_error(grads[0], layer.lora_A.grad) <= tolerance
    assert relative_error(grads[1], layer.lora_B.grad) <= tolerance


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dropout_gradients_equal_those_of_the_twin_under_the_same_mask(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(33, 65, SCHEMES[scheme], dropout=0.3).train()
    masks = []
    draw: Callable[..., Tensor | None] = layer.draw_kept
    monkeypatch.setattr(layer, "draw_kept", lambda *of: masks.append(draw(*of)) or masks[-1])
    x = random(4, 5, 65, seed=4).requires_grad_()
    inputs = (x, layer.lora_A, layer.lora_B)
    found = layer(x)
    (kept,) = masks
    weight = layer.frozen.weight.dequantize(torch.float32)
    expected = plain_lora(x, weight, layer, kept.view(4, 5, 65))
    assert relative_error(found, expected) <= 1e-5
    assert relative_error(found, plain_lora(x, weight, layer)) > 0.01  # the mask does something
    ours = torch.autograd.grad(found.square().sum(), inputs)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    assert max(map(relative_error, ours, theirs)) <= 1e-5


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    layer = make_layer(4, 50, SCHEMES["plain"], dropout=0.25)
    x = random(1, 50, seed=4)
    exact = plain_lora(x, layer.frozen.weight.values, layer)
    torch.testing.assert_close(layer.eval()(x), exact)
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = layer.train()(x.expand(20_000, 50))
    assert relative_error(drawn.mean(0), exact[0]) < 0.02
    assert drawn.std(0).min() > 0.1


def test_base_stays_frozen_and_a_fresh_layer_adds_nothing() -> None:
    frozen = make_layer(33, 65, SCHEMES["nf4-double"]).frozen
    layer = LoRALinear(frozen, rank=4, scaling=2.0)
    x = random(3, 65)
    assert torch.equal(layer(x), frozen(x))
    assert [name for name, _ in layer.named_parameters()] == ["lora_A", "lora_B"]
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    bound = 65**-0.5  # Kaiming-uniform with a = √5
    assert 0.9 * bound < layer.lora_A.abs().max() <= bound


@pytest.mark.parametrize("scheme", SCHEMES)
def test_delta_is_what_the_layer_adds(scheme: str) -> None:
    layer = make_layer(33, 65, SCHEMES[scheme])
    x = random(3, 65)
    torch.testing.assert_close(
        layer(x) - layer.frozen(x), x @ layer.delta().T, rtol=1e-4, atol=1e-4
    )


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layer_saves_no_unpacked_weight_and_no_second_copy_of_x(
    scheme: str, dtype: torch.dtype
) -> None:
    k, d, n = 48, 96, 20
    layer = make_layer(k, d, SCHEMES[scheme], stored=torch.bfloat16)
    x = random(n, d).to(dtype).requires_grad_()
    with saved_tensors() as saved:
        layer(x).sum()
    known = {t.data_ptr() for t in (layer.lora_A, layer.lora_B, x)}
    new = [tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in known]
    assert new == [(n, RANK)]
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in saved) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_frozen_layer_saves_nothing(scheme: str) -> None:
    layer = make_layer(48, 96, SCHEMES[scheme], bias=False).frozen
    x = random(20, 96).requires_grad_()
    with saved_tensors() as saved:
        layer(x).sum()
    assert saved == []


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_graph_keeps_no_packed_tensor_and_asks_the_weight_again(
    scheme: str, wrapped: bool
) -> None:
    """A loader that streams weights may move them away and back between forward and backward."""
    layer = make_layer(48, 96, SCHEMES[scheme])
    weight = layer.frozen.weight
    old = weight.dequantize(torch.float32).clone()
    x = random(20, 96).requires_grad_()
    y = (layer if wrapped else layer.frozen)(x)
    alive = [weakref.ref(tensor) for tensor in weight.buffers()]
    for name in weight._buffers:
        weight._buffers[name] = weight.get_buffer(name).clone()
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)
    (grad,) = torch.autograd.grad(y.sum(), x)
    expected = old.sum(0) + (layer.delta().sum(0) if wrapped else 0)
    torch.testing.assert_close(grad, expected.expand(20, 96), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- packing


def test_packed_sizes_are_what_the_scheme_promises() -> None:
    weight = random(256, 512)
    values = weight.numel()
    blocks = values // 64
    sizes = {name: scheme.freeze(weight).stored_bytes for name, scheme in SCHEMES.items()}
    assert sizes["nf4"] == sizes["fp4"] == values // 2 + 4 * blocks
    tables = 256 * 4 + 4  # code book of the constants and their offset
    assert sizes["nf4-double"] == values // 2 + blocks + blocks // 256 * 4 + tables
    assert sizes["int8"] == values + 256 * 4
    assert sizes["plain"] == 4 * values


@pytest.mark.parametrize(("scheme", "limit"), [("nf4", 0.1), ("fp4", 0.13), ("int8", 0.01)])
def test_quantisation_error_is_small(scheme: str, limit: float) -> None:
    weight = random(252, 123)
    found = SCHEMES[scheme].freeze(weight).dequantize(torch.float32)
    assert 1e-4 < relative_error(found, weight) < limit


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bits_are_those_of_bitsandbytes(quant_type: str, double: bool) -> None:
    import bitsandbytes.functional as bnb

    weight = random(252, 123)
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=quant_type, compress_statistics=double
    )
    ours = Quantization(4, quant_type, double).freeze(weight)
    assert isinstance(ours, FourBitWeight)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.dequantize(torch.float32), bnb.dequantize_4bit(codes, state))


def test_8_bits_are_those_of_bitsandbytes() -> None:
    import bitsandbytes.functional as bnb

    weight = random(252, 123)
    ours = SCHEMES["int8"].freeze(weight)
    assert isinstance(ours, Int8Weight)
    expected = bnb.int8_vectorwise_dequant(ours.codes, ours.absmax)
    torch.testing.assert_close(ours.dequantize(torch.float32), expected, rtol=1e-6, atol=0)
    assert ours.dequantize(torch.bfloat16).dtype == torch.bfloat16


class _Strides(TorchDispatchMode):
    """Records whether the rows of the 8-bit kernel's argument are contiguous in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[bool] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.bitsandbytes.int8_vectorwise_quant.default:
            self.given.append(args[0].is_contiguous())
        return func(*args, **(kwargs or {}))


def test_a_transposed_weight_is_laid_in_rows_for_the_8_bit_kernel() -> None:
    """The kernel of a GPU reads a raw pointer; on a CPU the fault would not show."""
    weight = random(123, 252).half()
    expected = SCHEMES["int8"].freeze(weight.T.contiguous())
    with _Strides() as strides:
        found = SCHEMES["int8"].freeze(weight.T)
    assert strides.given == [True]
    assert torch.equal(found.codes, expected.codes)


def test_plain_weight_is_not_copied_nor_cast_in_storage() -> None:
    weight = random(8, 6).bfloat16()
    frozen = SCHEMES["plain"].freeze(weight)
    assert isinstance(frozen, PlainWeight)
    assert frozen.dequantize(torch.bfloat16).data_ptr() == weight.data_ptr()
    assert frozen.dequantize(torch.float32).dtype == torch.float32
    assert frozen.values.dtype == torch.bfloat16


def test_a_value_beyond_float16_is_refused_at_8_bits() -> None:
    from qlora_kit.errors import ModelError

    weight = random(4, 5)
    weight[1, 2] = -70000.0
    with pytest.raises(ModelError, match="65504"):
        SCHEMES["int8"].freeze(weight)
    assert torch.isfinite(SCHEMES["nf4"].freeze(weight).dequantize(torch.float32)).all()


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("nf4-double", "4-bit nf4, double quantisation"),
        ("fp4", "4-bit fp4"),
        ("int8", "8-bit"),
        ("plain", "16-bit"),
    ],
)
def test_a_scheme_describes_itself(scheme: str, words: str) -> None:
    assert SCHEMES[scheme].describe() == words


# ---------------------------------------------------------------- what dropout draws


def masks(samples: tuple[int, ...], tokens: int, **changes: int) -> torch.Tensor:
    draws = Draws(**{"seed": 1, "step": 2, "tokens": 20, **changes}, samples=samples)
    return draws.kept(torch.Size((len(samples), tokens, 8)), 3, 0.5, torch.device("cpu"))


def test_a_mask_depends_on_its_sample_and_not_on_the_batch() -> None:
    together = masks((4, 9, 2), tokens=15).view(3, 15, 8)
    alone = masks((9,), tokens=11).view(11, 8)
    assert torch.equal(together[1, :11], alone)


@pytest.mark.parametrize("changes", [{"seed": 5}, {"step": 3}])
def test_seed_and_step_draw_other_masks(changes: dict[str, int]) -> None:
    assert 0.3 < (masks((4,), 15) != masks((4,), 15, **changes)).float().mean() < 0.7


def test_samples_and_layers_draw_other_masks() -> None:
    draws, shape = Draws(1, 2, (4, 5), 20), torch.Size((2, 15, 8))
    first = draws.kept(shape, 3, 0.5, torch.device("cpu"))
    other_layer = draws.kept(shape, 4, 0.5, torch.device("cpu"))
    assert 0.3 < (first != other_layer).float().mean() < 0.7
    assert 0.3 < (first.view(2, -1)[0] != first.view(2, -1)[1]).float().mean() < 0.7
    kept = draws.kept(torch.Size((2, 2000, 8)), 3, 0.9, torch.device("cpu"))
    assert abs(float(kept.float().mean()) - 0.9) < 0.01
