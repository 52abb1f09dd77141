"""Which variants of LoRA can be combined: a contradiction is one line, before anything is read.

Takes options; returns nothing, or raises an error. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from qlora_kit.config import VariantOptions
from qlora_kit.errors import ConfigError

# Starts that change the weights of the base, whose rows DoRA measures.
_CHANGE_BASE = ("pissa", "olora", "loftq", "lora-ga")


def check_forms(options: VariantOptions) -> None:
    """Check that the variants that change how a layer computes can be combined as asked.

    Raises:
        ConfigError: they cannot; the error has a line for each pair.
    """
    faults = [
        f"{one} and {other} contradict each other: {reason}; expected one of them; leave one out"
        for one, other, reason in (*_of_dora(options), *_of_vblora(options), *_of_a(options))
    ]
    if faults:
        raise ConfigError(*faults)


def _of_dora(options: VariantOptions) -> Iterator[tuple[str, str, str]]:
    if not options.dora:
        return
    if options.learned_scale:
        yield "--dora", "--learned-scale", "DoRA trains the length of each output already"
    if options.merge_aware:
        yield "--dora", "--merge-aware", "it packs weights that are not rescaled again"
    if options.init in _CHANGE_BASE:
        yield "--dora", f"--init {options.init}", "it changes the weights that DoRA measures"


def _of_vblora(options: VariantOptions) -> Iterator[tuple[str, str, str]]:
    if not options.vblora:
        return
    composed = "A and B are composed of shared vectors"
    asked = {
        "--dora": options.dora,
        "--learned-scale": options.learned_scale,
        "--freeze-a": options.freeze_a,
        "--merge-aware": options.merge_aware,
        "--rslora": options.rslora,
        "--rank-pattern": bool(options.rank_pattern),
        "--alpha-pattern": bool(options.alpha_pattern),
        "--rank-budget": options.rank_budget is not None,
        f"--init {options.init}": options.init != "kaiming",
        f"--loraplus-ratio {options.loraplus_ratio:g}": options.loraplus_ratio != 1,
        "--adapter": getattr(options, "adapter", None) is not None,
    }
    for flag, is_asked in asked.items():
        if is_asked:
            yield "--vblora", flag, composed


def _of_a(options: VariantOptions) -> Iterator[tuple[str, str, str]]:
    if options.freeze_a and options.loraplus_ratio != 1:
        ratio = f"--loraplus-ratio {options.loraplus_ratio:g}"
        yield "--freeze-a", ratio, "A is not trained, so B has no rate in units of its rate"
