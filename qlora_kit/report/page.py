"""Pages and model cards from the templates in `templates/`.

Takes values; returns the rendered text. A page is one HTML file without a script, and loads nothing
from anywhere. It shows text and numbers of any origin, and its template escapes all of them. A card
is Markdown, which is not escaped.
"""

from __future__ import annotations

import base64
import functools
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qlora_kit.report.tables import markdown_table

RUN_PAGE = "report.html"
"""the page of a run, in its folder"""


def render(template: str, /, **shown: Any) -> str:
    """Return the text of a template, filled with the values that it names."""
    return environment().get_template(template).render(shown)


@functools.cache
def environment() -> Environment:
    """Return jinja2's environment: the folder of templates, and the filters they may use."""
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
    """Return an address that contains the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
