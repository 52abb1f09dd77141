"""The two things a command can do: print its configuration, or run its recipe on the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import click
import yaml

from qlora_kit.config import AnyConfig, Options
from qlora_kit.events import Announce, Event, Notice
from qlora_kit.redact import redacted, redacted_values


def print_config(config: Options, *, as_json: bool) -> None:
    """Print a resolved configuration as YAML or JSON."""
    values = redacted_values(config.model_dump(mode="json"))
    click.echo(json.dumps(values, indent=2) if as_json else yaml.safe_dump(values, sort_keys=False))


def run_recipe(
    recipe: Callable[[AnyConfig, Announce], dict[str, Any]], config: AnyConfig, *, as_json: bool
) -> None:
    """Run a recipe and show its events; with `as_json`, print only its result, as JSON."""
    if as_json:
        click.echo(
            json.dumps(redacted_values(_finite(recipe(config, _notices_to_stderr))), indent=2)
        )
        return
    from qlora_kit.report.terminal import Terminal

    with Terminal() as terminal:
        recipe(config, terminal)


def _notices_to_stderr(event: Event) -> None:
    if isinstance(event, Notice):
        click.echo(f"note: {redacted(event.text)}", err=True)


def _finite(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result with null for each number that JSON does not have: infinity and NaN."""
    numbers = {k: v for k, v in result.items() if isinstance(v, float) and not math.isfinite(v)}
    return {**result, **dict.fromkeys(numbers)}
