"""From a batch to its loss: supervised tokens count, padding does not; and recomputation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from tiny_models import fill_lora, load_folder, mask_of
from torch import Tensor, nn

from qlora_kit.data.batch import Batch, collate
from qlora_kit.errors import ModelError
from qlora_kit.lora.attach import Adapter, attach
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.model.head import head_of
from qlora_kit.step.recompute import set_recompute
from qlora_kit.tasks.causal import loss_sum, scores, supervised_states

ROWS = [
    {"input_ids": [1, 7, 30, 41, 52, 63, 2], "labels": [-100, -100, -100, 41, 52, 63, 2], "row": 0},
    {"input_ids": [1, 9, 11, 2], "labels": [1, 9, 11, 2], "row": 1},
    {"input_ids": [1, 90, 80, 70, 60, 50], "labels": [-100] * 6, "row": 2},
]


@pytest.fixture
def adapter(save_tiny: Callable[..., Path]) -> Adapter:
    """A tiny 4-bit base with a filled adapter on every linear layer, with dropout."""
    base = load_folder(save_tiny("tinyllama"), 4)
    spec = LoraSpec(rank=4, alpha=8.0, dropout=0.3, targets=("all-linear",))
    adapter = attach(base, spec)
    fill_lora(adapter)
    return adapter


def test_a_state_predicts_the_next_label(adapter: Adapter) -> None:
    batch = collate(ROWS, 0)
    hidden, targets, weights, kept = supervised_states(adapter.base.model, batch)
    assert weights is None and kept is None
    assert targets.tolist() == [41, 52, 63, 2, 9, 11, 2]
    assert len(targets) == batch.weight
    with torch.no_grad():
        whole = adapter.base.model.base_model(
            input_ids=batch.input_ids, attention_mask=mask_of(batch)
        ).last_hidden_state
    picked = torch.cat([whole[0, 2:6], whole[1, 0:3]])
    torch.testing.assert_close(hidden, picked)


def test_padding_and_neighbours_do_not_change_the_loss(adapter: Adapter) -> None:
    model, head = adapter.base.model, head_of(adapter.base.model)
    together = loss_sum(model, collate(ROWS, 0), head)
    alone = sum(loss_sum(model, collate([row], 0), head).item() for row in ROWS)
    other_padding = loss_sum(model, collate(ROWS, 55), head)
    assert together.item() == pytest.approx(alone, rel=1e-6)
    assert together.item() == pytest.approx(other_padding.item(), rel=1e-6)


def test_a_batch_without_supervised_tokens_costs_nothing(adapter: Adapter) -> None:
    model = adapter.base.model
    loss = loss_sum(model, collate(ROWS[2:], 0), head_of(model))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in adapter.parameters().values())


def test_a_custom_loss_is_used(adapter: Adapter) -> None:
    model, head = adapter.base.model, head_of(adapter.base.model)
    batch = collate(ROWS, 0)

    def doubled(logits: Tensor, targets: Tensor) -> Tensor:
        return 2 * F.cross_entropy(logits, targets, reduction="sum")

    plain = loss_sum(model, batch, head)
    twice = loss_sum(model, batch, head, loss=doubled, chunk_tokens=2)
    assert twice.item() == pytest.approx(2 * plain.item(), rel=1e-6)


def test_scores_are_those_of_the_loss(adapter: Adapter) -> None:
    model, head = adapter.base.model, head_of(adapter.base.model)
    batch = collate(ROWS, 0)
    found = scores(model, batch, head, chunk_tokens=3)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=mask_of(batch)).logits
    kept = batch.labels[:, 1:] != -100
    top = logits[:, :-1].argmax(-1)[kept] == batch.labels[:, 1:][kept]
    assert -found.logprobs.sum().item() == pytest.approx(loss_sum(model, batch, head).item())
    assert torch.equal(found.is_top, top)
    assert not found.logprobs.requires_grad


# ---------------------------------------------------------------- recomputation


def step(adapter: Adapter, *, recompute: bool) -> tuple[float, dict[str, Tensor], int]:
    """Run a forward and backward in training; return loss, gradients, and bytes autograd kept."""
    model = adapter.base.model.train()
    set_recompute(model, recompute)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    batch: Batch = collate(ROWS, 0)
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_sum(model, batch, head_of(model))
    loss.backward()
    grads = {}
    for name, parameter in adapter.parameters().items():
        assert parameter.grad is not None, name
        grads[name], parameter.grad = parameter.grad, None
    return loss.item(), grads, sum(kept.values())


def test_recomputation_changes_memory_but_no_bit(adapter: Adapter) -> None:
    loss, grads, kept = step(adapter, recompute=False)
    again, grads_again, kept_again = step(adapter, recompute=True)
    assert again == loss
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
    assert all(grad.any() for grad in grads.values())
    assert kept_again < kept / 3


def test_recomputation_can_be_switched_off_again(adapter: Adapter) -> None:
    _, _, kept = step(adapter, recompute=False)
    step(adapter, recompute=True)
    assert step(adapter, recompute=False)[2] == kept


def test_dropout_differs_between_seeds_and_is_off_in_evaluation(adapter: Adapter) -> None:
    model, batch = adapter.base.model, collate(ROWS, 0)
    losses = []
    for training, seed in ((True, 1), (True, 2), (False, 1), (False, 2)):
        torch.manual_seed(seed)
        losses.append(loss_sum(model.train(training), batch, head_of(model)).item())
    assert losses[0] != losses[1]
    assert losses[2] == losses[3]


def test_gradients_of_a_batch_with_dropout_match_finite_differences(adapter: Adapter) -> None:
    """Backward uses the mask of forward, even if the layer runs again."""
    name, parameter = list(adapter.parameters().items())[3]
    _, grads, _ = step(adapter, recompute=True)
    direction = grads[name] / grads[name].norm()
    losses = []
    for sign in (1, -1):
        parameter.data.add_(direction, alpha=sign * 1e-2)
        losses.append(step(adapter, recompute=True)[0])
        parameter.data.sub_(direction, alpha=sign * 1e-2)
    slope = (losses[0] - losses[1]) / 2e-2
    assert slope == pytest.approx(grads[name].norm().item(), rel=1e-2)


def test_a_model_without_such_layers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="--no-recompute"):
        set_recompute(model, True)
    set_recompute(model, False)


def test_quantised_layers_train_like_their_unpacked_twin(save_tiny: Callable[..., Path]) -> None:
    """A whole model with NF4 weights equals one with the same weights merged back to 16 bits."""
    from qlora_kit.layers.weight import PlainWeight

    results = []
    for unpacked in (False, True):
        base = load_folder(save_tiny("qwen2.5-7b"), 4)
        adapter = attach(base, LoraSpec(rank=4, alpha=8.0, targets=("all-linear",)))
        fill_lora(adapter)
        if unpacked:
            for layer in adapter.layers.values():
                values = layer.frozen.weight.dequantize(torch.float32)
                layer.frozen.weight = PlainWeight(values)
        results.append(step(adapter, recompute=unpacked))
    (loss, grads, _), (twin_loss, twin_grads, _) = results
    assert loss == pytest.approx(twin_loss, rel=1e-6)
    assert max(relative_error(grads[name], twin_grads[name]) for name in grads) <= 1e-5
