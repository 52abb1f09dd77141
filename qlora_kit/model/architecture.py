"""The architecture of a model, without its weights.

Takes a `config.json`; returns transformers' own model on the meta device (a 7B takes 16 MiB).
Never downloads anything, and never runs code that comes with a model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from qlora_kit.errors import ModelError
from qlora_kit.layers.batch_norm import FrozenBatchNorm2d
from qlora_kit.layers.experts import Stack, run_experts
from qlora_kit.layers.frozen import TransposedLinear
from qlora_kit.layers.projections import projections, vocabulary_paths
from qlora_kit.layers.windows import WindowedLinear
from qlora_kit.model.class_head import (
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    is_encoder,
    outside_of_base,
)
from qlora_kit.model.config_file import (
    IMAGE_CLASSIFICATION,
    SPECIAL_IDS,
    as_list,
    check_end_tokens,
    ids_beyond,
    read_json_object,
    read_model_config,
)
from qlora_kit.model.encoder_decoder import (
    SEQ2SEQ_LM,
    check_family,
    is_encoder_decoder,
    set_layers,
    share_embedding,
)
from qlora_kit.model.faults import model_errors
from qlora_kit.model.images import has_stages, reads_images
from qlora_kit.private_torch import own_buffers
from qlora_kit.private_transformers import drop_kernels, initialize, run_experts_by
from qlora_kit.time_limit import TimeUp, time_limit

# The class that a base is loaded as, unless its task names another.
CAUSAL_LM = "AutoModelForCausalLM"
# Where a larger share of the weights stays unquantised, the promised memory cannot be kept.
_UNQUANTIZED_LIMIT = 0.05
_EXPECTED = {
    CAUSAL_LM: "a causal language model of transformers",
    SEQUENCE_CLASSIFICATION: "a model that transformers has a classifier of",
    TOKEN_CLASSIFICATION: "a model that transformers has a tagger of words of",
    IMAGE_CLASSIFICATION: "a model of images that transformers has a classifier of",
}
# How transformers calls `run_experts`.
_ONE_BY_ONE = "qlora_kit"
# To build 1,024 layers, the most that are allowed, takes 1 s.
_BUILD_SECONDS = 60.0
# Rotary frequencies take 256 bytes; a table of positions is as long as config.json says.
_MOST_BUFFER_BYTES = 1 << 30
# Any other kernel is a package, or a repository of the hub that would be downloaded and run.
_OWN_KERNELS = (None, "eager", "sdpa", "batched_mm", "grouped_mm")


def read_architecture(folder: Path) -> PreTrainedConfig:
    """Read the `config.json` of a folder.

    Raises:
        ModelError: there is none, transformers does not have the architecture, or it needs code
            of its own.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json; expected the folder of a transformers model")
    content = read_model_config(path)
    if content.get("auto_map") and content.get("model_type") not in list(CONFIG_MAPPING):
        raise ModelError(
            f"{path}: the model needs code of its own, which the kit never runs; expected an "
            "architecture that transformers has; choose another model"
        )
    with model_errors(path, "the numbers of a transformers model; restore it"):
        architecture = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        _drop_foreign_kernels(architecture)
    return _without_ids_beyond(architecture)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Read the `generation_config.json` of a folder; return None where there is none.

    Raises:
        ModelError: the file does not hold the settings of a transformers model.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    check_end_tokens(path, read_json_object(path))
    with model_errors(path, "the settings of a transformers model; restore it"):
        return GenerationConfig.from_pretrained(folder, local_files_only=True)


def _without_ids_beyond(architecture: PreTrainedConfig) -> PreTrainedConfig:
    """Forget special tokens that the vocabulary lacks: an embedding cannot be built with them.

    No result depends on them: padding is masked by position, and the tokenizer says which tokens
    begin and end a row.
    """
    text = architecture.get_text_config()
    tokens = getattr(text, "vocab_size", None) or 0
    for config in (architecture, text) if tokens else ():
        ids = {name: getattr(config, name, None) for name in SPECIAL_IDS}
        for name, beyond in ids_beyond(ids, tokens).items():
            setattr(config, name, [n for n in as_list(ids[name]) if n not in beyond] or None)
    return architecture


def _drop_foreign_kernels(architecture: PreTrainedConfig) -> None:
    """Forget the kernels that the file asks for: transformers would download and run them."""
    parts = [getattr(architecture, name, None) for name in architecture.sub_configs]
    for config in (architecture, *parts):
        if config is not None:
            drop_kernels(config, _OWN_KERNELS)


def architecture_from(numbers: Mapping[str, Any]) -> PreTrainedConfig:
    """Build the architecture from the numbers of a config.json.

    Raises:
        ModelError: transformers does not have its `model_type`.
    """
    with model_errors("architecture", "the numbers of a transformers model"):
        # transformers adds entries to the nested tables it is given.
        return _without_ids_beyond(AutoConfig.for_model(**copy.deepcopy(dict(numbers))))


def build_skeleton(architecture: PreTrainedConfig, loads: str = CAUSAL_LM) -> PreTrainedModel:
    """Build a model on the meta device, with its computed buffers filled in.

    Args:
        architecture: the architecture of the model.
        loads: the class of transformers that the model is built as.

    Raises:
        ModelError: the architecture is no causal language model of transformers, or takes longer
            than `_BUILD_SECONDS` to build.
    """
    name = architecture.model_type
    check_kind(architecture, loads)
    try:
        with (
            time_limit(_BUILD_SECONDS),
            model_errors(name, _EXPECTED.get(loads, "a model of transformers")),
        ):
            with torch.device("meta"):
                kind: Any = getattr(transformers, loads)
                skeleton: PreTrainedModel = kind.from_config(architecture, trust_remote_code=False)
            if loads == SEQ2SEQ_LM:
                share_embedding(skeleton)
            _fill_computed_buffers(skeleton)
            _turn_transposed(skeleton)
            if loads == IMAGE_CLASSIFICATION:
                _lay_convolutions_flat(skeleton)
            _take_stacks_apart(skeleton)
            _let_padding_be(skeleton)
    except TimeUp as error:
        raise ModelError(
            f"{name}: takes longer than {_BUILD_SECONDS:.0f} s to build without weights; expected "
            "a few seconds; check the numbers of its config.json"
        ) from error
    return skeleton


def check_kind(architecture: PreTrainedConfig, loads: str) -> None:
    """Check that an architecture is of the kind that it is loaded as.

    Raises:
        ModelError: it is of another kind; the error names the task that it is for.
    """
    name, reads_apart = architecture.model_type, is_encoder_decoder(architecture)
    if reads_images(architecture) != (loads == IMAGE_CLASSIFICATION):
        does, other = ("images", "text") if reads_images(architecture) else ("text", "images")
        raise ModelError(
            f"{name}: a model that reads {does}, asked to read {other}; expected --task classify "
            "with images for a ViT, ConvNeXt or ResNet, and text for another; pass the right "
            "--data, or choose another model"
        )
    if loads == CAUSAL_LM and is_encoder(architecture) and not reads_apart:
        raise ModelError(
            f"{name}: reads whole texts and writes none; expected a causal language model; train a "
            "classifier of it with `train --task classify` or `train --task tag`, or choose "
            "another model"
        )
    if loads == SEQ2SEQ_LM and not reads_apart:
        raise ModelError(
            f"{name}: has no encoder beside its decoder; expected an encoder-decoder such as T5; "
            "leave --task seq2seq out, or choose another model"
        )
    if reads_apart and loads != SEQ2SEQ_LM:
        raise ModelError(
            f"{name}: an encoder-decoder, which reads one text and writes another; expected "
            "another kind of model for this task; pass --task seq2seq, or choose another model"
        )
    if reads_apart:
        check_family(architecture)


def _turn_transposed(skeleton: PreTrainedModel) -> None:
    """Put linear layers in the place of transposed ones: their shape is the only one there is.

    A checkpoint's weights are turned as they are read (`model.convert`) and, where they are not
    packed, turned back as they are written (`export.merge`).
    """
    for path, module in list(skeleton.named_modules()):
        if isinstance(module, Conv1D):
            linear = TransposedLinear(module.nx, module.nf, device="meta")
            skeleton.set_submodule(path, linear.to(module.weight.dtype))


def _lay_convolutions_flat(skeleton: PreTrainedModel) -> None:
    """Put flat layers in the place of convolutions, and frozen norms in that of batch norms.

    The kernels of a checkpoint are laid flat as they are read (`model.convert`). Only models of
    images get here: others reach for the kernels of their convolutions themselves.
    """
    for path, module in list(skeleton.named_modules()):
        if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode == "zeros":
            skeleton.set_submodule(path, WindowedLinear.like(module))
        elif isinstance(module, nn.BatchNorm2d):
            skeleton.set_submodule(path, FrozenBatchNorm2d.like(module))


def _take_stacks_apart(skeleton: PreTrainedModel) -> None:
    """Put linear layers in the place of stacked weights, and let each expert run its own."""
    found = [each for each in skeleton.modules() if hasattr(each, "has_gate")]
    for experts in found:
        names = ("gate_up_proj", "down_proj") if experts.has_gate else ("up_proj", "down_proj")
        for name in names:
            weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
            stack = Stack.like(weight, bias, is_transposed=bool(experts.is_transposed))
            delattr(experts, name)
            if bias is not None:
                delattr(experts, f"{name}_bias")
            experts.add_module(name, stack)
    if found:
        run_experts_by(skeleton, _ONE_BY_ONE, run_experts)


def _let_padding_be(skeleton: PreTrainedModel) -> None:
    """Keep a model from looking for padding, and from advising a mask.

    Rows are masked where a token would see padding, and only there. To look at the ids at every
    forward would make a GPU wait.
    """
    for module in skeleton.modules():
        if isinstance(module, PreTrainedModel):
            setattr(module, "warn_if_padding_and_no_attention_mask", _look_at_nothing)  # noqa: B010


def _look_at_nothing(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Stand in for a check that is not wanted."""


def shortened(architecture: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the same architecture with `layers` decoder layers."""
    short = copy.deepcopy(architecture)
    if has_stages(architecture):
        return short  # its stages are of several sizes: none stands for the others
    text = short.get_text_config()
    text.num_hidden_layers = layers
    set_layers(short, layers)
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = (kinds * layers)[:layers]
    return short


def _fill_computed_buffers(skeleton: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint stores, such as the rotary frequencies."""
    stored = set(skeleton.state_dict())
    for path, module in skeleton.named_modules():
        computed = {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if _join(path, name) not in stored
        }
        for name, buffer in computed.items():
            if buffer.nbytes > _MOST_BUFFER_BYTES:
                raise ModelError(
                    f"{path}.{name}: would take {buffer.nbytes / 1e9:.1f} GB that no checkpoint "
                    "stores; expected a small table; check the numbers of config.json"
                )
            # Rotary frequencies must stay fp32, even where the default dtype is another.
            own_buffers(module)[name] = torch.empty_like(buffer, device="cpu")
        if computed:
            _initialize_buffers(skeleton, module)


@torch.no_grad()
def _initialize_buffers(skeleton: PreTrainedModel, module: nn.Module) -> None:
    assert all(parameter.is_meta for parameter in module.parameters(recurse=False))
    initialize(skeleton, module)


def unquantized_share(skeleton: PreTrainedModel) -> float:
    """Return the share of weights, outside embeddings and head, that are not in linear layers.

    The convolutions of a model of images are never quantised, whatever their share.

    Raises:
        ModelError: the share is above 5 %; the error names the largest such weight. Some mixtures
            of experts keep their experts in 3-D tensors that would not be quantised.
    """
    tables = {path for path, each in skeleton.named_modules() if isinstance(each, nn.Embedding)}
    skipped = tuple(f"{path}." for path in tables | vocabulary_paths(skeleton))
    found = projections(skeleton).items()
    linear = tuple(f"{path}." for path, each in found if each.window is None)
    sizes = {
        name: parameter.numel()
        for name, parameter in skeleton.named_parameters()
        if not name.startswith(skipped) and not outside_of_base(skeleton, name)
    }
    left = {name: size for name, size in sizes.items() if not name.startswith(linear)}
    share: float = sum(left.values()) / max(1, sum(sizes.values()))
    if share > _UNQUANTIZED_LIMIT and not reads_images(skeleton.config):
        largest = max(left, key=lambda name: left[name])
        raise ModelError(
            f"{skeleton.config.model_type}: {share:.0%} of the weights are not linear layers and "
            f"would stay unquantised (largest: {largest}); expected at most "
            f"{_UNQUANTIZED_LIMIT:.0%}; choose another model"
        )
    return share


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
