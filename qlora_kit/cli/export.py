"""`qlora-kit export`."""

from __future__ import annotations

from typing import Any

import click

from qlora_kit import recipe
from qlora_kit.cli.options import common_flags, configure, flags_of
from qlora_kit.cli.run import print_config, run_recipe
from qlora_kit.config import ExportConfig


@click.command()
@flags_of(ExportConfig, positional={"adapter": "RUN_OR_ADAPTER"})
@common_flags
def export(**given: Any) -> None:
    """Merge an adapter into its base, verify the merge, and write the model with its report.

    \b
    qlora-kit export runs/mine --to merged/mine
    """
    config = configure(ExportConfig, given)
    if given["dry_run"]:
        print_config(config, as_json=given["json"])
        return
    run_recipe(recipe.export, config, as_json=given["json"])
