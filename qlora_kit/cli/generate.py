"""`qlora-kit generate`."""

from __future__ import annotations

from typing import Any

import click

from qlora_kit import recipe
from qlora_kit.cli.options import common_flags, configure, flags_of
from qlora_kit.cli.run import print_config, run_recipe
from qlora_kit.config import GenerateConfig


@click.command()
@flags_of(GenerateConfig)
@common_flags
def generate(**given: Any) -> None:
    """Generate text with a model, with or without an adapter.

    \b
    qlora-kit generate --adapter runs/mine --prompt "Once upon a time"
    """
    config = configure(GenerateConfig, given)
    if given["dry_run"]:
        print_config(config, as_json=given["json"])
        return
    run_recipe(recipe.generate, config, as_json=given["json"])
