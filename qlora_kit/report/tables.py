"""Tables for a terminal and in Markdown; a page's tables are in `templates/parts.html.jinja`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Rows = tuple[tuple[str, str], ...]
"""name and value"""


def print_table(console: Console, title: str, rows: Rows) -> None:
    """Print names and values under a title; a long value is folded beside its name."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    # rich pads every line to the width of the table; the padding is taken off.
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        console.out(line.rstrip(), highlight=False)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines in which the cells of each column stand below each other."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def markdown_table(rows: Iterable[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    """Return a table in Markdown; it always has a head, because Markdown requires one."""
    return "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    plain = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(plain)} |"
