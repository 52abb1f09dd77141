"""`qlora-kit plan`."""

from __future__ import annotations

from typing import Any

import click

from qlora_kit import recipe
from qlora_kit.cli.options import common_flags, configure, flags_of
from qlora_kit.cli.run import print_config, run_recipe
from qlora_kit.config import PlanConfig


@click.command()
@flags_of(PlanConfig)
@common_flags
def plan(**given: Any) -> None:
    """Predict the peak memory of a run, without a GPU, weights or a network.

    Takes the options of `train`, and a folder or a bare config.json as --model.

    \b
    qlora-kit plan --model deepseek-7b --bits 4 --max-length 2048
    """
    config = configure(PlanConfig, given)
    if given["dry_run"]:
        print_config(config, as_json=given["json"])
        return
    run_recipe(recipe.plan, config, as_json=given["json"])
