"""The architecture of a model without its weights.

Takes a `config.json`; returns transformers' own model on the meta device (a 7B takes
16 MiB) and says which of its layers are linear, which belong to attention or MLP, and which
is the output head. Never downloads and never runs code that comes with a model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qlora_kit.errors import ModelError

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn", re.IGNORECASE)
# Above this share of weights that stay unquantised the memory promised is not kept.
_UNQUANTIZED_LIMIT = 0.05


def read_architecture(folder: Path) -> PreTrainedConfig:
    """Read `config.json` of a folder.

    Raises:
        ModelError: none there, not an architecture transformers has, or one that needs its
            own code.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; expected the folder of a transformers model")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{folder / 'config.json'}: {_first_line(error)}") from error


def architecture_from(numbers: Mapping[str, Any]) -> PreTrainedConfig:
    """Build the architecture from the numbers of a config.json.

    Raises:
        ModelError: its `model_type` is not one transformers has.
    """
    try:
        # transformers adds entries to the nested tables it is given.
        return AutoConfig.for_model(**copy.deepcopy(dict(numbers)))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"architecture: {_first_line(error)}") from error


def build_skeleton(architecture: PreTrainedConfig) -> PreTrainedModel:
    """Build the causal language model on the meta device, its computed buffers filled in.

    Raises:
        ModelError: the architecture is not a causal language model of transformers.
    """
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(architecture, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"{architecture.model_type}: {_first_line(error)}; expected a causal language model"
        ) from error
    _fill_computed_buffers(skeleton)
    return skeleton


def _fill_computed_buffers(skeleton: PreTrainedModel) -> None:
    """Compute what no checkpoint stores, such as the rotary frequencies."""
    stored = set(skeleton.state_dict())
    for path, module in skeleton.named_modules():
        computed = {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if _join(path, name) not in stored
        }
        for name, buffer in computed.items():
            # Rotary frequencies must stay fp32 even where the default dtype is another one.
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if computed:
            _initialize_buffers(skeleton, module)


@torch.no_grad()
def _initialize_buffers(skeleton: PreTrainedModel, module: nn.Module) -> None:
    for name in module._parameters:
        assert module._parameters[name] is None or module._parameters[name].is_meta  # type: ignore[union-attr]
    skeleton._init_weights(module)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a skeleton by path, the output head left out."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def group_of(path: str) -> str | None:
    """Return "attention" or "mlp" for the path of a linear layer, or None.

    The nearest enclosing name decides: `layers.0.self_attn.q_proj` is attention.
    """
    for name in reversed(path.split(".")[:-1]):
        if _ATTENTION.search(name):
            return "attention"
        if _MLP.search(name):
            return "mlp"
    return None


def embedding_paths(skeleton: PreTrainedModel) -> set[str]:
    """Return the paths of the input embedding and the output head."""
    wanted = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    return {
        path
        for path, module in skeleton.named_modules()
        if any(module is each for each in wanted if each is not None)
    }


def unquantized_share(skeleton: PreTrainedModel) -> float:
    """Return the share of weights outside embeddings and head that are not linear layers.

    Raises:
        ModelError: above 5 %, naming the largest: a mixture of experts keeps its experts in
            3-D tensors, GPT-2 in transposed layers, and neither would be quantised.
    """
    skipped = tuple(f"{path}." for path in embedding_paths(skeleton))
    linear = tuple(f"{path}." for path in linear_layers(skeleton))
    sizes = {
        name: parameter.numel()
        for name, parameter in skeleton.named_parameters()
        if not name.startswith(skipped)
    }
    left = {name: size for name, size in sizes.items() if not name.startswith(linear)}
    share: float = sum(left.values()) / max(1, sum(sizes.values()))
    if share > _UNQUANTIZED_LIMIT:
        largest = max(left, key=lambda name: left[name])
        raise ModelError(
            f"{skeleton.config.model_type}: {share:.0%} of the weights are not linear layers and "
            f"would stay unquantised (largest: {largest}); expected at most "
            f"{_UNQUANTIZED_LIMIT:.0%}; choose another model"
        )
    return share


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _first_line(error: BaseException) -> str:
    return str(error).strip().strip("'\"").splitlines()[0].rstrip(".")
