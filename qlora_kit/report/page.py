"""Self-contained HTML pages: one file, no script, nothing loaded from anywhere.

What it takes is text and numbers of any origin; what it returns is HTML in which all of it is
escaped. It writes no file.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

# A page shows strangers' text. Should an escape ever be forgotten, the browser still runs and
# loads nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2327; --paper: #fff; --faint: #5c6670;
  --line: #d5dade; --wash: #f4f6f7; --accent: #0b6e4f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ea; --paper: #14181b; --faint: #9aa5ae;
  --line: #343c43; --wash: #1d2327; --accent: #5fd3a6; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h1, h2 { line-height: 1.25; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; color: var(--faint); }
td.number { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; } img { max-width: 100%; background: #fff; }
figcaption, .note { color: var(--faint); font-size: .9rem; }
""".strip()


def page(title: str, sections: Iterable[str], style: str = "") -> str:
    """A complete HTML5 document.

    Args:
        title: Plain text, also the first heading.
        sections: HTML, as the functions below return it.
        style: CSS of this kind of page alone, after the rules that all pages share.
    """
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_STYLE}\n{style.strip()}\n</style>",
            "</head>",
            "<body>",
            f"<h1>{escape(title)}</h1>",
            *sections,
            "</body>",
            "</html>",
            "",
        )
    )


def section(heading: str, *parts: str) -> str:
    """A part of a page under its own heading (plain text); the parts are HTML."""
    return "\n".join(("<section>", f"<h2>{escape(heading)}</h2>", *parts, "</section>"))


def note(text: str) -> str:
    """A paragraph of plain text, set back."""
    return f'<p class="note">{escape(text)}</p>'


def table(rows: Iterable[Sequence[object]], head: Sequence[object] = ()) -> str:
    """A table of plain text and numbers, which are set to the right; an empty head is left out."""
    heading = "".join(f"<th>{escape(str(name))}</th>" for name in head)
    lines = [f"<tr>{heading}</tr>"] if heading else []
    lines += [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def figure(png: bytes, caption: str) -> str:
    """A picture inside the page; the caption, plain text, stands in where it cannot be seen."""
    data = base64.b64encode(png).decode("ascii")
    words = escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{words}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def _cell(value: object) -> str:
    # A bool is a number to Python and a word to a reader.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f'<td class="number">{value}</td>' if number else f"<td>{escape(str(value))}</td>"
