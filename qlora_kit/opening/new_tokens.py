"""Tokens that are added to a model, by `--new-tokens` or by the adapter that is opened.

Takes a tokenizer, which gets the tokens, and the base as it is stored; says how many rows the base
needs, and which of them are trained. Loads no weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import TrainConfig
from qlora_kit.errors import ConfigError
from qlora_kit.events import Announce, Notice
from qlora_kit.lora.files import read_base_record

if TYPE_CHECKING:
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.lora.whole import TokenRows
    from qlora_kit.model.load import BaseSpec
    from qlora_kit.model.names import ModelSource
    from qlora_kit.model.new_tokens import NewTokens
    from qlora_kit.opening.model import Opened


_EXPECTED = "expected a model that continues texts; leave it out"


def check_takes_tokens(config: TrainConfig) -> None:
    """Check that a task whose texts are not continued is asked for no new tokens.

    Raises:
        ConfigError: it is.
    """
    if config.new_tokens:
        raise ConfigError(f"--new-tokens: found with --task {config.task}; {_EXPECTED}")


def absent_tokens(opened: Opened, rows: Tokenized) -> Iterator[str]:
    """Yield a notice if some of the new tokens are in no row that is learnt from."""
    tokens = opened.new_tokens
    if tokens is None:
        return
    absent = {*rows.rows.absent(tokens.ids)}
    named = [text for text, n in zip(tokens.texts, tokens.ids, strict=True) if n in absent]
    if named:
        where = "none of the rows" if rows.stream_pass is None else "none of the first rows"
        yield (
            f"--new-tokens: {where} of the data has {', '.join(named)}, which so is learnt as a "
            "token that never comes"
        )


def writes_on(spec: BaseSpec) -> bool:
    """Whether a model continues texts, in which new tokens may stand."""
    from qlora_kit.model.class_head import is_encoder
    from qlora_kit.model.encoder_decoder import is_encoder_decoder

    architecture = spec.architecture()
    is_other = is_encoder(architecture) or is_encoder_decoder(architecture)
    return spec.classes is None and not is_other


def stored_vocabulary(bare: BaseSpec, tokenizer: Any, adapter: Path | None) -> int | None:
    """Return the rows that a base needs for a trained adapter, whose tokens the tokenizer gets.

    Args:
        bare: the base as it is stored.
        tokenizer: that of the adapter, or of the base: a checkpoint of a run has none of its own.
        adapter: folder of the adapter, or None.

    Returns:
        None where the base has as many as it needs.
    """
    from qlora_kit.lora.reading import read_adapter
    from qlora_kit.lora.token_files import has_tables, vocabulary_of
    from qlora_kit.model.new_tokens import add_tokens

    record = None if adapter is None else read_base_record(adapter)
    if record is not None and record.new_tokens:
        add_tokens(tokenizer, record.new_tokens, str(adapter))
    if adapter is None or not has_tables(adapter):
        return None
    return vocabulary_of(read_adapter(adapter), bare)


def with_tokens(
    bare: BaseSpec,
    tokenizer: Any,
    texts: Sequence[str],
    vocabulary: int | None,
    announce: Announce,
) -> tuple[NewTokens | None, int | None]:
    """Add tokens to a tokenizer, and say what they need.

    Args:
        bare: the base as it is stored.
        tokenizer: the tokenizer, changed in place.
        texts: the tokens.
        vocabulary: rows that the base is given already; None: as many as are stored.
        announce: receives notices.

    Returns:
        The tokens, None without; and the rows that the base needs, None where it has as many.
    """
    from qlora_kit.model.new_tokens import add_tokens, changed_by_decoding
    from qlora_kit.model.vocabulary import rows_of

    if not texts:
        return None, vocabulary
    if not writes_on(bare):
        raise ConfigError(f"--new-tokens: {bare.source.name} writes no text on; {_EXPECTED}")
    rows = vocabulary or rows_of(bare.architecture())
    tokens = add_tokens(tokenizer, texts, bare.source.name)
    for text in tokens.describe(rows):
        announce(Notice(text))
    for given, back in list(changed_by_decoding(tokenizer, tokens))[:1]:
        announce(
            Notice(f"the tokenizer puts a space after an added token: {given!r} reads {back!r}")
        )
    return tokens, tokens.rows_needed(rows) or vocabulary


def rows_of_tokens(tokens: NewTokens, spec: BaseSpec, bare: BaseSpec) -> TokenRows:
    """Return the rows of tokens that are trained.

    Args:
        tokens: the tokens.
        spec: the base, with rows for them.
        bare: the base as it is stored.
    """
    from qlora_kit.lora.whole import TokenRows
    from qlora_kit.model.vocabulary import rows_of

    known = min(tokens.known, rows_of(bare.architecture()) or tokens.known)
    return TokenRows.of(spec.skeleton(), tokens.ids, tokens.fresh, known)


def planned_tokens(
    spec: BaseSpec, texts: Sequence[str], source: ModelSource, announce: Announce
) -> tuple[BaseSpec, TokenRows | None]:
    """Return a base with rows for new tokens, and those rows, before anything is downloaded.

    Without the tokenizer it is not known whether the model has spare rows: none are counted on.

    Args:
        spec: the base as it is stored.
        texts: the tokens.
        source: the place of its files.
        announce: receives notices.
    """
    from qlora_kit.model.new_tokens import NewTokens
    from qlora_kit.model.tokenizer import load_tokenizer
    from qlora_kit.model.vocabulary import rows_of

    if not texts:
        return spec, None
    folder, rows = source.folder, rows_of(spec.architecture())
    if not writes_on(spec) or rows is None:
        raise ConfigError(f"--new-tokens: {source.name} writes no text on; {_EXPECTED}")
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        found, needed = with_tokens(spec, load_tokenizer(folder), texts, None, announce)
        assert found is not None
        grown = replace(spec, vocabulary=needed)
        return grown, rows_of_tokens(found, grown, spec)
    assert rows is not None
    ids = tuple(range(rows, rows + len(texts)))
    assumed = NewTokens(tuple(texts), ids, tuple(texts), rows)
    grown = replace(spec, vocabulary=rows + len(texts))
    return grown, rows_of_tokens(assumed, grown, spec)
