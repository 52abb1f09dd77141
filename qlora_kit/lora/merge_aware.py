"""What `--merge-aware` cannot be combined with: each is refused by name, before anything is loaded.

The layer itself is `layers.merge_aware`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qlora_kit.errors import ConfigError
from qlora_kit.lora.spec import LoraSpec

# What A and B start from without changing the weights of the base.
_STARTS = ("kaiming", "eva", "loftq")


def check_merge_aware(
    spec: LoraSpec, bits: int, *, is_shared: bool = False, experts: Iterable[str] = ()
) -> None:
    """Check that layers can multiply by their merged weights, packed again.

    Args:
        spec: the trained part; nothing is checked unless it is merge-aware.
        bits: bits of the base.
        is_shared: whether several processes hold the base together.
        experts: paths of stacks of experts among the targets.

    Raises:
        ConfigError: they cannot; the error has a line for each reason.
    """
    if spec.variant.merge_aware and (faults := [*_faults(spec, bits, is_shared, experts)]):
        raise ConfigError(*(f"--merge-aware: {fault}" for fault in faults))


def _faults(spec: LoraSpec, bits: int, is_shared: bool, experts: Iterable[str]) -> Iterator[str]:
    variant = spec.variant
    if bits == 16:
        yield "found a base in 16 bits; expected one that is packed; pass --bits 4 or 8"
    if spec.dropout:
        yield (
            f"found --lora-dropout {spec.dropout:g}, and the merged weight has no term that could "
            "be dropped; expected 0; leave --lora-dropout out"
        )
    if variant.init not in _STARTS:
        yield (
            f"found --init {variant.init}, which changes the base, whose codes must stay; "
            f"expected one of {', '.join(_STARTS)}; leave --init out"
        )
    for name in ("dora", "learned_scale", "vblora", "rank_budget"):
        if getattr(variant, name):
            flag = name.replace("_", "-")
            yield (
                f"found --{flag}, whose weight is not W + scaling B A with fixed ranks; expected "
                f"plain A and B; leave --{flag} out"
            )
    if is_shared:
        yield (
            "found --shard-base, and a part of a weight cannot be packed again as the whole is; "
            "expected a whole base in each process; leave --shard-base out"
        )
    for path in experts:
        yield (
            f"found {path} among the targets, a stack of experts, which export cannot write in "
            "4 bits; expected other layers; leave experts out of --targets"
        )
        return
