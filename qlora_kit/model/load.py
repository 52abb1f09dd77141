"""Loads a base: frozen, quantised tensor by tensor, every parameter filled exactly once.

Takes a `BaseSpec` and the hardware; returns a `Base`. `frozen_tensors` is the one stream of
weights: `load_base` fills a model from it, and the export reads it again to merge. Never holds the
whole checkpoint in memory, and never upcasts more than one tensor at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.config import BaseModelOptions
from qlora_kit.errors import ModelError
from qlora_kit.events import Announce, LoadProgress, Notice, silent
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.head import quantize_head
from qlora_kit.layers.projections import input_embedding, projected_weights
from qlora_kit.layers.quantize import Quantization, read_quantized
from qlora_kit.layers.shards import Shards
from qlora_kit.layers.weight import FrozenWeight, GatheredWeight, PlainWeight
from qlora_kit.model.architecture import (
    CAUSAL_LM,
    architecture_from,
    build_skeleton,
    read_architecture,
    shortened,
    unquantized_share,
)
from qlora_kit.model.checkpoint import SomeTensors, TensorSource, open_checkpoint
from qlora_kit.model.class_head import (
    ClassHead,
    fresh_value,
    head_layers,
    may_be_fresh,
    outside_of_base,
)
from qlora_kit.model.config_file import IMAGE_CLASSIFICATION
from qlora_kit.model.convert import Assembly, assemble
from qlora_kit.model.encoder_decoder import (
    SEQ2SEQ_LM,
    check_dtype,
    has_own_head,
    is_encoder_decoder,
    is_head_tied,
    untie_head,
)
from qlora_kit.model.hardware import Hardware, dtype_name
from qlora_kit.model.head import verify_head
from qlora_kit.model.memory import memory_returned
from qlora_kit.model.names import ModelSource
from qlora_kit.model.random_weights import RandomWeights
from qlora_kit.model.start import Start
from qlora_kit.model.vocabulary import set_rows, tables, with_row_count
from qlora_kit.model.width import batch_width
from qlora_kit.private_torch import own_buffers
from qlora_kit.signals import safe_point

RANDOM_SEED = 0
# T5's table of what positions add to the scores of attention, in the dtype of the scores.
_POSITION_BIAS = "relative_attention_bias"
_NO_BALANCE = (
    "config.json asks for a load-balancing loss (output_router_logits), which is left out: routers "
    "stay frozen"
)
_STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class BaseSpec:
    """All that decides the bits of a frozen base.

    Attributes:
        source: the name of the model, and the place of its files.
        folder: the folder of its files; None for random weights of a known architecture.
        quantization: the bits and format of the weights.
        random: whether to take random weights instead of the stored ones.
        loads: the class of transformers that the base is loaded as.
        classes: meaning of the outputs of a classifier; None for other models.
        vocabulary: rows of its embedding and of its head, where they are not as many as stored,
            because tokens were added; None: as many as are stored.
        start: what A and B start from, where that is of the weights; None: it is not.
    """

    source: ModelSource
    folder: Path | None
    quantization: Quantization
    random: bool = False
    loads: str = CAUSAL_LM
    classes: ClassHead | None = None
    vocabulary: int | None = None
    start: Start | None = None

    def architecture(self) -> PreTrainedConfig:
        """Return the architecture, from the folder or from `configs/`.

        Raises:
            ModelError: there is no folder, and `configs/` does not have the architecture.
        """
        architecture = self._stored_architecture()
        if self.classes is not None:
            self.classes.configure(architecture)
        if self.vocabulary is not None:
            set_rows(architecture, self.vocabulary)
        return architecture

    def _stored_architecture(self) -> PreTrainedConfig:
        if self.folder is not None:
            return read_architecture(self.folder)
        if self.source.architecture is None:
            raise ModelError(f"{self.source.name}: its architecture is not known; give a folder")
        return architecture_from(dict(self.source.architecture))

    def skeleton(self, layers: int | None = None) -> PreTrainedModel:
        """Return the model without weights.

        Args:
            layers: number of decoder layers; None: all layers of the architecture.
        """
        architecture = self.architecture()
        whole = architecture if layers is None else shortened(architecture, layers)
        skeleton = build_skeleton(whole, self.loads)
        folder = None if self.random else self.folder
        if self.loads == SEQ2SEQ_LM and has_own_head(architecture, folder):
            untie_head(skeleton)
        return skeleton

    @cached_property
    def fresh(self) -> frozenset[str]:
        """The parameters of a classifier that its checkpoint has no values for.

        The names of its tensors are read, once and without their values.
        """
        if self.classes is None or self.random:
            return frozenset()
        skeleton = self.skeleton()
        names = open_tensors(self, skeleton, torch.device("cpu")).names
        return frozenset(_fresh(assemble(names, skeleton), skeleton))

    @cached_property
    def has_other_head(self) -> bool:
        """Whether a model of images has learnt other classes, whose head is not taken."""
        if self.loads != IMAGE_CLASSIFICATION or self.classes is None or self.random:
            return False
        stored = ClassHead.of(self._stored_architecture())
        return stored is not None and len(stored.names) != len(self.classes.names)

    def trained_whole(self) -> tuple[str, ...]:
        """Return the paths of the linear layers that a classifier trains whole; none of others."""
        return () if self.classes is None else head_layers(self.skeleton(), self.fresh)


@dataclass(frozen=True)
class Placement:
    """The place of the embedding, and the bits of the head.

    Attributes:
        embedding_on_cpu: whether to keep the input embedding in host memory, where ids are looked
            up, so that only their rows are moved; the bits are the same. None: yes, if the model
            runs on a GPU.
        head_bits: 16 keeps the head as it is stored; fewer bits quantise it, which is approximate.
            A tied embedding then keeps a 16-bit copy of its own: the model's input stays exact,
            and the embedding, no longer the head, can be in host memory.
    """

    embedding_on_cpu: bool | None = None
    head_bits: Literal[4, 8, 16] = 16

    @classmethod
    def of(cls, options: BaseModelOptions) -> Placement:
        """Return the placement that the options ask for."""
        return cls(options.embedding_on_cpu, options.head_bits)

    def resolved(self, device: torch.device, *, tied: bool) -> Placement:
        """Return the placement for a model on `device`, with nothing left open.

        Args:
            device: the device that the layers run on. On a CPU there is no other memory to use.
            tied: whether the head is the embedding. Then it must be where logits are computed.
        """
        is_head = tied and self.head_bits == 16
        moved = self.embedding_on_cpu is not False and device.type != "cpu" and not is_head
        return replace(self, embedding_on_cpu=moved)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head of a skeleton is its input embedding."""
    if is_encoder_decoder(model.config):
        return is_head_tied(model)
    return bool(model.all_tied_weights_keys)


@dataclass(frozen=True)
class Base:
    """A loaded base: frozen, ready for LoRA.

    Attributes:
        model: transformers' model; its linear layers are `FrozenLinear`.
        spec: the spec that it was loaded by.
        hardware: the device and the dtype that it computes with.
        digest: hash of all stored tensors; two bases with the same digest are the same.
        parameters: number of weights, whatever their packing; tied weights are counted once.
        unquantized_share: share of the weights, outside embeddings and head, that stay unquantised.
        placement: the place of the embedding, and the bits of the head.
        fresh: the parameters of a classifier that its checkpoint has no values for.
        shards: the processes that hold the base together; None if this process holds all of it.
    """

    model: PreTrainedModel
    spec: BaseSpec
    hardware: Hardware
    digest: str
    parameters: int
    unquantized_share: float
    placement: Placement = Placement(embedding_on_cpu=False)
    fresh: frozenset[str] = frozenset()
    shards: Shards | None = None

    @property
    def quantization(self) -> Quantization:
        """The bits and format of the weights."""
        return self.spec.quantization

    @contextlib.contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """Put the model in evaluation mode; after the block, in the mode it was in before."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def batch_width(self, tokens: int) -> int:
        """Return the width T of a batch whose longest row has `tokens` tokens."""
        return batch_width(tokens, self.model.config, self.hardware.device)


class Digest:
    """A fast hash of named tensors that does not depend on their order."""

    def __init__(self) -> None:
        self._hashes: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a stored tensor to the hash (128 bits, about 10 GB/s)."""
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._hashes[name] = xxhash.xxh3_128_hexdigest(raw.data)

    def hexdigest(self) -> str:
        """Return the hash of all tensors that were added."""
        lines = "\n".join(f"{name} {value}" for name, value in sorted(self._hashes.items()))
        return xxhash.xxh3_128_hexdigest(lines.encode())


def open_tensors(spec: BaseSpec, skeleton: PreTrainedModel, device: torch.device) -> TensorSource:
    """Open the tensors of a base, stored or random.

    Args:
        spec: the base.
        skeleton: the model without weights, which gives random tensors their shapes.
        device: the device that draws random tensors.
    """
    if spec.random:
        return RandomWeights(skeleton, RANDOM_SEED, device)
    assert spec.folder is not None
    found = open_checkpoint(spec.folder)
    if spec.has_other_head:
        return SomeTensors(found, lambda name: not outside_of_base(skeleton, name))
    return found


def stored_quantization(architecture: PreTrainedConfig) -> Quantization | None:
    """Return the quantisation of a checkpoint that bitsandbytes quantised; None of any other.

    Raises:
        ModelError: the checkpoint was quantised by another library.
    """
    stored = getattr(architecture, "quantization_config", None)
    if stored is None:
        return None
    values: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    method = values.get("quant_method")
    if method != "bitsandbytes":
        raise ModelError(f"the checkpoint is quantised by {method}; expected bitsandbytes or none")
    if values.get("load_in_8bit"):
        return Quantization(bits=8)
    return Quantization(
        bits=4,
        quant_type=values.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(values.get("bnb_4bit_use_double_quant", False)),
    )


def unpacked_modules(architecture: PreTrainedConfig) -> tuple[str, ...]:
    """Return the names of modules that a checkpoint of bitsandbytes says it left unquantised."""
    stored = getattr(architecture, "quantization_config", None) or {}
    values: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    return tuple(values.get("llm_int8_skip_modules") or ())


# ---------------------------------------------------------------- the stream


def frozen_tensors(
    spec: BaseSpec,
    skeleton: PreTrainedModel,
    device: torch.device,
    digest: Digest,
    announce: Announce = silent,
    on_host: frozenset[str] = frozenset(),
) -> Iterator[tuple[str, FrozenWeight | Tensor]]:
    """Yield every parameter of the skeleton once: linear weights frozen, all others as stored.

    Tied copies are not yielded. Each parameter has memory of its own on `device`, or in host memory
    if `on_host` names it.

    Args:
        spec: the base.
        skeleton: the model without weights.
        device: the device of the parameters, where they are quantised.
        digest: receives every stored tensor that is read.
        announce: receives the progress.
        on_host: names of the parameters that stay in host memory.

    Raises:
        ModelError: tensors are missing or surplus, and the error names both; or a tensor has
            another shape, or is not finite.
    """
    source = open_tensors(spec, skeleton, device)
    expected = dict(skeleton.state_dict())
    tied = skeleton.all_tied_weights_keys or {}
    linear = projected_weights(skeleton)
    # Weights that bitsandbytes left unquantised in a checkpoint of its own stay unquantised.
    stored = None if spec.random else stored_quantization(skeleton.config)
    quantization = Quantization(bits=16) if stored else spec.quantization
    assemblies = assemble(source.names, skeleton)
    fresh = [] if spec.classes is None else _fresh(assemblies, skeleton)
    _check_names(assemblies, expected.keys() - set(fresh), tied, spec)
    resized = tables(skeleton) if spec.vocabulary is not None else frozenset()

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        digest.add(name, tensor)
        return tensor

    for done, assembly in enumerate(assemblies, 1):
        safe_point()
        if assembly.target in tied:
            continue
        if assembly.is_quantized:
            parts = {n: t.to(device, copy=True) for n, t in assembly.parts(read).items()}
            shape = expected[assembly.target].shape
            yield assembly.target, read_quantized(parts, (shape[0], shape[1]))
        else:
            for name, tensor in assembly.tensors(read, skeleton).items():
                is_own = source.gives_own
                if name in resized and len(tensor) != len(expected[name]):
                    tensor, is_own = with_row_count(tensor, len(expected[name])), False
                _check_tensor(name, tensor, expected)
                where = torch.device("cpu") if name in on_host else device
                if spec.start is not None and spec.start.covers(name):
                    yield name, start_frozen(spec.start, name, tensor, quantization, where)
                    continue
                yield name, freeze(name, tensor, name in linear, quantization, where, is_own=is_own)
        announce(LoadProgress(done, len(assemblies)))
    for name in fresh:
        layer = skeleton.get_submodule(name.rpartition(".")[0])
        is_linear = isinstance(layer, nn.Linear | FrozenLinear)
        own = fresh_value(name, expected[name], is_linear=is_linear).to(device)
        yield name, PlainWeight(own) if name in linear else own


def _fresh(assemblies: list[Assembly], skeleton: PreTrainedModel) -> list[str]:
    """Return the parameters of a classifier's head that no tensor makes up."""
    found = {name for assembly in assemblies for name in assembly.parameters}
    missing = [name for name, _ in skeleton.named_parameters() if name not in found]
    return [name for name in missing if may_be_fresh(skeleton, name)]


def freeze(
    name: str,
    tensor: Tensor,
    is_linear: bool,
    quantization: Quantization,
    device: torch.device,
    *,
    is_own: bool = False,
) -> FrozenWeight | Tensor:
    """Bring a stored tensor to its device, and quantise it if it is the weight of a linear layer.

    The result shares no memory with a file.

    Args:
        name: name of the parameter, for an error.
        tensor: the tensor as it is stored.
        is_linear: whether it is the weight of a linear layer.
        quantization: the bits and format of linear weights.
        device: the device of the result.
        is_own: whether the tensor has memory of its own; if not, it is copied.

    Raises:
        ModelError: the weight does not fit 8 bits.
    """
    if not is_linear or quantization.bits == 16:
        own = tensor.to(device, copy=not is_own)
        return PlainWeight(own) if is_linear else own
    try:
        return quantization.freeze(tensor.to(device))
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error


def start_frozen(
    start: Start, name: str, tensor: Tensor, quantization: Quantization, device: torch.device
) -> FrozenWeight:
    """Freeze the weight of a linear layer as a start that covers it wants it; see `freeze`."""

    def packed(weight: Tensor) -> FrozenWeight:
        frozen = freeze(name, weight, True, quantization, device, is_own=True)
        assert isinstance(frozen, FrozenWeight)
        return frozen

    return start.frozen(name, tensor.to(device), packed)


def _check_names(
    assemblies: list[Assembly], expected: Set[str], tied: dict[str, str], spec: BaseSpec
) -> None:
    found = {name for a in assemblies if a.converter is None for name in a.parameters}
    made = [a.target for a in assemblies if a.converter is not None]
    surplus = sorted(found - expected)
    missing = sorted(expected - found - tied.keys()) if not made else []
    faults = [
        f"{spec.source.name}: {what} tensors in the checkpoint ({len(names)}): "
        f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}; {remedy}"
        for what, names, remedy in (
            ("missing", missing, "download it again, or name another model"),
            ("surplus", surplus, "it does not fit its config.json"),
        )
        if names
    ]
    if faults:
        raise ModelError(*faults)


def _check_tensor(name: str, tensor: Tensor, expected: dict[str, Tensor]) -> None:
    if name not in expected or tensor.shape != expected[name].shape:
        wanted = tuple(expected[name].shape) if name in expected else "no such tensor"
        raise ModelError(
            f"{name}: shape {tuple(tensor.shape)} in the checkpoint; expected {wanted}"
        )
    if tensor.dtype == torch.int64 == expected[name].dtype:
        return  # the batches that a norm has seen are counted
    if tensor.dtype not in _STORED_DTYPES:
        raise ModelError(
            f"{name}: stored as {dtype_name(tensor.dtype)}; expected float32, bfloat16 or float16; "
            "name an unquantised model"
        )
    # If a tensor holds NaN, its extremes are NaN. This check needs no temporary tensor of its size.
    low, high = tensor.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ModelError(
            f"{name}: holds NaN or infinity, which would spoil every block it is in; refuse it"
        )


# ---------------------------------------------------------------- the model


def load_base(
    spec: BaseSpec,
    hardware: Hardware,
    announce: Announce = silent,
    placement: Placement | None = None,
    shards: Shards | None = None,
) -> Base:
    """Load a base, frozen and quantised, onto its device.

    Embeddings and head stay in 16 bits: in the compute dtype if that has 16 bits, or else in the
    checkpoint's dtype. No parameter requires a gradient.

    Args:
        spec: the base to load.
        hardware: the device that it is loaded onto, and the dtype that it computes in.
        announce: receives notices and the progress.
        placement: the place of the embedding, and the bits of the head; None: as suits the device.
        shards: the processes that hold the base together. Each reads the whole checkpoint, and
            keeps its part of every weight of the layers and of the head. The layers compute once
            `parallel.sharded` has divided them.

    Raises:
        ModelError: the checkpoint does not fit its architecture, or the architecture would
            stay largely unquantised, or computes its logits in an unknown way.
    """
    check_dtype(spec.architecture(), hardware.dtype)
    model = spec.skeleton()
    share = unquantized_share(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    digest = Digest()
    asked, is_head = placement or Placement(), is_tied(model)
    placement = asked.resolved(hardware.device, tied=is_head)
    if asked.embedding_on_cpu and not placement.embedding_on_cpu:
        why = "it is the head as well" if is_head else "all of it runs on the CPU"
        announce(Notice(f"--embedding-on-cpu has no effect on this model: {why}"))
    if asks_for_balance(model.config):
        announce(Notice(_NO_BALANCE))
    on_host = names_on_host(model, placement, shards)
    tensors = frozen_tensors(spec, model, hardware.device, digest, announce, on_host)
    with memory_returned(), torch.no_grad():
        fill(model, tensors, hardware, head_quantization(spec, placement), shards)
        if model.get_output_embeddings() is not None:
            verify_head(model, hardware)
    return Base(
        model, spec, hardware, digest.hexdigest(), parameters, share, placement, spec.fresh, shards
    )


def resized(base: Base, rows: int) -> Base:
    """Give a loaded base, without an adapter, another number of rows of tokens, in place.

    Args:
        base: the base.
        rows: of its embedding and of its head.

    Returns:
        The base, which now is what its own spec with this `vocabulary` would load.

    Raises:
        ModelError: its head is held in a way that gets no more rows.
    """
    model, head = base.model, base.model.get_output_embeddings()
    embedding: Any = input_embedding(model)
    if isinstance(head, FrozenLinear) and not isinstance(head.weight, PlainWeight):
        raise ModelError(
            f"{base.spec.source.name}: has a head of {head.weight.bits} bits, or in parts, which "
            f"gets no rows for added tokens; expected BaseSpec(vocabulary={rows}) when it is loaded"
        )
    with torch.no_grad():
        _set_table(embedding, with_row_count(embedding.weight.detach(), rows))
        if isinstance(head, FrozenLinear):
            assert isinstance(head.weight, PlainWeight)
            own = embedding.weight.detach() if is_tied(model) else head.weight.values
            head.weight = PlainWeight(with_row_count(own, rows))
            head.bias = None if head.bias is None else with_row_count(head.bias, rows)
    say_rows(model, rows)
    return replace(base, spec=replace(base.spec, vocabulary=rows))


def say_rows(model: PreTrainedModel, rows: int) -> None:
    """Let a loaded model, whose tables have as many rows already, say so."""
    embedding, head = input_embedding(model), model.get_output_embeddings()
    for table, name in ((embedding, "num_embeddings"), (head, "out_features")):
        if table is not None:
            setattr(table, name, rows)
    set_rows(model.config, rows)


def _set_table(table: nn.Module, values: Tensor) -> None:
    if "weight" in own_buffers(table):
        own_buffers(table)["weight"] = values
    else:
        table.weight = nn.Parameter(values, requires_grad=False)


def asks_for_balance(architecture: PreTrainedConfig) -> bool:
    """Whether a mixture's config.json adds a loss that spreads tokens evenly over its experts."""
    return bool(getattr(architecture.get_text_config(), "output_router_logits", False))


def head_quantization(spec: BaseSpec, placement: Placement) -> Quantization | None:
    """Return the quantisation of the head, with the base's format; None if it stays as stored."""
    bits = placement.head_bits
    return None if bits == 16 else replace(spec.quantization, bits=bits)


def names_on_host(
    model: PreTrainedModel, placement: Placement, shards: Shards | None = None
) -> frozenset[str]:
    """Return the names of the parameters that a resolved placement loads into host memory.

    A head that will be quantised is one of them: its slices go to the device one by one. So is a
    head that several processes hold together, which is on the device while it is used.
    """
    modules = []
    embedding = input_embedding(model)
    if placement.embedding_on_cpu and embedding is not None:
        modules.append(embedding)
    is_needed_in_parts = placement.head_bits != 16 or (shards is not None and not is_tied(model))
    if is_needed_in_parts and model.get_output_embeddings() is not None:
        modules.append(model.get_output_embeddings())
    return frozenset(f"{_path_of(model, module)}.weight" for module in modules)


def fill(
    model: PreTrainedModel,
    tensors: Iterable[tuple[str, FrozenWeight | Tensor]],
    hardware: Hardware,
    head: Quantization | None = None,
    shards: Shards | None = None,
) -> None:
    """Turn a skeleton into a frozen model in evaluation mode, tensor by tensor.

    Args:
        model: a skeleton, changed in place.
        tensors: every parameter once, see `frozen_tensors`. Each stays on its device: an embedding
            in host memory is looked up there.
        hardware: the device that the layers run on, and the dtype that they compute in.
        head: the quantisation of the head; None keeps it as it is stored.
        shards: the processes that hold the model together; each weight is cut when it is there.

    Raises:
        ModelError: a tensor is missing.
    """
    output = model.get_output_embeddings()
    head_path = None if output is None else _path_of(model, output)
    empty = set(model.state_dict(keep_vars=True)) - set(model.all_tied_weights_keys or {})
    divided = divided_weights(model, is_head_whole=head is not None) if shards else frozenset()
    for name, value in tensors:
        _place(model, name, value, hardware)
        empty.discard(name)
        del value  # what is read next must not lie beside it
        if shards is not None and name in divided:
            _cut(model, name, shards, hardware.device)
    if empty:
        raise ModelError(f"not filled by the checkpoint: {', '.join(sorted(empty)[:5])}")
    if head_path is not None:
        _share_tied(model, head_path)
    if head_path is not None and head is not None:
        stored = model.get_submodule(head_path)
        model.set_submodule(head_path, quantize_head(stored, head, hardware.device))
    _move_buffers(model, hardware.device)
    if hardware.device.type == "cuda":
        torch.cuda.empty_cache()  # small cards need the memory that quantising has used
    model.requires_grad_(False)
    model.config.use_cache = False
    if asks_for_balance(model.config):
        model.config.get_text_config().output_router_logits = False
    model.config.dtype = hardware.dtype
    embedding = input_embedding(model)
    if embedding is not None:
        _connect_embedding(embedding, hardware)
    model.eval()


def divided_weights(model: PreTrainedModel, *, is_head_whole: bool = False) -> frozenset[str]:
    """Return the names of the weights that several processes hold together.

    They are those of the layers that are gathered one after another, and that of the head, unless
    it is the embedding as well.

    Args:
        model: a skeleton.
        is_head_whole: whether every process holds the whole head.
    """
    layers = tuple(
        f"{path}."
        for path, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    )
    found = {name for name in projected_weights(model) if name.startswith(layers)}
    head = model.get_output_embeddings()
    if head is not None and not is_head_whole and not is_tied(model):
        found.add(f"{_path_of(model, head)}.weight")
    return frozenset(found)


def _cut(model: PreTrainedModel, name: str, shards: Shards, device: torch.device) -> None:
    """Let a frozen layer keep this process's part of its weight only."""
    layer = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(layer, FrozenLinear)
    if layer is model.get_output_embeddings():
        assert isinstance(layer.weight, PlainWeight)
        layer.weight = GatheredWeight(layer.weight.values, shards, device)
    else:
        layer.weight.cut(shards)


def _place(
    model: PreTrainedModel, name: str, value: FrozenWeight | Tensor, hardware: Hardware
) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.Linear):
        module = FrozenLinear.of(module)
        model.set_submodule(path, module)
    if isinstance(value, FrozenWeight):
        module.weight = value
        return
    is_table = isinstance(module, nn.Embedding) and not path.endswith(_POSITION_BIAS)
    # A ViT casts its images to the dtype of its first convolution.
    is_linear = isinstance(module, FrozenLinear) and module.window is None
    is_large = (is_table or is_linear) and leaf == "weight"
    # The statistics of a norm keep their digits; it computes 16-bit inputs with them.
    if isinstance(module, nn.BatchNorm2d):
        hardware = replace(hardware, dtype=torch.float32)
    value = _stored_dtype(value, hardware.dtype, is_large=is_large)
    if isinstance(module, FrozenLinear):
        if leaf == "weight":
            module.weight = PlainWeight(value)
        else:
            module.bias = value
    elif leaf in own_buffers(module):
        own_buffers(module)[leaf] = value
    elif value.device != hardware.device:
        # A buffer, because transformers takes the device of the first parameter for the model's.
        delattr(module, leaf)
        module.register_buffer(leaf, value)
    else:
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def _stored_dtype(tensor: Tensor, compute: torch.dtype, *, is_large: bool) -> Tensor:
    # If the model computes in 16 bits, its weights are stored in the compute dtype: otherwise each
    # use of fp16 norms and biases would promote bf16 activations to fp32. Norms, biases and the
    # routers of experts are always stored in the compute dtype: a layer norm and a product refuse
    # weights of another dtype than their input. An embedding or a head is cast where it is used.
    is_cast = compute.itemsize == 2 or not is_large
    return tensor.to(compute) if is_cast and tensor.is_floating_point() else tensor


def _share_tied(model: PreTrainedModel, head_path: str) -> None:
    head = model.get_submodule(head_path)
    if isinstance(head, nn.Linear):
        empty = FrozenLinear.of(head)
        if head.bias is not None and not head.bias.is_meta:
            empty.bias = head.bias
        model.set_submodule(head_path, empty)
        embedding = model.get_input_embeddings().weight
        empty.weight = PlainWeight(embedding.detach())


def _move_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Move the buffers to their devices; parameters and parts are in their places already."""
    embedding: Any = input_embedding(model)
    for module in model.modules():
        if isinstance(module, GatheredWeight):
            continue
        is_embedding = embedding is not None and module is embedding
        target = embedding.weight.device if is_embedding else device
        for name, buffer in own_buffers(module).items():
            if buffer is not None and buffer.device != target:
                own_buffers(module)[name] = buffer.to(target)


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str:
    for path, module in model.named_modules():
        if module is wanted:
            return str(path)
    raise ModelError("the model has no output head; expected a causal language model")


def _connect_embedding(embedding: nn.Module, hardware: Hardware) -> None:
    """Let an embedding take ids on any device, and return rows in the device and dtype of layers.

    The embedding itself is neither moved nor upcast.
    """
    stored: Any = embedding.weight
    on_host = stored.device != hardware.device

    def take(module: nn.Module, ids: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (ids[0].to(stored.device), *ids[1:])

    def give(module: nn.Module, ids: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        if on_host and hardware.device.type == "cuda":
            rows = rows.pin_memory()  # the processor waits for copies from any other host memory
        return rows.to(hardware.device, non_blocking=True).to(hardware.dtype)

    embedding.register_forward_pre_hook(take)
    embedding.register_forward_hook(give)
