"""Decides which fused kernels serve a loaded model, and lets them.

A kernel serves on a GPU only, where the model has something for it to compute, and where it agrees
with the plain code on a few random tokens. In a plan tensors have no values: there the model's
parts decide. Changes the norms of a model and the function that rotates its queries and keys, and
puts both back where their kernel does not serve.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.config import StepOptions
from qlora_kit.layers.kernels import NAMES, use
from qlora_kit.model.hardware import Hardware
from qlora_kit.step.norms import set_norms
from qlora_kit.step.reducers import resolve
from qlora_kit.step.rotary import set_rotary
from qlora_kit.step.trials import Numbers, Trial, Tried

# Norms have a kernel of torch's, and LoRA's products are torch's own.
_IN_TRITON = ("nf4", "rotary", "gate", "loss")


@dataclass(frozen=True)
class Kernels:
    """The kernels of a model.

    Attributes:
        serving: those that serve, in the order of `NAMES`.
        left_out: for each that the model could use and that does not serve, the reason.
    """

    serving: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> str:
        """Those that serve, as one word or a list of names."""
        return ", ".join(self.serving) or "plain"

    def described(self) -> str:
        """Say in one line which kernels serve, and why others do not."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        missing = (f"not {', '.join(names)}: {reason}" for reason, names in by_reason.items())
        return "; ".join((self.names, *missing))


def choose_kernels(model: PreTrainedModel, options: StepOptions, hardware: Hardware) -> Kernels:
    """Decide which kernels serve in this process from now on, and let them.

    Args:
        model: a loaded model, changed in place.
        options: the options of the user.
        hardware: the device that the model runs on; `meta` stands in for a GPU in a plan.
    """
    use(())
    wanted = options.kernels == "auto" and hardware.device.type != "cpu"
    set_norms(model, wanted, hardware.dtype)
    rotations = set_rotary(model, wanted)
    if not wanted:
        return Kernels()
    in_tiles = resolve(options, hardware).mlp_tile_tokens > 0
    found = decided(Tried(model, hardware, in_tiles, tuple(rotations)))
    set_norms(model, "norm" in found.serving, hardware.dtype)
    set_rotary(model, "rotary" in found.serving)
    use(found.serving)
    return found


def decided(tried: Tried) -> Kernels:
    """Try every kernel that a model has something for; return which may serve."""
    serving, left_out = [], {}
    for name in NAMES:
        if trials := tried.trials(name):
            reason = _fault(name, trials, tried.hardware)
            if reason is None:
                serving.append(name)
            else:
                left_out[name] = reason
    return Kernels(tuple(serving), left_out)


def _fault(name: str, trials: list[Trial], hardware: Hardware) -> str | None:
    """Return the reason why a kernel cannot serve, or None."""
    if name in _IN_TRITON and _lacks_triton(hardware):
        return "install triton"
    if hardware.device.type == "meta":
        return None
    faults = (_fault_of_trial(name, trial, hardware) for trial in trials)
    return next((fault for fault in faults if fault is not None), None)


def _lacks_triton(hardware: Hardware) -> bool:
    if hardware.device.type == "meta" and not torch.cuda.is_available():
        return False  # a plan for the GPU of another machine
    try:
        importlib.import_module("triton")
    except ImportError:
        return True
    return False


def _fault_of_trial(name: str, trial: Trial, hardware: Hardware) -> str | None:
    try:
        own = trial(Numbers(hardware))
        use((name,))
        found = trial(Numbers(hardware))
    except Exception as error:
        # Whatever a kernel raises on this GPU, the plain code computes the same without it.
        return f"raises {type(error).__name__}"
    finally:
        use(())
    tolerance = 1e-5 if hardware.dtype == torch.float32 else 2e-2
    agree = all(_agree(a, b, tolerance) for a, b in zip(found, own, strict=True))
    return None if agree else "differs from the plain code"


def _agree(found: Tensor, own: Tensor, tolerance: float) -> bool:
    found, own = found.float(), own.float()
    return found.shape == own.shape and bool((found - own).norm() <= tolerance * own.norm() + 1e-12)
