"""Private names of transformers that the kit uses (5.17 to 5.23), all of them in this file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def drop_kernels(config: PreTrainedConfig, kept: Collection[str | None]) -> None:
    """Forget the kernels that a configuration asks for, except those in `kept`."""
    for name in ("_attn_implementation", "_experts_implementation"):
        if getattr(config, name, None) not in kept:
            setattr(config, name, None)


def initialize(model: PreTrainedModel, module: nn.Module) -> None:
    """Let a model initialise one of its modules, as it does before training from scratch."""
    model._init_weights(module)


def recompute_by(layer: GradientCheckpointingLayer, run: Callable[..., Any]) -> None:
    """Let a decoder layer that is recomputed call `run(forward, *inputs)` in place of forward."""
    layer._gradient_checkpointing_func = run  # type: ignore[assignment]


def run_experts_by(model: PreTrainedModel, name: str, run: Callable[..., Tensor]) -> None:
    """Let the experts of a model run `run(experts, hidden, top_k_index, top_k_weights)`."""
    ALL_EXPERTS_FUNCTIONS.register(name, run)
    model.set_experts_implementation(name)


def gated(experts: nn.Module, gate_up: Tensor) -> Tensor:
    """Return what experts make of their gate and up projections (N, 2 I): (N, I)."""
    inner: Tensor = experts._apply_gate(gate_up)  # type: ignore[operator]
    return inner


def left_out_of_checkpoints(model: PreTrainedModel) -> Collection[str]:
    """Return the patterns of tensors that a checkpoint may have and the model ignores."""
    return model._keys_to_ignore_on_load_unexpected or ()


_ROTARY = "apply_rotary_pos_emb"


def rotary_functions(model: nn.Module) -> dict[str, Callable[..., Any]]:
    """Return what rotates queries and keys by their positions, by the file of a model's code.

    The attention of a model finds the function under its name in that file, at every call.
    """
    files = dict.fromkeys(type(module).__module__ for module in model.modules())
    found = {file: getattr(sys.modules.get(file), _ROTARY, None) for file in files}
    return {file: function for file, function in found.items() if function is not None}


def rotate_by(file: str, function: Callable[..., Any]) -> None:
    """Let all models of one file of code rotate queries and keys with `function`."""
    setattr(sys.modules[file], _ROTARY, function)


@contextlib.contextmanager
def masks_as_in_a_run() -> Iterator[None]:
    """Let models build no more attention masks in a simulation than they build in a run.

    transformers builds every mask while code is traced, and takes fake tensors for a tracer.
    """
    module: Any = masking_utils
    is_tracing = module.is_tracing
    module.is_tracing = lambda *_: False
    try:
        yield
    finally:
        module.is_tracing = is_tracing


_TORCHS_ATTENTION, _OWN_ATTENTION = "sdpa", "eager"
_OWN = "eager_attention_forward"
# transformers builds no mask for an attention whose name it does not know.
_UNMASKED = {_TORCHS_ATTENTION: "qlora_kit", _OWN_ATTENTION: "qlora_kit_eager"}

Attention: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]
"""Attention as transformers calls it: (module, query, key, value, mask, **options)."""


def attention_of(model: PreTrainedModel) -> str:
    """Return the name of a model's attention."""
    return str(model.config._attn_implementation)


def has_known_attention(model: PreTrainedModel) -> bool:
    """Whether a model attends by torch's function, or by the formula in its own file."""
    name = attention_of(model)
    return name == _TORCHS_ATTENTION or (name == _OWN_ATTENTION and hasattr(_file_of(model), _OWN))


def _file_of(module: nn.Module) -> Any:
    return sys.modules[type(module).__module__]


def _by_own_formula(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    return getattr(_file_of(module), _OWN)(module, *inputs, **options)


def attend_by(
    of_torch: Callable[[Attention], Attention], own: Callable[[Attention], Attention]
) -> None:
    """Let all models attend by what these functions make of torch's attention and of their own."""
    attention = of_torch(sdpa_attention_forward)
    for name in (_TORCHS_ATTENTION, _UNMASKED[_TORCHS_ATTENTION]):
        ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_ATTENTION_FUNCTIONS.register(_UNMASKED[_OWN_ATTENTION], own(_by_own_formula))


@contextlib.contextmanager
def without_masks(model: PreTrainedModel) -> Iterator[None]:
    """Let a model build no attention mask in the block."""
    name = model.config._attn_implementation
    model.config._attn_implementation = _UNMASKED[name]
    try:
        yield
    finally:
        model.config._attn_implementation = name
