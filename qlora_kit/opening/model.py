"""A model that is opened: its files, its tokenizer and its task; its weights when they are wanted.

Takes options; returns `Opened`, or a loaded base. Checks everything that can be checked before
weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import (
    BaseModelOptions,
    RecordOptions,
    TokenOptions,
)
from qlora_kit.data.samples import load_samples
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.events import Announce, Notice, silent
from qlora_kit.lora.files import (
    UNKNOWN_TEMPLATE,
    read_base_record,
)
from qlora_kit.model.config_file import ids_beyond, read_model_config
from qlora_kit.model.names import ModelSource, find_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from qlora_kit.data.labels import Labels
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.lora.whole import TokenRows
    from qlora_kit.model.class_head import ClassHead
    from qlora_kit.model.fetch import Fetched
    from qlora_kit.model.load import Base, BaseSpec
    from qlora_kit.model.new_tokens import NewTokens
    from qlora_kit.model.start import Start
    from qlora_kit.model.threads import Threads
    from qlora_kit.tasks import Task

from qlora_kit.opening.new_tokens import (
    rows_of_tokens,
    stored_vocabulary,
    with_tokens,
)
from qlora_kit.opening.tasks import (
    asked_task,
    classifier,
    compare_heads,
    is_of_images,
    stored_task,
)


@dataclass(frozen=True)
class Opened:
    """A model whose files and tokenizer are on this machine, and whose weights are not loaded.

    Attributes:
        source: the name of the model, and the place of its files.
        fetched: its files.
        tokenizer: its tokenizer, or the adapter's own; of a model of images its image processor.
        has_template: whether there is a chat template.
        task: what a sample means to the command.
        vocabulary: rows that the model's tables need for added tokens; None: as many as stored.
        new_tokens: tokens of which the command trains the rows.
        start: the start of the adapter, where the base that it was trained on is less it.
    """

    source: ModelSource
    fetched: Fetched
    tokenizer: Any
    has_template: bool
    task: Task
    vocabulary: int | None = None
    new_tokens: NewTokens | None = None
    start: Start | None = None

    def classifying(self, labels: Labels, announce: Announce = silent) -> Opened:
        """Return the same model, opened as a classifier with these labels.

        Args:
            labels: the labels.
            announce: receives a notice where the model's head has learnt others.

        Raises:
            ConfigError: the model has a head already, for other words or another number of labels.
        """
        processor = self.tokenizer if is_of_images(self.task) else None
        task = classifier(labels, self.tokenizer.pad_token_id, processor)
        # The head that a model of images has is only known to its files.
        stored = self._stored_head() if processor else self.task.classes
        for text in compare_heads(
            self.source.name, stored, task.classes, of_images=processor is not None
        ):
            announce(Notice(text))
        return replace(self, task=task)

    def check_head(self) -> None:
        """Check that a model of images that has no adapter has a head of its own.

        Raises:
            ModelError: it has none.
        """
        if is_of_images(self.task) and self._stored_head() is None:
            raise ModelError(
                f"{self.source.name}: reads images and has no head that tells classes apart; "
                "expected a classifier; train one with `train --task classify`, or name its "
                "--adapter"
            )

    def _stored_head(self) -> ClassHead | None:
        """Return the head that the files of the model have; None without one."""
        from qlora_kit.model.architecture import read_architecture
        from qlora_kit.model.class_head import ClassHead

        folder = self.fetched.folder
        return None if folder is None else ClassHead.of(read_architecture(folder))

    def continuing(self, task: Task) -> Opened:
        """Return the same model, opened for a task of models that continue a text.

        An encoder-decoder keeps its own task, by which it is refused.
        """
        return self if self.task.has_sources else replace(self, task=task)

    def spec(self, options: BaseModelOptions) -> BaseSpec:
        """Return the specification of the frozen base; see `base_spec`."""
        spec = base_spec(self.source, self.fetched.folder, options, self.task, self.vocabulary)
        return replace(spec, start=self.start)

    def token_rows(self, options: BaseModelOptions) -> TokenRows | None:
        """Return the rows of new tokens that are trained; None without new tokens."""
        if self.new_tokens is None:
            return None
        bare = base_spec(self.source, self.fetched.folder, options, self.task)
        return rows_of_tokens(self.new_tokens, self.spec(options), bare)

    def positions(self, options: BaseModelOptions) -> int | None:
        """Return how many tokens of a row the model has positions for; None if it does not say."""
        from qlora_kit.model.positions import positions_of

        return positions_of(self.spec(options).architecture())

    def check_kind(self, options: BaseModelOptions) -> None:
        """Check that the model is of the kind that its task needs.

        Raises:
            ModelError: it is of another kind; the error names the task that it is for.
        """
        from qlora_kit.model.architecture import check_kind

        check_kind(self.spec(options).architecture(), self.task.loads)

    def check_positions(self, options: BaseModelOptions, rows: Tokenized) -> None:
        """Check that the model has a position and an embedding for every token of every row.

        Raises:
            ConfigError: the longest row has more tokens than the model has positions.
            ModelError: the tokenizer gives a token that the model has no embedding for.
        """
        positions = self.positions(options)
        longest = max(rows.rows.lengths())
        if positions is not None and longest > positions:
            text = self.spec(options).architecture().get_text_config()
            raise ConfigError(
                f"--max-length: the longest row has {longest} tokens and the model only "
                f"{positions} positions; pass --max-length {positions} or less"
                f"{self._other_ways(text, longest)}"
            )
        embeddings = self.embeddings(options)
        largest = rows.rows.largest_token()
        if embeddings is not None and largest >= embeddings:
            raise self.has_no_embedding(largest, embeddings)

    def embeddings(self, options: BaseModelOptions) -> int | None:
        """Return how many tokens the model has embeddings for; None if it does not say."""
        text = self.spec(options).architecture().get_text_config()
        return getattr(text, "vocab_size", None)

    def has_no_embedding(self, token: int, embeddings: int) -> ModelError:
        """Return the error of a token of the data that the model has no embedding for."""
        return ModelError(
            f"{self.source.name}: its tokenizer gives token {token} for this data and the "
            f"model has {embeddings} embeddings; expected a tokenizer made for it; restore the "
            "tokenizer's files"
        )

    def _other_ways(self, text: PreTrainedConfig, longest: int) -> str:
        """Return in words how rows that are too long can be learnt all the same."""
        from qlora_kit.model.positions import scaling_for

        wholes = self.task.has_sources or self.task.name == "preference"
        splits = self.task.generates and not wholes
        scaling = scaling_for(text, longest)
        return (", with --long-samples split to keep all of them" if splits else "") + (
            f", or scale its rotary positions in its config.json: {scaling}" if scaling else ""
        )

    def load(
        self, options: BaseModelOptions, announce: Announce, threads: Threads | None = None
    ) -> Base:
        """Load the base, quantised and frozen.

        Args:
            options: the device, and how the base is held.
            announce: receives notices and the progress.
            threads: the threads to compute with on a CPU, if they are chosen already.
        """
        from qlora_kit.model.hardware import choose_hardware
        from qlora_kit.model.load import Placement, load_base

        hardware = choose_hardware(options.device, options.dtype, threads)
        return load_base(self.spec(options), hardware, announce, Placement.of(options))


def base_spec(
    source: ModelSource,
    folder: Path | None,
    options: BaseModelOptions,
    task: Task,
    vocabulary: int | None = None,
) -> BaseSpec:
    """Return the specification of the frozen base. A quantised checkpoint keeps its quantisation.

    Args:
        source: the name of the model, and the place of its files.
        folder: the folder of its files; None where random weights need none.
        options: how the base is to be held.
        task: the task that the base is loaded for.
        vocabulary: rows of its tables, where tokens were added; None: as many as stored.

    Raises:
        ConfigError: the user asked for other bits than a quantised checkpoint has.
    """
    from qlora_kit.layers.quantize import Quantization
    from qlora_kit.model.encoder_decoder import check_dtype
    from qlora_kit.model.load import BaseSpec, stored_quantization

    asked = Quantization(options.bits, options.quant_type, options.double_quant)
    is_random = options.weights == "random"
    spec = BaseSpec(source, folder, asked, is_random, task.loads, task.classes, vocabulary)
    architecture = spec.architecture()
    check_dtype(architecture, options.dtype)
    stored = stored_quantization(architecture)
    if stored is None or spec.random:
        return spec
    if "bits" in options.model_fields_set and options.bits != stored.bits:
        raise ConfigError(
            f"--bits {options.bits}: the checkpoint is quantised to {stored.bits} bits "
            f"already; pass --bits {stored.bits} or name the unquantised model"
        )
    return replace(spec, quantization=stored)


def open_tokenizer(
    options: BaseModelOptions,
    announce: Announce = silent,
    adapter: Path | None = None,
    chat_template: str | None = None,
    new_tokens: Sequence[str] = (),
) -> Opened:
    """Bring a model's files to this machine, and load its tokenizer, or the adapter's own.

    Args:
        options: name the model.
        announce: receives notices.
        adapter: folder of a trained adapter.
        chat_template: see `choose_template`; None for the tokenizer's own.
        new_tokens: tokens to add, of which the rows are trained.
    """
    from qlora_kit.data.chat_template import choose_template
    from qlora_kit.model.class_head import is_encoder
    from qlora_kit.model.doctor import too_old
    from qlora_kit.model.encoder_decoder import is_encoder_decoder
    from qlora_kit.model.fetch import fetch
    from qlora_kit.model.images import check_known, reads_images
    from qlora_kit.model.tokenizer import load_tokenizer, lossy_characters

    for text in too_old():
        announce(Notice(text))
    source = find_model(options.model)
    fetched = fetch(source, random=options.weights == "random", revision=options.revision)
    bare = base_spec(source, fetched.folder, options, asked_task())
    check_known(bare.architecture())
    if reads_images(bare.architecture()):
        return _opened_for_images(source, fetched, bare, adapter)
    reads_apart = is_encoder_decoder(bare.architecture())
    writes = reads_apart or not is_encoder(bare.architecture())
    has_own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    folder = adapter if adapter and has_own else fetched.tokenizer_folder
    # The tokenizers of T5 lose line ends and repeated spaces, and its models learnt without them.
    continues = writes and not reads_apart
    tokenizer = load_tokenizer(folder, writes=writes, is_exact=continues)
    if continues and (lost := lossy_characters(tokenizer)):
        announce(Notice(f"the tokenizer does not give these letters back: {lost}"))
    if options.weights == "random" and fetched.folder is None:
        announce(Notice("random weights: the demo's tokenizer stands in for the model's own"))
    has_template = chat_template is not None or tokenizer.chat_template is not None
    if continues:
        choose_template(tokenizer, chat_template)
        if adapter is not None:
            _compare_templates(tokenizer, adapter, announce)
    task = stored_task(bare, adapter, tokenizer.pad_token_id)
    vocabulary = stored_vocabulary(bare, tokenizer, adapter)
    added, vocabulary = with_tokens(bare, tokenizer, new_tokens, vocabulary, announce)
    start = _start_of(adapter)
    opened = Opened(source, fetched, tokenizer, has_template, task, vocabulary, added, start)
    _tell_ids_beyond(opened, options, announce)
    return opened


def _opened_for_images(
    source: ModelSource, fetched: Fetched, bare: BaseSpec, adapter: Path | None
) -> Opened:
    """Return a model of images, whose image processor stands in the place of a tokenizer."""
    from qlora_kit.model.image_processor import NAME, default_processor, load_image_processor

    architecture = bare.architecture()
    has_own = adapter is not None and (adapter / NAME).is_file()
    folder = adapter if adapter and has_own else fetched.folder
    processor = (
        load_image_processor(folder, architecture) if folder else default_processor(architecture)
    )
    task = stored_task(bare, adapter, None, processor)
    start = _start_of(adapter)
    return Opened(source, fetched, processor, has_template=False, task=task, start=start)


def _start_of(adapter: Path | None) -> Start | None:
    """Return what the base of an adapter is less; None where it is as it is stored."""
    record = None if adapter is None else read_base_record(adapter)
    if adapter is None or record is None or record.start is None:
        return None
    from qlora_kit.lora.starts.loading import stored_start

    return stored_start(adapter)


def _tell_ids_beyond(opened: Opened, options: BaseModelOptions, announce: Announce) -> None:
    """Announce special tokens that the model lacks; pad with the end token if it lacks the pad."""
    folder, tokenizer = opened.fetched.folder, opened.tokenizer
    tokens = getattr(opened.spec(options).architecture().get_text_config(), "vocab_size", None)
    if not tokens:
        return
    content = read_model_config(folder / "config.json") if folder is not None else {}
    for part in (content, content.get("text_config") or {}):
        for name, beyond in ids_beyond(part, tokens).items():
            found = f"{folder}/config.json: {name} is {', '.join(map(str, beyond))}"
            announce(Notice(f"{found}, and the model has {tokens} tokens: it is left out"))
    if tokenizer.pad_token_id >= tokens:
        announce(
            Notice(
                f"{opened.source.name}: its tokenizer pads with token {tokenizer.pad_token_id}, "
                f"and the model has {tokens}: rows are padded with the end token instead"
            )
        )
        tokenizer.pad_token = tokenizer.eos_token


def _compare_templates(tokenizer: Any, adapter: Path, announce: Announce) -> None:
    """Announce that an adapter was trained with another chat template, if it was."""
    from qlora_kit.model.tokenizer import template_hash

    record = read_base_record(adapter)
    trained_with = record.template_hash if record is not None else None
    if trained_with not in (None, UNKNOWN_TEMPLATE, template_hash(tokenizer)):
        announce(
            Notice(
                f"{adapter}: trained with another chat template than is used now: expect other "
                "answers; leave out --chat-template, or restore the adapter's tokenizer files"
            )
        )


@dataclass(frozen=True)
class OpenedBase:
    """A loaded base, and its tokenizer."""

    base: Base
    tokenizer: Any


def open_base(
    options: BaseModelOptions | None = None,
    announce: Announce = silent,
    adapter: Path | None = None,
) -> OpenedBase:
    """Find, download and load a base with its tokenizer.

    Args:
        options: the model, and how it is held; None: the demo in 4 bits.
        announce: receives notices and the loading progress.
        adapter: folder of an adapter that will be put on it. Its tokenizer is taken, and where its
            start has changed the base, so is this base.
    """
    from qlora_kit.model.threads import choose_threads

    options = options or BaseModelOptions()
    opened = open_tokenizer(options, announce, adapter)
    # A program that calls this function decides on its own threads, unless it passes a number.
    threads = None if options.threads is None else choose_threads(options.threads)
    return OpenedBase(opened.load(options, announce, threads), opened.tokenizer)


def load_data(
    data: str | None,
    tokenizer: Any,
    options: TokenOptions | None = None,
    records: RecordOptions | None = None,
) -> Tokenized:
    """Read, recognise, template and tokenise a data file.

    Args:
        data: a file, or another source that `load_samples` takes; None: the sample data.
        tokenizer: the tokenizer of the model.
        options: how text becomes tokens; the defaults if None.
        records: how a record becomes a sample; the defaults if None.
    """
    from qlora_kit.data.tokens import tokenize

    return tokenize(load_samples(data, "train", records), tokenizer, options or TokenOptions())
