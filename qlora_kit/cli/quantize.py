"""`qlora-kit quantize`."""

from __future__ import annotations

from typing import Any

import click

from qlora_kit import recipe
from qlora_kit.cli.options import common_flags, configure, flags_of
from qlora_kit.cli.run import print_config, run_recipe
from qlora_kit.config import QuantizeConfig


@click.command()
@flags_of(QuantizeConfig)
@common_flags
def quantize(**given: Any) -> None:
    """Write a model in 4 or 8 bits, to be loaded in seconds, here and in plain transformers.

    \b
    qlora-kit quantize --model deepseek-7b --bits 4 --to models/deepseek-7b-nf4
    """
    config = configure(QuantizeConfig, given)
    if given["dry_run"]:
        print_config(config, as_json=given["json"])
        return
    run_recipe(recipe.quantize, config, as_json=given["json"])
