"""Adapter files: PEFT's exact format, and `qlora_kit.json` beside it.

`save_adapter` writes them; `load_adapter` reads any PEFT LoRA adapter, if the kit has its features.
`qlora_kit.json` records the base that the adapter was trained on, so that a merge can quantise the
base in exactly the same way. Never downloads, and never runs code that a file contains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.errors import AdapterError, ModelError, StorageError, raised_as
from qlora_kit.layers.dora import DoRALinear, row_norms
from qlora_kit.layers.merge_aware import hash_of_all, hash_of_codes, packed_sum
from qlora_kit.layers.projections import (
    Projection,
    base_prefix,
    by_lora_path,
    carriers,
    projections,
    stacks,
)
from qlora_kit.layers.quantize import Quantization
from qlora_kit.layers.trained_rows import with_rows
from qlora_kit.layers.weight import FrozenWeight, PlainWeight
from qlora_kit.lora import biases as of_biases
from qlora_kit.lora.attach import Adapter, attach
from qlora_kit.lora.block_diagonal import written_out
from qlora_kit.lora.files import (
    CONFIG,
    PICKLED_WEIGHTS,
    RECORD,
    WEIGHTS,
    BaseRecord,
    PeftConfig,
    check_adapter_folder,
    check_one_task,
    read_base_record,
    read_peft_config,
)
from qlora_kit.lora.saved import Unresized, check_saved, put_in_place
from qlora_kit.lora.spec import LoraSpec, Variant
from qlora_kit.lora.stacked import (
    folded,
    key_paths,
    layers_named,
    stack_of_keys,
    taken_for_experts,
    target_parameters,
    unfolded,
)
from qlora_kit.lora.starts.form import as_trained, doubled, with_start
from qlora_kit.lora.tensor_names import plain_names, without_training_state
from qlora_kit.lora.token_files import (
    is_of_rows,
    tied_pair,
    token_fields,
    token_tensors,
    trained_tensors,
    vocabulary_of,
)
from qlora_kit.lora.vector_bank_files import as_bank_config, bank_tensors, with_matrices
from qlora_kit.lora.vocabulary import as_files, base_layers, check_same, turned
from qlora_kit.lora.whole import check_fits_rows
from qlora_kit.model.checkpoint import PickledShards
from qlora_kit.model.load import Base, BaseSpec, resized
from qlora_kit.redact import redacted_values
from qlora_kit.storage import check_no_pointer, load_tensors, save_tensors, write_json
from qlora_kit.time_limit import TimeUp, time_limit

_PREFIX = "base_model.model."
# The keys that PEFT writes, with or without the adapter's name; some tools leave the prefix out.
_KEY = re.compile(r"(base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_MAGNITUDE_KEY = re.compile(
    r"(base_model\.model\.)?(?P<path>.+)\.lora_magnitude_vector(\.default)?(\.weight)?"
)
_SAVED_KEY = re.compile(
    r"(base_model\.model\.)?(?P<path>.+?)(\.modules_to_save(\.default)?)?\.(?P<leaf>weight|bias)"
)
_MOST_FAULTS = 5
_HEADS = ("classifier", "score")
_PATTERN_SECONDS = 5.0


# ---------------------------------------------------------------- writing


def save_adapter(adapter: Adapter, folder: Path, record: BaseRecord) -> None:
    """Write the adapter into an existing folder.

    Args:
        adapter: the adapter.
        folder: an existing folder.
        record: the record of the base that it was trained on.

    Raises:
        StorageError: it could not be written.
    """
    has_bank = adapter.spec.variant.vblora
    tensors = bank_tensors(adapter) if has_bank else {}
    for path, layer in adapter.layers.items() if not has_bank else ():
        a, b = map(Tensor.cpu, layer.filed())
        a, b = with_start((a, b), adapter.start.get(path))
        if isinstance(layer, DoRALinear):
            magnitude = layer.lora_magnitude_vector.detach().cpu().contiguous()
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = magnitude
        if (window := layer.frozen.window) is not None:
            a, b = a.view(len(a), *window.kernel), b.view(*b.shape, *(1 for _ in window.size))
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = b.contiguous()
    for path, embedding in adapter.embeddings.items():
        tensors |= {f"{_PREFIX}{name}": each for name, each in as_files(path, embedding).items()}
    for path, key in key_paths(adapter.stacks).items():
        stack = adapter.stacks[path]
        for side, matrix in zip("AB", folded(stack.lora_A, stack.lora_B), strict=True):
            tensors[f"{_PREFIX}{key}.lora_{side}.weight"] = matrix.detach().cpu().contiguous()
    biases = set(_trained_biases(adapter))
    for name, tensor in {
        **_rest_of_heads(adapter),
        **adapter.saved,
        **trained_tensors(adapter),
    }.items():
        key = of_biases.key_of(name, adapter.layers) if name in biases else name
        tensors[f"{_PREFIX}{key}"] = tensor.detach().cpu().contiguous()
    for name, add in adapter.added.items():
        path = name.removesuffix(".bias")
        tensors[f"{_PREFIX}{path}.lora_B.bias"] = add / adapter.layers[path].scaling
    save_tensors(folder / WEIGHTS, tensors)
    if adapter.merge_aware:
        layers = adapter.merge_aware.items()
        codes = hash_of_all({path: hash_of_codes(layer.merged) for path, layer in layers})
        record = record.model_copy(update={"trained_codes": codes})
    # The name of a base may be a folder or an address, and have a secret in it.
    write_json(folder / CONFIG, redacted_values(peft_config(adapter, record)))
    write_json(folder / RECORD, redacted_values(record.as_json()))


def peft_config(adapter: Adapter, record: BaseRecord) -> dict[str, Any]:
    """Return the content of `adapter_config.json`."""
    spec = doubled(adapter.spec) if adapter.start else adapter.spec
    alpha = int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha
    model = adapter.base.model
    of_mixture = stacks(model)
    aside = taken_for_experts(adapter.layers) if of_mixture else []
    parameters = target_parameters(adapter.stacks, of_mixture, aside, projections(model))
    content = {
        "peft_type": "LORA",
        "task_type": spec.task_type or None,
        "base_model_name_or_path": record.base,
        "revision": record.revision,
        "r": spec.rank,
        "lora_alpha": alpha,
        # PEFT opens no parameters with dropout, which only training has.
        "lora_dropout": 0.0 if parameters else spec.dropout,
        "use_rslora": spec.rslora,
        **({"use_dora": True} if spec.variant.dora else {}),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "target_modules": _target_modules(
            model, (adapter.layers.keys() - set(aside)) | adapter.embeddings.keys()
        ),
        **({"target_parameters": parameters} if parameters else {}),
        "bias": of_biases.mode_of(_trained_biases(adapter), adapter.layers),
        **({"lora_bias": True} if adapter.added else {}),
        "fan_in_fan_out": any(layer.frozen.is_transposed for layer in adapter.layers.values()),
        "modules_to_save": _modules_to_save(adapter) or None,
        **token_fields(adapter),
        "inference_mode": True,
    }
    return as_bank_config(content, adapter) if spec.variant.vblora else content


def _trained_biases(adapter: Adapter) -> list[str]:
    """Return the names of the biases that replace those of the base, without their weights."""
    whole = adapter.whole_parameters()
    return of_biases.trained_alone(adapter.saved.keys() - whole.keys())


def _modules_to_save(adapter: Adapter) -> list[str]:
    """Return the modules that are saved whole; of a head that has several layers, the head.

    PEFT itself saves the head of a classifier by the name of its outermost module.
    """
    prefix = base_prefix(adapter.base.model)
    biases = {*_trained_biases(adapter)}
    whole = {path for path, layer in adapter.whole.items() if not is_of_rows(layer)}
    whole.discard(tied_pair(adapter) or "")
    paths = {name.rpartition(".")[0] for name in adapter.saved if name not in biases} | whole
    in_head = {path for path in paths if prefix and not path.startswith(prefix)}
    is_classifier = adapter.base.spec.classes is not None
    heads = {path.partition(".")[0] for path in in_head} if is_classifier else in_head
    return sorted((paths - in_head) | heads)


def _rest_of_heads(adapter: Adapter) -> dict[str, Tensor]:
    """Return the parameters of a classifier's head that nothing trains, such as those of a norm.

    They are those of the base; PEFT wants a head that it replaces to be complete.
    """
    if adapter.base.spec.classes is None:
        return {}
    prefix = base_prefix(adapter.base.model)
    named = adapter.base.model.named_parameters()
    return {name: each for name, each in named if prefix and not name.startswith(prefix)}


def _target_modules(model: nn.Module, targeted: Set[str]) -> list[str]:
    """Return the last parts of the paths, or the whole paths if the parts name other layers too."""
    endings = sorted({path.rsplit(".", 1)[-1] for path in targeted})
    every = carriers(model)
    named = {path for path in every if path.rsplit(".", 1)[-1] in endings}
    # PEFT takes a number for every module of that number, whatever it is.
    is_plain = named == targeted and not any(each.isdecimal() for each in endings)
    return endings if is_plain else sorted(targeted)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it is stored on disk, checked but not attached.

    Attributes:
        folder: the folder of its files.
        spec: rank, alpha and patterns; its targets are the paths of the tensors.
        tensors: A (R, D) and B (K, R) by path, fp32; those of experts by the path of each.
        base: the base that `adapter_config.json` names.
        record: the content of `qlora_kit.json`; None for an adapter of another tool.
        saved: parameters that replace parameters of the base, by name (`modules_to_save`).
        targeted: names of layers that must have tensors: whole paths, or their last parts.
        stacked: number of experts of each stack that carries LoRA, by path.
        targeted_stacks: names of stacks that must have tensors, likewise.
        kernels: the shape of a row of A in the file, (C, k, k), of each convolution, by path.
        of_base: tensors of the base that the file has beside the LoRA on them, by their name in
            the base, which must have the same.
        rows: values (k, D), fp32, of the rows of tokens that `spec.token_rows` names, by path of
            their table.
        stays_tied: whether a head that is the embedding as well stays so (`ensure_weight_tying`).
        added: what is added to the biases of layers, (K,), by the name of the bias (`lora_bias`).
        biases: the names among `saved` that are biases alone, without their weight (`bias`).
        magnitudes: of DoRA, the length (K,) of the row of each output's weight, fp32, by path.
        start: A and B that training started from, by path, where its base is less them.
    """

    folder: Path
    spec: LoraSpec
    tensors: Mapping[str, tuple[Tensor, Tensor]]
    base: str | None
    record: BaseRecord | None
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    targeted: tuple[str, ...] = ()
    stacked: Mapping[str, int] = field(default_factory=dict)
    targeted_stacks: tuple[str, ...] = ()
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    of_base: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    stays_tied: bool = False
    added: Mapping[str, Tensor] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    start: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def changes_nothing(self) -> bool:
        """Whether it leaves every weight of its base as it is."""
        pairs = self.tensors.values()
        replaces = bool(self.saved or self.rows)
        adds = any(bool(each.any()) for each in self.added.values())
        return not (replaces or adds) and not any(bool(a.any()) and bool(b.any()) for a, b in pairs)

    @property
    def whole(self) -> dict[str, Tensor]:
        """What it has beside LoRA, by the names of trained parameters, see `Adapter.fill`."""
        return {**self.saved, **{f"{path}.rows": each for path, each in self.rows.items()}}

    def in_place_of(self, name: str, value: FrozenWeight | Tensor) -> Tensor | None:
        """Return what takes the place of a parameter of the base; None if nothing does.

        Args:
            name: the name of the parameter.
            value: the parameter; with trained rows, its other rows are returned as they are.
        """
        if name in self.saved:
            return self.saved[name]
        path = name.removesuffix(".weight")
        if path == name or path not in self.rows or self.spec.token_rows is None:
            return None
        table = value if isinstance(value, Tensor) else value.dequantize(torch.float32)
        return with_rows(table, self.spec.token_rows.ids[path], self.rows[path], torch.float32)

    def unties(self, copy: str, source: str) -> bool:
        """Whether a parameter that is tied to another one of the base differs from it then."""
        if any(each.removesuffix(".weight") in self.tensors for each in (copy, source)):
            return True
        own, others = self.saved.get(copy), self.saved.get(source)
        if own is not None and others is not None:
            return own is not others and not torch.equal(own, others)
        if own is not None or others is not None:
            return True
        of_own, of_others = (self.rows.get(each.removesuffix(".weight")) for each in (copy, source))
        if of_own is None:
            return False
        return of_others is None or not torch.equal(of_own, of_others) or not self._same_rows

    @property
    def _same_rows(self) -> bool:
        assert self.spec.token_rows is not None
        return len(set(self.spec.token_rows.ids.values())) == 1

    def with_twins(self, skeleton: PreTrainedModel) -> StoredAdapter:
        """Return the adapter with both halves of a pair that stays tied, where it has one of them.

        Args:
            skeleton: of its base.
        """
        saved: dict[str, Tensor] = dict(self.saved)
        for copy, source in (skeleton.all_tied_weights_keys or {}).items():
            if self.stays_tied and len({copy, source} & saved.keys()) == 1:
                one = saved.get(copy, saved.get(source))
                assert one is not None
                saved |= {name: one.clone() for name in {copy, source} - saved.keys()}
        return replace(self, saved=saved)

    def delta(self, path: str, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return scaling · B A of the layer at `path`, (K, D), fp32, or some rows of it."""
        a, b = self.tensors[path]
        return (b[rows] @ a).mul_(self.scaling_of(path))

    def merged(self, path: str, weight: Tensor) -> Tensor:
        """Return W (K, D) of the layer at `path` with the adapter in it, fp32, where W is."""
        gain = self.gain(path, weight)
        # Added into the delta, because only the delta's memory is sure to be unshared.
        merged = self.delta(path).to(weight.device).add_(weight)
        return merged if gain is None else merged.mul_(gain.unsqueeze(1))

    def gain(self, path: str, weight: Tensor) -> Tensor | None:
        """Return what DoRA multiplies each output of a layer by, (K,), fp32; None without DoRA.

        Args:
            path: the path of the layer.
            weight: W (K, D) of the base there.
        """
        if path not in self.magnitudes:
            return None
        a, b = (each.to(weight.device) for each in self.tensors[path])
        norms = row_norms(weight, a, b, self.scaling_of(path))
        return self.magnitudes[path].to(weight.device) / norms

    def scaling_of(self, path: str) -> float:
        """Return the scaling of the layer, or of the expert, at `path`."""
        return self.spec.scaling_of(path.rpartition(".")[0] if self.is_of_expert(path) else path)

    def is_merged_into(self, weight: object) -> bool:
        """Whether training multiplied by this weight with the delta in it, packed again."""
        is_packed = isinstance(weight, FrozenWeight) and weight.bits != 16
        return self.spec.variant.merge_aware and is_packed

    def trained_weight(
        self, path: str, weight: FrozenWeight, quantization: Quantization
    ) -> FrozenWeight:
        """Return the weight that merge-aware training multiplied by, packed.

        Args:
            path: the path of a layer; without a delta its weight is that of the base.
            weight: the weight of the base, packed as in training.
            quantization: how it is packed.
        """
        if path not in self.tensors:
            return weight
        a, b = (each.to(weight.device) for each in self.tensors[path])
        return packed_sum(weight, a, b, self.scaling_of(path), quantization)

    def is_of_expert(self, path: str) -> bool:
        """Whether a path of `tensors` is that of an expert in a stack."""
        return path.rpartition(".")[0] in self.stacked


def read_adapter(folder: Path) -> StoredAdapter:
    """Read an adapter folder, and check that the adapter is whole.

    Raises:
        AdapterError: there is no adapter; it uses a feature that the kit does not have; an A has
            no B; a rank does not fit; or a value is not finite.
    """
    check_adapter_folder(folder)
    config = read_peft_config(folder)
    record = read_base_record(folder)
    raw = without_training_state(plain_names(_read_tensors(folder), folder / WEIGHTS))
    if not raw:
        raise AdapterError(
            f"{folder / WEIGHTS}: holds no tensors, as if emptied when it was saved; expected "
            "lora_A and lora_B; save the adapter again"
        )
    raw = with_matrices(raw, config, folder)
    magnitudes = _magnitudes(raw, config, folder)
    raw = {key: tensor for key, tensor in raw.items() if not _MAGNITUDE_KEY.fullmatch(key)}
    raw = turned(raw, folder / WEIGHTS)
    lora = {key: tensor for key, tensor in raw.items() if _KEY.fullmatch(key)}
    others = {key: tensor for key, tensor in raw.items() if key not in lora}
    of_tokens = token_tensors(others, config, folder / WEIGHTS)
    modules = (*(config.modules_to_save or ()), *of_tokens.tables)
    biases = of_biases.taken_out(
        of_tokens.rest,
        replace=config.bias in ("all", "lora_only"),
        add=bool(config.lora_bias),
        is_whole=lambda path: any(_is_within(path, module) for module in modules),
        file=folder / WEIGHTS,
    )
    of_base, rest = base_layers(biases.rest)
    saved = _saved(rest, modules, folder)
    _check_all_saved(saved, config, folder)
    pairs, kernels = _pair(lora, folder)
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
        token_rows=of_tokens.token_rows,
        variant=Variant(
            dora=bool(config.use_dora), merge_aware=bool(record and record.trained_codes)
        ),
    )
    ranks = _ranks(folder, spec)
    stack_paths = set(stack_of.values())
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    stacked: dict[str, int] = {}
    for path, (a, b) in pairs.items():
        of_experts = path in stack_paths
        parts = unfolded(path, a, b, ranks[path], folder) if of_experts else {path: (a, b)}
        for each, (part_of_a, part_of_b) in parts.items():
            _check_pair(folder, each, part_of_a, part_of_b, ranks[path])
        tensors |= parts
        stacked |= {path: len(parts)} if of_experts else {}
    outputs = {path: len(b) for path, (_, b) in tensors.items()}
    added = of_biases.added(biases.of_b, outputs, spec.scaling_of, folder)
    # A bias may be both: trained, and added to.
    trained = {name: each + added.pop(name, 0) for name, each in biases.trained.items()}
    if config.use_dora:
        _check_magnitudes(magnitudes, tensors, kernels, folder)
    return as_trained(StoredAdapter(
        folder, spec, tensors, config.base_model_name_or_path, record, saved | trained,
        targeted=(*config.targeted_names, *layers_named(parameters)),
        stacked=stacked, targeted_stacks=parameters, kernels=kernels, of_base=of_base,
        rows=of_tokens.rows, stays_tied=bool(config.ensure_weight_tying),
        added=added, biases=tuple(trained), magnitudes=magnitudes,
    ))  # fmt: skip


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


def _is_named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


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


def load_adapter(base: Base, folder: Path) -> Adapter:
    """Attach a stored adapter to `base`.

    Raises:
        AdapterError: see `read_adapter` and `check_fits`.
    """
    stored = read_adapter(folder)
    if stored.saved or stored.rows:
        stored = stored.with_twins(base.spec.skeleton())
    needed, before = vocabulary_of(stored, base.spec), None
    if needed is not None:
        before = Unresized.of(base)
        base = resized(base, needed)
    check_fits(stored, base)
    adapter = attach(base, stored.spec)
    adapter.fill(stored.tensors, stored.whole, stored.magnitudes)
    sums = of_biases.sums(base.model, stored.added)
    originals = put_in_place(base.model, {**stored.saved, **sums})
    return replace(
        adapter, saved=stored.saved, originals=originals, added=stored.added, resized_from=before
    )


def check_fits(stored: StoredAdapter, base: Base) -> None:
    """Check that an adapter was made for this base.

    Raises:
        AdapterError: a layer is missing or has another shape, or the adapter was trained on other
            weights than the base has.
    """
    check_layers(stored, carriers(base.model), base.spec.source.name)
    for name, tensor in stored.of_base.items():
        own = _held(base.model, name)
        if own is not None:
            check_same(name, tensor, own, stored.folder)
    if stored.saved or base.spec.classes is not None:
        skeleton = base.spec.skeleton()
        check_saved(stored.saved, base.spec, skeleton, stored.folder, stored.biases)
    check_token_rows(stored, base.spec)
    if stored.record is not None and stored.record.digest != base.digest:
        raise AdapterError(
            f"{stored.folder}: trained on other weights than {base.spec.source.name} has; "
            f"expected {stored.record.base} with digest {stored.record.digest}"
        )
    _check_start(stored, base)


def _check_start(stored: StoredAdapter, base: Base) -> None:
    """Check that a base is less what the training of an adapter started from, and nothing else."""
    start = base.spec.start
    taken = start.pairs if start is not None and start.changes_base else {}
    same = taken.keys() == stored.start.keys() and all(
        torch.equal(one, other)
        for path, pair in taken.items()
        for one, other in zip(pair, stored.start[path], strict=True)
    )
    if not same:
        init = stored.record.start.init if stored.record and stored.record.start else "no start"
        raise AdapterError(
            f"{stored.folder}: trained from {init}, and the base was not loaded for it; expected "
            "the base that its start leaves; load it with open_base(options, adapter=folder)"
        )


def _held(model: nn.Module, name: str) -> Tensor | None:
    """Return a parameter of a base if it is held as it is stored."""
    path, _, leaf = name.rpartition(".")
    held = getattr(model.get_submodule(path), leaf)
    held = held.values if isinstance(held, PlainWeight) else held
    return held if isinstance(held, Tensor) else None


def check_token_rows(stored: StoredAdapter, spec: BaseSpec) -> None:
    """Check that the base of an adapter has the rows of tokens that it trained.

    Raises:
        AdapterError: it does not.
    """
    rows = stored.spec.token_rows
    if rows is not None and (faults := [*check_fits_rows(rows, spec.skeleton(), stored.rows)]):
        raise AdapterError(
            f"{stored.folder}: {faults[0]}; expected the base {stored.base}; name it with --model"
        )


def check_layers(stored: StoredAdapter, found: Mapping[str, Projection], base: str) -> None:
    """Check that every layer of an adapter is in a base, with the right shape.

    Args:
        stored: the adapter.
        found: the projections of the base.
        base: the name of the base in an error.

    Raises:
        AdapterError: layers do not fit; the error has a line for each of the first five.
    """
    shapes = {path: (each.out_features, *each.kernel) for path, each in found.items()}
    sites = by_lora_path(found)
    faults = [
        f"{stored.folder}: its {path} has {count} experts, and {len(sites.get(path, ()))} in "
        f"{base}; expected the base {stored.base}; name it with --model"
        for path, count in stored.stacked.items()
        if count != len(sites.get(path, ()))
    ]
    if faults:
        raise AdapterError(*faults[:_MOST_FAULTS])
    for path, (a, b) in stored.tensors.items():
        own = (len(b), *stored.kernels.get(path, (a.shape[1],)))
        if shapes.get(path) != own:
            state = f"of shape {shapes[path]}" if path in shapes else "missing"
            faults.append(
                f"{stored.folder}: its layer {path} {own} is {state} in "
                f"{base}; expected the base {stored.base}; name it with --model"
            )
    if faults:
        raise AdapterError(*faults[:_MOST_FAULTS])
    there = stored.tensors.keys() | stored.stacked.keys()
    missing = sorted(
        path
        for path, (first, *_) in sites.items()
        if path not in there
        and f"{path}.weight" not in stored.saved
        and any(
            _is_named(path, name)
            for name in (stored.targeted_stacks if first.is_expert else stored.targeted)
        )
    )
    if missing:
        raise AdapterError(
            f"{stored.folder / CONFIG}: targets {missing[0]}, and its tensors are missing "
            f"({len(missing)} such layers); expected lora_A and lora_B; save the adapter again"
        )
