"""`qlora-kit check`."""

from __future__ import annotations

from typing import Any

import click

from qlora_kit import recipe
from qlora_kit.cli.options import common_flags, configure, flags_of
from qlora_kit.cli.run import print_config, run_recipe
from qlora_kit.config import CheckConfig


@click.command()
@flags_of(CheckConfig)
@common_flags
def check(**given: Any) -> None:
    """Show what a model would learn from a data file, token by token, without training.

    Takes the options of `train`; writes nothing but the page that --html names. Exit code 0:
    the data can be trained on; 2: why it cannot.

    \b
    qlora-kit check --model deepseek-7b --data my.jsonl --html data.html
    """
    config = configure(CheckConfig, given)
    if given["dry_run"]:
        print_config(config, as_json=given["json"])
        return
    run_recipe(recipe.check, config, as_json=given["json"])
