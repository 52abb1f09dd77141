"""From a configuration to a plan: what the run would need, and whether that fits.

Takes the options of `train`; returns a `Plan`. Needs no GPU, no weights and no network: of a
model it reads the architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from qlora_kit.config import PlanConfig
from qlora_kit.lora.attach import LoraSpec
from qlora_kit.model.architecture import build_skeleton, unquantized_share
from qlora_kit.model.hardware import Hardware, dtype_named
from qlora_kit.model.load import BaseSpec
from qlora_kit.model.names import find_model
from qlora_kit.model.quantize import Quantization
from qlora_kit.plan.simulate import Prediction, predict

# What a card holds besides the allocated memory: the CUDA context, published as 0.3 to 0.5 GB,
# and what the caching allocator cannot use of its blocks. Assumed; not measured yet.
CONTEXT_BYTES = 500_000_000
FRAGMENTATION = 0.05

_SETTINGS = (
    "model", "bits", "quant_type", "double_quant", "rank", "targets", "max_length", "batch_size",
    "gradient_accumulation_steps", "eval_batch_size", "recompute", "loss_chunk_tokens",
    "optimizer", "embedding_on_cpu", "head_bits", "offload_checkpoints", "mlp_tile_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a run would need.

    Attributes:
        prediction: the peak of each phase.
        settings: what was planned.
        warnings: what the user should know before the run.
        budget_bytes: of the whole card, or None where none was named.
    """

    prediction: Prediction
    settings: dict[str, Any]
    warnings: tuple[str, ...]
    budget_bytes: int | None = None

    @property
    def card_bytes(self) -> int:
        """What the run takes of a whole card: with context and a margin for fragmentation."""
        return CONTEXT_BYTES + round(self.prediction.peak.bytes * (1 + FRAGMENTATION))

    @property
    def fits(self) -> bool | None:
        """Whether the run fits its budget; None without one."""
        return None if self.budget_bytes is None else self.card_bytes <= self.budget_bytes

    def as_json(self) -> dict[str, Any]:
        """Return the plan for programs; all sizes in bytes."""
        device, host = self.prediction.device, self.prediction.host
        return {
            "predicted_peak_bytes": self.prediction.peak.bytes,
            "host_peak_bytes": self.prediction.host_peak.bytes,
            "phase_peaks_bytes": {phase: peak.bytes for phase, peak in device.items()},
            "host_phase_peaks_bytes": {phase: peak.bytes for phase, peak in host.items()},
            "breakdown_bytes": {phase: peak.by_purpose for phase, peak in device.items()},
            "settings": self.settings,
            "card_bytes": self.card_bytes,
            "fits": self.fits,
            "budget_bytes": self.budget_bytes,
            "warnings": list(self.warnings),
        }


def make_plan(config: PlanConfig) -> Plan:
    """Plan a run for a CUDA GPU, or for a CPU with `--device cpu`.

    Raises:
        ModelError: the model is unknown, or of an architecture that the kit does not train.
        ConfigError: a target names no layer.
    """
    source = find_model(config.model)
    quantization = Quantization(config.bits, config.quant_type, config.double_quant)
    spec = BaseSpec(source, source.folder, quantization, random=True)
    architecture = spec.architecture()
    unquantized_share(build_skeleton(architecture))
    hardware = planned_hardware(config)
    prediction = predict(spec, LoraSpec.of(config), config, hardware, config.max_length)
    settings = {name: getattr(config, name) for name in _SETTINGS}
    settings |= {"device": "cuda" if hardware.device.type == "meta" else "cpu"}
    settings |= {"dtype": hardware.dtype_name}
    return Plan(prediction, settings, tuple(_warnings(config, architecture)), config.vram)


def planned_hardware(config: PlanConfig) -> Hardware:
    """Return what stands in for the device: `meta` for a GPU, which need not be there."""
    if config.device == "cpu":
        dtype = torch.float32 if config.dtype == "auto" else dtype_named(config.dtype)
        return Hardware(torch.device("cpu"), dtype, "planned")
    dtype = torch.bfloat16 if config.dtype == "auto" else dtype_named(config.dtype)
    return Hardware(torch.device("meta"), dtype, "planned")


def _warnings(config: PlanConfig, architecture: PreTrainedConfig) -> list[str]:
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        return [
            f"{config.max_length:,} tokens are more than the model's {positions:,} positions; "
            "training refuses such rows"
        ]
    return []
