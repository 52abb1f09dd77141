"""The groups of parameters that an optimiser moves in different ways, such as those of LoRA+.

Takes an adapter; returns groups as torch's optimisers take them. Never moves anything.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_kit.config import TrainConfig
from qlora_kit.layers.galore import GaLoreLinear
from qlora_kit.lora.attach import Adapter
from qlora_kit.train.galore import PROJECTED

RATE_RATIO = "rate_ratio"
"""the entry of a group with its learning rate in units of the run's; 1 where there is none"""

# PEFT's `loraplus_lr_embedding`: LoRA on an embedding learns at this rate, whatever the others do.
_EMBEDDING_RATE = 1e-6


def parameter_groups(adapter: Adapter, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the groups of an adapter's parameters; one group where all move alike.

    With LoRA+ they are those of PEFT's `create_loraplus_optimizer`: every B learns at ratio times
    the rate of A, and so do vectors. A layer that is trained whole learns at the rate of A, and its
    bias does not decay. The weight decay of B is multiplied by its own rate, as AdamW does. The
    weights of GaLore have a group of their own, and learn at the rate of the run.

    Args:
        adapter: the adapter.
        config: says the ratio and the learning rate.

    Source: LoRA+ (arXiv:2402.12354), section 4.
    """
    projected = {
        f"{path}.weight" for path, layer in adapter.whole.items() if isinstance(layer, GaLoreLinear)
    }
    # An adapter without LoRA on its input embedding may not know of embeddings.
    embeddings = adapter.embeddings
    found: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {}
    for name, parameter in adapter.parameters().items():
        if name in projected:
            settings: dict[str, Any] = {PROJECTED: config.rank}
        elif config.loraplus_ratio == 1:
            settings = {}
        elif name.rpartition(".")[0] in embeddings:
            settings = {RATE_RATIO: _EMBEDDING_RATE / config.learning_rate}
        else:
            settings = _loraplus(name, parameter, config.loraplus_ratio)
        found.setdefault(tuple(settings.items()), []).append(parameter)
    return [{"params": parameters, **dict(settings)} for settings, parameters in found.items()]


def _loraplus(name: str, parameter: nn.Parameter, ratio: float) -> dict[str, Any]:
    if not (name.endswith(".lora_B") or parameter.dim() == 1):
        return {}
    if name.endswith(".bias"):
        return {RATE_RATIO: ratio, "weight_decay": 0.0}
    return {RATE_RATIO: ratio}
