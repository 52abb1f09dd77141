"""Says whether the samples of a run can be packed.

Packing changes nothing but speed, so it is refused wherever the samples of a row would depend on
each other.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.model.segments import agrees_packed, why_not_packed
from qlora_kit.tasks.task import Task


def check_packing(task: Task, model: PreTrainedModel, tokens: int) -> None:
    """Refuse packing where the samples would not be as if alone.

    Args:
        task: the task of the run.
        model: loaded, or a skeleton without values.
        tokens: tokens of the longest sample.

    Raises:
        ConfigError: the task or the model computes a row as one sample.
    """
    own = f"--task {task.name} computes a row as one sample"
    reason = why_not_packed(model, tokens) if task.packs else own
    if reason is not None:
        raise ConfigError(
            f"--packing: {reason}; expected a task and a model whose samples do not depend on "
            "each other in one row; leave it out"
        )


def try_packing(model: PreTrainedModel) -> None:
    """Compute two short samples packed and alone, before the first step of a packed run.

    Raises:
        ModelError: they differ.
    """
    if not agrees_packed(model):
        raise ModelError(
            "--packing: two samples in one row are not computed as if alone by this model; "
            "expected the same hidden states; leave --packing out"
        )
