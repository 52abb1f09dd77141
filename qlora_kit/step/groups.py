"""Lets the LoRA layers of a model that see one x compute together.

The names of the layers tell which they are, see `layers.projections`. A layer that is called with
something else computes alone, so a wrong guess costs time and no exactness.
"""

from __future__ import annotations

from torch import nn

from qlora_kit.layers.lora import LoRALinear, can_share
from qlora_kit.layers.projections import with_one_input


def set_groups(model: nn.Module) -> int:
    """Let the LoRA layers that see one x compute together.

    Layers without LoRA stay as they are, and so do layers of which one has another rank or scaling
    than the others.

    Args:
        model: a loaded model, changed in place: no module and no name of a parameter.

    Returns:
        The number of groups of two layers or more.
    """
    groups = 0
    for paths in with_one_input(model):
        modules = (model.get_submodule(path) for path in paths)
        layers = tuple(each for each in modules if isinstance(each, LoRALinear))
        for layer in layers:
            layer.partners = ()
        if len(layers) > 1 and can_share(layers):
            layers[0].partners = layers[1:]
            groups += 1
    return groups
