"""A survey of the data, for people: tables for the terminal, and a page with the masks of rows.

Takes a `Survey`; returns tables and HTML. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from qlora_kit.data.label_survey import RepeatedTexts, ValueFigures
from qlora_kit.data.preference_rows import PAIRS
from qlora_kit.data.source_figures import described_sources
from qlora_kit.data.text_rows import SUPERVISED_TOKENS
from qlora_kit.report.mask import left_out, shown, visible, weight_mark
from qlora_kit.report.page import render
from qlora_kit.report.tables import Rows

if TYPE_CHECKING:
    from qlora_kit.data.encode import Piece
    from qlora_kit.data.label_survey import ClassCount, LabelFigures, Values
    from qlora_kit.data.packing import PackedSample, PackedStep
    from qlora_kit.data.survey import Bin, Ends, Repeats, ShownRow, Survey

NAME = "data.html"
"""name of the page in a run's folder"""
ROWS = 20
"""token rows on the page in a run's folder"""

_BAR_WIDTH = 40
_MOST_OF_A_RUN = 600
_MOST_CLASSES = 20
_LONGEST_NAME = 40
_MOST_MICRO_BATCHES = 16
_MOST_NAMED = 12


# ---------------------------------------------------------------- tables


def tables(survey: Survey) -> tuple[tuple[str, Rows], ...]:
    """Return the tables of a survey, each with its title."""
    labels = survey.labels and ((_label_title(survey.labels), label_rows(survey.labels)),)
    return (
        (f"data: {survey.source}", summary_rows(survey)),
        *((("sources", described_sources(survey.sources)),) if survey.sources else ()),
        *(labels or ()),
        ("tokens of a row, before any is cut", length_rows(survey)),
        ("longest rows", longest_rows(survey)),
        *((("the first step, packed", packed_rows(survey.packed)),) if survey.packed else ()),
    )


def summary_rows(survey: Survey) -> Rows:
    """Return what became of the data, one row for each figure."""
    counts, lengths, ends = survey.training, survey.lengths, survey.ends
    held_out = survey.validation
    rows = [
        ("training", f"{counts.rows_kept:,} {counts.shape} rows{_in_pieces(survey)}"),
        ("validation", f"{held_out.rows_kept:,} rows" if held_out else "none"),
        ("tokens", f"{counts.tokens:,}{_supervised(survey)}"),
        ("lengths", f"median {lengths.median:,}, 95 % up to {lengths.p95:,}, "
                    f"longest {lengths.longest:,}; --max-length {survey.max_length:,}"),
        ("cut", _cut(survey)),
    ]  # fmt: skip
    if ends is not None:
        rows += [("end token", _end_text(ends)), ("prompts", _prompt_text(survey))]
    if survey.labels is not None:
        rows.append(_label_summary(survey.labels))
    what = "images" if counts.shape == "image" else "texts"
    rows.append(("repeated", _repeat_text(survey.repeats, what)))
    if survey.overlap is not None:
        rows.append(("in both parts", _repeat_text(survey.overlap, what)))
    if survey.packing:
        rows.append(("packing", survey.packing))
    return tuple(rows)


def _in_pieces(survey: Survey) -> str:
    ends = survey.ends
    if ends is None or ends.of == survey.training.rows_kept:
        return ""
    return f" in {ends.of:,} token rows"


def _supervised(survey: Survey) -> str:
    is_text = survey.training.weighs == SUPERVISED_TOKENS
    return f", {survey.supervised_share:.1%} supervised" if is_text else ""


def _cut(survey: Survey) -> str:
    counts = survey.training
    if survey.labels is not None:
        split = f"{counts.rows_split:,} split, " if survey.labels.kind == "tags" else ""
        return f"{counts.rows_truncated:,} truncated, {split}{counts.rows_dropped:,} dropped"
    if counts.weighs == PAIRS:
        return f"{counts.rows_truncated:,} truncated, {counts.rows_dropped:,} dropped"
    return (
        f"{counts.rows_truncated:,} truncated, {counts.rows_split:,} split, "
        f"{counts.rows_dropped:,} dropped; lost: {counts.weight_lost:,} supervised tokens"
    )


def _end_text(ends: Ends) -> str:
    return (
        f"{' or '.join(map(visible, ends.tokens)) or 'none'} at the end of what is learnt in "
        f"{ends.rows:,} of {ends.of:,} token rows"
    )


def _prompt_text(survey: Survey) -> str:
    prompts = survey.prompts
    if prompts is None or not prompts.tried:
        return "none to try"
    right = prompts.tried - prompts.differing
    return f"{right:,} of {prompts.tried:,} tried are what generation is given, token by token"


def _repeat_text(repeats: Repeats | RepeatedTexts, what: str) -> str:
    if isinstance(repeats, RepeatedTexts):
        others = f"{repeats.contradicting:,} of them with another label"
        return f"{repeats.rows:,} of {repeats.of:,} {what}, {others}" if repeats.rows else "nothing"
    if not repeats.rows and not repeats.prompts:
        return "nothing"
    whole = f"{repeats.rows:,} of {repeats.of:,} token rows"
    return f"{whole}, and the prompt of {repeats.prompts:,} with another answer"


# ---------------------------------------------------------------- labels


def _label_title(labels: LabelFigures) -> str:
    return (
        "values of the training rows"
        if isinstance(labels, ValueFigures)
        else f"labels of the training {labels.counted}"
    )


def _label_summary(labels: LabelFigures) -> tuple[str, str]:
    if isinstance(labels, ValueFigures):
        parts = [_spread(labels.training)]
        if labels.validation is not None:
            parts.append(f"validation {_spread(labels.validation)}")
        return "values", "; ".join(parts)
    how = "none, one or several" if labels.kind == "multi" else "one"
    each = "for each word" if labels.kind == "tags" else "each"
    return "labels", f"{how} of {len(labels.classes):,} {each}"


def _spread(values: Values) -> str:
    return f"{values.smallest:.4g} to {values.largest:.4g}, mean {values.mean:.4g}"


class _LabelBar(NamedTuple):
    name: str
    rows: int
    note: str


def label_rows(labels: LabelFigures) -> Rows:
    """Return the rows of each class, of the largest ones where they are many; or of each value."""
    bars = [*_label_bars(labels)]
    most = max(bar.rows for bar in bars)
    return tuple(
        (bar.name, f"{'█' * _width(bar.rows, most)} {bar.rows:,} {bar.note}".strip())
        for bar in bars
    )


def _label_bars(labels: LabelFigures) -> Iterator[_LabelBar]:
    if isinstance(labels, ValueFigures):
        for value in labels.training.histogram:
            yield _LabelBar(f"{value.first:.4g} to {value.last:.4g}", value.rows, "")
        return
    largest = sorted(labels.classes, key=lambda each: -each.training)[:_MOST_CLASSES]
    in_all = sum(each.training for each in labels.classes)
    for each in labels.classes:
        if each in largest:
            yield _LabelBar(_short(each.name), each.training, _label_note(each, in_all))
    if others := len(labels.classes) - len(largest):
        rows = in_all - sum(each.training for each in largest)
        yield _LabelBar(f"{others:,} others", rows, f"({rows / in_all:.1%})")


def _short(name: str) -> str:
    text = visible(" ".join(name.split()))
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…"


def _label_note(each: ClassCount, in_all: int) -> str:
    parts = [f"{each.training / in_all:.1%}"]
    if each.validation is not None:
        parts.append(f"{each.validation:,} in validation")
    if each.weight != 1:
        parts.append(f"weight {each.weight:.4g}")
    return f"({', '.join(parts)})"


# ---------------------------------------------------------------- lengths


def _width(rows: int, most: int) -> int:
    """Return the width of a bar; rounded up, so that what is not 0 has a bar."""
    return -(-_BAR_WIDTH * rows // most)


def length_rows(survey: Survey) -> Rows:
    """Return the histogram of lengths, one row a bin; bars beyond `max_length` are pale."""
    bins = survey.lengths.histogram
    most = max(each.rows for each in bins)
    rows = []
    for each in bins:
        block = "░" if each.first > survey.max_length else "█"
        rows.append((_range(each), f"{block * _width(each.rows, most)} {each.rows:,}".strip()))
    return tuple(rows)


def _range(each: Bin) -> str:
    return f"{each.first:,}–{each.last:,}" if each.last > each.first else f"{each.first:,}"


def longest_rows(survey: Survey) -> Rows:
    """Return the longest samples: what became of them, and their places."""
    return tuple((f"{row.tokens:,} tokens, {row.outcome}", row.place) for row in survey.longest)


def packed_rows(step: PackedStep) -> Rows:
    """Return the tokens of each sample of a packed step, by micro-batch."""
    return tuple(
        (f"micro-batch {number}", f"{_filled(samples, step)} tokens: {_in_a_row(samples)}")
        for number, samples in enumerate(step.micro_batches[:_MOST_MICRO_BATCHES], 1)
    )


def _filled(samples: Sequence[PackedSample], step: PackedStep) -> str:
    return f"{sum(sample.tokens for sample in samples):,} of {step.capacity:,}"


def _in_a_row(samples: Sequence[PackedSample]) -> str:
    more = len(samples) - _MOST_NAMED
    named = " + ".join(f"{sample.tokens:,}" for sample in samples[:_MOST_NAMED])
    return f"{named} and {more:,} more" if more > 0 else named


def shown_title(row: ShownRow) -> str:
    """Return the title of a sampled row."""
    cut = f" of {row.uncut_tokens:,}" if row.uncut_tokens > row.tokens else ""
    learnt = f"{row.supervised_tokens:,} supervised" if row.label is None else _label_of(row.label)
    return f"{row.place}: {row.tokens:,} tokens{cut}, {learnt}"


def _label_of(label: str) -> str:
    return f"label {_short(label)}"


# ---------------------------------------------------------------- the page


def data_page(survey: Survey) -> str:
    """Return a self-contained HTML page of a survey, with the masks of its sampled rows."""
    return render(
        "data.html.jinja",
        title=f"Data: {survey.source}",
        summary=summary_rows(survey),
        sources=described_sources(survey.sources),
        warnings=[*survey.warnings()],
        labels_title=survey.labels and _label_title(survey.labels),
        labels=[*_page_label_bars(survey.labels)] if survey.labels else [],
        max_length=f"{survey.max_length:,}",
        bars=[*_bars(survey)],
        longest=longest_rows(survey),
        repeated=[*_repeated(survey)],
        packing=survey.packing,
        packed=[*_strips(survey.packed)] if survey.packed else [],
        shown=[(shown_title(row), [*_spans(row.pieces)], row.thumbnail) for row in survey.shown],
        is_weighted=any(weight_mark(each.weight) for row in survey.shown for each in row.pieces),
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


def _page_label_bars(labels: LabelFigures) -> Iterator[_Bar]:
    bars = [*_label_bars(labels)]
    most = max(bar.rows for bar in bars)
    for bar in bars:
        width = f"{100 * bar.rows / most:.2f}%"
        yield _Bar(bar.name, f"{bar.rows:,} {bar.note}".strip(), width, is_cut=False)


class _Segment(NamedTuple):
    """A sample in the picture of a packed micro-batch."""

    width: str
    title: str


def _strips(step: PackedStep) -> Iterator[tuple[list[_Segment], str]]:
    """Yield the samples of each micro-batch as wide as they are long, and its tokens in words."""
    for samples in step.micro_batches[:_MOST_MICRO_BATCHES]:
        segments = [
            _Segment(
                f"{100 * sample.tokens / step.capacity:.2f}%",
                f"{sample.place}: {sample.tokens:,} tokens",
            )
            for sample in samples
        ]
        yield segments, _filled(samples, step)


def _repeated(survey: Survey) -> Iterator[tuple[str, Rows, str]]:
    for heading, repeats in (
        ("Training rows that repeat another", survey.repeats),
        ("Validation rows that are also trained on", survey.overlap),
    ):
        if repeats is None or not repeats.places:
            continue
        yield heading, repeats.places, _first_of(repeats.rows)
        if isinstance(repeats, RepeatedTexts) and repeats.contradictions:
            others = f"{heading}, with another label"
            yield others, repeats.contradictions, _first_of(repeats.contradicting)


def _first_of(rows: int) -> str:
    return f"The first of {rows:,}." if rows > 1 else "The only one."


class _Span(NamedTuple):
    """A token on the page, or the gap of tokens left out: text, CSS classes, a title to hover over.

    The title has the ids, and the weight of the loss where it is not 1.
    """

    text: str
    kind: str | None
    ids: str | None = None


def _spans(pieces: tuple[Piece, ...]) -> Iterator[_Span]:
    for what, weight in shown([piece.weight for piece in pieces], _MOST_OF_A_RUN):
        if isinstance(what, range):
            yield _Span(left_out(what), "gap")
            continue
        piece = pieces[what]
        mark = weight_mark(weight)
        kinds = [("learnt", weight), ("special", piece.is_special), ("weighted", mark)]
        kind = " ".join(name for name, applies in kinds if applies) or None
        ids = " + ".join(map(str, piece.ids))
        yield _Span(visible(piece.text), kind, f"{ids}, loss {mark}" if mark else ids)
