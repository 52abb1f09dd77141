"""LoRA layers that see one x compute together: the same results, fewer products, nothing kept."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from qlora_kit.layers import kernels
from qlora_kit.layers.draws import Draws, drawn_from
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.handover import Handover
from qlora_kit.layers.lora import LoRALinear, can_share
from qlora_kit.layers.quantize import Quantization
from qlora_kit.layers.weight import FourBitWeight, PlainWeight
from qlora_kit.private_torch import TorchDispatchMode

D, RANK, SCALING = 24, 3, 1.7
# Keys and values are narrower than queries, as in grouped attention.
OUTPUTS = {"q": 40, "k": 16, "v": 16}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Three projections of one x."""

    def __init__(self, bits: Any = 16, dropout: float = 0.0, dtype: torch.dtype = torch.float32):
        super().__init__()
        for number, (name, k) in enumerate(OUTPUTS.items()):
            frozen = FrozenLinear(D, k, bias=True)
            frozen.weight = Quantization(bits).freeze((random(k, D, seed=number) / 5).to(dtype))
            frozen.bias = random(k, seed=7 + number)
            layer = LoRALinear(frozen, rank=RANK, scaling=SCALING, dropout=dropout, number=number)
            layer.lora_A.data = random(RANK, D, seed=10 + number)
            layer.lora_B.data = random(k, RANK, seed=20 + number)
            setattr(self, name, layer)

    @property
    def layers(self) -> list[LoRALinear]:
        return [getattr(self, name) for name in OUTPUTS]

    def group(self, together: bool = True) -> Attention:
        assert can_share(self.layers)
        self.q.partners = (self.k, self.v) if together else ()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


def step(module: Attention, x: Tensor, **draws: int) -> list[Tensor]:
    """Return the outputs and all gradients of a forward and a backward."""
    module.zero_grad()
    source = x.clone().requires_grad_()
    torch.manual_seed(0)
    outputs = module(source * 1)
    grads = [random(*each.shape, seed=n).to(each.dtype) for n, each in enumerate(outputs)]
    torch.autograd.backward(outputs, grads)
    assert source.grad is not None
    trained = [parameter.grad.clone() for parameter in module.parameters()]
    return [*(each.detach() for each in outputs), source.grad, *trained]


# ---------------------------------------------------------------- the same results


def test_gradients_are_exact_in_float64() -> None:
    module = Attention().double().group()
    named = {name: each.detach().requires_grad_() for name, each in module.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return functional_call(module, dict(zip(named, values, strict=True)), (x * 1,))

    x = random(2, 3, D, seed=4).double().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *named.values()))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_group_computes_what_its_layers_compute(bits: int) -> None:
    module = Attention(bits)
    alone, together = (step(module.group(each), random(2, 5, D, seed=4)) for each in (False, True))
    for found, expected in zip(together, alone, strict=True):
        assert found.shape == expected.shape
        assert relative_error(found, expected) <= 1e-6
    assert all(map(torch.equal, together, step(module.group(), random(2, 5, D, seed=4))))


@pytest.mark.parametrize("names", [(), ("lora",)])
def test_bf16_rounds_no_more_in_a_group(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_DEVICES", {"cpu"})
    kernels.use(names)
    try:
        x = random(2, 33, D, seed=4).bfloat16()
        module = Attention(dtype=torch.bfloat16)
        alone, together = (step(module.group(each), x) for each in (False, True))
    finally:
        kernels.use(())
    exact = step(module.group(False), x.float())
    for number, wanted in enumerate(exact):
        found, before = (relative_error(each[number], wanted) for each in (together, alone))
        assert found <= 1.05 * before + 1e-6
    # The gradients of A and B are fp32, and of the same numbers.
    for found, expected in zip(together[4:], alone[4:], strict=True):
        assert relative_error(found, expected) <= 1e-5


def test_without_a_gradient_of_x_the_weights_are_not_unpacked_again() -> None:
    module = Attention().group()
    x = random(5, D)
    sum(each.sum() for each in module(x)).backward()
    assert all(parameter.grad.norm() > 0 for parameter in module.parameters())


def test_masks_of_dropout_are_those_of_each_layer() -> None:
    """Each layer draws by its number, so nothing is shared; the bits are those without a group."""
    module, x = Attention(dropout=0.3), random(2, 5, D, seed=4)
    for draws in (None, Draws(1, 2, (3, 4), 5)):
        found = []
        for together in (False, True):
            if draws is None:
                found.append(step(module.group(together), x))
            else:
                with drawn_from(draws):
                    found.append(step(module.group(together), x))
        assert all(map(torch.equal, *found))
    module.eval()
    assert relative_error(module(x)[1], module.group(False)(x)[1]) <= 1e-6


# ---------------------------------------------------------------- whoever calls


CALLS: dict[str, Callable[[Attention, Tensor], Tensor]] = {
    "alone": lambda module, x: module.k(x),
    "with another x": lambda module, x: module.q(x).sum() + module.k(x + 1),
    "in the reverse order": lambda module, x: module.k(x) + module.q(x).sum(),
    "twice": lambda module, x: module.q(x).sum() + module.k(x) + module.k(x),
    "between others": lambda module, x: module.q(x).sum() + module.q(x + 1).sum() + module.k(x),
    "another view": lambda module, x: module.q(x).sum() + module.k(x.view(-1, D)).view(2, 5, -1),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_layer_that_is_called_in_another_way_is_right(call: str) -> None:
    module, found = Attention(), []
    for together in (False, True):
        module.group(together).zero_grad()
        with torch.no_grad():
            module(random(2, 5, D, seed=9))
        source = random(2, 5, D, seed=4).requires_grad_()
        y = CALLS[call](module, source * 1)
        (grad,) = torch.autograd.grad(y.square().sum(), source)
        found.append((y.detach(), grad))
    assert all(relative_error(a, b) <= 1e-6 for a, b in zip(*found, strict=True))


def test_a_result_without_gradients_is_not_given_to_a_call_with_them() -> None:
    module, x = Attention().group(), random(2, 5, D)
    with torch.no_grad():
        module.q(x)
    assert module.k(x).requires_grad
    module.q(x)
    with torch.no_grad():
        assert not module.k(x).requires_grad


@pytest.mark.parametrize("change", ["x", "lora_A", "lora_B"])
def test_a_result_of_what_changed_in_place_is_not_given(change: str) -> None:
    module, x = Attention().group(), random(2, 5, D)
    with torch.no_grad():
        module.q(x)
        (x if change == "x" else getattr(module.k, change)).mul_(2)
        expected = module.k(x + 0)
        assert torch.equal(module.k(x), expected)


def test_inference_mode_counts_no_changes() -> None:
    module, x = Attention().group(), random(2, 5, D)
    expected = module(x)
    with torch.inference_mode():
        assert all(map(torch.equal, module(x + 0), expected))


def test_hooks_see_their_own_layer() -> None:
    module, x, seen = Attention().group(), random(2, 5, D), []
    module.k.register_forward_hook(lambda layer, given, y: seen.append((given[0] is x, y)))
    module.v.register_forward_pre_hook(lambda layer, given: (given[0] + 1,))
    _, k, v = module(x)
    assert seen == [(True, k)]
    assert relative_error(v, module.group(False).v(x)) <= 1e-6  # the hook adds one here too


def test_a_copy_has_a_group_of_its_own() -> None:
    module, x = Attention().group(), random(2, 5, D)
    other = copy.deepcopy(module)
    assert other.q.partners == (other.k, other.v)
    assert other.state_dict().keys() == module.state_dict().keys()
    assert len(other.state_dict()) == 3 * 4
    with torch.no_grad():
        other.k.lora_B.zero_()
    assert not torch.equal(other(x)[1], module(x)[1])


def test_only_layers_of_one_kind_share() -> None:
    module = Attention()
    assert can_share(module.layers)
    for change in (
        lambda layer: setattr(layer, "scaling", 1.0),
        lambda layer: setattr(layer, "lora_A", nn.Parameter(torch.zeros(RANK + 1, D))),
        lambda layer: layer.double(),
        lambda layer: layer.requires_grad_(False),
    ):
        other = copy.deepcopy(module)
        change(other.k)
        assert not can_share(other.layers)
    assert not can_share([*module.layers, module.q])


# ---------------------------------------------------------------- nothing is kept


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed here is freed at once, not by the collector of garbage."""
    gc.disable()
    yield
    gc.enable()


def watched(*tensors: Tensor) -> Callable[[], list[bool]]:
    alive = [weakref.ref(each.untyped_storage()) for each in tensors]
    return lambda: [ref() is not None for ref in alive]


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("gradients", [True, False])
def test_what_nobody_asks_for_lives_no_longer_than_x(gradients: bool) -> None:
    module = Attention().group()
    with torch.set_grad_enabled(gradients):
        x = random(2, 5, D).requires_grad_(gradients) * 1
        y = module.q(x)
    (waiting,) = module.k._handover._result
    alive = watched(x, waiting)
    del waiting, y
    assert alive() == [True, True]
    del x
    assert alive() == [False, False]


@pytest.mark.usefixtures("no_collector")
def test_nothing_waits_after_the_last_layer() -> None:
    module = Attention().group()
    x = random(2, 5, D).requires_grad_() * 1
    outputs = module(x)
    alive = watched(*outputs)
    del outputs
    assert alive() == [False] * 3


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("recomputed", [False, True])
def test_nothing_is_left_where_memory_runs_out(
    recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, made = Attention().group(), []
    own = PlainWeight.product

    def short(self: PlainWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = own(self, x, bias)
        made.append(weakref.ref(y.untyped_storage()))
        return y

    def attend(x: Tensor) -> Tensor:
        q = module.q(x * 1)
        if len(made) > 3 * recomputed:
            raise torch.OutOfMemoryError("out of memory")
        return q * module.k(x).mean() * module.v(x).mean()

    monkeypatch.setattr(PlainWeight, "product", short)

    def run() -> None:
        x = random(2, 5, D).requires_grad_()
        y = checkpoint(attend, x, use_reentrant=False) if recomputed else attend(x)
        y.sum().backward()

    with pytest.raises(torch.OutOfMemoryError):
        run()
    assert len(made) >= 3
    assert not any(ref() is not None for ref in made)


@pytest.mark.usefixtures("no_collector")
def test_a_recomputation_that_ends_early_leaves_nothing() -> None:
    """It ends where the last tensor is saved, and that is before the products."""
    module = Attention().group()
    x = random(2, 5, D).requires_grad_()
    outputs = checkpoint(lambda x: module(x * 1), x, use_reentrant=False)
    sum(each.sum() for each in outputs).backward()
    assert [layer._handover._result for layer in module.layers] == [[], [], []]
    reference = Attention()
    sum(each.sum() for each in reference(x)).backward()
    for found, expected in zip(module.parameters(), reference.parameters(), strict=True):
        assert relative_error(found.grad, expected.grad) <= 1e-6


def test_a_handover_forgets_what_is_not_asked_for() -> None:
    handover, x = Handover(), random(3)
    assert handover.take(x) is None
    handover.put(random(1), x)
    assert handover.take(random(3)) is None
    assert handover.take(x) is None


# ---------------------------------------------------------------- work


class _Operations(TorchDispatchMode):
    """Collects the operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def products_of(module: Attention, device: str, dtype: torch.dtype) -> dict[str, int]:
    x = torch.empty(64, D, dtype=dtype, device=device, requires_grad=True)
    with _Operations() as seen:
        outputs = module.to(device)(x * 1)
        torch.autograd.backward(outputs, [torch.empty_like(each) for each in outputs])
    wanted = ("mm", "bmm", "addmm", "lora_matrices", "lora_left", "lora_add")
    return {name: seen.names.count(name) for name in wanted if name in seen.names}


def test_a_group_multiplies_x_once_in_each_direction() -> None:
    together = products_of(Attention().group(), "cpu", torch.float32)
    alone = products_of(Attention(), "cpu", torch.float32)
    # Forward: x A once instead of thrice. Backward: dA once, and g A onto the gradient of x.
    assert sum(alone.values()) - sum(together.values()) == 2 + 2 + 2


def test_a_group_of_split_terms_launches_as_it_says() -> None:
    kernels.use(("lora",))
    try:
        together = products_of(Attention(dtype=torch.bfloat16).group(), "meta", torch.bfloat16)
        alone = products_of(Attention(dtype=torch.bfloat16), "meta", torch.bfloat16)
    finally:
        kernels.use(())
    assert (together["lora_matrices"], alone["lora_matrices"]) == (1, 3)
    assert (together["lora_left"], alone["lora_left"]) == (2, 6)
    assert (together["lora_add"], alone["lora_add"]) == (3 + 1, 3 + 3)
    # Forward: x A. Backward: the gradient of each y with B and with h, and the first with W; the
    # other products with W are added to it.
    assert (together["mm"], alone["mm"]) == (1 + 3 + 3 + 1, 3 + 3 + 3 + 3)
    assert (together["bmm"], alone["bmm"]) == (1, 3)


def test_x_is_saved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, saved = Attention(4).group(), []
    x = random(2, 5, D).requires_grad_() * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    known = {parameter.data_ptr() for parameter in module.parameters()}
    new = [each for each in saved if each.data_ptr() not in known]
    assert [tuple(each.shape) for each in new] == [(10, D), (10, 3 * RANK)]
    assert new[0].data_ptr() == x.data_ptr()
    assert isinstance(module.q.frozen.weight, FourBitWeight)
