"""Label texts, or their words, with a loaded classifier, with or without an adapter.

Takes encoded texts; returns how likely each label is. Chooses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from qlora_kit.lora.several import PerRow
from qlora_kit.model.halving import batches_that_fit
from qlora_kit.tasks.classify import ClassifyObjective


@torch.no_grad()
def likelihoods(
    objective: ClassifyObjective,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 32,
    per_row: PerRow | None = None,
) -> Iterator[list[Any]]:
    """Yield for each text the probability of each label, or the number that it is given.

    Where words are tagged it is a list for each token, the padding of its batch included.

    Args:
        objective: the classifier, with the adapter it may carry.
        rows: `input_ids`, and `token_types` where there are two texts; in any order of length.
        batch_size: rows of a batch; fewer if memory runs out.
        per_row: the adapter of each row, where several are on the base.

    Raises:
        OutOfMemory: even one text does not fit.
        Stopped: a signal came.
    """
    kind = objective.classes.kind

    def found(indices: Sequence[int]) -> torch.Tensor:
        if per_row is not None:
            per_row.choose(indices)
        logits = objective.logits(objective.batch([rows[index] for index in indices])).cpu()
        if kind == "regression":
            return logits
        return logits.sigmoid() if kind == "multi" else logits.softmax(-1)

    def line_of(index: int) -> str:
        return (
            f"out of memory on one text of {len(rows[index]['input_ids'])} tokens; expected it to "
            "fit; pass a shorter text, or fewer --bits"
        )

    device = objective.base.hardware.device
    with objective.base.in_evaluation():
        for _, values in batches_that_fit(
            range(len(rows)), batch_size, found, device, line_of=line_of
        ):
            yield from values.tolist()
