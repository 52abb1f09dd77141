"""What a start can be combined with: asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from qlora_kit.errors import ConfigError
from qlora_kit.layers.projections import by_lora_path, projections
from qlora_kit.lora.spec import LoraSpec, Variant
from qlora_kit.lora.targets import targeted_paths
from qlora_kit.model.load import BaseSpec, stored_quantization

OF_WEIGHTS = ("pissa", "olora", "loftq")
"""the starts that are computed of the weights, while they are loaded"""
OF_ROWS = ("eva", "lora-ga")
"""the starts that are computed of the first rows, on the loaded base"""


def check_start(lora: LoraSpec, spec: BaseSpec, skeleton: nn.Module) -> None:
    """Check that a start can be computed, for these layers and with this variant.

    Args:
        lora: the trained part.
        spec: the base.
        skeleton: its skeleton.

    Raises:
        ConfigError: it cannot; the error has a line for each reason.
    """
    if lora.variant.init == "kaiming":
        return
    faults = [
        *_of_variant(lora.variant),
        *_of_base(lora.variant.init, spec),
        *_of_layers(lora, skeleton),
    ]
    if faults:
        raise ConfigError(*faults)


def _of_variant(variant: Variant) -> Iterator[str]:
    asked = {
        "dora": variant.dora,
        "learned-scale": variant.learned_scale,
        "rank-budget": variant.rank_budget is not None,
        "vblora": variant.vblora,
    }
    for flag, is_set in asked.items():
        if is_set:
            yield (
                f"--init {variant.init}: decides A and B, and --{flag} needs plain ones; expected "
                f"one of the two; leave --{flag} or --init out"
            )


def _of_base(init: str, spec: BaseSpec) -> Iterator[str]:
    name = spec.source.name
    is_stored_quantized = not spec.random and stored_quantization(spec.architecture()) is not None
    if init != "eva" and is_stored_quantized:
        yield (
            f"--init {init}: needs the weights as they were before quantisation, and {name} is "
            "stored quantised; expected the unquantised model; name it, or pass --init eva"
        )
    if init == "loftq" and spec.quantization.bits == 16:
        yield (
            "--init loftq: makes up for what quantising loses, and --bits 16 quantises nothing; "
            "expected 4 or 8 bits; pass --bits 4, or --init pissa"
        )


def _of_layers(lora: LoraSpec, skeleton: nn.Module) -> Iterator[str]:
    found = by_lora_path(projections(skeleton))
    init = lora.variant.init
    for path in targeted_paths(skeleton, lora):
        first = found[path][0] if path in found else None
        if first is None:
            kind = "a head or an embedding"
        elif first.is_expert:
            kind = "a stack of experts"
        elif first.window is not None:
            kind = "a convolution"
        else:
            continue
        yield (
            f"--init {init}: {path} is {kind}, for which it is not made; expected linear layers; "
            "leave it out of --targets, or leave --init out"
        )
        return
