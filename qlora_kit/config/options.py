"""Every option: its default, its unit, its other names, and the things it decides.

Each command has one frozen class, composed of groups of options. The command line, the comparison
of `--resume`, the settings of a plan and the tables of the docs are all made from these fields, so
they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_serializer,
)

from qlora_kit.config.decisions import ChangeGroup, Decision, declared
from qlora_kit.config.over import Over, parse_over
from qlora_kit.config.values import (
    as_meant,
    check_tokens,
    kinds_of,
    parse_balanced_or_numbers,
    parse_device,
    parse_devices,
    parse_digits,
    parse_init,
    parse_list,
    parse_loss,
    parse_names,
    parse_number,
    parse_numbers,
    parse_resume,
    parse_size,
    parse_size_or_auto,
    parse_sources,
    parse_steps,
    parse_tokens,
    parse_tracker,
    pinned_name,
    switch,
)

# ---------------------------------------------------------------- field types

# A rank or a batch above this is a typing error.
_MOST = 65_536

_OPTIMIZER_NAMES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_8bit": "adamw8bit",
    "adamw_bnb_8bit": "adamw8bit",
    "paged_adamw_32bit": "paged-adamw",
    "paged_adamw": "paged-adamw",
    "paged_adamw_8bit": "paged-adamw8bit",
}
_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SCHEDULER_NAMES = {"constant_with_warmup": "constant"}
_TRAIN_ON_NAMES = {"all-turns": "completion", "all_turns": "completion", "last_turn": "last-turn"}
_LABEL_KIND_NAMES = {
    "single_label_classification": "single",
    "multi_label_classification": "multi",
}


def _renamed(names: Mapping[str, str]) -> BeforeValidator:
    return BeforeValidator(
        lambda value: names.get(value, value) if isinstance(value, str) else value
    )


TaskName = Literal["causal", "classify", "tag", "seq2seq", "preference"]
PreferenceLoss = Literal["dpo", "ipo", "orpo"]
AskedLoss = Annotated[PreferenceLoss, BeforeValidator(parse_loss)]
LabelNames = Annotated[tuple[str, ...], BeforeValidator(parse_list)]
LabelKind = Literal["single", "multi", "regression", "tags"]
AskedLabelKind = Annotated[
    Literal["auto", "single", "multi", "regression"], _renamed(_LABEL_KIND_NAMES)
]
ClassWeights = Annotated[
    Literal["balanced"] | dict[str, Annotated[float, Field(gt=0), BeforeValidator(parse_number)]],
    BeforeValidator(parse_balanced_or_numbers),
]
Bits = Annotated[Literal[4, 8, 16], BeforeValidator(parse_digits)]
LongSamples = Literal["auto", "drop", "truncate", "split", "error"]
ChangeNames = Annotated[tuple[ChangeGroup, ...], BeforeValidator(parse_list)]
ModuleNames = Annotated[tuple[str, ...], BeforeValidator(parse_list)]
TokenNames = Annotated[tuple[str, ...], AfterValidator(check_tokens), BeforeValidator(parse_tokens)]
LayerNumbers = Annotated[
    tuple[Annotated[int, Field(ge=0, le=_MOST), BeforeValidator(parse_number)], ...],
    BeforeValidator(parse_list),
]
Init = Annotated[
    Literal["kaiming", "pissa", "olora", "loftq", "eva", "lora-ga"], BeforeValidator(parse_init)
]
TargetNames = Annotated[tuple[str, ...], BeforeValidator(parse_list), Field(min_length=1)]
MetricName = Literal["exact_match", "squad", "bleu", "chrf", "final_number"]
MetricNames = Annotated[tuple[MetricName, ...], BeforeValidator(parse_list)]
Columns = Annotated[dict[str, str], BeforeValidator(parse_names)]
_Integer = Annotated[int, Field(ge=1, le=_MOST), BeforeValidator(parse_number)]
_Number = Annotated[float, Field(gt=0), BeforeValidator(parse_number)]
IntegerByPattern = Annotated[dict[str, _Integer], BeforeValidator(parse_numbers)]
NumberList = Annotated[tuple[_Number, ...], BeforeValidator(parse_list)]
NumberByPattern = Annotated[dict[str, _Number], BeforeValidator(parse_numbers)]
FolderByName = Annotated[dict[str, Path], BeforeValidator(parse_names)]
ByteCount = Annotated[int, BeforeValidator(parse_size)]
DeviceName = Annotated[Literal["auto", "cpu", "cuda"], BeforeValidator(parse_device)]
DeviceCount = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=1, le=_MOST)], BeforeValidator(parse_devices)
]
MemorySize = Annotated[Literal["auto"] | int, BeforeValidator(parse_size_or_auto)]
OptimizerName = Annotated[
    Literal["adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit"], _renamed(_OPTIMIZER_NAMES)
]
SchedulerName = Annotated[Literal["linear", "cosine", "constant"], _renamed(_SCHEDULER_NAMES)]
TrainOn = Annotated[Literal["completion", "last-turn", "all"], _renamed(_TRAIN_ON_NAMES)]
DtypeName = Annotated[Literal["auto", "float32", "bfloat16", "float16"], _renamed(_DTYPE_NAMES)]
ExportDtypeName = Annotated[Literal["float16", "bfloat16", "float32"], _renamed(_DTYPE_NAMES)]
GgufTypeName = Literal["f16", "f32", "bf16", "q8_0"]
Resume = Annotated[str | None, BeforeValidator(parse_resume)]
Steps = Annotated[int | None, BeforeValidator(parse_steps)]
Tracker = Annotated[Literal["none", "tensorboard", "wandb"], BeforeValidator(parse_tracker)]
Overs = Annotated[tuple[Over, ...], BeforeValidator(parse_over)]


def option(
    default: Any,
    text: str,
    *,
    also: Sequence[str] = (),
    decides: Decision | Sequence[Decision] = (),
    known_by_result: bool = False,
    leads: bool = False,
    bare: str | int | None = None,
    repeats: bool = False,
    **bounds: Any,
) -> Any:
    """Declare one option.

    Args:
        default: the value where none is given.
        text: the help, with the unit.
        also: names that peers give the option.
        decides: the things that the option decides of a run, see `config.decisions`.
        known_by_result: two runs are compared not by this value but by its result, such as a hash
            of the rows.
        leads: whether the option is one of the dozen that `--help` shows first.
        bare: the value where the option is named without one, or is true in a file.
        repeats: whether its flag may be given more than once, each time with another value.
        bounds: bounds of the value, in pydantic's names.
    """
    decided = [decides] if isinstance(decides, str) else list(decides)
    extra: dict[str, Any] = {
        "also": list(also), "decides": decided, "known_by_result": known_by_result, "leads": leads,
        "bare": bare, "repeats": repeats,
    }  # fmt: skip
    return Field(default, description=text, json_schema_extra=extra, **bounds)


class Options(BaseModel):
    """Base of all groups: frozen, and unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        bare = declared(cls, name)["bare"]
        if bare is not None and (is_on := switch(value)) is not None:
            value = bare if is_on else None
        return as_meant(value, kinds_of(cls.model_fields[name].annotation))

    @field_serializer("adapter", "adapters", check_fields=False, when_used="json")
    def _pinned(self, value: Path | dict[str, Path] | None) -> Any:
        if isinstance(value, dict):
            return {name: pinned_name(folder) for name, folder in value.items()}
        return None if value is None else pinned_name(value)


# ---------------------------------------------------------------- groups


class BaseModelOptions(Options):
    """Which frozen base, and how it is held in memory."""

    model: str = option(
        "demo", "name in configs/, folder, or hub id of a causal language model",
        also=["model_name_or_path", "base_model"],
        decides=["memory", "base"], known_by_result=True, leads=True,
    )  # fmt: skip
    revision: str | None = option(
        None,
        "commit, branch or tag of a hub id",
        also=["model_revision"],
        decides="base",
        known_by_result=True,
    )
    weights: Literal["pretrained", "random"] = option(
        "pretrained",
        "random: the real architecture with random weights, no download",
        decides="base",
        known_by_result=True,
    )
    bits: Bits = option(
        4,
        "bits a frozen weight is held in; 16: unquantised",
        decides=["base", "memory"],
        leads=True,
    )
    quant_type: Literal["nf4", "fp4"] = option(
        "nf4",
        "code book of the 4-bit weights",
        also=["bnb_4bit_quant_type"],
        decides=["base", "memory"],
    )
    double_quant: bool = option(
        True,
        "quantise the 4-bit constants as well",
        also=["bnb_4bit_use_double_quant"],
        decides=["base", "memory"],
    )
    embedding_on_cpu: bool | None = option(
        None, "keep the input embedding in host memory; default: on a GPU, unless head and "
        "embedding are one", decides="memory")  # fmt: skip
    head_bits: Bits = option(
        16,
        "bits the output head is held in; below 16 it is approximate, and so is the loss",
        decides=["base", "memory"],
    )
    device: DeviceName = option(
        "auto", "where the model runs", decides="precision", known_by_result=True
    )
    dtype: DtypeName = option(
        "auto", "compute dtype; auto: bfloat16 where the GPU has it, else float32",
        also=["bnb_4bit_compute_dtype", "torch_dtype"],
        decides="precision", known_by_result=True,
    )  # fmt: skip
    threads: int | None = option(
        None, "threads of a CPU; default: as many as cores are free at the start, or as "
        "OMP_NUM_THREADS says", ge=1, le=_MOST,
        decides="precision", known_by_result=True,
    )  # fmt: skip


class AdapterOption(Options):
    """A trained adapter to put on the base."""

    adapter: Path | None = option(
        None, "folder or hub id of a trained adapter; name=folder, more than once, puts several on "
        "one base",
        also=["adapter_name_or_path", "lora_model_dir"], repeats=True,
    )  # fmt: skip
    adapters: FolderByName = option({}, "several adapters, as name=folder,name=folder")


class AdapterByRowOption(AdapterOption):
    """An adapter for each row, or for all of them."""

    adapter_field: str = option(
        "adapter", "field of a record that names its adapter, where several are given"
    )


class LoraOptions(Options):
    """The trained part."""

    rank: int = option(
        16,
        "rank of the LoRA matrices",
        also=["lora_r", "r"],
        ge=1,
        le=_MOST,
        decides=["shape", "memory"],
        leads=True,
    )
    alpha: float = option(
        32, "LoRA numerator: scaling = alpha / rank", also=["lora_alpha"], gt=0, decides="lora"
    )
    lora_dropout: float = option(
        0.0, "dropout on the input of A, 0 to 1", ge=0, lt=1, decides="lora"
    )
    targets: TargetNames = option(
        ("attention",),
        "comma-separated: attention, mlp, experts, all-linear (all but experts), all-conv, names, "
        "or regular expressions of paths",
        also=["lora_target_modules", "target_modules", "lora_target"],
        decides=["shape", "memory"],
        leads=True,
    )
    rslora: bool = option(
        False, "scaling = alpha / sqrt(rank)", also=["use_rslora"], decides="lora"
    )
    rank_pattern: IntegerByPattern = option(
        {}, "rank by name, such as down_proj=8,layers.0.self_attn.q_proj=32", decides="shape"
    )
    alpha_pattern: NumberByPattern = option(
        {}, "alpha by name, such as down_proj=16", decides="lora"
    )
    layers_to_transform: LayerNumbers = option(
        (), "numbers of the blocks that get LoRA, from 0, such as 0,1,5; default: all",
        also=["lora_layers_to_transform"], decides=["shape", "memory"],
    )  # fmt: skip
    exclude_modules: ModuleNames = option(
        (), "layers that get no LoRA though --targets names them: names or regular expressions",
        decides=["shape", "memory"],
    )  # fmt: skip
    modules_to_save: ModuleNames = option(
        (), "layers that are trained whole and saved beside A and B, such as embed_tokens,lm_head",
        also=["lora_modules_to_save", "additional_target"], decides=["shape", "memory"],
    )  # fmt: skip
    new_tokens: TokenNames = option(
        (), "tokens to add, such as <think>,</think>; of embedding and head only their rows are "
        "trained",
        also=["add_tokens", "added_tokens"], decides=["shape", "memory"],
    )  # fmt: skip


class VariantOptions(LoraOptions):
    """A variant of LoRA."""

    init: Init = option(
        "kaiming", "what A and B start from; pissa, olora: the largest parts of the weights; "
        "loftq: what quantising lost; eva: the inputs of the first rows; lora-ga: their gradients",
        also=["init_lora_weights"], decides="lora",
    )  # fmt: skip
    dora: bool = option(
        False, "train the length of each output's weights apart from their direction",
        also=["use_dora"], decides=["shape", "memory"],
    )  # fmt: skip
    loraplus_ratio: float = option(
        1.0, "learning rate of B in units of that of A; LoRA+ takes 16",
        also=["loraplus_lr_ratio"], gt=0, decides="schedule",
    )  # fmt: skip
    learned_scale: bool = option(
        False, "train the scaling of each layer; it is folded into B on save",
        decides=["shape", "memory"],
    )  # fmt: skip
    freeze_a: bool = option(
        False, "train B alone; A stays as it was drawn", decides=["shape", "memory"]
    )
    rank_budget: int | None = option(
        None, "sum of the ranks of all layers, given to the layers that use them best",
        ge=1, decides=["shape", "memory"],
    )  # fmt: skip
    vblora: bool = option(
        False, "compose A and B of a few vectors that all layers share",
        also=["use_vblora"], decides=["shape", "memory"],
    )  # fmt: skip
    galore: ModuleNames = option(
        (), "unquantised layers that are trained whole, by gradients of low rank",
        also=["galore_target", "optim_target_modules"], decides=["shape", "memory"],
    )  # fmt: skip
    merge_aware: bool = option(
        False, "train the 4-bit codes that export --requantize writes", decides=["lora", "memory"]
    )


class TaskOptions(Options):
    """What a sample means."""

    task: TaskName = option(
        "causal", "causal: text to be learnt; classify: texts or images and their labels; tag: "
        "words and their tags; seq2seq: sources and targets, by an encoder-decoder; preference: "
        "two answers to a prompt, of which one is better",
        decides="task", leads=True,
    )  # fmt: skip
    labels: LabelNames = option(
        (), "names of the labels in their order, separated by commas; default: those of the data",
        decides="task",
    )  # fmt: skip
    label_kind: AskedLabelKind = option(
        "auto", "one label a sample, several, or a number; auto: by the data",
        also=["problem_type"], decides="task",
    )  # fmt: skip
    class_weights: ClassWeights = option(
        {}, "weights of labels in the loss, such as spam=3,other=1; balanced: all count alike",
        decides="task",
    )  # fmt: skip


class PreferenceOptions(Options):
    """How answers are compared."""

    loss: AskedLoss = option(
        "dpo", "loss of a pair of answers; dpo and ipo compare with the model as it was, orpo "
        "learns the chosen answer as well and needs no reference",
        also=["loss_type", "pref_loss"], decides="task",
    )  # fmt: skip
    beta: float = option(
        0.1, "dpo, ipo: how dear it is to move away from the reference; orpo: weight of the "
        "comparison",
        also=["pref_beta"], gt=0, decides="task",
    )  # fmt: skip


class StartOptions(Options):
    """What training starts from."""

    adapter: Path | None = option(
        None, "folder or hub id of a trained adapter to start from, with its rank, alpha and "
        "targets; dpo and ipo compare with it",
        also=["adapter_name_or_path", "lora_model_dir"], decides="lora", known_by_result=True,
    )  # fmt: skip


class RecordOptions(Options):
    """How the records of a data file are understood."""

    format: Literal[
        "auto", "chat", "sharegpt", "alpaca", "chat-pair", "pair", "qa", "text", "classify", "tag",
        "preference",
    ] = option(
        "auto", "what a record is; auto: by its fields", also=["dataset_format"],
        decides="data", known_by_result=True,
    )  # fmt: skip
    columns: Columns = option(
        {}, "fields that have another name in the data, such as "
        "prompt=query,completion=extra_info.answer",
        decides="data", known_by_result=True,
    )  # fmt: skip
    skip_bad_lines: bool = option(
        False,
        "leave out records with a fault, and say how many, instead of ending",
        decides="data",
        known_by_result=True,
    )


class TemplateOption(Options):
    """How turns become text."""

    chat_template: str | None = option(
        None, "Jinja file, or alpaca, chatml, gemma, llama-3, mistral, vicuna, zephyr; default: "
        "the tokenizer's own, for base models alpaca",
        also=["template", "chat_template_path", "chat_template_jinja"],
        decides="tokenizer",
    )  # fmt: skip


class DataSource(RecordOptions, TemplateOption):
    """A source of training data. What it leaves open is as the run has it for all sources."""

    path: str = option(..., "file, folder or hub id")
    weight: float | None = option(
        None, "weight among the sources; 1, where only others have one", gt=0
    )

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        """Write what was given and nothing else, so that what was left open stays open."""
        given = [name for name in type(self).model_fields if name in self.model_fields_set]
        others = {name: getattr(self, name) for name in given if name != "path"}
        return {"path": self.path, **others} if others else self.path


Data = Annotated[str | tuple[DataSource, ...] | None, BeforeValidator(parse_sources)]


class DataOptions(Options):
    """What is learnt."""

    data: Data = option(
        None, "training file, folder or hub id; more than once mixes several; without it the "
        "built-in sample data",
        also=["dataset", "train_file", "data_path"],
        decides="data", known_by_result=True, leads=True, repeats=True,
    )  # fmt: skip
    data_weights: NumberList = option(
        (), "shares of several sources in the rows of each optimiser step, such as 3,1; default: "
        "every row of every source once an epoch",
        decides="data", known_by_result=True,
    )  # fmt: skip
    validation: str | None = option(
        None,
        "validation file",
        also=["validation_file", "eval_dataset"],
        decides="data",
        known_by_result=True,
    )
    validation_fraction: float = option(
        0.05, "share of the data held out when no validation file is given and rows >= 200",
        also=["val_size", "val_set_size"], ge=0, lt=1, decides="data")  # fmt: skip

    @field_validator("data")
    @classmethod
    def _one_source_is_the_run(cls, data: Any) -> Any:
        """One source has nothing to be weighed against, and its template is the run's."""
        if isinstance(data, tuple) and len(data) == 1:
            for name in ("weight", "chat_template"):
                if getattr(data[0], name) is not None:
                    raise ValueError(
                        f"expected several sources where one has a {name} of its own; "
                        + ("leave it out" if name == "weight" else f"write {name} beside data")
                    )
        return data

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The sources of the data, in the order in which they are given; none: the sample data."""
        if self.data is None:
            return ()
        return (DataSource(path=self.data),) if isinstance(self.data, str) else self.data

    @property
    def source_weights(self) -> tuple[float, ...]:
        """The weight of each source; none where every row comes once an epoch."""
        if self.data_weights or all(source.weight is None for source in self.sources):
            return self.data_weights
        return tuple(1.0 if each.weight is None else each.weight for each in self.sources)


class StreamOptions(Options):
    """How data larger than memory are read."""

    stream_data: bool | None = option(
        None, "read the data while training, instead of all of it before; memory stays the same, "
        "however large the files; default: for local files of 4 MB or more, where nothing forbids "
        "it",
        also=["streaming"], decides="data",
    )  # fmt: skip
    shuffle_buffer: int | None = option(
        None, "samples of a stream that the next one is drawn from; 1: the order of the files; "
        "default: 10,000, or all where the text is 32 MB or less",
        also=["buffer_size"], ge=1, decides="data",
    )  # fmt: skip
    data_workers: int = option(
        1, "processes that tokenise beside the training; 0: none, the training waits",
        also=["dataset_num_proc"], ge=0, le=256,
    )  # fmt: skip
    tokenize_first: bool | None = option(
        None, "make the tokens of all rows before the first step; default: where the text is less "
        "than 1 MB, or something has to know all of them; of more only the reading comes first",
        decides="data",
    )  # fmt: skip


class TokenOptions(TemplateOption):
    """How a record becomes tokens."""

    max_length: int = option(
        1024, "tokens a sample may have",
        also=["cutoff_len", "sequence_len", "max_seq_length"], ge=2,
        decides=["data", "memory"], leads=True,
    )  # fmt: skip
    long_samples: LongSamples = option(
        "auto",
        "samples over max_length; auto: truncate pairs and chats, split plain text; split divides "
        "chats between turns",
        decides="data",
    )
    train_on: TrainOn = option(
        "completion", "tokens that are supervised: every answer (all-turns is the same), the last "
        "answer of a chat, or everything", decides="data")  # fmt: skip


class StepOptions(Options):
    """How one optimiser step is computed."""

    batch_size: int = option(
        1,
        "rows a micro-batch",
        also=["per_device_train_batch_size", "micro_batch_size"],
        ge=1,
        decides=["batch", "memory"],
        leads=True,
    )
    gradient_accumulation_steps: int = option(
        16,
        "micro-batches an optimiser step",
        also=["gradient_accumulation"],
        ge=1,
        decides=["batch", "memory"],
        leads=True,
    )
    packing: bool | None = option(
        None, "lay the samples of a step end to end in few full micro-batches, each as if alone; "
        "default: where it is exact and saves micro-batches", decides=["batch", "memory"],
    )  # fmt: skip
    group_by_length: bool = option(
        True, "put rows of about the same length into one micro-batch", decides="batch"
    )
    recompute: bool = option(
        True, "recompute activations in backward (gradient checkpointing)",
        also=["gradient_checkpointing"], decides="memory")  # fmt: skip
    keep_layers: int = option(
        0,
        "decoder layers, counted from the last, that keep their activations instead",
        ge=0,
        decides="memory",
    )
    unpacked_layers: int = option(
        0,
        "decoder layers, counted from the last, whose weights stay unpacked beside the packed ones",
        ge=0,
        decides="memory",
    )
    offload_checkpoints: bool | None = option(
        None, "hold what recomputation keeps in host memory; default: on a GPU", decides="memory"
    )
    mlp_tile_tokens: int | None = option(
        None, "tokens an MLP works on at a time, keeping its input only; 0: as its model has it; "
        "default: 2048 with recompute, else 0", ge=0, decides=["precision", "memory"])  # fmt: skip
    loss_chunk_tokens: int = option(
        256,
        "tokens whose logits exist at one time in the loss",
        ge=1,
        decides=["precision", "memory"],
    )
    kernels: Literal["auto", "plain"] = option(
        "auto", "auto: fused kernels where the model runs on a GPU and they compute the same; "
        "plain: the code without them", decides=["precision", "memory"], known_by_result=True,
    )  # fmt: skip


class ProcessOptions(Options):
    """How many processes train together."""

    devices: DeviceCount | None = option(
        None, "processes that divide the rows of every step, each on a GPU of its own; auto: one "
        "for each GPU; default: this process, or those of a launcher such as torchrun",
        also=["num_processes", "nproc_per_node"],
    )  # fmt: skip
    shard_base: bool | None = option(
        None, "hold the base in parts, one on each device of a machine, and gather it layer by "
        "layer; default: where it does not fit a device, and there are several", decides="memory",
    )  # fmt: skip


class BudgetOptions(Options):
    """How much memory a run may have. What is left open in its settings is then chosen."""

    vram: MemorySize | None = option(
        None, "memory of the whole card, such as 10GB or 8GiB, or auto; chooses micro-batch and "
        "reducers that fit, and is kept to", leads=True)  # fmt: skip
    ram: MemorySize | None = option(
        None, "memory of the host that the run may take, such as 16GB, or auto"
    )


class OptimizerOptions(Options):
    """How the adapter moves."""

    epochs: float = option(
        1.0,
        "passes over the data",
        also=["num_train_epochs", "num_epochs"],
        gt=0,
        decides="length",
        leads=True,
    )
    max_steps: Steps = option(
        None, "optimiser steps; overrides epochs; -1: none", ge=1, decides="length"
    )
    learning_rate: float = option(
        2e-4, "peak learning rate", also=["lr"], gt=0, decides="schedule", leads=True
    )
    scheduler: SchedulerName = option(
        "linear",
        "shape of the learning rate after warm-up",
        also=["lr_scheduler_type", "lr_scheduler"],
        decides="schedule",
    )
    warmup_ratio: float = option(
        0.03, "share of the steps that warm up", ge=0, le=1, decides="schedule"
    )
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW", ge=0, decides="schedule")
    max_grad_norm: float = option(
        0.3, "gradient norm that is clipped to; 0: no clipping", ge=0, decides="schedule"
    )
    optimizer: OptimizerName = option(
        "adamw", "adamw keeps fp32 state", also=["optim"], decides=["shape", "memory"]
    )
    seed: int = option(
        42, "seed of initialisation, data order and dropout", ge=0, le=2**32 - 1, decides="seed"
    )
    deterministic: bool = option(
        False,
        "the same bits in each run on a GPU too; its cost is printed",
        also=["full_determinism"],
        decides="precision",
    )


class RunOptions(Options):
    """Where a run lives, and when it saves and evaluates."""

    output: Path | None = option(
        None, "folder of the run; default runs/<model>-<n>", also=["output_dir"], leads=True
    )
    overwrite: bool = option(
        False, "replace a run already in the folder", also=["overwrite_output_dir"]
    )
    resume: Resume = option(
        None, "continue from `latest` or a checkpoint folder", also=["resume_from_checkpoint"],
        bare="latest",
    )  # fmt: skip
    allow_change: ChangeNames = option(
        (), "what may differ from the run that --resume continues: data,tokenizer,base,batch,…"
    )
    save_steps: int | None = option(
        None, "optimiser steps between checkpoints; default: at each epoch's end", ge=1
    )
    save_total_limit: int | None = option(None, "checkpoints kept besides the best", ge=1)
    eval_steps: int | None = option(
        None, "optimiser steps between evaluations; default: at each epoch's end", ge=1
    )
    eval_batch_size: int = option(
        8,
        "rows a batch in evaluation; unless given, fewer where these take more than a step",
        also=["per_device_eval_batch_size"],
        ge=1,
        decides="memory",
    )
    best_metric: str = option(
        "loss", "what the best checkpoint and early stopping go by: loss, or a metric of the task, "
        "such as accuracy or macro_f1",
        also=["metric_for_best_model"],
    )  # fmt: skip
    early_stopping_patience: int | None = option(
        None, "evaluations without improvement before the run stops", ge=1
    )
    logging_steps: int = option(1, "optimiser steps between rows of the log", ge=1)
    report_to: Tracker = option(
        "none", "where metrics go besides the log; wandb is Weights & Biases"
    )
    samples: int = option(
        3, "prompts of the data continued before and after training, shown in report.html; 0: none",
        ge=0, le=1000,
    )  # fmt: skip
    rehearse: bool = option(
        True, "take a step on the longest rows before the first, measure its memory, and undo it"
    )
    profile: int | None = option(
        None, "optimiser steps whose time is recorded and told by part, after two that warm up; "
        "without a number 3",
        ge=1, bare=3,
    )  # fmt: skip


# ---------------------------------------------------------------- commands


class TrainConfig(
    RunOptions,
    OptimizerOptions,
    ProcessOptions,
    BudgetOptions,
    StepOptions,
    TokenOptions,
    RecordOptions,
    PreferenceOptions,
    TaskOptions,
    StreamOptions,
    DataOptions,
    StartOptions,
    VariantOptions,
    BaseModelOptions,
):
    """Options of `qlora-kit train`."""


class PlanConfig(TrainConfig):
    """How to show the plan. `qlora-kit plan` takes the options of the run that is planned."""

    plot: Path | None = option(None, "picture of the memory of each phase, such as plan.png")
    card: str | None = option(
        None, "card to predict the time for, where it is not in this machine, such as 'RTX 4090'"
    )


class CheckConfig(TrainConfig):
    """How to show the data. `qlora-kit check` takes the options of the run whose data it is."""

    rows: int = option(3, "token rows to show, drawn by the seed", ge=0, le=1000)
    html: Path | None = option(None, "page of what is found, with the rows, such as data.html")


class SweepConfig(TrainConfig):
    """What is searched, and how. `qlora-kit sweep` takes the options of the runs that it makes."""

    over: Overs = option(
        (), "option to vary and its values, such as learning_rate=1e-4,3e-4; more than once varies "
        "several; semicolons stand between values that are lists", repeats=True, leads=True,
    )  # fmt: skip
    search: Literal["grid", "random"] = option(
        "grid", "grid: every combination of the values; random: --trials of them, drawn by the "
        "seed, from values or from ranges such as learning_rate=1e-5..1e-3", leads=True,
    )  # fmt: skip
    trials: int | None = option(None, "trials of a random search", ge=1, le=1000, leads=True)
    output: Path | None = option(
        None, "folder of the sweep, in which each trial is a run; default sweeps/<model>-<n>",
        also=["output_dir"], leads=True,
    )  # fmt: skip


class EvaluateConfig(TokenOptions, RecordOptions, AdapterByRowOption, BaseModelOptions):
    """What is measured."""

    data: str | None = option(
        None, "file, folder or hub id with the rows to measure", also=["dataset", "test_file"]
    )
    batch_size: int = option(
        8,
        "rows a batch; unless given, 32 answers are generated together",
        also=["per_device_eval_batch_size"],
        ge=1,
    )
    loss_chunk_tokens: int = option(256, "tokens whose logits exist at one time in the loss", ge=1)
    metrics: MetricNames = option(
        (), "also generate every answer and measure it, comma-separated: exact_match, squad, bleu, "
        "chrf, final_number",
    )  # fmt: skip
    exact_match: bool = option(False, "the same as --metrics exact_match")
    max_new_tokens: int = option(256, "tokens an answer may have", ge=1)
    predictions: Path | None = option(
        None, "file for every answer, what was expected and its figures, such as predictions.jsonl"
    )
    overwrite: bool = option(False, "replace the file of predictions if it exists")
    max_rows: int | None = option(None, "measure only the first rows", ge=1)

    @property
    def answer_metrics(self) -> tuple[MetricName, ...]:
        """What is measured of generated answers, each metric once."""
        named: tuple[MetricName, ...] = ("exact_match",) if self.exact_match else ()
        return tuple(dict.fromkeys((*named, *self.metrics)))

    @property
    def generates_for(self) -> str | None:
        """The flag for which answers are generated; None where there is none."""
        if self.metrics:
            return "--metrics"
        if self.exact_match:
            return "--exact-match"
        return None if self.predictions is None else "--predictions"


class AnswerOptions(Options):
    """How answers are made."""

    raw: bool = option(False, "continue the prompt as it is, without a chat template")
    max_new_tokens: int = option(256, "tokens to generate at most", ge=1)
    temperature: float = option(0.0, "0: greedy; above: sampling", ge=0)
    top_p: float = option(1.0, "share of the probability kept when sampling", gt=0, le=1)
    seed: int = option(42, "seed of sampling", ge=0, le=2**32 - 1)


class GenerateConfig(AnswerOptions, TemplateOption, AdapterByRowOption, BaseModelOptions):
    """What is asked, and how it is answered."""

    prompt: str | None = option(
        None, "text to continue, or a chat turn where the model has a template"
    )
    prompts: Path | None = option(
        None, "file of prompts instead: records with a prompt, a text or turns"
    )


class ChatConfig(AnswerOptions, TemplateOption, AdapterOption, BaseModelOptions):
    """How the conversation is held."""

    system: str | None = option(None, "what the model is told before the first turn")
    context: int | None = option(
        None, "tokens that the model sees at most, the answer among them; default: as many as it "
        "has positions for",
        also=["num_ctx", "ctx_size", "max_model_len"], ge=2,
    )  # fmt: skip


class ServeConfig(TemplateOption, AdapterOption, BaseModelOptions):
    """Who may ask, and how much is answered at a time."""

    host: str = option(
        "127.0.0.1", "address to listen on; 0.0.0.0 lets other machines ask", leads=True
    )
    port: int = option(8000, "port to listen on; 0 takes a free one", ge=0, le=65_535, leads=True)
    api_key_env: str | None = option(
        None, "environment variable with the key that callers must show", leads=True
    )
    max_batch: int = option(8, "requests that are answered together", ge=1, le=_MOST, leads=True)
    queue: int = option(
        64, "requests that may wait besides; those beyond are told to come back later", ge=0,
        le=_MOST, leads=True,
    )  # fmt: skip
    max_length: int | None = option(
        None, "tokens of a prompt and its answer together; default: the model's positions", ge=2
    )
    timeout: float = option(600, "seconds that a request may take, its wait included", gt=0)


class ExportConfig(Options):
    """What is written, in which form, and where to."""

    adapter: Path = option(
        ..., "run or adapter folder, or hub id; to push, also the folder of an earlier export"
    )
    to: Path | None = option(None, "new folder, or hub:owner/name to push to the hub")
    private: bool = option(False, "hub: make the repository private, and refuse one that is public")
    revision: str | None = option(
        None, "hub: branch to push to, made where it is not there; default: main"
    )
    license: str | None = option(
        None, "licence for the model card, by the hub's name, such as apache-2.0"
    )
    check_server: Literal["vllm", "sglang", "tgi"] | None = option(
        None, "write nothing, and say what this server would refuse of the adapter, or leave out"
    )
    model: str | None = option(
        None, "base to merge into; default: the one the adapter names; with --form adapter what "
        "the adapter is to name instead, such as the hub id of a folder's model",
        also=["model_name_or_path", "base_model"],
    )  # fmt: skip
    base: Literal["quantized", "original"] = option(
        "quantized", "weights the delta is added to: the base as training had it, dequantised, or "
        "those of the checkpoint",
    )  # fmt: skip
    requantize: bool = option(
        False, "pack the merged weights again as the base was, and say what that loses"
    )
    dtype: ExportDtypeName = option("float16", "dtype of the merged weights")
    form: Literal["merged", "adapter", "gguf", "gguf-adapter"] = option(
        "merged", "merged: a model in safetensors; adapter: the LoRA alone, as PEFT has it; gguf, "
        "gguf-adapter: the same two as llama.cpp and Ollama read them", also=["export_format"],
    )  # fmt: skip
    gguf_type: GgufTypeName | None = option(
        None, "type of the matrices of a GGUF file; default: f16, and f32 of an adapter"
    )
    max_shard_size: ByteCount = option(
        4_000_000_000, "largest file, such as 4GB or 500MB (10^9 and 10^6 bytes)", ge=1_000_000
    )
    data: str | None = option(
        None, "file with rows of the task to verify the merge on; default: validation rows of the "
        "run, else built-in prompts",
    )  # fmt: skip
    verify_tokens: int = option(
        1024, "tokens that the merged model and the adapter are compared on; 0: weights only", ge=0
    )
    verify_threshold: float | None = option(
        None, "largest mean KL divergence from the adapter on its quantised base, nats per token; "
        "a merge above it is undone", ge=0,
    )  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where the merge is computed")
    overwrite: bool = option(
        False, "replace the folder if it exists; hub: replace what the branch has, in one commit"
    )

    @property
    def repository(self) -> str | None:
        """The repository of the hub that `to` names; None where it names a folder."""
        text = str(self.to)
        return text if text.startswith("hub:") else None


class QuantizeConfig(Options):
    """What is quantised, and where to."""

    model: str = option(
        ..., "name in configs/, folder, or hub id of a causal language model",
        also=["model_name_or_path", "base_model"],
    )  # fmt: skip
    to: Path = option(..., "new folder for the quantised model")
    revision: str | None = option(
        None, "commit, branch or tag of a hub id", also=["model_revision"]
    )
    bits: Annotated[Literal[4, 8], BeforeValidator(parse_digits)] = option(
        4, "bits a weight of a linear layer is stored in"
    )
    quant_type: Literal["nf4", "fp4"] = option(
        "nf4", "code book of the 4-bit weights", also=["bnb_4bit_quant_type"]
    )
    double_quant: bool = option(
        True, "quantise the 4-bit constants as well", also=["bnb_4bit_use_double_quant"]
    )
    dtype: Annotated[Literal["auto", "float16", "bfloat16", "float32"], _renamed(_DTYPE_NAMES)] = (
        option("auto", "dtype of embeddings, head and norms; auto: as they are stored")
    )
    max_shard_size: ByteCount = option(
        4_000_000_000, "largest file, such as 4GB or 500MB (10^9 and 10^6 bytes)", ge=1_000_000
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where weights are quantised")
    overwrite: bool = option(False, "replace the folder if it exists")


class RunsConfig(Options):
    """Which runs are listed, and how."""

    folder: Path = option(Path("runs"), "folder of runs, of a sweep, or of one run")
    sort: Literal["time", "best", "name"] = option(
        "time", "order: time, the run that was written last first; best, by the figure of the best "
        "checkpoint; or name",
    )  # fmt: skip
    html: Path | None = option(
        None, "page that draws the runs together; auto, or without a name: runs.html in the folder",
        bare="auto",
    )  # fmt: skip
