"""Variants of LoRA that contradict each other, or another option.

Takes the options of a run; raises an error, or returns nothing. Loads nothing.
"""

from __future__ import annotations

from qlora_kit.config import TrainConfig
from qlora_kit.lora.combinations import check_forms
from qlora_kit.opening.moves import check_moves
from qlora_kit.opening.start import check_start_options


def check_variants(config: TrainConfig) -> None:
    """Check that the variants that are asked for can be had together, and with the other options.

    Raises:
        ConfigError: they cannot; the error has a line for each contradiction.
    """
    check_forms(config)
    check_start_options(config)
    check_moves(config)
    if config.merge_aware:
        from qlora_kit.lora.merge_aware import check_merge_aware
        from qlora_kit.lora.spec import LoraSpec

        check_merge_aware(LoraSpec.of(config), config.bits, is_shared=bool(config.shard_base))
