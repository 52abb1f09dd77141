"""A survey of the data, for people: tables for the terminal, and a page with the masks of rows.

Takes a `Survey`; returns tables and HTML. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from qlora_kit.report.mask import left_out, shown, visible
from qlora_kit.report.page import render
from qlora_kit.report.tables import Rows

if TYPE_CHECKING:
    from qlora_kit.data.encode import Piece
    from qlora_kit.data.survey import Bin, Repeats, ShownRow, Survey

NAME = "data.html"
"""name of the page in a run's folder"""
ROWS = 20
"""token rows on the page in a run's folder"""

_BAR_WIDTH = 40
_MOST_OF_A_RUN = 600


# ---------------------------------------------------------------- tables


def tables(survey: Survey) -> tuple[tuple[str, Rows], ...]:
    """Return the tables of a survey, each with its title."""
    return (
        (f"data: {survey.source}", summary_rows(survey)),
        ("tokens of a row, before any is cut", length_rows(survey)),
        ("longest rows", longest_rows(survey)),
    )


def summary_rows(survey: Survey) -> Rows:
    """Return what became of the data, one row for each figure."""
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
                f"{counts.rows_dropped:,} dropped; lost: {counts.weight_lost:,} "
                "supervised tokens"),
        ("end token", f"{' or '.join(map(visible, ends.tokens)) or 'none'} at the end of what is "
                      f"learnt in {ends.rows:,} of {ends.of:,} token rows"),
        ("prompts", _prompt_text(survey)),
        ("repeated", _repeat_text(survey.repeats)),
    ]  # fmt: skip
    if survey.overlap is not None:
        rows.append(("in both parts", _repeat_text(survey.overlap)))
    return tuple(rows)


def _prompt_text(survey: Survey) -> str:
    tried, right = survey.prompts.tried, survey.prompts.tried - survey.prompts.differing
    if not tried:
        return "none to try"
    return f"{right:,} of {tried:,} tried are what generation is given, token by token"


def _repeat_text(repeats: Repeats) -> str:
    if not repeats.rows and not repeats.prompts:
        return "nothing"
    whole = f"{repeats.rows:,} of {repeats.of:,} token rows"
    return f"{whole}, and the prompt of {repeats.prompts:,} with another answer"


def length_rows(survey: Survey) -> Rows:
    """Return the histogram of lengths, one row a bin; bars beyond `max_length` are pale."""
    bins = survey.lengths.histogram
    most = max(each.rows for each in bins)
    rows = []
    for each in bins:
        # Rounded up, so that every bin that is not empty has a bar.
        width = -(-_BAR_WIDTH * each.rows // most)
        block = "░" if each.first > survey.max_length else "█"
        rows.append((_range(each), f"{block * width} {each.rows:,}".strip()))
    return tuple(rows)


def _range(each: Bin) -> str:
    return f"{each.first:,}–{each.last:,}" if each.last > each.first else f"{each.first:,}"


def longest_rows(survey: Survey) -> Rows:
    """Return the longest samples: what became of them, and their places."""
    return tuple((f"{row.tokens:,} tokens, {row.outcome}", row.place) for row in survey.longest)


def shown_title(row: ShownRow) -> str:
    """Return the title of a sampled row."""
    cut = f" of {row.uncut_tokens:,}" if row.uncut_tokens > row.tokens else ""
    return f"{row.place}: {row.tokens:,} tokens{cut}, {row.supervised_tokens:,} supervised"


# ---------------------------------------------------------------- the page


def data_page(survey: Survey) -> str:
    """Return a self-contained HTML page of a survey, with the masks of its sampled rows."""
    return render(
        "data.html.jinja",
        title=f"Data: {survey.source}",
        summary=summary_rows(survey),
        warnings=[*survey.warnings()],
        max_length=f"{survey.max_length:,}",
        bars=[*_bars(survey)],
        longest=longest_rows(survey),
        repeated=[*_repeated(survey)],
        shown=[(shown_title(row), [*_spans(row.pieces)]) for row in survey.shown],
    )


class _Bar(NamedTuple):
    range: str
    rows: str
    width: str
    is_cut: bool


def _bars(survey: Survey) -> Iterator[_Bar]:
    bins = survey.lengths.histogram
    most = max(each.rows for each in bins)
    for each in bins:
        width = f"{100 * each.rows / most:.2f}%"
        yield _Bar(_range(each), f"{each.rows:,}", width, each.first > survey.max_length)


def _repeated(survey: Survey) -> Iterator[tuple[str, Rows, str]]:
    for heading, repeats in (
        ("Training rows that repeat another", survey.repeats),
        ("Validation rows that are also trained on", survey.overlap),
    ):
        if repeats is not None and repeats.places:
            first = f"The first of {repeats.rows:,}." if repeats.rows > 1 else "The only one."
            yield heading, repeats.places, first


class _Span(NamedTuple):
    """A token on the page, or the gap of tokens left out: text, CSS classes, ids to hover over."""

    text: str
    kind: str | None
    ids: str | None = None


def _spans(pieces: tuple[Piece, ...]) -> Iterator[_Span]:
    for what, is_supervised in shown([piece.is_supervised for piece in pieces], _MOST_OF_A_RUN):
        if isinstance(what, range):
            yield _Span(left_out(what), "gap")
            continue
        piece = pieces[what]
        kinds = [("learnt", is_supervised), ("special", piece.is_special)]
        kind = " ".join(name for name, applies in kinds if applies) or None
        yield _Span(visible(piece.text), kind, " + ".join(map(str, piece.ids)))
