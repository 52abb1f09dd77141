"""From the name of a model to a loaded base with its tokenizer, and the adapter put on it.

The recipes share it, and users of the API start with it. It imports torch inside its functions
only, after everything that can be checked without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_kit.config import (
    AdapterOption,
    AnyConfig,
    BaseModelOptions,
    EvaluateConfig,
    GenerateConfig,
    Layer,
    RecordOptions,
    TokenOptions,
    TrainConfig,
    resolve,
)
from qlora_kit.data.samples import load_samples
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.events import Announce, Notice, silent
from qlora_kit.lora.files import (
    UNKNOWN_TEMPLATE,
    BaseRecord,
    check_adapter_folder,
    read_base_record,
    read_peft_config,
)
from qlora_kit.model.config_file import ids_beyond, names_classifier, read_model_config
from qlora_kit.model.names import ModelSource, find_model, known_models
from qlora_kit.train.folder import stored_layer

if TYPE_CHECKING:
    from qlora_kit.data.labels import Labels
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.lora.attach import LoraSpec
    from qlora_kit.lora.several import AdapterSet
    from qlora_kit.model.fetch import Fetched
    from qlora_kit.model.load import Base, BaseSpec
    from qlora_kit.model.threads import Threads
    from qlora_kit.tasks import Task

# Models whose first position is the one behind the number of their padding token.
_COUNTED_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm")

_TWO_LABELS = ("0", "1")

AdapterConfig = TypeVar("AdapterConfig", EvaluateConfig, GenerateConfig)


def configure(
    config_class: type[AnyConfig], layers: Sequence[Layer] = (), **given: Any
) -> AnyConfig:
    """Resolve a configuration from all its sources; each source overrides those to its left.

        defaults  <  configs/NAME.yaml  <  the run that is resumed  <  `layers`  <  `given`

    The class alone, as in `TrainConfig(model="smollm2-135m")`, knows the defaults only.

    Args:
        config_class: the configuration of a command.
        layers: values of other sources, such as `config.read_config_file`.
        given: values by the name of their option, or by a synonym of it.

    Raises:
        ConfigError: the values have faults; the error lists all of them, see `config.resolve`.
        ModelError: there is no such model.
    """
    layers = [*layers, Layer("", given)]
    asked = resolve(config_class, layers)
    if isinstance(asked, TrainConfig) and (stored := _stored_options(asked)):
        layers.insert(0, stored)
        asked = resolve(config_class, layers)
    if not isinstance(asked, TrainConfig):
        return asked
    source = find_model(asked.model)
    origin = f"configs/{source.name}.yaml" if source.name in known_models() else source.name
    return resolve(config_class, [Layer(origin, source.settings), *layers])


def _stored_options(asked: TrainConfig) -> Layer | None:
    """Return the options of the run to resume, which the user's options override; or None."""
    stored = stored_layer(asked.output, asked.resume)
    given = asked.model_fields_set
    if stored is not None and "epochs" in given and "max_steps" not in given:
        # A stored number of steps would silently win over the epochs that the user asked for.
        return Layer(stored.origin, {**stored.values, "max_steps": None})
    return stored


@dataclass(frozen=True)
class Opened:
    """A model whose files and tokenizer are on this machine, and whose weights are not loaded.

    Attributes:
        source: the name of the model, and the place of its files.
        fetched: its files.
        tokenizer: its tokenizer, or the adapter's own.
        has_template: whether there is a chat template.
        task: what a sample means to the command.
    """

    source: ModelSource
    fetched: Fetched
    tokenizer: Any
    has_template: bool
    task: Task

    def classifying(self, labels: Labels) -> Opened:
        """Return the same model, opened as a classifier with these labels."""
        return replace(self, task=_classifier(labels, self.tokenizer.pad_token_id))

    def spec(self, options: BaseModelOptions) -> BaseSpec:
        """Return the specification of the frozen base; see `base_spec`."""
        return base_spec(self.source, self.fetched.folder, options, self.task)

    def positions(self, options: BaseModelOptions) -> int | None:
        """Return how many tokens of a row the model has positions for; None if it does not say."""
        text = self.spec(options).architecture().get_text_config()
        positions = getattr(text, "max_position_embeddings", None)
        if positions is not None and text.model_type in _COUNTED_FROM_PADDING:
            return int(positions) - (text.pad_token_id or 0) - 1
        return positions

    def check_positions(self, options: BaseModelOptions, rows: Tokenized) -> None:
        """Check that the model has a position and an embedding for every token of every row.

        Raises:
            ConfigError: the longest row has more tokens than the model has positions.
            ModelError: the tokenizer gives a token that the model has no embedding for.
        """
        text = self.spec(options).architecture().get_text_config()
        positions = self.positions(options)
        longest = max(rows.rows.lengths())
        if positions is not None and longest > positions:
            raise ConfigError(
                f"--max-length: the longest row has {longest} tokens and the model only "
                f"{positions} positions; pass --max-length {positions} or less"
            )
        embeddings = getattr(text, "vocab_size", None)
        largest = rows.rows.largest_token()
        if embeddings is not None and largest >= embeddings:
            raise ModelError(
                f"{self.source.name}: its tokenizer gives token {largest} for this data and the "
                f"model has {embeddings} embeddings; expected a tokenizer made for it; restore the "
                "tokenizer's files"
            )

    def trainable(self, options: BaseModelOptions, lora: LoraSpec) -> int:
        """Return the number of parameters that an adapter will have, before anything is loaded.

        Raises:
            ConfigError: a target or pattern names no layer.
        """
        from qlora_kit.layers.projections import projections
        from qlora_kit.lora.attach import targeted_paths

        skeleton = self.spec(options).skeleton()
        layers = projections(skeleton)
        paths = targeted_paths(skeleton, lora)
        shapes = ((layers[path].in_features + layers[path].out_features, path) for path in paths)
        count: int = sum(width * lora.rank_of(path) for width, path in shapes)
        for path in lora.whole:
            count += sum(each.numel() for each in skeleton.get_submodule(path).parameters())
        return count

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
        from qlora_kit.model.load import Placement, is_tied, load_base

        hardware = choose_hardware(options.device, options.dtype, threads)
        base = load_base(self.spec(options), hardware, announce, Placement.of(options))
        if options.embedding_on_cpu and not base.placement.embedding_on_cpu:
            why = "it is the head as well" if is_tied(base.model) else "all of it runs on the CPU"
            announce(Notice(f"--embedding-on-cpu has no effect on this model: {why}"))
        return base


def asked_task() -> Task:
    """Return the task of every command. No other place names a task."""
    from qlora_kit.tasks import CAUSAL

    return CAUSAL


def planned_task(config: TrainConfig) -> Task:
    """Return the task of a run whose data are not read: with two labels, if none are named."""
    if config.task != "classify":
        return asked_task()
    from qlora_kit.data.labels import Labels

    if config.label_kind == "regression":
        return _classifier(Labels("regression"), None)
    names = config.labels or _TWO_LABELS
    labels = Labels("multi", names) if config.label_kind == "multi" else Labels("single", names)
    return _classifier(labels, None)


def _classifier(labels: Labels, pad_token_id: int | None) -> Task:
    from qlora_kit.data.labelled_rows import LabelledRows
    from qlora_kit.model.class_head import VALUE, ClassHead
    from qlora_kit.tasks.classify import classify

    head = ClassHead(labels.kind, labels.names or (VALUE,), pad_token_id)
    weights = labels.weights if len(set(labels.weights)) > 1 else ()
    return classify(head, LabelledRows(labels), weights)


def _stored_task(spec: BaseSpec, adapter: Path | None, pad_token_id: int | None) -> Task:
    """Return the task that an adapter, or else a model, was trained for."""
    from qlora_kit.data.labels import Labels
    from qlora_kit.lora.adapter import stored_labels
    from qlora_kit.model.class_head import ClassHead

    found = None if adapter is None else stored_labels(adapter)
    head = ClassHead.of(spec.architecture())
    if found is None and head is not None:
        found = head.kind, head.names
    if found is None:
        return asked_task()
    kind, names = found
    return _classifier(Labels(kind, () if kind == "regression" else names), pad_token_id)


def stored_task_name(model: str, adapter: Path | None) -> str:
    """Return the name of the task that an adapter, or else a model, was trained for.

    Reads text files only, before torch is imported.

    Args:
        model: name, folder or hub id.
        adapter: folder of an adapter, or None.
    """
    if adapter is not None:
        record = read_base_record(adapter)
        is_classifier = read_peft_config(adapter).task_type == "SEQ_CLS"
        return "classify" if is_classifier or (record and record.labels) else "causal"
    folder = find_model(model).folder
    if folder is None or not (folder / "config.json").is_file():
        return "causal"
    named = read_model_config(folder / "config.json").get("architectures")
    return "classify" if names_classifier(named) else "causal"


def check_generates(task: Task, asked: str) -> None:
    """Check that the models of a task write text.

    Raises:
        ConfigError: they do not, and `asked`, an option or a command, needs text.
    """
    if not task.generates:
        raise ConfigError(
            f"{asked}: a model of task {task.name} writes no text; expected one that does; use "
            "`qlora-kit evaluate`, which measures what it is for"
        )


def base_spec(
    source: ModelSource, folder: Path | None, options: BaseModelOptions, task: Task
) -> BaseSpec:
    """Return the specification of the frozen base. A quantised checkpoint keeps its quantisation.

    Args:
        source: the name of the model, and the place of its files.
        folder: the folder of its files; None where random weights need none.
        options: how the base is to be held.
        task: the task that the base is loaded for.

    Raises:
        ConfigError: the user asked for other bits than a quantised checkpoint has.
    """
    from qlora_kit.layers.quantize import Quantization
    from qlora_kit.model.load import BaseSpec, stored_quantization

    asked = Quantization(options.bits, options.quant_type, options.double_quant)
    is_random = options.weights == "random"
    spec = BaseSpec(source, folder, asked, is_random, task.loads, task.classes)
    stored = stored_quantization(spec.architecture())
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
) -> Opened:
    """Bring a model's files to this machine, and load its tokenizer, or the adapter's own.

    Args:
        options: name the model.
        announce: receives notices.
        adapter: folder of a trained adapter.
        chat_template: see `choose_template`; None for the tokenizer's own.
    """
    from qlora_kit.data.chat_template import choose_template
    from qlora_kit.model.class_head import is_encoder
    from qlora_kit.model.doctor import too_old
    from qlora_kit.model.fetch import fetch
    from qlora_kit.model.tokenizer import load_tokenizer, lossy_characters

    for text in too_old():
        announce(Notice(text))
    source = find_model(options.model)
    fetched = fetch(source, random=options.weights == "random", revision=options.revision)
    bare = base_spec(source, fetched.folder, options, asked_task())
    writes = not is_encoder(bare.architecture())
    has_own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    folder = adapter if adapter and has_own else fetched.tokenizer_folder
    tokenizer = load_tokenizer(folder, writes=writes)
    if writes and (lost := lossy_characters(tokenizer)):
        announce(Notice(f"the tokenizer does not give these letters back: {lost}"))
    if options.weights == "random" and fetched.folder is None:
        announce(Notice("random weights: the demo's tokenizer stands in for the model's own"))
    has_template = chat_template is not None or tokenizer.chat_template is not None
    if writes:
        choose_template(tokenizer, chat_template)
        if adapter is not None:
            _compare_templates(tokenizer, adapter, announce)
    task = _stored_task(bare, adapter, tokenizer.pad_token_id)
    opened = Opened(source, fetched, tokenizer, has_template, task)
    _tell_ids_beyond(opened, options, announce)
    return opened


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


def open_base(options: BaseModelOptions | None = None, announce: Announce = silent) -> OpenedBase:
    """Find, download and load a base with its tokenizer.

    Args:
        options: the model, and how it is held; None: the demo in 4 bits.
        announce: receives notices and the loading progress.
    """
    from qlora_kit.model.threads import choose_threads

    options = options or BaseModelOptions()
    opened = open_tokenizer(options, announce)
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


# ---------------------------------------------------------------- adapters


def put_on(base: Base, config: AdapterOption, announce: Announce) -> BaseRecord | None:
    """Attach the adapter that is configured, if any, and return its record.

    A notice says so if the adapter was trained on other bits than those of the base.
    """
    from qlora_kit.lora.adapter import load_adapter

    if config.adapter is None:
        return None
    load_adapter(base, config.adapter)
    record = read_base_record(config.adapter)
    if record is not None and record.bits != base.quantization.bits:
        announce(
            Notice(
                f"the adapter was trained on {record.bits} bits and is used on "
                f"{base.quantization.bits}: expect other numbers"
            )
        )
    return record


def put_several_on(base: Base, config: AdapterOption, announce: Announce) -> AdapterSet:
    """Put several adapters on a base.

    A notice names each adapter that was trained on other bits, or with another chat template.
    """
    from qlora_kit.lora.several import load_adapters

    adapters = load_adapters(base, config.adapters)
    records = {name: read_base_record(folder) for name, folder in config.adapters.items()}
    first = next(iter(records.values()))
    for name, record in records.items():
        if record is None:
            continue
        if record.bits != base.quantization.bits:
            announce(
                Notice(
                    f"adapter {name}: trained on {record.bits} bits and used on "
                    f"{base.quantization.bits}: expect other numbers"
                )
            )
        if first is None or UNKNOWN_TEMPLATE in (record.template_hash, first.template_hash):
            continue
        if record.template_hash != first.template_hash:
            announce(
                Notice(
                    f"adapter {name}: trained with another chat template than "
                    f"{next(iter(records))}, whose is used for all: expect other answers"
                )
            )
    return adapters


def stored_options(adapter: Path, model: str | None = None) -> dict[str, Any]:
    """Return the base options that an adapter was trained with, as far as its files say.

    Args:
        adapter: the folder of the adapter.
        model: the base that the user asked for, which goes before the recorded base. The recorded
            commit belongs to the recorded base, and is left out for any other.
    """
    options = _recorded_options(adapter)
    if model is None or model == options.get("model"):
        return options
    return {**options, "model": model, "revision": None}


def _recorded_options(adapter: Path) -> dict[str, Any]:
    check_adapter_folder(adapter)
    config, record = read_peft_config(adapter), read_base_record(adapter)
    if record is not None:
        names = {"bits", "quant_type", "double_quant", "weights", "revision"}
        return {"model": record.base, **record.model_dump(include=names)}
    named = config.base_model_name_or_path
    return {"model": named} if named else {}


def adapter_of(config: AdapterOption) -> Path | None:
    """Return the folder of the adapter, or of the first of several; None if there is none."""
    return config.adapter or next(iter(config.adapters.values()), None)


def as_trained(config: AdapterConfig) -> AdapterConfig:
    """Return the configuration with the adapter's base and bits, unless the user named others.

    Raises:
        ConfigError: the configuration has both one adapter and several.
    """
    if config.adapter is not None and config.adapters:
        raise ConfigError("--adapter and --adapters contradict each other; pass one of them")
    adapter = adapter_of(config)
    if adapter is None:
        return config
    model = config.model if "model" in config.model_fields_set else None
    stored = stored_options(adapter, model)
    missing = {name: v for name, v in stored.items() if name not in config.model_fields_set}
    return config.model_copy(update=missing)


def check_base(model: str, adapter: Path | None) -> None:
    """Check that a model is known.

    Raises:
        ModelError: it is not; the error names the adapter that was trained on it, if there is one.
    """
    try:
        find_model(model)
    except ModelError as error:
        if adapter is None:
            raise
        raise ModelError(
            f"{error.faults[0]}; {adapter} goes on it: name where it is now with --model"
        ) from error
