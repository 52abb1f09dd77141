"""Turns samples into token rows, and counts what became of each sample.

Takes `Samples` and a tokenizer; returns `Tokenized`, kept in the cache of `datasets` under a
fingerprint of samples, tokenizer, template and settings. Never loses a row without counting it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy
import pyarrow
import tokenizers
import transformers

from qlora_kit import storage
from qlora_kit.config import LongSamples, TokenOptions
from qlora_kit.data.encode import CHOSEN_TOKENS, IGNORED, LOSS_WEIGHTS, Labelled
from qlora_kit.data.fields import Faults
from qlora_kit.data.labels import Labels
from qlora_kit.data.preference_rows import PAIRS
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import Shape, ShapeOfAll
from qlora_kit.data.tagged_rows import TAGS
from qlora_kit.data.text_rows import SUPERVISED_TOKENS, TextRows
from qlora_kit.errors import DataError, StorageError

# Processes that only tokenise import this module too: `datasets` and torch come where they are
# used.
if TYPE_CHECKING:
    from qlora_kit.data.batch import TokenTable
    from qlora_kit.data.stream_count import Pass, PassOfSources

MIN_ROWS_FOR_VALIDATION = 200
MIN_ROWS_OF_A_SOURCE = 20
"""the same for one of several sources, which together have as many rows as one must have"""

# A part of the fingerprint: raise it when the code begins to make other rows of the same samples.
_ROWS_VERSION = 3
_BATCH_ROWS = 1000
# What a cut takes away; a label goes with its row.
_IN_WORDS = {SUPERVISED_TOKENS: "supervised token", TAGS: "tag"}


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a data file.

    rows_read = rows_kept + rows_dropped, and the number of token rows is
    rows_kept - rows_split + chunks. The weight of a row is the number of losses that it has: of its
    supervised tokens, its label, the tags of its words, or one for a pair of answers.
    """

    shape: ShapeOfAll
    weighs: str
    """the name of what is weighed: supervised_tokens, labels, tags or pairs"""
    rows_read: int = 0
    rows_kept: int = 0
    """source rows of which at least one token row is left"""
    rows_truncated: int = 0
    """kept rows that lost a part to `max_length`, mostly their end"""
    rows_dropped: int = 0
    """rows that were too long, or of no weight"""
    rows_split: int = 0
    """kept rows of which chunks were made, one or several"""
    rows_by_turn: int = 0
    """split rows rendered once an answer: the template changes or does not end earlier turns"""
    rows_unaligned: int = 0
    """rows where a token straddles the end of a prompt and could not be divided"""
    rows_weighted: int = 0
    """kept rows with a token whose loss is weighted"""
    chunks: int = 0
    """token rows made of the split rows"""
    tokens: int = 0
    weight: int = 0
    weight_lost: int = 0
    """weight that is in no token row"""

    def as_json(self) -> dict[str, Any]:
        """Return the counts by name; the weight is named after what is weighed."""
        named = {"weight": self.weighs, "weight_lost": f"{self.weighs}_lost"}
        counts = {named.get(name, name): value for name, value in asdict(self).items()}
        del counts["weighs"]
        return counts

    def describe(self) -> str:
        """Return one line for people."""
        parts = [f"{self.rows_read:,} {self.shape} {'row' if self.rows_read == 1 else 'rows'}"]
        if self.rows_kept + self.rows_dropped < self.rows_read:
            parts.append(f"{self.rows_kept:,} in this part")
        for count, word in (
            (self.rows_truncated, "truncated"),
            (self.rows_split, f"split into {self.chunks:,} chunks"),
            (self.rows_by_turn, "of these learnt turn by turn, each answer after its own prompt"),
            (self.rows_unaligned, "with a token across the end of a prompt"),
            (self.rows_weighted, "weighted"),
        ):
            if count:
                parts.append(f"{count:,} {word}")
        parts.append(f"{self.tokens:,} tokens{self._supervised()}")
        parts.append(f"lost: {self._lost()}")
        return "; ".join(parts)

    @property
    def _is_text(self) -> bool:
        return self.weighs == SUPERVISED_TOKENS

    def _supervised(self) -> str:
        if not self._is_text:
            return ""
        return f", {self.weight / max(self.tokens, 1):.0%} supervised"

    def _lost(self) -> str:
        """Return in words how much of the data is lost to training; "nothing" where all is kept."""
        lost = [
            f"{count:,} {word}{'' if count == 1 else 's'}"
            for count, word in (
                (self.rows_dropped, "row"),
                (self.weight_lost, _IN_WORDS.get(self.weighs)),
            )
            if count and word
        ]
        return ", ".join(lost) or "nothing"


@dataclass(frozen=True)
class SourceRows:
    """The token rows of one of several sources, which lie one source after another.

    Attributes:
        name: a short name for logs and tables.
        source: the file, folder or hub id.
        counts: what became of its rows.
        rows: the indices of its token rows among all.
    """

    name: str
    source: str
    counts: Counts
    rows: range


@dataclass(frozen=True)
class Tokenized:
    """Token rows ready to be batched.

    `fingerprint` is a hash of everything that decides the rows, and `origin` has the hashes of its
    parts: data, tokenizer, template. `seconds` is the time it took to make the rows; None where
    they came from the cache.
    """

    rows: TokenTable
    counts: Counts
    fingerprint: str
    origin: Mapping[str, str | None]
    seconds: float | None = None
    dropped: Mapping[int, int] = field(default_factory=dict)
    """number of tokens of each sample of which no row is left, by the index of the sample"""
    labels: Labels | None = None
    """what a row's labels stand for, where rows are classified"""
    sources: tuple[SourceRows, ...] = ()
    """the rows of each source, where there are several"""
    stream_pass: Pass | PassOfSources | None = None
    """of the first rows of a stream: what a pass of it has, where it was counted"""

    @property
    def template_hash(self) -> str | None:
        """Hash of the chat template that rendered the rows; None for pairs and texts."""
        return None if self.counts.shape in (Shape.PAIR, Shape.TEXT) else self.origin["template"]

    def label_counts(self) -> tuple[int, ...]:
        """Return how many rows have each label, in the order of their names; () for text."""
        if self.labels is None:
            return ()
        return self.labels.counts(self.rows.column("labels").combine_chunks().flatten().to_pylist())

    def describe(self) -> str:
        """Return one line for people: what became of the rows, and how fast."""
        if self.seconds is None:
            return f"{self.counts.describe()}; from the cache"
        speed = self.counts.tokens / max(self.seconds, 1e-9)
        return f"{self.counts.describe()}; {speed:,.0f} tokens/s"


# ---------------------------------------------------------------- tokenise


def tokenize(
    samples: Samples,
    tokenizer: Any,
    options: TokenOptions,
    *,
    makes: MakesRows = TextRows,
    cache: bool = True,
) -> Tokenized:
    """Turn samples into token rows.

    Args:
        samples: the samples that `load_samples` returned.
        tokenizer: transformers' tokenizer; its chat template is set, see `choose_template`.
        options: the longest row allowed, the treatment of longer ones, the tokens to supervise.
        makes: what a sample means, see `RowMaker`; text to be learnt by default.
        cache: take the rows from the cache folder of `datasets`, and keep them there.

    Raises:
        DataError: the template does not fit a row; a row is too long, with
            `long_samples="error"`; or nothing is left that a loss could be computed for.
        ConfigError, ModelError: the chat template is not usable.
    """
    work = Tokenizing(samples, makes(samples, tokenizer, options), options)
    fingerprint = work.fingerprint()
    if not cache:
        return work.run(fingerprint, None)
    file = cache_folder() / f"{fingerprint}.arrow"
    found = _from_cache(file, fingerprint, work.maker)
    if found is not None:
        return found
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            made = work.run(fingerprint, file)
        except DataError:
            file.unlink(missing_ok=True)
            raise
        # The counts are written last: without them and the hash, rows are not read from the cache.
        about = {
            "counts": asdict(made.counts),
            "dropped": list(made.dropped.items()),
            "sha256": storage.file_hash(file),
        }
        storage.write_json(file.with_suffix(".json"), about)
    except (OSError, StorageError):
        # A cache that cannot be written costs time, not the run.
        again = Tokenizing(samples, makes(samples, tokenizer, options), options)
        return again.run(fingerprint, None)
    return made


def cache_folder() -> Path:
    """Return the folder of all that is kept for a later run: a part of the cache of `datasets`."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "qlora_kit"


def _from_cache(file: Path, fingerprint: str, maker: RowMaker) -> Tokenized | None:
    """Return the rows of an earlier run; None where they are missing or were changed."""
    import datasets

    from qlora_kit.data.batch import TokenTable

    try:
        about = storage.read_json(file.with_suffix(".json"))
        if about["sha256"] != storage.file_hash(file):
            return None
        rows = TokenTable(datasets.Dataset.from_file(str(file)))
        counts = Counts(**{**about["counts"], "shape": Shape(about["counts"]["shape"])})
        dropped = {int(index): int(tokens) for index, tokens in about["dropped"]}
    except (
        DataError, StorageError, OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException,
    ):  # fmt: skip
        return None
    return Tokenized(rows, counts, fingerprint, maker.origin, dropped=dropped, labels=maker.labels)


class _TableRow(NamedTuple):
    """A row of the table, with the columns of `_schema`."""

    input_ids: list[int]
    labels: list[Any]
    row: int
    uncut_tokens: int
    token_types: list[int] | None
    loss_weights: list[float] | None
    image: str | None
    chosen_tokens: int | None


def _schema(maker: RowMaker) -> pyarrow.Schema:
    columns = [
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("labels", pyarrow.list_(maker.label_type)),
        ("row", pyarrow.int64()),
        ("uncut_tokens", pyarrow.int32()),
    ]
    if maker.has_token_types:
        columns.append(("token_types", pyarrow.list_(pyarrow.int8())))
    if maker.has_weights:
        columns.append((LOSS_WEIGHTS, pyarrow.list_(pyarrow.float32())))
    if has_images(maker):
        columns.append(("image", pyarrow.string()))
    if maker.weighs == PAIRS:
        columns.append((CHOSEN_TOKENS, pyarrow.int32()))
    return pyarrow.schema(columns)


def has_images(maker: RowMaker) -> bool:
    """Whether the rows of a maker are images, which are in files and are never cut."""
    return bool(getattr(maker, "has_images", False))


class RowMaker(Protocol):
    """How a task makes token rows of samples.

    Attributes:
        weighs: the name of what a loss is a sum over.
        origin: hashes of what decides the rows beside the settings: data, tokenizer, template.
        settings: what else decides them.
        label_type: pyarrow's type of a label.
        has_token_types: whether a row says of which text each token is.
        has_weights: whether a row may say by which weight each of its tokens is learnt.
        labels: what the labels of a row stand for, where rows are classified.
    """

    weighs: str
    origin: Mapping[str, str | None]
    settings: Sequence[Any]
    label_type: pyarrow.DataType
    has_token_types: bool
    has_weights: bool
    labels: Labels | None

    def on(self, samples: Samples) -> Self:
        """Return the maker of the rows of other samples, of the same data and the same shape."""
        ...

    def rows(self, indices: Sequence[int], faults: Faults) -> Iterator[tuple[int, Labelled]]:
        """Yield the rows of samples, each with the index of its sample, however long."""
        ...

    def divided(self, index: int, tokens: int) -> list[Labelled] | None:
        """Return the rows of a sample that is to be split, where it has borders of its own.

        Args:
            index: of the sample.
            tokens: tokens of its longest row.

        Returns:
            Rows, some of which may still be too long; None where there are no such borders.

        Raises:
            DataError: no rows can be made of a part.
        """
        ...

    def count(self, index: int) -> int:
        """Return how many rows a sample has if none is too long; encodes nothing.

        Raises:
            DataError: the sample cannot become rows.
        """
        ...

    def shorten(self, index: int, row: Labelled, how: LongSamples) -> list[Labelled]:
        """Return what is left of a row that is too long, truncated or split."""
        ...

    def weight(self, labels: list[Any]) -> int:
        """Return the weight of a row with these labels."""
        ...

    def nothing_left(self, lost: int, how: LongSamples) -> str:
        """Return the error where no row is left; `lost` is the weight that length took."""
        ...


MakesRows = Callable[[Samples, Any, TokenOptions], RowMaker]


def treatment_of_long(options: TokenOptions, shape: ShapeOfAll) -> LongSamples:
    """Return what becomes of samples of a shape that are too long, "auto" decided."""
    if options.long_samples != "auto":
        return options.long_samples
    return "split" if shape in (Shape.TEXT, Shape.TAG) else "truncate"


class Tokenizing:
    """One pass over the samples: makes their rows, fits them to length and counts.

    Args:
        samples: of one shape.
        maker: makes their rows.
        options: the longest row allowed, the treatment of longer ones.

    Attributes:
        tally: what became of the samples so far, by the names of `Counts`.
        faults: those of the samples so far.
    """

    def __init__(self, samples: Samples, maker: RowMaker, options: TokenOptions) -> None:
        self.samples = samples
        self.maker = maker
        self.schema = _schema(maker)
        self.max_length = sys.maxsize if has_images(maker) else options.max_length
        self.long_samples = treatment_of_long(options, samples.shape)
        self.tally: Counter[str] = Counter()
        self.dropped: dict[int, int] = {}
        self.faults = Faults()

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that decides the rows."""
        parts = {
            "version": _ROWS_VERSION,
            "libraries": [tokenizers.__version__, transformers.__version__],
            "settings": [self.max_length, self.long_samples, *self.maker.settings],
            **self.maker.origin,
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def run(self, fingerprint: str, file: Path | None) -> Tokenized:
        """Make all rows, into `file` or into memory."""
        import datasets

        from qlora_kit.data.batch import TokenTable

        started = time.perf_counter()
        source = datasets.Dataset.from_dict({"sample": range(len(self.samples.items))})
        with no_progress_bars():
            rows = source.map(
                lambda batch: self.table(batch["sample"]),
                batched=True,
                batch_size=_BATCH_ROWS,
                remove_columns=["sample"],
                features=datasets.Features.from_arrow_schema(self.schema),
                load_from_cache_file=False,
                keep_in_memory=file is None,
                cache_file_name=str(file) if file else None,
                new_fingerprint=fingerprint,
            )
        self.faults.raise_if_any()
        read, weighs = len(self.samples.items), self.maker.weighs
        counts = Counts(self.samples.shape, weighs, read, **self.tally)
        if not counts.weight:
            raise DataError(self.maker.nothing_left(counts.weight_lost, self.long_samples))
        seconds = time.perf_counter() - started
        made = TokenTable(rows)
        return Tokenized(
            made,
            counts,
            fingerprint,
            self.maker.origin,
            seconds,
            self.dropped,
            self.maker.labels,
        )

    def table(self, indices: Sequence[int]) -> pyarrow.Table:
        """Return the token rows of some samples, with the columns of `_schema`."""
        rows: list[_TableRow] = []
        made = self.maker.rows(indices, self.faults)
        for index, of_one in itertools.groupby(made, key=lambda pair: pair[0]):
            rows += self.fit(index, [row for _, row in of_one])
        columns = [[getattr(row, name) for row in rows] for name in self.schema.names]
        return pyarrow.table(columns, schema=self.schema)

    def fit(self, index: int, rows: Sequence[Labelled]) -> list[_TableRow]:
        """Shorten the rows of one sample to the allowed length, and count what is lost."""
        by_turn, is_split = len(rows) > 1, self.long_samples == "split"
        longest = max(row.length for row in rows)
        is_long = longest > self.max_length
        divided = self._divided(index, longest) if is_long and is_split else None
        if divided is not None:
            rows = divided
        uncut = [row.length if divided is None else longest for row in rows]
        left = [
            _TableRow(
                part.ids,
                part.labels,
                index,
                tokens,
                part.token_types,
                part.weights,
                part.image,
                part.source,
            )
            for row, tokens in zip(rows, uncut, strict=True)
            for part in self._shorten(index, row)
            if self.maker.weight(part.labels)
        ]
        weight = sum(self.maker.weight(row.labels) for row in left)
        in_all = sum(self.maker.weight(row.labels) for row in rows)
        self.tally.update(
            rows_kept=int(bool(left)),
            rows_dropped=int(not left),
            rows_unaligned=int(not all(row.aligned for row in rows)),
            rows_weighted=int(any(row.loss_weights for row in left)),
            tokens=sum(len(row.input_ids) for row in left),
            weight=weight,
            weight_lost=in_all - weight,
        )
        if not left:
            self.dropped[index] = longest
            return []
        if by_turn or (is_long and is_split):
            self.tally.update(rows_split=1, chunks=len(left), rows_by_turn=int(by_turn))
        # A text that is split loses nothing; an exchange that fits in no row loses its end.
        loses = any(row.length > self.max_length for row in divided or ())
        self.tally.update(rows_truncated=int(loses if is_split else is_long))
        return left

    def _divided(self, index: int, tokens: int) -> list[Labelled] | None:
        """Return the rows of a sample's parts; None where it has no borders, or cannot be divided.

        Then the whole sample is a fault already.
        """
        try:
            return self.maker.divided(index, tokens)
        except DataError as error:
            self.faults.add(*error.faults)
            return None

    def _shorten(self, index: int, row: Labelled) -> list[Labelled]:
        length, limit = row.length, self.max_length
        if length <= limit:
            return [row]
        if self.long_samples == "error":
            self.faults.add(
                f"{self.samples.items[index].place}: {length} tokens; expected at most {limit}; "
                "shorten it, raise --max-length or choose another --long-samples"
            )
        if self.long_samples in ("error", "drop"):
            return []
        return self.maker.shorten(index, row, self.long_samples)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Let `datasets` show no bars while the block runs."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


# ---------------------------------------------------------------- validation


def split_validation(
    tokenized: Tokenized, fraction: float, seed: int
) -> tuple[Tokenized, Tokenized | None]:
    """Hold out a share of the rows; the same rows for the same data, fraction and seed.

    Chunks of one source row stay together. They may be parted where a few long texts make up the
    data: fewer than `MIN_ROWS_FOR_VALIDATION` source rows, but at least as many token rows. Of
    several sources the same share of each is held out.

    Args:
        tokenized: all rows.
        fraction: share of the rows to hold out, 0 to 1.
        seed: draws the rows.

    Returns:
        The rest and the held-out rows; all rows and None where there are too few. Each part
        counts its own kept rows and tokens; rows read, cut and lost are counted with the rest.
    """
    groups, spans = tokenized.rows.column("row").to_numpy(), [range(len(tokenized.rows))]
    least = MIN_ROWS_FOR_VALIDATION
    if tokenized.sources and len(groups) >= least:
        spans, least = [each.rows for each in tokenized.sources], MIN_ROWS_OF_A_SOURCE
    parts = [_held_out(groups[span.start : span.stop], fraction, seed, least) for span in spans]
    is_held = numpy.concatenate(parts)
    if not is_held.any():
        return tokenized, None
    rest = _selected(tokenized, ~is_held, f"{fraction} {seed} rest")
    part = _selected(tokenized, is_held, f"{fraction} {seed} held out")
    sources = tuple(replace(each, counts=_own(each.counts)) for each in part.sources)
    return rest, replace(part, counts=_own(part.counts), dropped={}, sources=sources)


def _held_out(groups: Any, fraction: float, seed: int, least: int) -> Any:
    """Return whether each token row is held out; none is, if there are fewer than `least`.

    Args:
        groups: the source row of each token row, (rows,).
        fraction: share of the rows to hold out.
        seed: draws the rows.
        least: see above.
    """
    names = numpy.unique(groups)
    if len(names) < least:
        groups = names = numpy.arange(len(groups))
    return numpy.isin(groups, names[held_out_numbers(len(names), fraction, seed, least)])


def held_out_numbers(
    count: int, fraction: float, seed: int, least: int = MIN_ROWS_FOR_VALIDATION
) -> list[int]:
    """Return which of so many samples are held out, in order; none, if there are too few.

    Args:
        count: number of the samples.
        fraction: share of them to hold out.
        seed: draws them.
        least: number of samples that there must be.
    """
    held = round(fraction * count) if count >= least else 0
    return sorted(random.Random(f"validation {seed}").sample(range(count), held))


def without_samples(tokenized: Tokenized, numbers: Collection[int]) -> Tokenized:
    """Return the rows of all samples but some; all rows, if no other would be left.

    Args:
        tokenized: the rows.
        numbers: indices of the samples.
    """
    is_kept = ~numpy.isin(tokenized.rows.column("row").to_numpy(), [*numbers])
    return _selected(tokenized, is_kept, f"{sorted(numbers)}") if is_kept.any() else tokenized


def _own(counts: Counts) -> Counts:
    """Return the counts of held-out rows alone, whatever became of others."""
    return Counts(
        counts.shape,
        counts.weighs,
        rows_read=counts.rows_kept,
        rows_kept=counts.rows_kept,
        tokens=counts.tokens,
        weight=counts.weight,
    )


def _selected(tokenized: Tokenized, mask: Any, name: str) -> Tokenized:
    rows = tokenized.rows.select(numpy.flatnonzero(mask))
    digest = hashlib.sha256(f"{tokenized.fingerprint} {name}".encode()).hexdigest()
    ends = [0, *numpy.cumsum(mask).tolist()]
    sources = []
    for each in tokenized.sources:
        span = range(ends[each.rows.start], ends[each.rows.stop])
        none = replace(each.counts, rows_kept=0, tokens=0, weight=0)
        counts = _counts_of(rows.select(span), each.counts) if span else none
        sources.append(replace(each, counts=counts, rows=span))
    return replace(
        tokenized,
        rows=rows,
        counts=_counts_of(rows, tokenized.counts),
        fingerprint=digest,
        sources=tuple(sources),
    )


def _counts_of(rows: TokenTable, counts: Counts) -> Counts:
    """Return counts whose kept rows, tokens and weight are those of some of the rows."""
    return replace(
        counts,
        rows_kept=len(numpy.unique(rows.column("row").to_numpy())),
        tokens=sum(rows.all_tokens()),
        weight=_weight(rows, counts.weighs),
    )


def _weight(rows: TokenTable, weighs: str) -> int:
    if weighs == SUPERVISED_TOKENS:
        return int(rows.is_supervised().sum())
    if weighs == TAGS:
        return int((rows.column("labels").combine_chunks().flatten().to_numpy() != IGNORED).sum())
    return len(rows)
