"""The ways to lower the memory of a step: decides which of them are on, and switches them on.

| reducer | same bits | costs |
|---|---|---|
| embedding on the CPU | yes | one copy of (B, T, D) a micro-batch |
| recompute | yes | a second forward of every layer that does not keep its activations |
| checkpoints in host memory | yes | copies beside the computation |
| MLP in tiles | but for the order of sums | nothing where layers are recomputed |

The chunked loss has no switch, because there is no other loss. 8-bit and paged Adam are choices of
the optimiser, and the embedding is placed when the base is loaded (`model.load.Placement`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from qlora_kit.config import StepOptions
from qlora_kit.model.hardware import Hardware
from qlora_kit.step.offload import Offload
from qlora_kit.step.recompute import set_recompute
from qlora_kit.step.tiles import set_mlp_tiles
from qlora_kit.step.unpacked import set_unpacked

# The best of 1,024, 2,048 and 4,096 in the simulation of deepseek-7b. Smaller tiles save no more
# memory, and unpack the weights more often or hold three of them unpacked.
MLP_TILE_TOKENS = 2048


@dataclass(frozen=True)
class Reducers:
    """The decisions on how a step saves memory; none is left open.

    Attributes:
        recompute: run each layer again in backward.
        offload_checkpoints: hold the layers' inputs in host memory between forward and backward.
        mlp_tile_tokens: tokens that a gated MLP computes at a time; 0: all, as its model does.
        keep_layers: number of the last layers that keep their activations and are not run again.
        unpacked_layers: number of the last layers whose weights stay unpacked.
    """

    recompute: bool
    offload_checkpoints: bool
    mlp_tile_tokens: int
    keep_layers: int = 0
    unpacked_layers: int = 0


def resolve(options: StepOptions, hardware: Hardware) -> Reducers:
    """Decide what the options leave open: a reducer is on if it is exact and almost free.

    On a CPU there is no other memory that could hold the checkpoints. A user who turned recompute
    off has memory to spare, and tiles would compute a part of the MLP again. With recompute, a
    layer in tiles takes 0.8 to 1.0 times as long (one CPU thread).

    Args:
        options: the options of the user; None in a field leaves it open.
        hardware: the device that the model runs on.
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
        unpacked_layers=options.unpacked_layers,
    )


class Applied(NamedTuple):
    """What the reducers found in a model to act on.

    Attributes:
        tiled_mlps: the number of MLPs that work in tiles.
        unpacked_weights: the number of weights that stay unpacked.
    """

    tiled_mlps: int
    unpacked_weights: int


def apply(model: nn.Module, reducers: Reducers, hardware: Hardware) -> Applied:
    """Switch a loaded model to these reducers, whatever was on before.

    Raises:
        ModelError: the architecture has no layers that can be recomputed.
    """
    offload = Offload.on(hardware.device) if reducers.offload_checkpoints else None
    set_recompute(model, reducers.recompute, offload, reducers.keep_layers)
    tiled = set_mlp_tiles(model, reducers.mlp_tile_tokens, hardware.dtype)
    return Applied(tiled, set_unpacked(model, reducers.unpacked_layers, hardware.dtype))


def without_effect(options: StepOptions, reducers: Reducers, applied: Applied) -> list[str]:
    """Return a line for each option that has no effect, with the reason.

    Args:
        options: the options of the user.
        reducers: the decisions of `resolve`.
        applied: what `apply` returned.
    """
    said = []
    if options.offload_checkpoints and not reducers.offload_checkpoints:
        reason = "the model runs on a CPU" if options.recompute else "nothing is recomputed"
        said.append(f"--offload-checkpoints has no effect: {reason}")
    if options.keep_layers and not options.recompute:
        said.append("--keep-layers has no effect: nothing is recomputed")
    if options.mlp_tile_tokens and not applied.tiled_mlps:
        said.append("--mlp-tile-tokens has no effect: the model's MLPs are of another kind")
    if options.unpacked_layers and not applied.unpacked_weights:
        said.append("--unpacked-layers has no effect: no layer holds its packed weights whole")
    return said
