"""`qlora-kit evaluate`."""

from __future__ import annotations

from typing import Any

import click

from qlora_kit import recipe
from qlora_kit.cli.options import common_flags, configure, flags_of
from qlora_kit.cli.run import print_config, run_recipe
from qlora_kit.config import EvaluateConfig


@click.command()
@flags_of(EvaluateConfig)
@common_flags
def evaluate(**given: Any) -> None:
    """Measure a model, with or without an adapter, on a data file.

    \b
    qlora-kit evaluate --model deepseek-7b --adapter runs/mine --data test.jsonl
    """
    config = configure(EvaluateConfig, given)
    if given["dry_run"]:
        print_config(config, as_json=given["json"])
        return
    run_recipe(recipe.evaluate, config, as_json=given["json"])
