"""Surveys the data of a run: lengths, repeats, ends, prompts, and a few rows to look at.

Takes the samples and token rows that training takes; returns a frozen `Survey`. Never changes a
row, and tokenises nothing but the prompts that it compares with the rows.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from qlora_kit.config import TokenOptions
from qlora_kit.data.divide import Divider
from qlora_kit.data.encode import IGNORED, Encoder, Piece, pieces_of, prompt_ids
from qlora_kit.data.image_files import facts_of, read_bytes, thumbnail
from qlora_kit.data.joined_rows import renderer_of
from qlora_kit.data.label_survey import LabelFigures, RepeatedTexts, label_figures, repeated_texts
from qlora_kit.data.labels import Labels
from qlora_kit.data.packing import PackedStep
from qlora_kit.data.row_arrays import Part, RowArrays, hash_of_ids
from qlora_kit.data.shapes import Conversation, LabelledImage, Pair, Preference, Sample, Shape
from qlora_kit.data.source_figures import SourceFigures, source_figures
from qlora_kit.data.template import Renderer, end_tokens
from qlora_kit.data.text_rows import SUPERVISED_TOKENS
from qlora_kit.data.tokens import Counts
from qlora_kit.errors import DataError
from qlora_kit.time_limit import many_limits

_MOST_LISTED = 5
_SAMPLES_TRIED = 100
_THUMBNAIL_SIDE = 96


@dataclass(frozen=True)
class Bin:
    """The number of samples with `first` to `last` tokens, both included."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class Lengths:
    """The tokens of the samples, before any sample is cut."""

    median: int
    p95: int
    longest: int
    histogram: tuple[Bin, ...]
    """its borders are powers of two, the midpoints between them, and `max_length`"""


@dataclass(frozen=True)
class LongRow:
    """One of the longest samples."""

    place: str
    tokens: int
    outcome: str
    """whole, truncated, split or dropped"""


@dataclass(frozen=True)
class Repeats:
    """Token rows that repeat an earlier row."""

    rows: int
    """number of rows that repeat a whole row"""
    of: int
    """number of rows that were compared"""
    prompts: int
    """number of rows that repeat the first prompt of another row, with another answer"""
    places: tuple[tuple[str, str], ...]
    """places of the first repeated rows, each with the place of the row that it repeats"""


@dataclass(frozen=True)
class Ends:
    """The tokens by which a model learns to stop."""

    rows: int
    """number of token rows whose last supervised token is an end token"""
    of: int
    """number of all token rows"""
    tokens: Mapping[str, int]
    """for each end token, the number of rows whose last supervised token it is"""


@dataclass(frozen=True)
class PromptTest:
    """Whether rows begin with the very ids that generation would be given."""

    tried: int
    """number of prompts that were compared, drawn from the data"""
    differing: int
    """number of prompts that no row begins with"""
    places: tuple[str, ...]
    """places of the first prompts that differ"""


@dataclass(frozen=True)
class ShownRow:
    """A sampled token row, piece by piece."""

    place: str
    tokens: int
    supervised_tokens: int
    uncut_tokens: int
    pieces: tuple[Piece, ...]
    label: str | None = None
    """the label in words, where rows are classified"""
    thumbnail: bytes | None = None
    """a small PNG of the row, where it is an image"""


@dataclass(frozen=True)
class Survey:
    """A survey of the rows that a model would learn from and be measured on.

    Texts to be learnt have `ends` and `prompts`, labelled texts have `labels`.
    """

    source: str
    max_length: int
    training: Counts
    validation: Counts | None
    lengths: Lengths
    longest: tuple[LongRow, ...]
    ends: Ends | None
    prompts: PromptTest | None
    labels: LabelFigures | None
    repeats: Repeats | RepeatedTexts
    """within the training rows"""
    overlap: Repeats | RepeatedTexts | None
    """of the validation rows with the training rows"""
    shown: tuple[ShownRow, ...]
    packing: str = ""
    """whether the samples of a step are packed, in words"""
    packed: PackedStep | None = None
    """the first step, where its samples are packed"""
    sources: tuple[SourceFigures, ...] = ()
    """the figures of each source, where there are several"""

    @property
    def supervised_share(self) -> float:
        """Return the share of the training tokens that are supervised, 0 to 1."""
        return self.training.weight / self.training.tokens

    def as_json(self) -> dict[str, Any]:
        """Return the figures, without any text of the data but the names of labels."""
        left_out = ("labels",) if self.labels is None else ("ends", "prompts")
        left_out = ("shown", "sources", *left_out)
        figures = {name: value for name, value in asdict(self).items() if name not in left_out}
        sources = {"sources": [each.as_json() for each in self.sources]} if self.sources else {}
        counts = {
            "training": self.training.as_json(),
            "validation": self.validation.as_json() if self.validation else None,
        }
        has_share = self.training.weighs == SUPERVISED_TOKENS
        share = {"supervised_share": round(self.supervised_share, 4)} if has_share else {}
        return {**figures, **counts, **share, **sources, "warnings": list(self.warnings())}

    def warnings(self) -> Iterator[str]:
        """Yield a line for each thing that looks wrong, though the data can be trained on."""
        yield from self._of_lengths()
        if self.labels is not None:
            yield from self.labels.warnings()
        if self.ends is not None and not self.ends.rows and self.training.shape is not Shape.TEXT:
            yield "no row ends with an end token; the model does not learn to stop"
        if self.prompts is not None and self.prompts.differing:
            yield (
                "prompts whose tokens are others in generation than in training: "
                f"{self.prompts.differing:,} of {self.prompts.tried:,} tried, the first in "
                f"{self.prompts.places[0]}"
            )
        yield from self._of_repeats()

    def _of_lengths(self) -> Iterator[str]:
        counts, lengths = self.training, self.lengths
        if counts.rows_truncated:
            yield (
                f"rows longer than --max-length {self.max_length:,}, which lose their end: "
                f"{counts.rows_truncated:,} of {counts.rows_read:,}; {lengths.p95:,} would keep "
                f"95 % whole, {lengths.longest:,} all"
            )
        if counts.rows_dropped:
            why = "with nothing to learn within" if self.labels is None else "longer than"
            yield (
                f"rows left out, {why} --max-length {self.max_length:,}: "
                f"{counts.rows_dropped:,} of {counts.rows_read:,}"
            )

    def _of_repeats(self) -> Iterator[str]:
        for repeats, what, remedy in (
            (self.repeats, "training rows that repeat another", "or they count twice"),
            (
                self.overlap,
                "validation rows that are also trained on",
                "or the validation loss looks better than it is",
            ),
        ):
            if repeats is not None and repeats.rows:
                place, earlier = repeats.places[0]
                yield (
                    f"{what}: {repeats.rows:,}, the first {place}, as {earlier}; remove them, "
                    f"{remedy}"
                )
            if isinstance(repeats, RepeatedTexts) and repeats.contradictions:
                place, earlier = repeats.contradictions[0]
                longer = ", or raise --max-length" if self.training.rows_truncated else ""
                yield (
                    f"{what}, with another label: {repeats.contradicting:,}, the first {place}, as "
                    f"{earlier}; correct one of the labels{longer}: no model can learn both"
                )


def survey(
    training: Part,
    validation: Part | None,
    tokenizer: Any,
    options: TokenOptions,
    *,
    seed: int,
    shown_rows: int,
    has_sources: bool = False,
) -> Survey:
    """Survey the data of a run.

    Args:
        training: the rows to learn from.
        validation: the rows to measure on; its samples may be those of `training`.
        tokenizer: transformers' tokenizer, whose chat template the rows were made with.
        options: the options that the rows were made with.
        seed: draws the rows that are shown and the prompts that are tried.
        shown_rows: number of rows that are cut into pieces for a reader.
        has_sources: whether rows are sources and targets, which no template joins, so that there is
            nothing to try of prompts.
    """
    rows, counts = RowArrays(training), training.tokenized.counts
    measured = None if validation is None else RowArrays(validation)
    lengths = [tokens for _, tokens in rows.sample_lengths()]
    labels = training.tokenized.labels
    repeats, overlap = (_repeats if labels is None else repeated_texts)(rows, measured)
    return Survey(
        source=training.samples.source,
        max_length=options.max_length,
        training=counts,
        validation=None if validation is None else validation.tokenized.counts,
        lengths=_lengths(lengths, options.max_length),
        longest=tuple(_longest(rows, options)),
        ends=None if labels else _ends(rows, tokenizer),
        prompts=(
            None
            if labels or has_sources
            else _try_prompts(
                rows, tokenizer, options, renderer_of(training.samples, tokenizer, options), seed
            )
        ),
        labels=label_figures(labels, rows, measured) if labels else None,
        repeats=repeats,
        overlap=overlap,
        shown=tuple(_rows_to_show(rows, tokenizer, labels, seed, shown_rows)),
        sources=source_figures(
            training.tokenized, None if validation is None else validation.tokenized
        ),
    )


# ---------------------------------------------------------------- lengths


def _lengths(tokens: Sequence[int], max_length: int) -> Lengths:
    median, p95 = numpy.percentile(tokens, (50, 95), method="higher")
    return Lengths(int(median), int(p95), max(tokens), tuple(_histogram(tokens, max_length)))


def _histogram(tokens: Sequence[int], max_length: int) -> Iterator[Bin]:
    powers = [1 << power for power in range(3, max(tokens).bit_length() + 1)]
    borders = sorted({*powers, *(3 * power // 2 for power in powers), max_length, max(tokens)})
    borders = [0, *(border for border in borders if border <= max(tokens))]
    counts, _ = numpy.histogram(tokens, [border + 1 for border in borders] + [max(tokens) + 2])
    bins = [
        Bin(first + 1, last, int(count))
        for first, last, count in zip(borders, borders[1:], counts, strict=False)
    ]
    shortest = next(index for index, each in enumerate(bins) if each.rows)
    return iter(bins[shortest:])


def _longest(rows: RowArrays, options: TokenOptions) -> Iterator[LongRow]:
    lengths = sorted(rows.sample_lengths(), key=lambda each: (-each[1], each[0]))
    for index, tokens in lengths[:_MOST_LISTED]:
        if index in rows.dropped:
            outcome = "dropped"
        elif tokens <= options.max_length:
            outcome = "whole"
        else:
            is_cut = options.long_samples != "split" and rows.counts_of(index).rows_truncated
            outcome = "truncated" if is_cut else "split"
        yield LongRow(rows.samples[index].place, tokens, outcome)


# ---------------------------------------------------------------- ends and prompts


def _ends(rows: RowArrays, tokenizer: Any) -> Ends:
    last = numpy.searchsorted(rows.supervised, rows.starts[1:]) - 1
    found = Counter(rows.ids[rows.supervised[last]].tolist())
    texts = end_tokens(tokenizer)
    known = dict(zip(tokenizer.convert_tokens_to_ids(list(texts)), texts, strict=True))
    tokens = {known[token]: count for token, count in found.most_common() if token in known}
    return Ends(sum(tokens.values()), len(rows), tokens)


def _try_prompts(
    rows: RowArrays,
    tokenizer: Any,
    options: TokenOptions,
    renderer: Callable[[int], Renderer],
    seed: int,
) -> PromptTest:
    """Encode prompts as generation does, and look for the rows that begin with them."""
    encoder = Encoder(tokenizer)
    names = numpy.unique(rows.sample_of_row).tolist()
    picked = random.Random(f"prompts {seed}").sample(names, min(_SAMPLES_TRIED, len(names)))
    tried, places = 0, []
    with many_limits():
        for index in sorted(picked):
            own = rows.of_sample(index)
            made = [rows.ids[rows.span(row)].tolist() for row in own]
            sample, tokens = rows.samples[index], int(max(rows.uncut_tokens[own]))
            is_divided = options.long_samples == "split" and tokens > options.max_length
            divider = Divider(renderer(index), encoder, options.max_length)
            parts = divider.divided(sample, tokens) if is_divided else [sample]
            for text in _prompts_of(parts, renderer(index)):
                ids = prompt_ids(tokenizer, text)
                if not any(len(row) > len(ids) for row in made):
                    continue  # the row was cut before the answer
                tried += 1
                if not any(row[: len(ids)] == ids for row in made):
                    places.append(rows.samples[index].place)
    return PromptTest(tried, len(places), tuple(places[:_MOST_LISTED]))


def _prompts_of(samples: Iterable[Sample], renderer: Renderer) -> Iterator[str]:
    """Yield the text before each answer that is learnt, as generation would be given it."""
    for each in samples:
        sample = each.sides[0] if isinstance(each, Preference) else each
        if isinstance(sample, Pair):
            yield renderer.prompt_text(sample.prompt)
        elif isinstance(sample, Conversation):
            for index in renderer.learnt_turns(sample):
                # With `train_on` "all" no prompt has been rendered yet, and the template may refuse
                # it.
                with contextlib.suppress(DataError):
                    yield renderer.prompt_text(sample.messages[:index], sample.place, sample.tools)


# ---------------------------------------------------------------- repeats


class _Known(NamedTuple):
    """The rows and prompts seen so far, by the hash of their ids."""

    rows: dict[bytes, str]
    """place of the first row with this hash"""
    prompts: set[bytes]


def _repeats(rows: RowArrays, measured: RowArrays | None) -> tuple[Repeats, Repeats | None]:
    """Return the repeats within the rows, and those of the measured rows with them."""
    known = _Known({}, set())
    within = _count_repeats(rows, known, remember=True)
    return within, None if measured is None else _count_repeats(measured, known, remember=False)


def _count_repeats(rows: RowArrays, known: _Known, *, remember: bool) -> Repeats:
    """Compare rows with the known ones, by the ids that the model sees: after any cut."""
    places: list[tuple[str, str]] = []
    repeated = prompts = 0
    first = rows.supervised[numpy.searchsorted(rows.supervised, rows.starts[:-1])]
    for row in range(len(rows)):
        span = rows.span(row)
        whole = hash_of_ids(rows.ids[span])
        # A single token before the answer is no prompt: it can only be a BOS token.
        asked = (
            hash_of_ids(rows.ids[span.start : first[row]]) if first[row] - span.start > 1 else None
        )
        if whole in known.rows:
            repeated += 1
            if len(places) < _MOST_LISTED:
                places.append((rows.place(row), known.rows[whole]))
        elif asked in known.prompts:
            prompts += 1
        if remember:
            known.rows.setdefault(whole, rows.place(row))
            known.prompts.update([asked] if asked else [])
    return Repeats(repeated, len(rows), prompts, tuple(places))


# ---------------------------------------------------------------- rows to look at


def _rows_to_show(
    rows: RowArrays, tokenizer: Any, labels: Labels | None, seed: int, count: int
) -> Iterator[ShownRow]:
    picked = random.Random(f"shown {seed}").sample(range(len(rows)), min(count, len(rows)))
    for row in sorted(picked):
        sample = rows.samples[int(rows.sample_of_row[row])]
        if isinstance(sample, LabelledImage):
            yield _shown_image(rows, row, sample, labels)
            continue
        for which, span in rows.sequences(row):
            ids = rows.ids[span].tolist()
            learnt = [IGNORED] * len(ids) if labels else rows.labels[span].tolist()
            yield ShownRow(
                f"{rows.place(row)}{which}",
                tokens=len(ids),
                supervised_tokens=0 if labels else rows.supervised_within(span),
                uncut_tokens=len(ids) if which else int(rows.uncut_tokens[row]),
                pieces=pieces_of(tokenizer, ids, learnt, rows.weights_of(row)),
                label=labels.name_of(rows.labels_of(row)) if labels else None,
            )


def _shown_image(
    rows: RowArrays, row: int, image: LabelledImage, labels: Labels | None
) -> ShownRow:
    """Return what the file of an image says of it, and the image as a thumbnail."""
    path = Path(image.file)
    content = read_bytes(path)
    facts = Piece(facts_of(content, path).describe(), (), weight=0.0, is_special=False)
    span = rows.span(row)
    tokens = span.stop - span.start
    return ShownRow(
        rows.place(row),
        tokens=tokens,
        supervised_tokens=0,
        uncut_tokens=tokens,
        pieces=(facts,),
        label=labels.name_of(rows.labels_of(row)) if labels else None,
        thumbnail=thumbnail(content, path, _THUMBNAIL_SIDE),
    )
