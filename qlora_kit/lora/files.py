"""The two JSON files of an adapter, checked field by field before they are used.

Takes an adapter folder, perhaps a stranger's; returns `PeftConfig` (adapter_config.json) and
`BaseRecord` (qlora_kit.json). A field that the kit does not understand is refused by name, never
ignored. Imports no torch: the record of the base is read before torch is imported.
"""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from qlora_kit.config import LabelKind, PreferenceLoss
from qlora_kit.errors import AdapterError, DataError
from qlora_kit.lora.peft_fields import is_plain_start, is_unset, why_refused
from qlora_kit.model.config_file import IMAGE_CLASSIFICATION
from qlora_kit.storage import check_confined, read_json

if TYPE_CHECKING:
    from qlora_kit.lora.spec import LoraSpec
    from qlora_kit.model.load import Base

WEIGHTS, PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
CONFIG = "adapter_config.json"
RECORD = "qlora_kit.json"

# PEFT's words for the tasks that classify.
CLASSIFIERS: Mapping[str, str] = {"SEQ_CLS": "classify", "TOKEN_CLS": "tag"}

UNKNOWN_TEMPLATE = "unknown"
"""stands in a record whose author did not say which chat template the data went through"""

MOST_RANK = 65_536
_MOST_FILE_BYTES = 1 << 24
_MOST_SHOWN = 60
_VERSIONED = ("torch", "transformers", "bitsandbytes")

# PEFT options the kit does not have, with the values that mean "not used".
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "layer_replication": (None, []),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "megatron_config": (None,),
    "enable_lora": (None,),
}
# PEFT options that say how the adapter was made, and do not change what it computes.
_HARMLESS = {
    "peft_version", "auto_mapping", "inference_mode", "runtime_config",
    "layers_pattern",
    # The base decides whether its layers hold their weights transposed, here and in PEFT.
    "fan_in_fan_out",
    "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # They compute as plain LoRA, once they are trained.
    "velora_config", "monteclora_config",
    # Of the first versions of PEFT: whether a forward merges first.
    "merge_weights",
}  # fmt: skip

# Of VB-LoRA: how it was drawn, sizes that the tensors have, and what was saved of the logits.
_OF_VB_LORA = {
    "num_vectors", "vector_length", "save_only_topk_weights", "vblora_dropout",
    "init_vector_bank_bound", "init_logits_std",
}  # fmt: skip

# ---------------------------------------------------------------- patterns

_PLAIN_NAME = re.compile(r"[\w.-]+")
_QUANTIFIER = re.compile(r"(?<!\()[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_BACK_REFERENCE = re.compile(r"\\[1-9]|\(\?P=")
_MOST_PATTERN_LENGTH = 200
_MOST_QUANTIFIERS = _MOST_GROUPS = 4
_MOST_PATTERNS = 64


def _check_pattern(pattern: str) -> str:
    """Refuse a regular expression that may never end: its time must be a low power of the length.

    Raises:
        ValueError: the expression is too complex, or is none.
    """
    bare = re.sub(r"\\[^1-9]", "", pattern)  # an escaped character matches only itself
    if (
        len(pattern) > _MOST_PATTERN_LENGTH
        or _REPEATED_GROUP.search(bare)
        or _BACK_REFERENCE.search(pattern)
        or len(_QUANTIFIER.findall(bare)) > _MOST_QUANTIFIERS
        or bare.count("(") > _MOST_GROUPS
    ):
        raise ValueError("a name, or a simple regular expression of one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError, FutureWarning) as error:
        raise ValueError("a name, or a regular expression of one") from error
    return pattern


def _check_patterns(patterns: dict[str, Any]) -> dict[str, Any]:
    complex_ones = [key for key in patterns if not _PLAIN_NAME.fullmatch(key)]
    if len(complex_ones) > _MOST_PATTERNS:
        raise ValueError(f"names, and at most {_MOST_PATTERNS} regular expressions")
    for pattern in complex_ones:
        _check_pattern(pattern)
    return patterns


# ---------------------------------------------------------------- what the files may hold

_Text = Annotated[str, Field(min_length=1, max_length=4096)]


def _check_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("each name once")
    return names


_Labels = Annotated[
    tuple[_Text, ...], Field(strict=False, min_length=1), AfterValidator(_check_once)
]
# Some tools write "" for a value that they do not know.
_OrAbsent = BeforeValidator(lambda value: None if is_unset(value) else value)
_Rank = Annotated[int, Field(ge=1, le=MOST_RANK)]
_Alpha = Annotated[float, Field(gt=0)]
_Token = Annotated[int, Field(ge=0, lt=1 << 31)]
_DtypeName = Literal["float32", "bfloat16", "float16"]


class _File(BaseModel):
    model_config = ConfigDict(
        frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class BlockDiagonal(_File):
    """Which A or B are stored as blocks: the field `use_bdlora`, with PEFT's names."""

    target_modules_bd_a: list[_Text] | None = None
    target_modules_bd_b: list[_Text] | None = None
    # A matrix that is written out has as many times the bytes of its file.
    nblocks: Annotated[int, Field(ge=1, le=64)] = 1


class PeftConfig(_File):
    """The fields of `adapter_config.json` that the kit uses, with PEFT's names and defaults."""

    model_config = ConfigDict(extra="allow")

    base_model_name_or_path: Annotated[_Text | None, _OrAbsent] = None
    revision: Annotated[_Text | None, _OrAbsent] = None
    r: _Rank = 8
    lora_alpha: _Alpha = 8.0
    lora_dropout: Annotated[Annotated[float, Field(ge=0, lt=1)] | None, _OrAbsent] = None
    use_rslora: Annotated[bool | None, _OrAbsent] = None
    use_dora: Annotated[bool | None, _OrAbsent] = None
    # Of VB-LoRA alone: the number of vectors that a part of A or B is mixed of.
    topk: Annotated[Annotated[int, Field(ge=1)] | None, _OrAbsent] = None
    rank_pattern: Annotated[
        Annotated[dict[str, _Rank], AfterValidator(_check_patterns)] | None, _OrAbsent
    ] = None
    alpha_pattern: Annotated[
        Annotated[dict[str, _Alpha], AfterValidator(_check_patterns)] | None, _OrAbsent
    ] = None
    target_modules: Annotated[list[_Text] | _Text | None, _OrAbsent] = None
    target_parameters: Annotated[list[_Text] | None, _OrAbsent] = None
    exclude_modules: Annotated[list[_Text] | _Text | None, _OrAbsent] = None
    layers_to_transform: Annotated[list[int] | int | None, _OrAbsent] = None
    modules_to_save: Annotated[list[_Text] | None, _OrAbsent] = None
    ensure_weight_tying: Annotated[bool | None, _OrAbsent] = None
    trainable_token_indices: Annotated[
        list[_Token] | dict[_Text, list[_Token]] | None, _OrAbsent
    ] = None
    task_type: Any = None
    bias: Annotated[Literal["none", "all", "lora_only"] | None, _OrAbsent] = None
    lora_bias: Annotated[bool | None, _OrAbsent] = None
    use_bdlora: Annotated[BlockDiagonal | None, _OrAbsent] = None
    init_lora_weights: Any = None

    @property
    def classifies(self) -> str | None:
        """The task of a classifier, by the name it has here; None of another model."""
        return CLASSIFIERS.get(str(self.task_type))

    @property
    def targeted_names(self) -> tuple[str, ...]:
        """The names of layers that must have tensors, by which missing tensors are found.

        Patterns are left out, because a pattern may match more layers than its author meant. The
        tensors themselves say where the adapter is attached.
        """
        if self.exclude_modules or self.layers_to_transform is not None:
            return ()
        return tuple(self.target_modules) if isinstance(self.target_modules, list) else ()


class StartErrors(_File):
    """What quantising loses, relative to the norm of the weights of the trained layers.

    Attributes:
        plain: without a start, as in plain QLoRA.
        start: with it.
        peft: the difference of the trained model from its form of rank 2R on the original base in
            the same bits.
    """

    model_config = ConfigDict(extra="forbid")

    plain: float
    start: float
    peft: float


class StartRecord(_File):
    """How the base of an adapter is rebuilt: it is less what A and B started from.

    The adapter's file has rank 2R, see `lora.starts.form`: its second half is the start.

    Attributes:
        init: the name of the start.
        alpha, alpha_pattern: those of the trained adapter, of rank R.
        errors: what was measured at the start; None where the base is not quantised.
    """

    model_config = ConfigDict(extra="forbid")

    init: Literal["pissa", "olora", "lora-ga"]
    alpha: _Alpha
    alpha_pattern: dict[str, _Alpha] = Field(default_factory=dict)
    errors: StartErrors | None = None

    @classmethod
    def of(cls, spec: LoraSpec, errors: StartErrors | None) -> StartRecord:
        """Describe the start of an adapter that is trained by a spec."""
        init: Any = spec.variant.init
        return cls(
            init=init,
            alpha=float(spec.alpha),
            alpha_pattern={name: float(each) for name, each in spec.alpha_pattern.items()},
            errors=errors,
        )


class BaseRecord(_File):
    """The base that an adapter was trained on: the content of `qlora_kit.json`.

    Attributes:
        base: hub id, known name, or folder of the base.
        digest: hash of the base's tensors, see `model.load.Digest`.
        bits, quant_type, double_quant, block_size: the quantisation of the base.
        compute_dtype, dequantization_dtype: dtype of activations, and of unpacked weights.
        weights: "pretrained" or "random".
        revision: commit of the hub repository, if the base came from the hub.
        template_hash: hash of the chat template that the data went through; None if there was no
            template; `UNKNOWN_TEMPLATE` if it is not known.
        labels: names of a classifier's labels in the order of its outputs; None for other models.
        label_kind: "single", "multi", "regression" or "tags"; None for other models.
        reads: what the model reads. PEFT has no name for the task of a classifier of images.
        preference_loss, preference_beta: the loss that pairs of answers were compared by; None for
            other models.
        new_tokens: tokens that were added to the tokenizer, or that it had, and were trained.
        start: how the base is rebuilt, where what A and B started from was taken from it.
        trained_codes: SHA-256 of the packed weights that a merge-aware adapter was trained as, see
            `layers.merge_aware.hash_of_all`; None for other adapters.
        versions: versions of the kit and of the libraries it computes with.
    """

    model_config = ConfigDict(extra="forbid")

    base: _Text
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{1,128}$")]
    bits: Literal[4, 8, 16]
    quant_type: Literal["nf4", "fp4"]
    double_quant: bool
    compute_dtype: _DtypeName
    dequantization_dtype: _DtypeName
    weights: Literal["pretrained", "random"] = "pretrained"
    block_size: Literal[64] = 64
    revision: _Text | None = None
    template_hash: _Text | None = None
    labels: _Labels | None = None
    label_kind: LabelKind | None = None
    reads: Literal["text", "images"] = "text"
    preference_loss: PreferenceLoss | None = None
    preference_beta: Annotated[float, Field(gt=0)] | None = None
    new_tokens: Annotated[tuple[_Text, ...], Field(strict=False)] = ()
    start: StartRecord | None = None
    trained_codes: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def classifies(self) -> str | None:
        """The task of a classifier, by the name it has here; None of another model."""
        if self.labels is None:
            return None
        return "tag" if self.label_kind == "tags" else "classify"

    @classmethod
    def of(
        cls,
        base: Base,
        revision: str | None = None,
        template_hash: str | None = UNKNOWN_TEMPLATE,
        preference: tuple[PreferenceLoss, float] | None = None,
        new_tokens: tuple[str, ...] = (),
    ) -> BaseRecord:
        """Describe a loaded base.

        Args:
            base: the base that the adapter was trained on.
            revision: commit of the base, if it came from the hub.
            template_hash: see `data.tokens.Tokenized.template_hash`. With None, `generate` uses no
                template. With `UNKNOWN_TEMPLATE`, it uses the tokenizer's, if there is one.
            preference: the loss that pairs of answers were compared by, and its β.
            new_tokens: the tokens of which rows are trained.
        """
        dtype: Any = base.hardware.dtype_name
        classes = base.spec.classes
        return cls(
            base=base.spec.source.identity,
            digest=base.digest,
            weights="random" if base.spec.random else "pretrained",
            bits=base.quantization.bits,
            quant_type=base.quantization.quant_type,
            double_quant=base.quantization.double_quant,
            compute_dtype=dtype,
            dequantization_dtype=dtype,
            revision=revision,
            template_hash=template_hash,
            labels=classes.names if classes else None,
            label_kind=classes.kind if classes else None,
            reads="images" if base.spec.loads == IMAGE_CLASSIFICATION else "text",
            preference_loss=preference[0] if preference else None,
            preference_beta=preference[1] if preference else None,
            new_tokens=new_tokens,
            start=base.spec.start.record if base.spec.start else None,
            versions=library_versions(),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the content of the file; what only some tasks have is left out of others."""
        content = self.model_dump(mode="json")
        if self.labels is None:
            del content["labels"], content["label_kind"]
        if self.reads == "text":
            del content["reads"]
        if self.preference_loss is None:
            del content["preference_loss"], content["preference_beta"]
        if not self.new_tokens:
            del content["new_tokens"]
        if self.start is None:
            del content["start"]
        if self.trained_codes is None:
            del content["trained_codes"]
        return content


def library_versions() -> dict[str, str]:
    """Return the versions of the kit and of the libraries it computes with."""
    return {name: _version(name) for name in ("qlora-kit", *_VERSIONED)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# ---------------------------------------------------------------- reading

_AnyFile = TypeVar("_AnyFile", bound=_File)


def check_adapter_folder(folder: Path) -> None:
    """Check that the files of an adapter are in `folder`, and that no link leads out of it.

    Raises:
        AdapterError: a file is missing, or a link leads out of the folder.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder; expected an adapter or run folder")
    has_weights = any((folder / name).is_file() for name in (WEIGHTS, PICKLED_WEIGHTS))
    for name, is_there in ((CONFIG, (folder / CONFIG).is_file()), (WEIGHTS, has_weights)):
        if not is_there:
            raise AdapterError(f"{folder}: no {name}; expected an adapter or run folder")
    check_confined(folder, AdapterError)


def read_peft_config(folder: Path) -> PeftConfig:
    """Read `adapter_config.json`.

    Raises:
        AdapterError: the file is of no LoRA adapter, sets a feature that the kit does not have, or
            has a field with a value that it must not have.
    """
    path = folder / CONFIG
    content = _read_object(path)
    if content.get("peft_type") == "VBLORA":
        content = _as_lora(content)
    elif content.get("peft_type") != "LORA":
        raise AdapterError(f'{path}: not a LoRA adapter; expected "peft_type": "LORA"')
    for name, unused in _UNSUPPORTED.items():
        value = content.get(name)
        if value not in unused and not is_unset(value):
            raise AdapterError(f"{path}: {name} is set{why_refused(name, value)}")
    start = content.get("init_lora_weights")
    if not is_plain_start(start):
        raise AdapterError(
            f"{path}: init_lora_weights is set to {_short(repr(start))}"
            f"{why_refused('init_lora_weights', start)}"
        )
    known = {"peft_type", *PeftConfig.model_fields, *_UNSUPPORTED, *_HARMLESS}
    for name, value in content.items():
        if name not in known and not is_unset(value):
            raise AdapterError(
                f"{path}: {_short(name)} is set, which the kit does not know; expected a LoRA "
                "adapter of PEFT; unset it only if it changes nothing of what the adapter computes"
            )
    return _checked(PeftConfig, content, path, "")


def _as_lora(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return VB-LoRA's fields as those of the LoRA that its A and B are; PEFT's rank is 4."""
    rank = content.get("r", 4)
    own = {name: value for name, value in content.items() if name not in _OF_VB_LORA}
    same = {"r": rank, "lora_alpha": rank, "topk": content.get("topk", 2)}
    return {**own, **same, "lora_dropout": content.get("vblora_dropout", 0.0)}


def peft_fields(folder: Path) -> dict[str, Any]:
    """Return the fields of `adapter_config.json` as they are written, whatever they are.

    Raises:
        AdapterError: the file is no JSON object.
    """
    return _read_object(folder / CONFIG)


def read_base_record(folder: Path) -> BaseRecord | None:
    """Read `qlora_kit.json`; return None if there is none.

    Raises:
        AdapterError: the file has other fields or values than the kit writes.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    return _checked(BaseRecord, _read_object(path), path, "not a record of this kit: ")


def check_one_task(folder: Path, record: BaseRecord, config: PeftConfig) -> None:
    """Check that both files of an adapter say alike whether it classifies, and what.

    Raises:
        AdapterError: they do not.
    """
    if record.reads == "images" and config.task_type is None:
        return
    if record.classifies != config.classifies:
        found = {None: "no labels", "classify": "labels of texts", "tag": "tags of words"}
        raise AdapterError(
            f"{folder}: {RECORD} has {found[record.classifies]}, and {CONFIG} says task_type "
            f"{_short(str(config.task_type))}; expected files of one run; restore them"
        )


def _read_object(path: Path) -> dict[str, Any]:
    size = path.stat().st_size if path.is_file() else 0
    if size > _MOST_FILE_BYTES:
        raise AdapterError(
            f"{path}: {size:,} bytes; expected at most {_MOST_FILE_BYTES:,}; restore it"
        )
    try:
        content = read_json(path)
    except DataError as error:
        raise AdapterError(*error.faults) from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: found no JSON object; expected one of fields; restore it")
    return content


def _checked(kind: type[_AnyFile], content: dict[str, Any], path: Path, what: str) -> _AnyFile:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
    name = _short(".".join(str(part) for part in problem["loc"] if part != "[key]"))
    message = problem["msg"].replace("Input should be ", "").replace("Value error, ", "")
    if problem["type"] in ("missing", "extra_forbidden"):
        found, message = problem["type"].split("_")[0], "the fields that the kit writes"
    else:
        found = f"found {_short(repr(problem['input']))}"
    raise AdapterError(
        f"{path}: {what}{name}: {found}; expected {message[0].lower()}{message[1:]}; restore it"
    )


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "…"
