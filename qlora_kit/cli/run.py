"""What a command prints: its configuration, or the events of its recipe and then its result."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import yaml

from qlora_kit.config import Options, SweepConfig
from qlora_kit.events import Announce, AnswerEnded, AnswerPart, Event, LogLine, Notice
from qlora_kit.opening.trials import resolved_sweep
from qlora_kit.redact import for_terminal, redacted, redacted_values


def print_config(config: Options, *, as_json: bool) -> None:
    """Print a resolved configuration as YAML or JSON; of a sweep, its runs."""
    if isinstance(config, SweepConfig):
        values = resolved_sweep(config)
    else:
        values = config.model_dump(mode="json")
    values = redacted_values(values)
    click.echo(json.dumps(values, indent=2) if as_json else yaml.safe_dump(values, sort_keys=False))


@contextmanager
def listener(*, as_json: bool, answers_alone: bool = False) -> Iterator[Announce]:
    """Yield what shows the events of a recipe; with `as_json` only notices, on stderr.

    Args:
        as_json: whether standard output is for the result alone.
        answers_alone: whether it is for answers alone where nobody types.
    """
    if as_json:
        yield _notices_to_stderr
        return
    if answers_alone and not sys.stdin.isatty():
        yield _answers_to_stdout
        return
    from qlora_kit.report.terminal import Terminal

    with Terminal() as terminal:
        yield terminal


def print_result(result: dict[str, Any]) -> None:
    """Print the result of a recipe as JSON, with null for numbers that JSON does not have."""
    click.echo(json.dumps(redacted_values(_finite(result)), indent=2))


def _notices_to_stderr(event: Event) -> None:
    if isinstance(event, LogLine):
        click.echo(redacted(event.text), err=True)
    if isinstance(event, Notice):
        click.echo(f"note: {redacted(event.text)}", err=True)


def _answers_to_stdout(event: Event) -> None:
    if isinstance(event, AnswerPart):
        click.echo(for_terminal(redacted(event.text)), nl=False)
    elif isinstance(event, AnswerEnded):
        click.echo()
    else:
        _notices_to_stderr(event)


def _finite(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result with null for each number that JSON does not have: infinity and NaN."""
    numbers = {k: v for k, v in result.items() if isinstance(v, float) and not math.isfinite(v)}
    return {**result, **dict.fromkeys(numbers)}
