"""Options that change what is trained and how it moves, where they contradict each other.

Takes the options of a run; raises an error, or returns nothing. Loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from qlora_kit.config import TrainConfig
from qlora_kit.errors import ConfigError


def check_moves(config: TrainConfig) -> None:
    """Check that LoRA+, a budget of ranks and GaLore are asked for where they can be kept.

    Raises:
        ConfigError: they are not; the error has a line for each contradiction.
    """
    faults = [*_of_budget(config), *_of_others(config)]
    if faults:
        raise ConfigError(*faults)


def _of_budget(config: TrainConfig) -> Iterator[str]:
    if config.rank_budget is None:
        return
    flag = f"--rank-budget {config.rank_budget}"
    if config.rank_pattern:
        yield f"{flag}: decides the ranks, and --rank-pattern does too; expected one; leave one out"
    if config.init != "kaiming":
        yield (
            f"{flag}: decides the ranks after --init {config.init} took its matrices from the "
            "weights; expected one of the two; leave one out"
        )
    if config.adapter is not None:
        yield f"{flag}: --adapter has its ranks already; expected one of the two; leave one out"
    if config.task == "preference":
        yield (
            f"{flag}: is decided by the loss of single answers, and --task preference compares "
            "two; expected another task; leave --rank-budget out"
        )


def _of_others(config: TrainConfig) -> Iterator[str]:
    if config.galore and config.adapter is not None:
        yield (
            "--galore: --adapter goes on with LoRA matrices alone; expected a new run; leave one "
            "of them out"
        )
    if config.galore and config.shard_base:
        yield (
            "--galore: trains whole weights, and --shard-base divides them among devices; "
            "expected --no-shard-base; leave one of them out"
        )
