"""What lowers the memory of a step: which of it is on, and switching it on.

| reducer | same bits | costs |
|---|---|---|
| embedding on the CPU | yes | one copy of (B, T, D) a micro-batch |
| recompute | yes | a second forward of every layer that does not keep its activations |
| checkpoints in host memory | yes | copies beside the computation |
| MLP in tiles | but for the order of sums | nothing where layers are recomputed |

The chunked loss has no switch: it is the loss. 8-bit and paged Adam are optimisers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qlora_kit.config import StepOptions
from qlora_kit.model.hardware import Hardware
from qlora_kit.step.offload import Offload
from qlora_kit.step.recompute import set_recompute
from qlora_kit.step.tiles import set_mlp_tiles

# Of 1,024, 2,048 and 4,096 in the simulation of deepseek-7b. Smaller tiles save no more and
# unpack the weights more often, or hold three of them unpacked.
MLP_TILE_TOKENS = 2048


@dataclass(frozen=True)
class Reducers:
    """What is done in a step to need less memory; nothing is left open.

    Attributes:
        recompute: run each layer again in backward.
        offload_checkpoints: hold the layers' inputs in host memory meanwhile.
        mlp_tile_tokens: tokens a gated MLP works on at a time; 0: all, as its model has it.
        keep_layers: so many of the last layers are not run again.
    """

    recompute: bool
    offload_checkpoints: bool
    mlp_tile_tokens: int
    keep_layers: int = 0


def resolve(options: StepOptions, hardware: Hardware) -> Reducers:
    """Decide what the options leave open: all that is exact and next to free.

    Beside a CPU there is no other memory for checkpoints. Without recompute whoever asked for
    it has memory to spare, and tiles would compute a part of the MLP again; with it a layer
    takes 0.8 to 1.0 times as long in tiles (one CPU thread).
    """
    on_gpu = hardware.device.type != "cpu"
    offload, tile = options.offload_checkpoints, options.mlp_tile_tokens
    if tile is None:
        tile = MLP_TILE_TOKENS if options.recompute else 0
    return Reducers(
        recompute=options.recompute,
        offload_checkpoints=on_gpu and options.recompute and offload is not False,
        mlp_tile_tokens=tile,
        keep_layers=options.keep_layers,
    )


def apply(model: nn.Module, reducers: Reducers, hardware: Hardware) -> int:
    """Switch a loaded model to these reducers, whatever was on before.

    Returns:
        How many MLPs work in tiles.

    Raises:
        ModelError: the architecture has no layers that can be recomputed.
    """
    offload = Offload.on(hardware.device) if reducers.offload_checkpoints else None
    set_recompute(model, reducers.recompute, offload, reducers.keep_layers)
    return set_mlp_tiles(model, reducers.mlp_tile_tokens, hardware.dtype)


def without_effect(options: StepOptions, reducers: Reducers, tiled_mlps: int) -> list[str]:
    """Say which options ask for what is not done, and why."""
    said = []
    if options.offload_checkpoints and not reducers.offload_checkpoints:
        reason = "the model runs on a CPU" if options.recompute else "nothing is recomputed"
        said.append(f"--offload-checkpoints has no effect: {reason}")
    if options.keep_layers and not options.recompute:
        said.append("--keep-layers has no effect: nothing is recomputed")
    if options.mlp_tile_tokens and not tiled_mlps:
        said.append("--mlp-tile-tokens has no effect: the model's MLPs are of another kind")
    return said
