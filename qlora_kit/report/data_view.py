"""A survey of the data for people: rows for the terminal, and a page with the masks of rows.

Takes a `Survey`; returns tables and HTML. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from qlora_kit.report.mask import left_out, shown, visible
from qlora_kit.report.page import note, page, section, table
from qlora_kit.report.tables import Rows

if TYPE_CHECKING:
    from qlora_kit.data.pieces import Piece
    from qlora_kit.data.survey import Bin, Repeats, ShownRow, Survey

NAME = "data.html"
"""of the page in a run's folder"""
ROWS = 20
"""token rows on that page"""

_BAR_WIDTH = 40
_MOST_OF_A_RUN = 600
_STYLE = """
:root { --learnt: #bfe8cf; --learnt-too: #d6f1e0; }
@media (prefers-color-scheme: dark) { :root { --learnt: #1d4d36; --learnt-too: #173d2b; } }
.tokens { font: 14px/1.8 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--wash); padding: .8rem; border-radius: 6px; }
.tokens span { color: var(--faint); }
.tokens span:nth-child(even) { background: rgb(128 128 128 / .14); }
.tokens .learnt { color: var(--ink); background: var(--learnt);
  border-bottom: 2px solid var(--accent); }
.tokens .learnt:nth-child(even) { background: var(--learnt-too); }
.tokens .special { font-weight: 700; }
.tokens .gap, .tokens .gap:nth-child(even) { font-style: italic; background: none; border: 0; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .2rem .8rem;
  align-items: center; font-variant-numeric: tabular-nums; }
.bars span { text-align: right; } .bar { height: 1rem; background: var(--accent); }
.bar.cut { background: none; border: 2px solid var(--faint); box-sizing: border-box; }
"""


# ---------------------------------------------------------------- tables


def tables(survey: Survey) -> tuple[tuple[str, Rows], ...]:
    """Return the tables of a survey, each with its title."""
    return (
        (f"data: {survey.source}", summary_rows(survey)),
        ("tokens of a row, before any is cut", length_rows(survey)),
        ("longest rows", longest_rows(survey)),
    )


def summary_rows(survey: Survey) -> Rows:
    """Return what became of the data, a row for each thing worth knowing."""
    counts, lengths, ends = survey.training, survey.lengths, survey.ends
    pieces = f" in {ends.of:,} token rows" if ends.of != counts.rows_kept else ""
    held_out = survey.validation
    rows = [
        ("training", f"{counts.rows_kept:,} {counts.shape} rows{pieces}"),
        ("validation", f"{held_out.rows_kept:,} rows" if held_out else "none"),
        ("tokens", f"{counts.tokens:,}, {survey.supervised_share:.1%} supervised"),
        ("lengths", f"median {lengths.median:,}, 95 % up to {lengths.p95:,}, "
                    f"longest {lengths.longest:,}; --max-length {survey.max_length:,}"),
        ("cut", f"{counts.rows_truncated:,} truncated, {counts.rows_split:,} split, "
                f"{counts.rows_dropped:,} dropped; lost: {counts.supervised_tokens_lost:,} "
                "supervised tokens"),
        ("end token", f"{' or '.join(map(visible, ends.tokens)) or 'none'} at the end of what is "
                      f"learnt in {ends.rows:,} of {ends.of:,} token rows"),
        ("prompts", _prompts(survey)),
        ("repeated", _repeats(survey.repeats)),
    ]  # fmt: skip
    if survey.overlap is not None:
        rows.append(("in both parts", _repeats(survey.overlap)))
    return tuple(rows)


def _prompts(survey: Survey) -> str:
    tried, right = survey.prompts.tried, survey.prompts.tried - survey.prompts.differing
    if not tried:
        return "none to try"
    return f"{right:,} of {tried:,} tried are what generation is given, token by token"


def _repeats(repeats: Repeats) -> str:
    if not repeats.rows and not repeats.prompts:
        return "nothing"
    whole = f"{repeats.rows:,} of {repeats.of:,} token rows"
    return f"{whole}, and the prompt of {repeats.prompts:,} with another answer"


def length_rows(survey: Survey) -> Rows:
    """Return the histogram of lengths, a row a bin; pale beyond `max_length`."""
    bins = survey.lengths.histogram
    most = max(each.rows for each in bins)
    rows = []
    for each in bins:
        # A bin with anything in it is seen.
        width = -(-_BAR_WIDTH * each.rows // most)
        block = "░" if each.first > survey.max_length else "█"
        rows.append((_range(each), f"{block * width} {each.rows:,}".strip()))
    return tuple(rows)


def _range(each: Bin) -> str:
    return f"{each.first:,}–{each.last:,}" if each.last > each.first else f"{each.first:,}"


def longest_rows(survey: Survey) -> Rows:
    """Return the longest samples: what became of them, and where they stand."""
    return tuple((f"{row.tokens:,} tokens, {row.outcome}", row.place) for row in survey.longest)


def shown_title(row: ShownRow) -> str:
    """Return what is said above a sampled row."""
    cut = f" of {row.uncut_tokens:,}" if row.uncut_tokens > row.tokens else ""
    return f"{row.place}: {row.tokens:,} tokens{cut}, {row.supervised_tokens:,} supervised"


# ---------------------------------------------------------------- the page


def data_page(survey: Survey) -> str:
    """Return a self-contained HTML page of a survey, with the masks of its sampled rows."""
    sections = [
        section("What becomes of the data", table(summary_rows(survey)), *_warnings(survey)),
        section(
            "Tokens of a row",
            note(f"Before any is cut; outlined is beyond --max-length {survey.max_length:,}."),
            _bars(survey),
        ),
        section("Longest rows", table(longest_rows(survey))),
        *_repeated(survey),
        section(
            "What is learnt, token by token",
            f'<p class="tokens"><span class="learnt">supervised</span> <span>context</span> '
            f'<span class="learnt special">{escape("</s>")}</span></p>',
            note(
                "A loss is computed for the underlined tokens and for no others. Bold tokens are "
                "special ones; hover over a token to see its number. Rows were drawn at random."
            ),
        ),
        *(section(shown_title(row), _tokens(row.pieces)) for row in survey.shown),
    ]
    return page(f"Data: {survey.source}", sections, _STYLE)


def _warnings(survey: Survey) -> Iterable[str]:
    warnings = [*survey.warnings()]
    if warnings:
        yield "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in warnings) + "</ul>"


def _bars(survey: Survey) -> str:
    bins = survey.lengths.histogram
    most = max(each.rows for each in bins)
    lines = []
    for each in bins:
        cut = " cut" if each.first > survey.max_length else ""
        bar = f'<div class="bar{cut}" style="width: {100 * each.rows / most:.2f}%"></div>'
        lines.append(f"<span>{_range(each)}</span><div>{bar}</div><span>{each.rows:,}</span>")
    return '<div class="bars">\n' + "\n".join(lines) + "\n</div>"


def _repeated(survey: Survey) -> Iterable[str]:
    for heading, repeats in (
        ("Training rows that repeat another", survey.repeats),
        ("Validation rows that are also trained on", survey.overlap),
    ):
        if repeats is not None and repeats.places:
            places = table(repeats.places, ("row", "repeats"))
            first = note(f"The first of {repeats.rows:,}." if repeats.rows > 1 else "The only one.")
            yield section(heading, places, first)


def _tokens(pieces: tuple[Piece, ...]) -> str:
    spans = []
    for what, is_supervised in shown([piece.is_supervised for piece in pieces], _MOST_OF_A_RUN):
        if isinstance(what, range):
            spans.append(f'<span class="gap">{left_out(what)}</span>')
            continue
        piece = pieces[what]
        kinds = [("learnt", is_supervised), ("special", piece.is_special)]
        names = " ".join(name for name, applies in kinds if applies)
        classes = f' class="{names}"' if names else ""
        number = " + ".join(map(str, piece.ids))
        spans.append(f'<span{classes} title="{number}">{escape(visible(piece.text))}</span>')
    return f'<p class="tokens">{"".join(spans)}</p>'
