"""`qlora-kit train`."""

from __future__ import annotations

from typing import Any

import click

from qlora_kit import recipe
from qlora_kit.cli.options import common_flags, configure, flags_of
from qlora_kit.cli.run import print_config, run_recipe
from qlora_kit.config import TrainConfig


@click.command()
@flags_of(TrainConfig)
@common_flags
def train(**given: Any) -> None:
    """Train a LoRA adapter on a frozen base.

    \b
    qlora-kit train --model deepseek-7b --bits 4 --data my.jsonl --output runs/mine
    """
    config = configure(TrainConfig, given)
    if given["dry_run"]:
        print_config(config, as_json=given["json"])
        return
    run_recipe(recipe.train, config, as_json=given["json"])
