"""The purpose of each storage of a run, told to a ledger while the run goes.

The kit's own layers announce the purpose of their memory (`layers.purpose`); this module names the
purpose of tensors that torch makes. Takes a loaded model and its adapter, fake or real; never
changes a result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.layers.merge_aware import MergeAwareLinear, codes_of
from qlora_kit.layers.projections import base_prefix, projections
from qlora_kit.layers.purpose import (
    EXPERTS,
    GATHERED,
    HEAD,
    LAYER_CHECKPOINTS,
    LOSS_CHUNK,
    MERGED,
    UNPACKED,
    heard_by,
)
from qlora_kit.layers.shards import held
from qlora_kit.layers.trained import TrainedLinear
from qlora_kit.plan.ledger import Ledger

_CONSTANTS = "quantisation constants"
# The names of the purposes, in the order in which a picture stacks them.
PURPOSES = (
    "base weights", EXPERTS, _CONSTANTS, "norms and biases", "embeddings", HEAD, "LoRA",
    "gradients", "optimizer", LAYER_CHECKPOINTS, "activations", LOSS_CHUNK,
    UNPACKED, "workspace", "copies to save", GATHERED, MERGED,
)  # fmt: skip


def purpose_of_part(part: str) -> str:
    """Return the purpose of a part of a frozen weight; the part "" is a tensor without parts."""
    return "base weights" if part in ("", "codes", "values") else _CONSTANTS


def claim_model(ledger: Ledger, model: PreTrainedModel) -> None:
    """Tell the ledger the purpose of every tensor of a loaded model."""
    for tensor in [*model.parameters(), *model.buffers()]:
        ledger.claim(held(tensor), "norms and biases")
    for projection in projections(model).values():
        for name, tensor in projection.frozen.weight.stored():
            ledger.claim(tensor, EXPERTS if projection.is_expert else purpose_of_part(name))
    for module in model.modules():
        # A layer that is trained whole keeps the frozen one, which is no part of the model.
        if isinstance(module, TrainedLinear):
            for name, tensor in module.replaced.weight.stored():
                ledger.claim(tensor, purpose_of_part(name))
    prefix = base_prefix(model)
    for name, module in model.named_modules():
        if name and prefix and not f"{name}.".startswith(prefix):
            for tensor in [*module.parameters(), *module.buffers()]:
                ledger.claim(tensor, HEAD)
    claim_merged(ledger, model)
    # Embeddings come last, because one may be the head as well.
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            ledger.claim(module.weight, "embeddings")


def claim_merged(ledger: Ledger, model: nn.Module) -> None:
    """Tell the ledger the purpose of the merged weights that layers multiply by."""
    for module in model.modules():
        if isinstance(module, MergeAwareLinear):
            ledger.claim(codes_of(module.merged), MERGED)


def claim_trained(ledger: Ledger, optimizer: torch.optim.Optimizer) -> None:
    """Tell the ledger the purpose of trained parameters, gradients and the optimiser's state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            ledger.claim(parameter, "LoRA")
            if parameter.grad is not None:
                ledger.claim(parameter.grad, "gradients")
            for value in optimizer.state[parameter].values():
                if isinstance(value, Tensor):
                    ledger.claim(value, "optimizer")


@contextlib.contextmanager
def watched(ledger: Ledger, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Tell the ledger the purpose of tensors made in forward, in backward and in the update."""
    with contextlib.ExitStack() as stack:
        for handle in (*_gradient_hooks(ledger, optimizer), *_optimizer_hooks(ledger, optimizer)):
            stack.callback(handle.remove)
        stack.enter_context(heard_by(ledger))
        yield


def _gradient_hooks(ledger: Ledger, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter.register_post_accumulate_grad_hook(
                lambda p: ledger.claim(p.grad, "gradients")
            )


def _optimizer_hooks(ledger: Ledger, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    entered = contextlib.ExitStack()

    def begin(*_: Any) -> None:
        entered.enter_context(ledger.purpose("optimizer"))

    yield optimizer.register_step_pre_hook(begin)
    yield optimizer.register_step_post_hook(lambda *_: entered.close())
