"""Token classification: each word of a sentence has a tag, and tags may spell entities.

Takes what classification takes, with a target for each word instead of one for each text; returns
sums over words. The first token of a word speaks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.data.encode import IGNORED
from qlora_kit.data.tag_schemes import has_scheme
from qlora_kit.data.tagged_rows import TAGS, words_of
from qlora_kit.data.tokens import MakesRows
from qlora_kit.model.class_head import TOKEN_CLASSIFICATION, ClassHead
from qlora_kit.tasks.classify import ClassifyObjective, LabelledBatch, Measured
from qlora_kit.tasks.scores import class_figures, entity_figures
from qlora_kit.tasks.task import Figures, RowSums, Task

_ENTITY_METRICS = {
    "f1": ".4f", "precision": ".4f", "recall": ".4f", "macro_f1": ".4f", "token_accuracy": ".2%",
}  # fmt: skip
_WORD_METRICS = {"token_accuracy": ".2%", "macro_f1": ".4f"}


class TagObjective(ClassifyObjective):
    """Token classification on a loaded base."""

    def _stand_in_targets(self, rows: int, width: int) -> tuple[Tensor, tuple[int, ...]]:
        return torch.zeros(rows, width, dtype=torch.int64, device="cpu"), (width,) * rows

    def _row_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row, (B,): cross-entropy, summed over its words."""
        weights = torch.tensor(self.class_weights, device=logits.device)
        losses = F.cross_entropy(
            logits.flatten(0, 1),
            targets.flatten(),
            weight=weights if len(weights) else None,
            ignore_index=IGNORED,
            reduction="none",
        )
        return losses.view(targets.shape).sum(1)

    def row_sums(self, batch: LabelledBatch, measured: Measured) -> RowSums:
        """See `Objective`; the predicted tag of each word is kept."""
        predicted = measured.logits.argmax(-1).cpu()
        chosen = [
            tags[wanted != IGNORED] for tags, wanted in zip(predicted, batch.targets, strict=True)
        ]
        weight = torch.tensor(batch.counts, dtype=torch.float64)
        return RowSums(weight, measured.losses.double().cpu(), {}, chosen)

    def figures(self, outputs: Sequence[Tensor], rows: Sequence[Mapping[str, Any]]) -> Figures:
        """See `Objective`; the outputs are the predicted tags of each row's words, (words,)."""
        names = self.classes.names
        if has_scheme(names):
            wanted = [[row["labels"][word] for word in words_of(row["labels"])] for row in rows]
            sentences = partial(_sentences, rows=rows, names=names)
            predicted = sentences([tags.tolist() for tags in outputs])
            return entity_figures([*predicted], [*sentences(wanted)])
        targets = torch.tensor([tag for row in rows for tag in row["labels"] if tag != IGNORED])
        found = dict(class_figures(torch.cat([*outputs]), targets, names, "words"))
        return {"token_accuracy": found.pop("accuracy"), **found}


def _sentences(
    tags: Sequence[Sequence[int]], rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Iterator[list[str]]:
    """Yield the tags of each sentence by their names; the parts of a long one are joined."""
    pairs = zip(rows, tags, strict=True)
    for _, parts in groupby(pairs, key=lambda pair: pair[0]["row"]):
        yield [names[tag] for _, of_part in parts for tag in of_part]


def tag(classes: ClassHead, makes: MakesRows, class_weights: tuple[float, ...] = ()) -> Task:
    """Return the task of words with these tags.

    Args:
        classes: the tags.
        makes: turns samples into token rows with their targets.
        class_weights: weight of each tag in the loss; all the same if empty.
    """
    return Task(
        name="tag",
        loads=TOKEN_CLASSIFICATION,
        peft_type="TOKEN_CLS",
        makes=makes,
        weighs=TAGS,
        unit="nats per word",
        metrics=_ENTITY_METRICS if has_scheme(classes.names) else _WORD_METRICS,
        of_loss=lambda loss: {},
        generates=False,
        objective=partial(TagObjective, class_weights=class_weights),
        classes=classes,
        tells_units=True,
    )
