"""PEFT's fields that the kit does not honour: when they are unset, and why they are refused.

Takes values of `adapter_config.json`; returns what to say of them. The fields that are honoured are
those of `files.PeftConfig`. Imports no torch.

Source of the formats: PEFT 0.21, `peft.tuners.lora.config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_UNSET_WORDS = ("", "none", "null")
# Starts that leave the base as it is: A and B mean the same as in plain LoRA.
_PLAIN_STARTS = ("true", "false", "gaussian", "orthogonal", "eva", "mica")
# Starts that take W − scaling · B A for the base, by the A and B that they start from.
_STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga")

_MERGE_THERE = "merge it in PEFT (merge_and_unload), and use the merged model"
_CONVERT = (
    "; expected plain LoRA; convert it in PEFT (save_pretrained with "
    "path_initial_model_for_weight_conversion)"
)
_DEFAULT = ", which the kit does not have; expected it unset"
_REASONS: Mapping[str, str] = {
    "layer_replication": (
        ": its model repeats blocks of the base, each with LoRA of its own; expected LoRA on the "
        "base's own blocks; save the repeated model, and train on that"
    ),
    "alora_invocation_tokens": (
        ": it is to change only the tokens that follow its invocation; expected LoRA that changes "
        "all tokens; use it in PEFT"
    ),
    "arrow_config": (
        ": its router chooses among other adapters for each token; expected one adapter; name one "
        "of those"
    ),
    "kasa_config": (
        ": it cuts the smallest singular values off the base's weights; expected LoRA on the base "
        f"as it is; {_MERGE_THERE}"
    ),
    "use_qalora": (
        ": its A multiplies means of groups of inputs, for a base of GPTQ; expected LoRA on the "
        "inputs themselves; use it in PEFT"
    ),
    "enable_lora": (
        ": it has LoRA on some thirds of a layer's outputs, as the first PEFT had; expected LoRA "
        "on whole layers; train it again"
    ),
    "megatron_config": (
        ": its layers are Megatron's, divided among processes; expected layers of transformers; "
        "use it in Megatron"
    ),
}


def is_unset(value: Any) -> bool:
    """Whether a value of a field means that it is not used, in whatever spelling."""
    if isinstance(value, str):
        return value.strip().lower() in _UNSET_WORDS
    return value is None or value is False or (isinstance(value, list | dict) and not value)


def is_plain_start(value: Any) -> bool:
    """Whether a value of `init_lora_weights` leaves the base as it is."""
    return is_unset(value) or str(value).lower() in _PLAIN_STARTS


def why_refused(name: str, value: Any) -> str:
    """Return the rest of an error that begins with "<name> is set", or "… is set to <value>"."""
    if name != "init_lora_weights":
        return _REASONS.get(name, _DEFAULT)
    start = str(value).lower()
    if start.startswith(_STARTS_THAT_CHANGE_THE_BASE):
        return f": its base had its start B A subtracted before training{_CONVERT}"
    if start == "loftq":
        return (
            ": its base is what LoftQ made of the weights; expected LoRA on the weights themselves;"
            f" {_MERGE_THERE}"
        )
    return ", a start that the kit does not know; expected one that leaves the base as it is"
