"""Pages and model cards from the templates in `templates/`.

A page is one file without a script, and loads nothing from anywhere. It shows text and numbers of
any origin, all of which its template escapes. A card is Markdown, and is not escaped so.
"""

from __future__ import annotations

import base64
import functools
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qlora_kit.report.tables import markdown_table


def render(template: str, /, **shown: Any) -> str:
    """Return what a template makes of the values it names."""
    return environment().get_template(template).render(shown)


@functools.cache
def environment() -> Environment:
    """Return where templates are found, and what they may use."""
    made = Environment(
        loader=PackageLoader("qlora_kit.report"),
        autoescape=lambda name: name is None or not name.endswith(".md.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"data_address": _data_address, "markdown_table": markdown_table}
    return made


def _data_address(png: bytes) -> str:
    """Return an address that is the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
