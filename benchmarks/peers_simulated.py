"""The peers' stack on fake tensors: their own code and trainer, with the kit's account of memory.

`SFTTrainer.train()` runs as it is, on tensors that have a size and no content, as in
`qlora_kit.plan`. On a scaled-down model the result agrees with the allocator's record of the same
run (`peak_vram.py` shows the ratio). To stand in for a missing GPU, three things are replaced. Each
takes as much memory as on a GPU or less, so that any doubt favours the peers:

- attention takes the memory of the flash kernel, in the dtype that autocast gives it;
- trl's loss folds its tiles in place, as its Triton kernels do (`peers_stack.folded_in_place`);
- `activation_offloading` and paged optimiser states count as host memory, and nothing is kept
  on the device while it is copied.

bitsandbytes' 8-bit layers look at values, so they cannot be simulated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import peers_model
import peers_stack
import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from trl.trainer import sft_trainer

from qlora_kit.layers.quantize import Quantization, empty_4bit
from qlora_kit.plan.attention import planned_attention
from qlora_kit.plan.ledger import Ledger
from qlora_kit.plan.temporaries import workspace_bytes
from qlora_kit.private_transformers import masks_as_in_a_run

_HOST = "host"
# trl does not offload tensors smaller than this.
_MIN_OFFLOAD_BYTES = 1024


class _TwoSides(Ledger):
    """A ledger of tensors on the CPU, where those of the purpose "host" count as host memory."""

    def _side(self, tensor: Tensor) -> str:
        return "host" if self._purposes[-1] == _HOST else "device"


def simulate(architecture: Any, run: dict[str, Any], *, for_gpu: bool) -> dict[str, int]:
    """Return the peak of two optimiser steps, in bytes, on the device and on the host.

    Args:
        architecture: the architecture of the model.
        run: the run, as `peers_stack.build_trainer` takes it.
        for_gpu: plan for a GPU; else for the CPU of this machine, to compare with a real run.

    Raises:
        ValueError: the run is not in 4 bits.
    """
    if run["bits"] != 4:
        raise ValueError(f"{run['bits']} bits: only bitsandbytes' 4-bit layers can be simulated")
    model = peers_model.empty_model(architecture, run["bits"])
    ledger = _TwoSides("cpu")
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(masks_as_in_a_run())
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        if for_gpu:
            stack.enter_context(_as_on_a_gpu(ledger))
        stack.enter_context(ledger)
        cpu = torch.device("cpu")
        workspace = torch.empty(workspace_bytes("meta") if for_gpu else 0, dtype=torch.uint8)
        peers_model.fill(model, cpu, _pack_nothing)
        ledger.restart()
        peers_stack.train(model, run, on_cpu=True, offload=for_gpu)
        found = {"step": ledger.peak("device").bytes, "host": ledger.peak("host").bytes}
        del workspace
    return found


def _pack_nothing(layer: Any, _: Callable[[], Tensor], device: torch.device) -> None:
    """Give a layer packed tensors of the right sizes; they are plain parameters here."""
    shape = (layer.out_features, layer.in_features)
    sized = empty_4bit(shape, Quantization(4), device)
    second = QuantState(
        absmax=sized.absmax_scale, code=sized.absmax_code, blocksize=sized.constants_block_size,
        dtype=torch.float32,
    )  # fmt: skip
    state = QuantState(
        absmax=sized.absmax, shape=torch.Size(shape), code=torch.empty(16, device=device),
        blocksize=sized.block_size, quant_type=sized.quant_type, dtype=torch.bfloat16,
        offset=sized.absmax_offset, state2=second,
    )  # fmt: skip
    weight: Any = nn.Parameter(sized.codes, requires_grad=False)
    weight.quant_state, weight.bnb_quantized = state, True
    weight.compress_statistics, weight.quant_type = True, sized.quant_type
    weight.quant_storage, weight.blocksize = torch.uint8, sized.block_size
    layer.weight, layer.quant_state = weight, state


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Move or cast a module; torch itself would swap tensors, which fake tensors do not allow."""
    for each in module.modules() if recurse else [module]:
        for name, parameter in list(each.named_parameters(recurse=False)):
            with torch.no_grad():
                value = change(parameter)
            if value is not parameter:
                each._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in list(each.named_buffers(recurse=False)):
            each._buffers[name] = change(buffer)
    return module


# ---------------------------------------------------------------- as on a GPU


@contextlib.contextmanager
def _as_on_a_gpu(ledger: _TwoSides) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        patch = lambda *where: stack.enter_context(mock.patch.object(*where))  # noqa: E731
        stack.enter_context(planned_attention(ledger))
        patch(F, "scaled_dot_product_attention", _in_autocast(F.scaled_dot_product_attention))
        patch(
            sft_trainer, "get_act_offloading_ctx_manager", lambda model: _offloading(ledger, model)
        )
        made = Optimizer8bit.get_state_buffer

        def paged(*arguments: Any, **options: Any) -> Tensor:
            with ledger.purpose(_HOST):
                return made(*arguments, **options)

        patch(Optimizer8bit, "get_state_buffer", paged)
        yield


def _in_autocast(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cast the inputs of attention, as autocast does for the operation itself."""

    def cast(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = (each.to(dtype) for each in (query, key, value))
        return attention(query, key, value, **options)

    return cast


def _offloading(ledger: _TwoSides, model: nn.Module) -> saved_tensors_hooks:
    """Keep saved tensors on the host until backward, as trl's `OffloadActivations` does.

    Unlike trl's it uses no streams.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor: Tensor) -> tuple[bool, Tensor]:
        is_weight = tensor.untyped_storage()._cdata in weights
        if is_weight or tensor.nbytes < _MIN_OFFLOAD_BYTES:
            return False, tensor
        with ledger.purpose(_HOST):
            return True, tensor.detach().clone()

    def unpack(kept: tuple[bool, Tensor]) -> Tensor:
        is_away, tensor = kept
        return tensor.clone() if is_away else tensor

    return saved_tensors_hooks(pack, unpack)
