"""The optimiser: AdamW with fp32, 8-bit or paged state, and the learning rate of each step.

The learning rate is a function of the step alone, so a resumed run needs no scheduler state.
This file and the package `layers/` are the only importers of bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.config import OptimizerOptions
from qlora_kit.train import galore
from qlora_kit.train.galore import PROJECTED

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], options: OptimizerOptions
) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters.

    At 8 bits, bitsandbytes keeps the state of tensors under 4,096 elements in fp32.

    Args:
        parameters: the trained parameters, all on one device, or groups of them as torch takes
            them, see `train.groups`.
        options: the kind of optimiser, the learning rate and the weight decay.

    Source: Decoupled Weight Decay Regularization (arXiv:1711.05101); 8-bit Optimizers via
    Block-wise Quantization (arXiv:2110.02861).
    """
    common: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": _BETAS,
        "eps": _EPSILON,
        "weight_decay": options.weight_decay,
    }
    given: list[Any] = list(parameters)
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    first = groups[0]["params"][0]
    on_gpu = first.device.type == "cuda"
    if options.optimizer == "adamw":
        # On a GPU, torch's default makes several lists of temporary tensors, each as large as all
        # parameters together. The fused one makes none.
        fused = {"fused": True if on_gpu else None}
        return _built(torch.optim.AdamW, groups, {**common, **fused})
    from bitsandbytes import optim

    bits = 8 if options.optimizer.endswith("8bit") else 32
    # Paged state moves between GPU and host; on a CPU all state is in host memory anyway.
    paged = options.optimizer.startswith("paged") and on_gpu
    return _built(optim.AdamW, groups, {**common, "optim_bits": bits, "is_paged": paged})


def _built(kind: Any, groups: list[Any], options: dict[str, Any]) -> torch.optim.Optimizer:
    if any(PROJECTED in group for group in groups):
        kind = galore.with_projections(kind)
    made: torch.optim.Optimizer = kind(groups, **options)
    return made


def learning_rate_at(step: int, total_steps: int, options: OptimizerOptions) -> float:
    """Return the learning rate of an optimiser step.

    It rises linearly over the warm-up. Then it stays (constant), falls linearly to zero (linear),
    or falls along half a cosine (cosine). The last step still has a rate above zero.

    Args:
        step: number of the step, counted from 1.
        total_steps: number of steps of the whole run.
        options: the highest learning rate, the warm-up, and the scheduler.
    """
    warmup = math.ceil(options.warmup_ratio * total_steps)
    if step <= warmup:
        return options.learning_rate * step / warmup
    progress = (step - 1 - warmup) / max(1, total_steps - warmup)
    if options.scheduler == "linear":
        return options.learning_rate * max(0.0, 1 - progress)
    if options.scheduler == "cosine":
        return options.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return options.learning_rate


# ---------------------------------------------------------------- state in memory


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimiser's state now, before its first step would make it.

    So if memory runs out for the state, it runs out before any weight changes.
    """
    for group_index, index, group, parameter in _places(optimizer):
        if optimizer.state[parameter]:
            continue
        if PROJECTED in group or not hasattr(optimizer, "init_state"):
            optimizer.state[parameter] = _fresh_state(parameter, group)
            continue
        try:
            optimizer.init_state(group, parameter, group_index, index)
        except BaseException:
            # A state that is made in part would pass for a whole one.
            del optimizer.state[parameter]
            raise


def _places(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[int, int, dict[str, Any], nn.Parameter]]:
    """Yield the number of its group, its number there, the group, and the parameter itself."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            yield group_index, index, group, parameter


def _fresh_state(parameter: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of torch's AdamW, or of GaLore, before its first step."""
    if PROJECTED in group:
        return galore.fresh_state(parameter, group[PROJECTED])
    return {
        "step": torch.zeros((), dtype=torch.float32, device=_device_of_step(parameter, group)),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _device_of_step(parameter: nn.Parameter, group: Mapping[str, Any]) -> torch.device:
    """Return the device of AdamW's count of steps: the CPU, or the parameter's if it is fused."""
    return parameter.device if group.get("fused") else torch.device("cpu")


def optimizer_copy(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return a copy of the state of each parameter, with its tensors in host memory."""
    return [
        {
            name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
            for name, value in optimizer.state.get(parameter, {}).items()
        }
        for parameter in _parameters(optimizer)
    ]


@torch.no_grad()
def restore_copy(optimizer: torch.optim.Optimizer, copies: list[dict[str, Any]]) -> None:
    """Put the copies of `optimizer_copy` back, and remove state that was made since."""
    for parameter, kept in zip(_parameters(optimizer), copies, strict=True):
        if not kept:
            optimizer.state.pop(parameter, None)
            continue
        state = optimizer.state[parameter]
        for name, value in kept.items():
            if isinstance(value, Tensor):
                state[name].copy_(value)
            else:
                state[name] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# ---------------------------------------------------------------- state on disk


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Split the optimiser's state into tensors and plain values, both by parameter name."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for entry, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                # Parameters share their code books, and safetensors refuses shared memory.
                tensors[f"{name}/{entry}"] = value.detach().cpu().contiguous().clone()
            else:
                values.setdefault(name, {})[entry] = value
    return tensors, values


@torch.no_grad()
def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Mapping[str, Any]],
) -> None:
    """Fill a fresh optimiser with the results of `optimizer_tensors`."""
    places = {place[-1]: place[:-1] for place in _places(optimizer)}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        group_index, index, group = places[parameter]
        if PROJECTED in group:
            state.update(_fresh_state(parameter, group))
        elif hasattr(optimizer, "init_state"):
            # bitsandbytes allocates its state itself, in paged memory too; then it is filled.
            optimizer.init_state(group, parameter, group_index, index)
        prefix = f"{name}/"
        counts = _device_of_step(parameter, group)
        for key in (key for key in tensors if key.startswith(prefix)):
            _restore_entry(state, key.removeprefix(prefix), tensors[key], parameter.device, counts)
        state.update(values.get(name, {}))


def _restore_entry(
    state: dict[str, Any],
    entry: str,
    stored: Tensor,
    device: torch.device,
    counts_device: torch.device,
) -> None:
    if isinstance(state.get(entry), Tensor):
        state[entry].copy_(stored)
    else:
        state[entry] = stored.to(counts_device if stored.dim() == 0 else device)
