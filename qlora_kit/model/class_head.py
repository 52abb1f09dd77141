"""The head of a classifier: what its outputs are called, and which layers it is.

Takes the names of classes and the architecture of a base; changes the architecture so that
transformers builds the head, and says which linear layers are trained whole, because no checkpoint
of the base has them. Never trains anything.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from qlora_kit.config import LabelKind
from qlora_kit.layers.projections import base_prefix
from qlora_kit.model.config_file import classifying_task

SEQUENCE_CLASSIFICATION = "AutoModelForSequenceClassification"
TOKEN_CLASSIFICATION = "AutoModelForTokenClassification"

# The name of the output of a classifier that gives a number.
VALUE = "value"

# transformers' words for them; it has none for the tags of words.
_PROBLEM_TYPES: dict[LabelKind, str] = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}


@dataclass(frozen=True)
class ClassHead:
    """What the outputs of a classifier mean.

    Attributes:
        kind: one label a sample, several, a number, or a tag for each of its words.
        names: of the labels, in the order of the outputs; of a number it is one name.
        pad_token_id: by which decoders find the last token of a padded row.
    """

    kind: LabelKind
    names: tuple[str, ...]
    pad_token_id: int | None = None

    @classmethod
    def of(cls, architecture: PreTrainedConfig) -> ClassHead | None:
        """Return the head of a stored classifier, or None where the model is none."""
        task = classifying_task(architecture.architectures)
        if task is None:
            return None
        names = tuple(architecture.id2label[number] for number in range(architecture.num_labels))
        kinds: dict[str | None, LabelKind] = {
            theirs: ours for ours, theirs in _PROBLEM_TYPES.items()
        }
        kind = kinds.get(architecture.problem_type, "single" if len(names) > 1 else "regression")
        pad = getattr(architecture, "pad_token_id", None)
        return cls("tags" if task == "tag" else kind, names, pad)

    def configure(self, architecture: PreTrainedConfig) -> None:
        """Let transformers build this head."""
        architecture.num_labels = len(self.names)
        architecture.id2label = dict(enumerate(self.names))
        architecture.label2id = {name: number for number, name in enumerate(self.names)}
        architecture.problem_type = _PROBLEM_TYPES.get(self.kind)
        if self.pad_token_id is not None:
            architecture.pad_token_id = self.pad_token_id
            architecture.get_text_config().pad_token_id = self.pad_token_id


def is_encoder(architecture: PreTrainedConfig) -> bool:
    """Whether every token of a model sees those behind it, so that padding has to be masked."""
    return architecture.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def outside_of_base(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter or layer is a part of a head, and not of the base beneath it."""
    prefix = base_prefix(model)
    return bool(prefix) and not name.startswith(prefix)


def head_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the modules beside the base, in which a classifier's head lies."""
    named = (name for name, _ in model.named_children())
    return tuple(name for name in named if outside_of_base(model, f"{name}."))


def may_be_fresh(skeleton: PreTrainedModel, name: str) -> bool:
    """Whether a classifier may begin without a stored value for a parameter.

    Heads, and the pooler in front of them, which a masked language model has no use for.
    """
    return outside_of_base(skeleton, name) or "pooler" in name.split(".")


def head_layers(skeleton: PreTrainedModel, fresh: Collection[str]) -> tuple[str, ...]:
    """Return the paths of the linear layers of a classifier that are trained whole.

    Args:
        skeleton: of the classifier.
        fresh: names of the parameters that the checkpoint has no values for.
    """
    return tuple(
        path
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.Linear)
        and (outside_of_base(skeleton, path) or f"{path}.weight" in fresh)
    )


def fresh_value(name: str, like: torch.Tensor, *, is_linear: bool) -> torch.Tensor:
    """Return the value of a parameter that no checkpoint has, before it is trained, fp32.

    The scale of a norm is one; all else is zero. `lora.attach` draws the layers that are trained.

    Args:
        name: of the parameter.
        like: has its shape.
        is_linear: whether it belongs to a linear layer.
    """
    is_scale = name.endswith(".weight") and not is_linear and like.dim() == 1
    return torch.full(like.shape, 1.0 if is_scale else 0.0, dtype=torch.float32, device="cpu")
