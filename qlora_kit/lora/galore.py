"""Puts the layers that GaLore trains whole on a base.

Takes a loaded base and a `LoraSpec`; `lora.targets` says which layers it means. Trains nothing:
`train.galore` moves the weights.
"""

from __future__ import annotations

from qlora_kit.errors import ConfigError
from qlora_kit.layers.galore import GaLoreLinear
from qlora_kit.layers.projections import projections
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.lora.targets import galore_paths
from qlora_kit.model.load import Base

_FLAG = "--galore"


def check_galore(spec: LoraSpec, bits: int) -> None:
    """Check that the layers of GaLore are held unquantised.

    Raises:
        ConfigError: they are not.
    """
    if spec.variant.galore and bits != 16:
        raise ConfigError(
            f"{_FLAG}: trains the weights themselves, and --bits {bits} quantises them; expected "
            f"--bits 16; pass it, or leave {_FLAG} out"
        )


def train_by_galore(base: Base, spec: LoraSpec) -> dict[str, GaLoreLinear]:
    """Replace the frozen layers that GaLore trains; return what replaces them, by path.

    Raises:
        ConfigError: a name names no such layer, or they are quantised.
    """
    check_galore(spec, base.quantization.bits)
    if spec.variant.galore and base.shards is not None:
        raise ConfigError(
            f"{_FLAG}: trains whole weights, and several devices hold the base in parts; expected "
            "--no-shard-base; pass it, or leave --galore out"
        )
    found = projections(base.model)
    layers = {}
    for path in galore_paths(base.model, spec):
        layers[path] = GaLoreLinear(found[path].frozen)
        base.model.set_submodule(path, layers[path])
    return layers
