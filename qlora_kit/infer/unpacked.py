"""Weights that stay unpacked while a model answers, where memory has room for them.

An answer multiplies by every weight once a token. A weight that is packed, or stored in another
dtype than that of the products, would be unpacked each time, which takes longer than the product.
The products are of the same numbers, so no bit of an answer changes.
"""

from __future__ import annotations

from collections.abc import Iterator

from qlora_kit.events import Announce, Notice
from qlora_kit.layers.weight import FrozenWeight, PlainWeight
from qlora_kit.model.load import Base
from qlora_kit.model.memory import free_bytes
from qlora_kit.step.unpacked import packed_weights, unpacked_bytes

_LARGEST_SHARE = 0.5
"""of the free memory: the rest is for keys, values and other programs"""


def keep_unpacked(base: Base, announce: Announce) -> None:
    """Let the weights stay unpacked, if they take at most half of the memory that is free.

    Args:
        base: the loaded model, with the adapters on it; changed in place.
        announce: receives a notice of the bytes that they take beside the stored ones.
    """
    device, dtype = base.hardware.device, base.hardware.dtype
    weights = [each for each in _unpacked_for_products(base) if each.device.type == device.type]
    needed = unpacked_bytes(weights, dtype)
    if not needed or needed > _LARGEST_SHARE * free_bytes(device):
        return
    for weight in weights:
        weight.keep_unpacked(dtype)
    announce(Notice(f"the weights stay unpacked while it answers, in {needed / 1e6:,.1f} MB more"))


def _unpacked_for_products(base: Base) -> Iterator[FrozenWeight]:
    yield from packed_weights(base.model)
    for module in base.model.modules():
        if isinstance(module, PlainWeight) and module.dtype != base.hardware.dtype:
            yield module
