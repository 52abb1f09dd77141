"""Settles how a loaded model computes its steps: its reducers of memory, and its kernels.

A run and its plan make the same call, so the plan predicts the step that the run takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from qlora_kit.config import StepOptions
from qlora_kit.model.hardware import Hardware
from qlora_kit.step.groups import set_groups
from qlora_kit.step.kernels import Kernels, choose_kernels
from qlora_kit.step.reducers import Applied, Reducers, apply, resolve

# As a model is loaded: nothing runs again, and no MLP works in tiles.
_AS_LOADED = Reducers(recompute=False, offload_checkpoints=False, mlp_tile_tokens=0)


@dataclass(frozen=True)
class Settled:
    """How a model computes its steps.

    Attributes:
        reducers: the reducers of memory.
        applied: what they found in the model to act on.
        kernels: the kernels that serve.
    """

    reducers: Reducers
    applied: Applied
    kernels: Kernels


def settle(model: PreTrainedModel, options: StepOptions, hardware: Hardware) -> Settled:
    """Let a loaded model compute its steps by these options, whatever was settled before.

    Args:
        model: a loaded model, changed in place.
        options: the options of the user.
        hardware: the device that the model runs on; `meta` stands in for a GPU in a plan.

    Raises:
        ModelError: the architecture has no layers that can be recomputed.
    """
    reducers = resolve(options, hardware)
    applied = apply(model, reducers, hardware)
    set_groups(model)
    return Settled(reducers, applied, choose_kernels(model, options, hardware))


def unsettle(model: PreTrainedModel, hardware: Hardware) -> None:
    """Let a model compute as it was loaded, so that another run may settle it anew.

    Args:
        model: a model that `settle` has changed, or not; changed in place.
        hardware: the device that it runs on.
    """
    apply(model, _AS_LOADED, hardware)
    choose_kernels(model, StepOptions(kernels="plain"), hardware)
