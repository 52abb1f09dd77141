"""Reads any PEFT LoRA adapter, if the kit has its features: the files become a `StoredAdapter`.

Never downloads, and never runs code that a file contains. What an adapter needs that the kit does
not have is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kit.errors import AdapterError, ModelError, StorageError, raised_as
from qlora_kit.lora import biases as of_biases
from qlora_kit.lora.block_diagonal import written_out
from qlora_kit.lora.files import (
    CONFIG,
    PICKLED_WEIGHTS,
    WEIGHTS,
    PeftConfig,
    check_adapter_folder,
    check_one_task,
    read_base_record,
    read_peft_config,
)
from qlora_kit.lora.spec import LoraSpec, Variant
from qlora_kit.lora.stacked import (
    layers_named,
    stack_of_keys,
    unfolded,
)
from qlora_kit.lora.starts.form import as_trained
from qlora_kit.lora.stored import StoredAdapter
from qlora_kit.lora.tensor_names import plain_names, without_training_state
from qlora_kit.lora.token_files import (
    TokenTensors,
    token_tensors,
)
from qlora_kit.lora.vector_bank_files import with_matrices
from qlora_kit.lora.vocabulary import base_layers, turned
from qlora_kit.model.checkpoint import PickledShards
from qlora_kit.storage import check_no_pointer, load_tensors
from qlora_kit.time_limit import TimeUp, time_limit

# The keys that PEFT writes, with or without the adapter's name; some tools leave the prefix out.
_KEY = re.compile(r"(base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_MAGNITUDE_KEY = re.compile(
    r"(base_model\.model\.)?(?P<path>.+)\.lora_magnitude_vector(\.default)?(\.weight)?"
)
_SAVED_KEY = re.compile(
    r"(base_model\.model\.)?(?P<path>.+?)(\.modules_to_save(\.default)?)?\.(?P<leaf>weight|bias)"
)
_HEADS = ("classifier", "score")
_PATTERN_SECONDS = 5.0


class _Divided(NamedTuple):
    """The tensors of a file, divided by what they are."""

    lora: Mapping[str, Tensor]
    magnitudes: Mapping[str, Tensor]
    of_tokens: TokenTensors
    biases: of_biases.Biases
    of_base: Mapping[str, Tensor]
    saved: Mapping[str, Tensor]


def read_adapter(folder: Path) -> StoredAdapter:
    """Read an adapter folder, and check that the adapter is whole.

    Raises:
        AdapterError: there is no adapter; it uses a feature that the kit does not have; an A has
            no B; a rank does not fit; or a value is not finite.
    """
    check_adapter_folder(folder)
    config = read_peft_config(folder)
    record = read_base_record(folder)
    found = _divided(folder, config)
    pairs, kernels = _pair(found.lora, folder)
    if (blocks := config.use_bdlora) is not None:
        pairs = {path: written_out(path, pair, blocks, folder) for path, pair in pairs.items()}
    parameters = tuple(config.target_parameters or ())
    stack_of = stack_of_keys(pairs, parameters, folder / CONFIG)
    if parameters and config.lora_dropout:
        raise AdapterError(
            f"{folder / CONFIG}: lora_dropout is {config.lora_dropout:g} with target_parameters, "
            "which PEFT refuses too; expected 0; restore it"
        )
    pairs = {stack_of.get(path, path): pair for path, pair in pairs.items()}
    spec = LoraSpec(
        rank=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout or 0.0,
        targets=tuple(pairs),
        rslora=bool(config.use_rslora),
        rank_pattern=config.rank_pattern or {},
        alpha_pattern=config.alpha_pattern or {},
        token_rows=found.of_tokens.token_rows,
        variant=Variant(
            dora=bool(config.use_dora), merge_aware=bool(record and record.trained_codes)
        ),
    )
    tensors, stacked = _by_path(pairs, {*stack_of.values()}, _ranks(folder, spec), folder)
    outputs = {path: len(b) for path, (_, b) in tensors.items()}
    added = of_biases.added(found.biases.of_b, outputs, spec.scaling_of, folder)
    # A bias may be both: trained, and added to.
    trained = {name: each + added.pop(name, 0) for name, each in found.biases.trained.items()}
    if config.use_dora:
        _check_magnitudes(found.magnitudes, tensors, kernels, folder)
    return as_trained(StoredAdapter(
        folder, spec, tensors, config.base_model_name_or_path, record, {**found.saved, **trained},
        targeted=(*config.targeted_names, *layers_named(parameters)),
        stacked=stacked, targeted_stacks=parameters, kernels=kernels, of_base=found.of_base,
        rows=found.of_tokens.rows, stays_tied=bool(config.ensure_weight_tying),
        added=added, biases=tuple(trained), magnitudes=found.magnitudes,
    ))  # fmt: skip


def _divided(folder: Path, config: PeftConfig) -> _Divided:
    """Read the tensors of an adapter, and tell them apart by their names."""
    file = folder / WEIGHTS
    raw = without_training_state(plain_names(_read_tensors(folder), file))
    if not raw:
        raise AdapterError(
            f"{file}: holds no tensors, as if emptied when it was saved; expected lora_A and "
            "lora_B; save the adapter again"
        )
    raw = with_matrices(raw, config, folder)
    magnitudes = _magnitudes(raw, config, folder)
    raw = {key: tensor for key, tensor in raw.items() if not _MAGNITUDE_KEY.fullmatch(key)}
    raw = turned(raw, file)
    lora = {key: tensor for key, tensor in raw.items() if _KEY.fullmatch(key)}
    others = {key: tensor for key, tensor in raw.items() if key not in lora}
    of_tokens = token_tensors(others, config, file)
    modules = (*(config.modules_to_save or ()), *of_tokens.tables)
    biases = of_biases.taken_out(
        of_tokens.rest,
        replace=config.bias in ("all", "lora_only"),
        add=bool(config.lora_bias),
        is_whole=lambda path: any(_is_within(path, module) for module in modules),
        file=file,
    )
    of_base, rest = base_layers(biases.rest)
    saved = _saved(rest, modules, folder)
    _check_all_saved(saved, config, folder)
    return _Divided(lora, magnitudes, of_tokens, biases, of_base, saved)


def _by_path(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    stack_paths: Set[str],
    ranks: Mapping[str, int],
    folder: Path,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, int]]:
    """Return A and B of each layer and expert, and the number of experts of each stack, by path."""
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    stacked: dict[str, int] = {}
    for path, (a, b) in pairs.items():
        of_experts = path in stack_paths
        parts = unfolded(path, a, b, ranks[path], folder) if of_experts else {path: (a, b)}
        for each, (part_of_a, part_of_b) in parts.items():
            _check_pair(folder, each, part_of_a, part_of_b, ranks[path])
        tensors |= parts
        stacked |= {path: len(parts)} if of_experts else {}
    return tensors, stacked


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the safetensors file, or the plain tensors of a `.bin` if there is no such file."""
    check_no_pointer(folder / WEIGHTS, AdapterError)
    try:
        if (folder / WEIGHTS).is_file():
            return load_tensors(folder / WEIGHTS)
        pickled = PickledShards([folder / PICKLED_WEIGHTS])
        return {name: pickled.read(name).clone() for name in pickled.names}
    except StorageError as error:
        raise AdapterError(f"{error}; expected the weights of a LoRA adapter") from error
    except ModelError as error:
        raise AdapterError(*error.faults) from error


def _magnitudes(raw: Mapping[str, Tensor], config: PeftConfig, folder: Path) -> dict[str, Tensor]:
    """Return DoRA's lengths of rows by path, fp32."""
    matches = {key: match for key in raw if (match := _MAGNITUDE_KEY.fullmatch(key))}
    if matches and not config.use_dora:
        raise AdapterError(
            f"{folder / CONFIG}: use_dora is not set, and {WEIGHTS} has {next(iter(matches))}; "
            "expected files of one adapter; restore them"
        )
    return {match["path"]: raw[key].float() for key, match in matches.items()}


def _check_magnitudes(
    magnitudes: Mapping[str, Tensor],
    tensors: Mapping[str, tuple[Tensor, Tensor]],
    kernels: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> None:
    if kernels:
        raise AdapterError(
            f"{folder}: use_dora is set, and {next(iter(kernels))} is a convolution, for which the "
            "kit has no DoRA; expected DoRA on linear layers"
        )
    for path in sorted(tensors.keys() | magnitudes.keys()):
        magnitude, pair = magnitudes.get(path), tensors.get(path)
        if magnitude is None or pair is None or magnitude.shape != (len(pair[1]),):
            raise AdapterError(
                f"{folder / WEIGHTS}: {path} has no lora_magnitude_vector as long as its B; "
                "expected one of each layer, because use_dora is set; save the adapter again"
            )
        if not torch.isfinite(magnitude).all():
            raise AdapterError(f"{folder}: {path} holds NaN or infinity; train it again")


def _saved(raw: Mapping[str, Tensor], modules: tuple[str, ...], folder: Path) -> dict[str, Tensor]:
    """Return the parameters of `modules_to_save` by the name they have in the base."""
    file = folder / WEIGHTS
    saved: dict[str, Tensor] = {}
    for key, tensor in raw.items():
        match = _SAVED_KEY.fullmatch(key)
        path = match["path"] if match else ""
        # PEFT compares the end of the path only: "norm" names every layer norm.
        if match is None or not any(_is_within(path, module) for module in modules):
            raise AdapterError(f"{file}: unknown tensor {key}; expected lora_A and lora_B")
        if not (tensor.is_floating_point() and torch.isfinite(tensor.float()).all()):
            raise AdapterError(f"{file}: {key} holds NaN or infinity; train it again")
        name = f"{path}.{match['leaf']}"
        if name in saved and not torch.equal(saved[name], tensor):
            raise AdapterError(
                f"{file}: holds {name} twice, with different values; expected one; save the "
                "adapter again"
            )
        saved[name] = tensor
    return saved


def _check_all_saved(saved: Mapping[str, Tensor], config: PeftConfig, folder: Path) -> None:
    paths = {name.rpartition(".")[0] for name in saved}
    for module in config.modules_to_save or ():
        # PEFT names every head that a classifier may have, whichever this one has.
        is_other_head = bool(config.classifies and saved) and module in _HEADS
        if not is_other_head and not any(_is_within(path, module) for path in paths):
            raise AdapterError(
                f"{folder / WEIGHTS}: modules_to_save names {module} and there is no tensor of it; "
                "expected its weights; save the adapter again"
            )


def _is_within(path: str, module: str) -> bool:
    """Whether a path is one that PEFT means by the name of a module, or leads into it."""
    return path.endswith(module) or f"{module}." in path


def _ranks(folder: Path, spec: LoraSpec) -> dict[str, int]:
    """Return the rank of every layer; a stranger's patterns may be slow, and get limited time."""
    line = (
        f"{folder / CONFIG}: rank_pattern or alpha_pattern takes longer than "
        f"{_PATTERN_SECONDS:.0f} s to match; expected names of layers; write them out"
    )
    with raised_as(AdapterError, line, of=TimeUp), time_limit(_PATTERN_SECONDS):
        # Both kinds of patterns are matched here, so no later match can take longer.
        return {path: spec.rank_of(path) for path in spec.targets if spec.scaling_of(path)}


def _pair(
    raw: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, tuple[int, ...]]]:
    """Return A and B of each layer as matrices, and the kernels of those that are convolutions."""
    sides: dict[str, dict[str, Tensor]] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    for key, tensor in raw.items():
        match = _KEY.fullmatch(key)
        assert match is not None
        pair = sides.setdefault(match["path"], {})
        is_point = match["side"] == "A" or all(size == 1 for size in tensor.shape[2:])
        if not tensor.is_floating_point():
            raise AdapterError(
                f"{folder / WEIGHTS}: {key} is {tensor.dtype}; expected floating-point numbers; "
                "save the adapter again, unquantised"
            )
        if not tensor.numel():
            raise AdapterError(
                f"{folder / WEIGHTS}: {key} is empty {tuple(tensor.shape)}, as of a model whose "
                "shards were not gathered before it was saved; expected its values; save the "
                "adapter again"
            )
        if match["side"] in pair or not 2 <= tensor.dim() <= 4 or not is_point:
            raise AdapterError(
                f"{folder / WEIGHTS}: {key} stands twice or is no matrix; expected one lora_A and "
                "one lora_B a layer; save the adapter again"
            )
        if match["side"] == "A" and tensor.dim() > 2:
            kernels[match["path"]] = tuple(tensor.shape[1:])
        pair[match["side"]] = tensor.float().flatten(1)
    for path, pair in sides.items():
        if len(pair) != 2:
            raise AdapterError(f"{folder / WEIGHTS}: {path} has only one of lora_A and lora_B")
    return {path: (pair["A"], pair["B"]) for path, pair in sides.items()}, kernels


def _check_pair(folder: Path, path: str, a: Tensor, b: Tensor, rank: int) -> None:
    if a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            f"{folder}: {path} has A {tuple(a.shape)} and B {tuple(b.shape)}; expected rank {rank}"
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"{folder}: {path} holds NaN or infinity; train it again")


def stored_labels(folder: Path, *, of_images: bool = False) -> tuple[Any, tuple[str, ...]] | None:
    """Return the kind and the names of the labels of a stored classifier; None of other adapters.

    Without a record the names are those that transformers gives: LABEL_0, LABEL_1 …

    Args:
        folder: of the adapter.
        of_images: whether its base reads images: PEFT has no name for what it does then.

    Raises:
        AdapterError: a classifier of another tool without its head; or its two files disagree.
    """
    record, config = read_base_record(folder), read_peft_config(folder)
    if record is not None:
        check_one_task(folder, record, config)
        return None if record.labels is None else (record.label_kind, record.labels)
    task = config.classifies or ("classify" if of_images else None)
    if task is None:
        return None
    stored = read_adapter(folder)
    saved = {name: each for name, each in stored.saved.items() if name not in stored.biases}
    if of_images and not saved:
        return None  # the base has a head of its own
    outputs = [len(tensor) for name, tensor in saved.items() if name.endswith(".weight")]
    if not outputs:
        raise AdapterError(
            f"{folder}: a classifier without its head; expected modules_to_save with the layer "
            "that gives the labels; save the adapter again"
        )
    # The last layer of a head is its narrowest.
    names = tuple(f"LABEL_{number}" for number in range(min(outputs)))
    if task == "tag":
        return "tags", names
    return ("single" if len(names) > 1 else "regression"), names
