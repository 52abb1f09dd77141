"""The token rows of several sources, made one source at a time and joined to one table.

Takes joined `Samples` and a tokenizer; returns `Tokenized` whose rows lie one source after another.
Each source has its own entry in the cache. Orders nothing, see `data.mixing`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from itertools import accumulate
from operator import eq
from typing import Any

import datasets

from qlora_kit.config import TokenOptions
from qlora_kit.data.batch import NamedSources, TokenTable
from qlora_kit.data.mixing import Mixture
from qlora_kit.data.samples import Samples
from qlora_kit.data.sources import source_names
from qlora_kit.data.template import Renderer
from qlora_kit.data.tokens import (
    Counts,
    MakesRows,
    SourceRows,
    Tokenized,
    no_progress_bars,
    tokenize,
)
from qlora_kit.errors import ConfigError


def tokenize_sources(
    samples: Samples, tokenizer: Any, options: TokenOptions, makes: MakesRows
) -> list[Tokenized]:
    """Turn the samples of each source into token rows.

    Args:
        samples: joined samples, see `data.sources`.
        tokenizer: transformers' tokenizer, with the run's chat template.
        options: see `tokenize`; a source may have a chat template of its own.
        makes: what a sample means, see `RowMaker`.

    Raises:
        DataError, ModelError: see `tokenize`.
        ConfigError: the chat template of a source is not usable; the error names the source.
    """
    return [_tokenized(part, tokenizer, options, makes) for part in samples.parts]


def _tokenized(part: Samples, tokenizer: Any, options: TokenOptions, makes: MakesRows) -> Tokenized:
    if part.chat_template is None:
        return tokenize(part, tokenizer, options, makes=makes)
    own = options.model_copy(update={"chat_template": part.chat_template})
    try:
        # Choosing a template changes the tokenizer, and that of the run is saved with the adapter.
        return tokenize(part, deepcopy(tokenizer), own, makes=makes)
    except ConfigError as error:
        raise ConfigError(*(f"{part.source}: {fault}" for fault in error.faults)) from error


def join(samples: Samples, parts: Sequence[Tokenized]) -> Tokenized:
    """Join the token rows of sources; they lie one source after another.

    Args:
        samples: the joined samples.
        parts: the token rows of each source, see `tokenize_sources`.
    """
    tables = [
        _numbered_from(first, part.rows) for first, part in zip(samples.starts, parts, strict=True)
    ]
    ends = [*accumulate((len(part.rows) for part in parts), initial=0)]
    names = source_names(samples.parts)
    sources = tuple(
        SourceRows(names[i], samples.parts[i].source, parts[i].counts, range(ends[i], ends[i + 1]))
        for i in range(len(parts))
    )
    return Tokenized(
        TokenTable(datasets.concatenate_datasets(tables)),
        _sum_of_counts(samples, [part.counts for part in parts]),
        _hash_of([part.fingerprint for part in parts]),
        {
            **parts[0].origin,
            "data": _content_of(samples, parts),
            "template": _template_of(samples, parts),
        },
        dropped=dict(_dropped(samples, parts)),
        labels=parts[0].labels,
        sources=sources,
    )


def _numbered_from(first: int, rows: TokenTable) -> datasets.Dataset:
    """Return rows whose source samples are numbered among the samples of all sources."""
    numbers = rows.column("row").to_numpy() + first
    with no_progress_bars():
        return rows.table.remove_columns("row").add_column("row", numbers)


def _sum_of_counts(samples: Samples, counts: Sequence[Counts]) -> Counts:
    summed = {
        each.name: sum(getattr(one, each.name) for one in counts)
        for each in fields(Counts)
        if each.name not in ("shape", "weighs")
    }
    return Counts(samples.shape, counts[0].weighs, **summed)


def _content_of(samples: Samples, parts: Sequence[Tokenized]) -> str:
    """Return a hash of what every source holds, and of the template that it has for itself."""
    return _hash_of(
        [
            (rows.origin["data"], rows.template_hash if part.chat_template else None)
            for part, rows in zip(samples.parts, parts, strict=True)
        ]
    )


def _template_of(samples: Samples, parts: Sequence[Tokenized]) -> str | None:
    """Return the hash of the run's chat template, if it rendered any row."""
    pairs = zip(samples.parts, parts, strict=True)
    hashes = (rows.template_hash for part, rows in pairs if part.chat_template is None)
    return next(filter(None, hashes), None)


def _hash_of(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _dropped(samples: Samples, parts: Sequence[Tokenized]) -> Iterator[tuple[int, int]]:
    for first, part in zip(samples.starts, parts, strict=True):
        yield from ((first + index, tokens) for index, tokens in part.dropped.items())


def mixed(tokenized: Tokenized, weights: Sequence[float]) -> Tokenized:
    """Return rows that know their sources, and whose epochs have the sources' shares.

    Args:
        tokenized: the training rows, of one source or of several.
        weights: the weight of each source; none: every row comes once an epoch.

    Raises:
        ConfigError: an epoch is so short that it has no row of a source.
    """
    if not tokenized.sources:
        return tokenized
    sizes = [len(each.rows) for each in tokenized.sources]
    mixture = None
    if weights:
        mixture = mixture_of(sizes, weights, [each.source for each in tokenized.sources])
    return with_mixture(tokenized, mixture)


def with_mixture(tokenized: Tokenized, mixture: Mixture | None) -> Tokenized:
    """Return rows of several sources that know their sources.

    Args:
        tokenized: the rows.
        mixture: how they make up an epoch; None: every row comes once.
    """
    known = NamedSources(
        tuple(each.name for each in tokenized.sources),
        tuple(each.rows.stop for each in tokenized.sources),
    )
    return replace(tokenized, rows=TokenTable(tokenized.rows.table, mixture, known))


def mixture_of(sizes: Sequence[int], weights: Sequence[float], of: Sequence[str]) -> Mixture:
    """Return how the rows of sources make up an epoch, by weights.

    Args:
        sizes: rows of each source.
        weights: the weight of each.
        of: their files, folders or hub ids.

    Raises:
        ConfigError: an epoch is so short that it has no row of a source.
    """
    mixture = Mixture((*sizes,), (*weights,))
    counts = mixture.rows_of_sources
    if not all(counts):
        short, none = of[[*map(eq, counts, sizes)].index(True)], of[counts.index(0)]
        raise ConfigError(
            f"--data-weights: an epoch, which ends when {short} has been seen once, has "
            f"{mixture.rows:,} rows and none of {none}; expected one at least of each source; "
            f"raise the weight of {none}, or add rows to {short}"
        )
    return mixture


def renderer_of(
    samples: Samples, tokenizer: Any, options: TokenOptions
) -> Callable[[int], Renderer]:
    """Return the function that gives the renderer of a sample, by the sample's index.

    Args:
        samples: the samples, of one source or of several.
        tokenizer: transformers' tokenizer, with the run's chat template.
        options: what is supervised.
    """
    of_run = Renderer(tokenizer, options.train_on)
    renderers = [
        of_run
        if part.chat_template is None
        else Renderer(deepcopy(tokenizer), options.train_on, part.chat_template)
        for part in samples.parts
    ]
    return lambda index: renderers[samples.part_of(index)] if renderers else of_run
