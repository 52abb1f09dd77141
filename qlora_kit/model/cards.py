"""Rates of known cards from their data sheets, for plans on a machine without the card.

The rates are those of dense products with sums in fp32. Sources: NVIDIA's architecture whitepapers
(GA102, Ada, RTX Blackwell) for GeForce cards, and NVIDIA's data sheets of the A10, A40, A100, L4,
L40S, RTX A6000, RTX 6000 Ada, H100 and H200.
"""

from __future__ import annotations

from typing import NamedTuple

from qlora_kit.errors import ConfigError
from qlora_kit.model.ceilings import Ceilings

# The share of its data sheet that an H100 reached: 802 of 989 TFLOP/s in an 8,192 x 8,192 product,
# and 2.6 of 3.35 TB/s in passes over memory (`benchmarks/results/gpu`).
_PRODUCT_SHARE, _PASS_SHARE = 0.81, 0.79
# Copies over PCIe 4.0 with 16 lanes reach some 25 GB/s; cards with 8 lanes half of it.
_LINK_BYTES_PER_SECOND = 12e9


class _Sheet(NamedTuple):
    """A line of a data sheet: 10¹² operations a second, and 10⁹ bytes a second."""

    bfloat16: float
    float32: float
    memory: float


_CARDS = {
    "RTX 3050": _Sheet(18.2, 9.1, 224),
    "RTX 3060": _Sheet(25.5, 12.7, 360),
    "RTX 3070": _Sheet(40.6, 20.3, 448),
    "RTX 3080": _Sheet(59.5, 29.8, 760),
    "RTX 3090": _Sheet(71.2, 35.6, 936),
    "RTX 4060": _Sheet(30.2, 15.1, 272),
    "RTX 4060 Ti": _Sheet(44.1, 22.1, 288),
    "RTX 4070": _Sheet(58.3, 29.1, 504),
    "RTX 4080": _Sheet(97.5, 48.7, 717),
    "RTX 4090": _Sheet(165.2, 82.6, 1008),
    "RTX 5070": _Sheet(61.7, 30.9, 672),
    "RTX 5080": _Sheet(112.6, 56.3, 960),
    "RTX 5090": _Sheet(209.5, 104.8, 1792),
    "A10": _Sheet(125, 31.2, 600),
    "A40": _Sheet(149.7, 37.4, 696),
    "A100 40GB": _Sheet(312, 19.5, 1555),
    "A100 80GB": _Sheet(312, 19.5, 1935),
    "L4": _Sheet(121, 30.3, 300),
    "L40S": _Sheet(362, 91.6, 864),
    "RTX A6000": _Sheet(154.8, 38.7, 768),
    "RTX 6000 Ada": _Sheet(364.2, 91.1, 960),
    "H100 PCIe": _Sheet(756, 51, 2000),
    "H100": _Sheet(989, 67, 3350),
    "H200": _Sheet(989, 67, 4800),
}

KNOWN = tuple(_CARDS)


def ceilings_of_card(name: str) -> Ceilings:
    """Return the rates that a card should reach, by its name: "RTX 4090" or "rtx-4090".

    What is not in a data sheet stays unknown: the host's time for a call.

    Raises:
        ConfigError: the card is not known.
    """
    found = next((card for card in KNOWN if _plain(card) == _plain(name)), None)
    if found is None:
        raise ConfigError(
            f"--card {name}: its rates are not known; expected {', '.join(KNOWN)}; "
            "leave --card out for a plan without the time"
        )
    sheet = _CARDS[found]
    products = {"bfloat16": sheet.bfloat16, "float16": sheet.bfloat16, "float32": sheet.float32}
    return Ceilings(
        device=found,
        flop_per_second={name: _PRODUCT_SHARE * rate * 1e12 for name, rate in products.items()},
        bytes_per_second=((1, _PASS_SHARE * sheet.memory * 1e9),),
        unpacked_per_second={},
        link_bytes_per_second=_LINK_BYTES_PER_SECOND,
        call_seconds=None,
        is_measured=False,
    )


def _plain(name: str) -> str:
    """Return a name without what people write differently."""
    letters = "".join(letter for letter in name.lower() if letter.isalnum())
    return letters.removeprefix("nvidia").removeprefix("geforce")
