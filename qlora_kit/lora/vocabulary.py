"""LoRA on the input embedding: attaching it, its refusals, and its tensors in PEFT's files.

A table (V, D) has the pair A (R, D), B (V, R) here, like a layer that maps D to V, so that deltas,
merges and checks of shapes need not know of tables. PEFT's files hold lora_embedding_A (R, V) and
lora_embedding_B (D, R) instead: the same two matrices, turned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.layers.lora_embedding import LoRAEmbedding
from qlora_kit.lora.spec import LoraSpec, Variant

# PEFT writes them without the adapter's name, and holds them with it.
_EMBEDDING_KEY = re.compile(r"(?P<path>.+)\.lora_embedding_(?P<side>[AB])(\.default)?")
_BASE_KEY = re.compile(r"(base_model\.model\.)?(?P<path>.+)\.base_layer\.(?P<leaf>weight|bias)")
# GaLore is of other layers.
_COMPOSE = frozenset({"galore"})


def check_plain(spec: LoraSpec, paths: list[str]) -> None:
    """Check that an embedding or a head that carries LoRA carries plain LoRA.

    Args:
        spec: the specification.
        paths: the targeted parts of the vocabulary.

    Raises:
        ConfigError: a variant is asked for, which has no form for a vocabulary here.
    """
    asked = [
        each.name
        for each in fields(Variant)
        if each.name not in _COMPOSE and getattr(spec.variant, each.name) != each.default
    ]
    if paths and asked:
        raise ConfigError(
            f"--{asked[0].replace('_', '-')}: not for {paths[0]}, which carries plain LoRA only; "
            f"expected --targets without it; leave {paths[0].rpartition('.')[2]} out"
        )


def as_files(path: str, layer: LoRAEmbedding) -> dict[str, Tensor]:
    """Return the tensors of an embedding with LoRA, on the CPU, by PEFT's names."""
    return {
        f"{path}.lora_embedding_A": layer.lora_B.detach().cpu().T.contiguous(),
        f"{path}.lora_embedding_B": layer.lora_A.detach().cpu().T.contiguous(),
    }


def turned(raw: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, with those of embeddings as those of layers.

    Raises:
        AdapterError: a tensor of an embedding is no matrix.
    """
    found = {}
    for key, tensor in raw.items():
        match = _EMBEDDING_KEY.fullmatch(key)
        if match is None:
            found[key] = tensor
            continue
        if tensor.dim() != 2:
            raise AdapterError(
                f"{file}: {key} has {tensor.dim()} dimensions; expected a matrix; save the adapter "
                "again"
            )
        side = {"A": "B", "B": "A"}[match["side"]]
        found[f"{match['path']}.lora_{side}.weight"] = tensor.T.contiguous()
    return found


def base_layers(raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide the tensors of a file: the base's own, by their name in the base, and the others.

    PEFT saves the embedding and the head of the base beside their LoRA.
    """
    matches = {key: _BASE_KEY.fullmatch(key) for key in raw}
    own = {f"{m['path']}.{m['leaf']}": raw[key] for key, m in matches.items() if m is not None}
    return own, {key: raw[key] for key, match in matches.items() if match is None}


def check_same(name: str, saved: Tensor, of_base: Tensor, folder: Path) -> None:
    """Check that what an adapter has of its base is what the base has.

    Raises:
        AdapterError: it is not.
    """
    same = saved.shape == of_base.shape
    if same:
        # One of the two may have been stored in fewer bits.
        narrow = min(saved.dtype, of_base.dtype, key=lambda dtype: dtype.itemsize)
        same = torch.equal(saved.to(of_base.device, narrow), of_base.to(narrow))
    if not same:
        raise AdapterError(
            f"{folder}: its {name} {tuple(saved.shape)} is not that of the base "
            f"{tuple(of_base.shape)}, whose delta it was trained for; expected the base it was "
            "trained on; name it with --model"
        )
