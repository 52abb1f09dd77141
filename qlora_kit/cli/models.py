"""`qlora-kit models` and `qlora-kit doctor`: the models with a name; a check of this machine."""

from __future__ import annotations

import json
import sys

import click

from qlora_kit.model.names import known_models


@click.command()
@click.option("--json", "as_json", is_flag=True, help="print JSON for programs")
def models(as_json: bool) -> None:
    """List the models that have a name."""
    known = known_models()
    if as_json:
        rows = {n: {"hub_id": s.hub_id, "parameters": s.parameters} for n, s in known.items()}
        click.echo(json.dumps(rows, indent=2))
        return
    for name, source in known.items():
        size = f"{(source.parameters or 0) / 1e9:8.3f} B"
        click.echo(f"{name:18} {size}  {source.hub_id or 'built in'}")
    click.echo(
        "\nAny folder or hub id (owner/name) of a decoder, an encoder or a T5 works as well."
    )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="print JSON for programs")
def doctor(as_json: bool) -> None:
    """Report versions and devices, and whether 4 and 8 bits work on them."""
    from qlora_kit.model.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([finding.__dict__ for finding in findings], indent=2))
    else:
        for finding in findings:
            mark = "ok  " if finding.ok else "FAIL"
            click.echo(f"{mark} {finding.name:24} {finding.found}")
            if finding.remedy:
                click.echo(f"     {'':24} {finding.remedy}")
    if not all(finding.ok for finding in findings):
        sys.exit(3)
