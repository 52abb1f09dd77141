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
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy
import pyarrow
import tokenizers
import transformers

from qlora_kit import storage
from qlora_kit.config import TokenOptions
from qlora_kit.data.batch import TokenTable
from qlora_kit.data.encode import IGNORED, Encoder, Labelled
from qlora_kit.data.fields import Faults
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import Shape
from qlora_kit.data.template import Rendered, Renderer
from qlora_kit.errors import DataError, StorageError
from qlora_kit.model.tokenizer import template_hash
from qlora_kit.time_limit import many_limits

MIN_ROWS_FOR_VALIDATION = 200

# A part of the fingerprint: raise it when the code begins to make other rows of the same samples.
_ROWS_VERSION = 3
_BATCH_ROWS = 1000
_SCHEMA = pyarrow.schema(
    [
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("labels", pyarrow.list_(pyarrow.int32())),
        ("row", pyarrow.int64()),
        ("uncut_tokens", pyarrow.int32()),
    ]
)


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a data file.

    rows_read = rows_kept + rows_dropped, and the number of token rows is
    rows_kept - rows_split + chunks. A token is supervised if a loss is computed for it: no token
    comes before the first token of a row, so the first never counts.
    """

    shape: Shape
    rows_read: int = 0
    rows_kept: int = 0
    """source rows of which at least one token row is left"""
    rows_truncated: int = 0
    """kept rows that lost a part to `max_length`, mostly their end"""
    rows_dropped: int = 0
    """rows that were too long, or without a supervised token"""
    rows_split: int = 0
    """kept rows of which chunks were made, one or several"""
    rows_by_turn: int = 0
    """split rows rendered once an answer: the template changes or does not end earlier turns"""
    rows_unaligned: int = 0
    """rows where a token straddles the end of a prompt and could not be divided"""
    chunks: int = 0
    """token rows made of the split rows"""
    tokens: int = 0
    supervised_tokens: int = 0
    supervised_tokens_lost: int = 0
    """supervised tokens that are in no token row"""

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
        ):
            if count:
                parts.append(f"{count:,} {word}")
        share = self.supervised_tokens / max(self.tokens, 1)
        parts.append(f"{self.tokens:,} tokens, {share:.0%} supervised")
        parts.append(f"lost: {self._lost()}")
        return "; ".join(parts)

    def _lost(self) -> str:
        """Return in words how much of the data is lost to training; "nothing" where all is kept."""
        lost = [
            f"{count:,} {word}{'' if count == 1 else 's'}"
            for count, word in (
                (self.rows_dropped, "row"),
                (self.supervised_tokens_lost, "supervised token"),
            )
            if count
        ]
        return ", ".join(lost) or "nothing"


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

    @property
    def template_hash(self) -> str | None:
        """Hash of the chat template that rendered the rows; None for pairs and texts."""
        return None if self.counts.shape in (Shape.PAIR, Shape.TEXT) else self.origin["template"]

    def describe(self) -> str:
        """Return one line for people: what became of the rows, and how fast."""
        if self.seconds is None:
            return f"{self.counts.describe()}; from the cache"
        speed = self.counts.tokens / max(self.seconds, 1e-9)
        return f"{self.counts.describe()}; {speed:,.0f} tokens/s"


# ---------------------------------------------------------------- tokenise


def tokenize(
    samples: Samples, tokenizer: Any, options: TokenOptions, *, cache: bool = True
) -> Tokenized:
    """Turn samples into token rows.

    Args:
        samples: the samples that `load_samples` returned.
        tokenizer: transformers' tokenizer; its chat template is set, see `choose_template`.
        options: the longest row allowed, the treatment of longer ones, the tokens to supervise.
        cache: take the rows from the cache folder of `datasets`, and keep them there.

    Raises:
        DataError: the template does not fit a row; a row is too long, with
            `long_samples="error"`; or no supervised token is left.
        ConfigError, ModelError: the chat template is not usable.
    """
    work = _Tokenizing(samples, tokenizer, options)
    fingerprint = work.fingerprint()
    if not cache:
        return work.run(fingerprint, None)
    file = Path(datasets.config.HF_DATASETS_CACHE) / "qlora_kit" / f"{fingerprint}.arrow"
    found = _from_cache(file, fingerprint, work.origin)
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
        return _Tokenizing(samples, tokenizer, options).run(fingerprint, None)
    return made


def _from_cache(file: Path, fingerprint: str, origin: Mapping[str, str | None]) -> Tokenized | None:
    """Return the rows of an earlier run; None where they are missing or were changed."""
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
    return Tokenized(rows, counts, fingerprint, origin, dropped=dropped)


class _TableRow(NamedTuple):
    """A row of the table, with the columns of `_SCHEMA`."""

    ids: list[int]
    labels: list[int]
    sample: int
    uncut_tokens: int


class _Tokenizing:
    """One pass over the samples: renders, encodes, fits to length and counts."""

    def __init__(self, samples: Samples, tokenizer: Any, options: TokenOptions) -> None:
        self.samples = samples
        self.renderer = Renderer(tokenizer, options.train_on, options.chat_template)
        self.encoder = Encoder(tokenizer)
        self.max_length = options.max_length
        self.long_samples: str = options.long_samples
        if self.long_samples == "auto":
            self.long_samples = "split" if samples.shape is Shape.TEXT else "truncate"
        # Every row of this tokenizer starts with a BOS, and so does each chunk of a split row.
        self.opening = [tokenizer.bos_token_id] if self.encoder.puts_bos else []
        self.origin = {
            "data": samples.content_hash(),
            "tokenizer": self.encoder.content_hash(),
            "template": template_hash(tokenizer),
        }
        self.tally: Counter[str] = Counter()
        self.dropped: dict[int, int] = {}
        self.faults = Faults()

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that decides the rows."""
        parts = {
            "version": _ROWS_VERSION,
            "libraries": [tokenizers.__version__, transformers.__version__],
            "settings": [self.max_length, self.long_samples, self.renderer.train_on],
            **self.origin,
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def run(self, fingerprint: str, file: Path | None) -> Tokenized:
        """Make all rows, into `file` or into memory."""
        started = time.perf_counter()
        source = datasets.Dataset.from_dict({"sample": range(len(self.samples.items))})
        with _no_progress_bars():
            rows = source.map(
                lambda batch: self._table(batch["sample"]),
                batched=True,
                batch_size=_BATCH_ROWS,
                remove_columns=["sample"],
                features=datasets.Features.from_arrow_schema(_SCHEMA),
                load_from_cache_file=False,
                keep_in_memory=file is None,
                cache_file_name=str(file) if file else None,
                new_fingerprint=fingerprint,
            )
        self.faults.raise_if_any()
        counts = Counts(self.samples.shape, len(self.samples.items), **self.tally)
        if not counts.supervised_tokens:
            raise DataError(self._nothing_to_learn())
        seconds = time.perf_counter() - started
        made = TokenTable(rows)
        return Tokenized(made, counts, fingerprint, self.origin, seconds, self.dropped)

    def _table(self, indices: Sequence[int]) -> pyarrow.Table:
        rendered, sources = self._render(indices)
        encoded = zip(sources, self.encoder.encode(rendered), strict=True)
        rows: list[_TableRow] = []
        for index, of_one in itertools.groupby(encoded, key=lambda pair: pair[0]):
            rows += self._fit(index, [row for _, row in of_one])
        columns = list(zip(*rows, strict=True)) or [()] * len(_SCHEMA)
        return pyarrow.table(list(map(list, columns)), schema=_SCHEMA)

    def _render(self, indices: Sequence[int]) -> tuple[list[Rendered], list[int]]:
        """Return the texts of samples, and for each text the index of its sample."""
        rendered: list[Rendered] = []
        sources: list[int] = []
        with many_limits():
            for index in indices:
                try:
                    texts = self.renderer.render(self.samples.items[index])
                except DataError as error:
                    self.faults.add(*error.faults)
                    continue
                rendered += texts
                sources += [index] * len(texts)
        return rendered, sources

    def _fit(self, index: int, rows: Sequence[Labelled]) -> list[_TableRow]:
        """Shorten the rows of one sample to the allowed length, and count what is lost."""
        left = [
            _TableRow(part.ids, part.labels, index, len(row.ids))
            for row in rows
            for part in self._shorten(index, row)
            if supervised_count(part.labels)
        ]
        supervised = sum(supervised_count(row.labels) for row in left)
        all_supervised = sum(supervised_count(row.labels) for row in rows)
        self.tally.update(
            rows_kept=int(bool(left)),
            rows_dropped=int(not left),
            rows_unaligned=int(not all(row.aligned for row in rows)),
            tokens=sum(len(row.ids) for row in left),
            supervised_tokens=supervised,
            supervised_tokens_lost=all_supervised - supervised,
        )
        if not left:
            self.dropped[index] = max(len(row.ids) for row in rows)
            return []
        by_turn, is_split = len(rows) > 1, self.long_samples == "split"
        is_long = any(len(row.ids) > self.max_length for row in rows)
        if by_turn or (is_long and is_split):
            self.tally.update(rows_split=1, chunks=len(left), rows_by_turn=int(by_turn))
        if is_long and not is_split:
            self.tally.update(rows_truncated=1)
        return left

    def _shorten(self, index: int, row: Labelled) -> list[Labelled]:
        length, limit = len(row.ids), self.max_length
        if length <= limit:
            return [row]
        if self.long_samples == "truncate":
            return [Labelled(row.ids[:limit], row.labels[:limit], row.aligned)]
        if self.long_samples == "split":
            return self._split(row)
        if self.long_samples == "error":
            self.faults.add(
                f"{self.samples.items[index].place}: {length} tokens; expected at most {limit}; "
                "shorten it, raise --max-length or choose another --long-samples"
            )
        return []

    def _split(self, row: Labelled) -> list[Labelled]:
        opening = len(self.opening)
        width = self.max_length - opening
        chunks = []
        for start in range(opening, len(row.ids), width):
            ids = self.opening + row.ids[start : start + width]
            labels = [IGNORED] * opening + row.labels[start : start + width]
            if len(ids) >= 2:
                chunks.append(Labelled(ids, labels, row.aligned))
        return chunks

    def _nothing_to_learn(self) -> str:
        """Return the error that says whether the length or the mask took every supervised token."""
        source, lost = self.samples.source, self.tally["supervised_tokens_lost"]
        found = f"{source}: no supervised token is left in {len(self.samples.items)} rows"
        if not lost:
            return (
                f"{found}: the mask of --train-on {self.renderer.train_on} covers all; expected "
                "text to learn; add longer answers or pass --train-on all"
            )
        if self.long_samples == "drop":
            return (
                f"{found}: all are longer than --max-length {self.max_length}; expected shorter "
                "ones; raise --max-length or pass --long-samples truncate"
            )
        return (
            f"{found}: the prompts alone fill --max-length {self.max_length}; expected room for "
            "the answers; raise --max-length"
        )


def supervised_count(labels: list[int]) -> int:
    """Return the number of tokens that a loss is computed for; the first token never counts."""
    return len(labels) - labels.count(IGNORED) - (bool(labels) and labels[0] != IGNORED)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
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
    data: fewer than `MIN_ROWS_FOR_VALIDATION` source rows, but at least as many token rows.

    Args:
        tokenized: all rows.
        fraction: share of the rows to hold out, 0 to 1.
        seed: draws the rows.

    Returns:
        The rest and the held-out rows; all rows and None where there are too few. Each part
        counts its own kept rows and tokens; rows read, cut and lost are counted with the rest.
    """
    groups = tokenized.rows.column("row").to_numpy()
    names = numpy.unique(groups)
    if len(names) < MIN_ROWS_FOR_VALIDATION:
        groups = names = numpy.arange(len(groups))
    count = round(fraction * len(names))
    if len(names) < MIN_ROWS_FOR_VALIDATION or not count:
        return tokenized, None
    held = random.Random(f"validation {seed}").sample(range(len(names)), count)
    is_held = numpy.isin(groups, names[sorted(held)])
    rest = _selected(tokenized, ~is_held, f"{fraction} {seed} rest")
    part = _selected(tokenized, is_held, f"{fraction} {seed} held out")
    own = Counts(
        part.counts.shape,
        rows_read=part.counts.rows_kept,
        rows_kept=part.counts.rows_kept,
        tokens=part.counts.tokens,
        supervised_tokens=part.counts.supervised_tokens,
    )
    return rest, replace(part, counts=own, dropped={})


def _selected(tokenized: Tokenized, mask: Any, name: str) -> Tokenized:
    rows = tokenized.rows.select(numpy.flatnonzero(mask))
    is_supervised = rows.is_supervised()
    counts = replace(
        tokenized.counts,
        rows_kept=len(numpy.unique(rows.column("row").to_numpy())),
        tokens=len(is_supervised),
        supervised_tokens=int(is_supervised.sum()),
    )
    digest = hashlib.sha256(f"{tokenized.fingerprint} {name}".encode()).hexdigest()
    return replace(tokenized, rows=rows, counts=counts, fingerprint=digest)
