"""GaLore: against a reference written from the paper's algorithm; its files, resume and plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import relative_error
from tiny_models import load_folder
from torch import Tensor
from training import make_rows, options, weights_of
from transformers import AutoModelForCausalLM

import qlora_kit as qk
from qlora_kit.errors import ConfigError
from qlora_kit.events import StepFinished
from qlora_kit.layers.galore import GaLoreLinear
from qlora_kit.lora.spec import LoraSpec, Variant
from qlora_kit.train import galore
from qlora_kit.train.checkpoint import find_checkpoint
from qlora_kit.train.loop import Saving
from qlora_kit.train.optimizer import build_optimizer

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
SPEC = LoraSpec(rank=4, targets=("attention",), variant=Variant(galore=("down_proj", "up_proj")))


def algorithm_2(
    weight: Tensor, gradients: list[Tensor], rank: int, rate: float, every: int
) -> Tensor:
    """Return W after the steps of the paper's algorithm 2, written out for W (m, n), m ≤ n."""
    first, second, scale = 0.9, 0.999, 0.25
    moment, square = torch.zeros(rank, weight.shape[1]), torch.zeros(rank, weight.shape[1])
    for t, gradient in enumerate(gradients):
        g = -gradient
        if t % every == 0:
            u, _, _ = torch.linalg.svd(g)
            p = u[:, :rank]
        r = p.T @ g
        moment = first * moment + (1 - first) * r
        square = second * square + (1 - second) * r**2
        n = (moment / (1 - first ** (t + 1))) / (
            torch.sqrt(square / (1 - second ** (t + 1))) + 1e-8
        )
        weight = weight + rate * scale * p @ n
    return weight


@pytest.mark.parametrize("is_tall", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_steps_are_those_of_the_papers_algorithm(
    monkeypatch: pytest.MonkeyPatch, kind: Any, is_tall: bool
) -> None:
    """Five steps, with the subspace renewed at every second; a tall W is its transpose."""
    monkeypatch.setattr(galore, "_RENEWED_EVERY", 2)
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 10), [torch.randn(6, 10) for _ in range(5)]
    expected = algorithm_2(start, gradients, 3, 0.1, 2)
    weight = torch.nn.Parameter(start.T.clone() if is_tall else start.clone())
    other = torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [other]}, {"params": [weight], galore.PROJECTED: 3}]
    optimizer = build_optimizer(groups, options(learning_rate=0.1, optimizer=kind))
    for gradient in gradients:
        weight.grad = (gradient.T if is_tall else gradient).clone()
        other.grad = torch.ones(3)
        qk_state(optimizer)
        optimizer.step()
        assert weight.grad is None
    found = weight.detach().T if is_tall else weight.detach()
    assert relative_error(found, expected) <= 1e-5
    assert torch.allclose(other, torch.full((3,), 0.5), atol=1e-3)  # Adam: 0.1 a step
    numbers = sum(each.numel() for each in optimizer.state[weight].values()
                  if isinstance(each, Tensor))  # fmt: skip
    assert numbers == 6 * 3 + 2 * 3 * 10


def qk_state(optimizer: torch.optim.Optimizer) -> None:
    from qlora_kit.train.optimizer import make_state

    make_state(optimizer)


def test_weight_decay_is_of_the_whole_weight() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 8))
    optimizer = build_optimizer(
        [{"params": [weight], galore.PROJECTED: 2}], options(learning_rate=0.1, weight_decay=0.5)
    )
    qk_state(optimizer)
    weight.grad = torch.zeros(4, 8)
    optimizer.step()
    assert torch.allclose(weight, torch.full((4, 8), 0.95))


def trained(folder: Path, config: qk.TrainConfig, **more: Any) -> qk.Adapter:
    adapter = qk.attach(load_folder(folder), SPEC, seed=1)
    qk.train_adapter(adapter, make_rows(4), config, **more)
    return adapter


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_resumed_run_has_the_same_bits_and_peft_opens_its_file(
    save_tiny: Callable[..., Path], tmp_path: Path, optimizer: str
) -> None:
    folder, config = save_tiny(), options(rank=4, optimizer=optimizer)
    whole = trained(folder, config)
    record = qk.BaseRecord.of(whole.base)
    trained(
        folder, config, saving=Saving(tmp_path / "run", record),
        stop_when=lambda e: isinstance(e, StepFinished) and e.optimizer_step == 2,
    )  # fmt: skip
    found = find_checkpoint(tmp_path / "run", "latest").folder
    assert found is not None
    assert "model.layers.0.mlp.up_proj.weight/projection" in load_file(
        found / "optimizer.safetensors"
    )
    again = trained(folder, config, saving=Saving(tmp_path / "run", record, found))
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(again)[name], weight), name
    (tmp_path / "adapter").mkdir()
    qk.save_adapter(whole, tmp_path / "adapter", record)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter"
    ).eval()
    whole.base.model.eval()
    own = logits(whole.base.model)
    assert relative_error(own, logits(theirs)) <= 1e-5
    assert relative_error(logits(qk.load_adapter(load_folder(folder), tmp_path / "adapter")
                                 .base.model), own) <= 1e-5  # fmt: skip
    assert relative_error(logits(qk.merge(whole).model), own) <= 1e-5


def test_the_base_is_put_back_bit_for_bit(save_tiny: Callable[..., Path]) -> None:
    base = load_folder(save_tiny())
    before = logits(base.model)
    adapter = qk.attach(base, SPEC)
    assert sorted(adapter.whole) == sorted(
        f"model.layers.{n}.mlp.{name}_proj" for n in (0, 1) for name in ("up", "down")
    )
    assert all(isinstance(layer, GaLoreLinear) for layer in adapter.whole.values())
    assert not adapter.whole.keys() & adapter.layers.keys()
    assert torch.equal(logits(base.model), before)
    for layer in adapter.whole.values():
        layer.weight.data.zero_()
    assert not torch.equal(logits(base.model), before)
    assert torch.equal(logits(qk.detach(adapter).model), before)


@pytest.mark.parametrize(
    ("name", "names", "bits", "line"),
    [
        ("tinyllama", ("up_proj",), 4, "--bits 4 quantises them; expected --bits 16"),
        ("tinyllama", ("lm_head",), 16, "'lm_head' names no linear layer"),
    ],
)
def test_what_galore_cannot_train_is_refused(
    save_tiny: Callable[..., Path], name: str, names: tuple[str, ...], bits: int, line: str
) -> None:
    base = load_folder(save_tiny(name), bits)
    with pytest.raises(ConfigError) as refused:
        qk.attach(base, LoraSpec(variant=Variant(galore=names)))
    assert line in str(refused.value)
