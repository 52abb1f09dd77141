"""The names of an adapter's tensors, as tools write them, in the form that PEFT writes.

Takes the tensors of a file; returns them by PEFT's names. What torch and trainers wrap a model in
leaves its mark in the names, and a state dict that was saved as it stood has the adapter's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qlora_kit.errors import AdapterError

# torch.compile, FSDP and activation checkpointing wrap any module; DataParallel wraps the model.
_WRAPPERS = re.compile(
    r"^module\.(?=base_model\.)|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# A model that was wrapped by PEFT twice.
_PREFIX_AGAIN = re.compile(r"^(base_model\.model\.)+(?=base_model\.model\.)")
_ADAPTER_NAME = re.compile(r"(?<=\.lora_[AB])\.[\w-]+(?=\.(weight|bias)$)")
# Of a head that has several layers.
_INNER_OF_SAVED = re.compile(r"\.modules_to_save(\.default)?(?=\..+\.)")
# What two variants of LoRA keep for training only: noise, and the directions of a backward.
_FOR_TRAINING = re.compile(r"\.lora_(monteclora_sampler|velora_embed)\b")


def plain_names(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter by the names that PEFT gives them.

    Args:
        tensors: the tensors by the names in the file.
        file: the file, for an error.

    Raises:
        AdapterError: two tensors have one name, as those of two adapters do.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _plain_name(key)
        if name in renamed:
            raise AdapterError(
                f"{file}: {name} stands twice, as if of two adapters; expected the tensors of one; "
                "save the adapter again"
            )
        renamed[name] = tensor
    return renamed


def _plain_name(key: str) -> str:
    name = _PREFIX_AGAIN.sub("", _WRAPPERS.sub("", key))
    return _INNER_OF_SAVED.sub("", _ADAPTER_NAME.sub("", name))


def without_training_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what MonteCLoRA and VeLoRA only train with; they compute as plain LoRA."""
    return {name: each for name, each in tensors.items() if not _FOR_TRAINING.search(name)}
