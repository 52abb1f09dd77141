"""What each storage of a run is for, told to a ledger while the run goes.

Takes a loaded model and its adapter, fake or real; changes nothing that they compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.lora.attach import frozen_layers
from qlora_kit.model.head import Head
from qlora_kit.model.quantize import FourBitWeight, FrozenWeight, Int8Weight
from qlora_kit.plan.ledger import Ledger
from qlora_kit.step import forward as step
from qlora_kit.step.loss import cross_entropy_sum

_CONSTANTS = "quantisation constants"
# Names of purposes, in the order in which a picture stacks them.
PURPOSES = (
    "base weights", _CONSTANTS, "norms and biases", "embeddings", "head", "LoRA",
    "gradients", "optimiser", "layer checkpoints", "activations", "loss chunk",
    "dequantised weight", "workspace", "copies to save",
)  # fmt: skip


def purpose_of_part(part: str) -> str:
    """Return what a part of a frozen weight is for; "" is a tensor without parts."""
    return "base weights" if part in ("", "codes", "values") else _CONSTANTS


def claim_model(ledger: Ledger, model: PreTrainedModel, head: Head) -> None:
    """Say what every tensor of a loaded model is for."""
    for tensor in [*model.parameters(), *model.buffers()]:
        ledger.claim(tensor, "norms and biases")
    for layer in frozen_layers(model).values():
        for name, tensor in layer.weight.named_buffers():
            ledger.claim(tensor, purpose_of_part(name))
    for tensor in head.linear.weight.buffers():
        ledger.claim(tensor, "head")
    # Last: it may be the head.
    ledger.claim(model.get_input_embeddings().weight, "embeddings")


def claim_trained(ledger: Ledger, optimizer: torch.optim.Optimizer) -> None:
    """Say what the trained parameters, their gradients and the optimiser's state are for."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            ledger.claim(parameter, "LoRA")
            if parameter.grad is not None:
                ledger.claim(parameter.grad, "gradients")
            for value in optimizer.state[parameter].values():
                if isinstance(value, Tensor):
                    ledger.claim(value, "optimiser")


@contextlib.contextmanager
def watched(
    ledger: Ledger, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> Iterator[None]:
    """Say what is made while the model runs, forward and backward, and while it is updated."""
    with contextlib.ExitStack() as stack:
        for handle in (
            *_gradient_hooks(ledger, optimizer),
            *_checkpoint_hooks(ledger, model),
            *_optimizer_hooks(ledger, optimizer),
        ):
            stack.callback(handle.remove)
        for kind in (FourBitWeight, Int8Weight):
            stack.enter_context(mock.patch.object(kind, "dequantize", _dequantize(kind, ledger)))
        stack.enter_context(mock.patch.object(step, "cross_entropy_sum", _loss(ledger)))
        yield


def _gradient_hooks(ledger: Ledger, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter.register_post_accumulate_grad_hook(
                lambda p: ledger.claim(p.grad, "gradients")
            )


def _checkpoint_hooks(ledger: Ledger, model: PreTrainedModel) -> Iterator[Any]:
    def claim(layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if layer.gradient_checkpointing and layer.training:
            hidden = inputs[0] if inputs else named["hidden_states"]
            ledger.claim(hidden, "layer checkpoints")

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            hooked: nn.Module = layer
            yield hooked.register_forward_pre_hook(claim, with_kwargs=True)


def _optimizer_hooks(ledger: Ledger, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    entered = contextlib.ExitStack()

    def begin(*_: Any) -> None:
        entered.enter_context(ledger.purpose("optimiser"))

    yield optimizer.register_step_pre_hook(begin)
    yield optimizer.register_step_post_hook(lambda *_: entered.close())


def _loss(ledger: Ledger) -> Any:
    def booked(*arguments: Any) -> Tensor:
        with ledger.purpose("loss chunk"):
            return cross_entropy_sum(*arguments)

    return booked


def _dequantize(kind: type[FrozenWeight], ledger: Ledger) -> Any:
    real = kind.dequantize

    def dequantize(self: FrozenWeight, dtype: torch.dtype) -> Tensor:
        with ledger.purpose("dequantised weight"):
            weight = real(self, dtype)
        if ledger.work is not None:
            ledger.work.unpacked_bytes += weight.nbytes
        return weight

    return dequantize
