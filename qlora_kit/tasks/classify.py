"""Classification: a text, or a pair of texts, has one label, several, or a number.

Takes a loaded classifier and batches of texts with their targets; returns sums over rows. The
model's own forward makes the logits, so that what is exported computes the same in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.data.batch import Indices, PaddedRows
from qlora_kit.data.encode import IGNORED
from qlora_kit.data.labelled_rows import LABELS
from qlora_kit.data.tagged_rows import words_of
from qlora_kit.data.tokens import MakesRows
from qlora_kit.layers.loss import CHUNK_TOKENS
from qlora_kit.model.class_head import SEQUENCE_CLASSIFICATION, ClassHead, is_encoder
from qlora_kit.model.load import Base
from qlora_kit.tasks.scores import class_figures, number_figures
from qlora_kit.tasks.task import Figures, RowSums, Task

_CLASS_METRICS = {"accuracy": ".2%", "macro_f1": ".4f"}
_NUMBER_METRICS = {"rmse": ".4f", "mae": ".4f", "pearson": ".4f", "spearman": ".4f"}

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""Takes logits (B, K) in fp32 and targets, see `LabelledBatch`; returns a sum over the rows."""


@dataclass(frozen=True)
class LabelledBatch(PaddedRows):
    """One micro-batch of texts, padded on the right, with the target of each."""

    input_ids: Tensor
    """(B, T) int64"""
    lengths: tuple[int, ...]
    """(B,) tokens of each row, without padding"""
    rows: Indices
    """index of the source sample of each row"""
    targets: Tensor
    """(B,) int64 classes; (B, K) fp32 of ones and zeros for several labels; (B,) fp32 numbers;
    (B, T) int64 tags of words, `IGNORED` at other tokens"""
    counts: tuple[int, ...]
    """(B,) number of losses of each row: one, or one for each word"""
    mask: Tensor | None = None
    """(B, T) int64, 1 for a token; None where no token sees padding"""
    token_types: Tensor | None = None
    """(B, T) int64, which of two texts a token is of; None where the model does not ask"""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of a classifier's forward."""
        named = {"attention_mask": self.mask, "token_type_ids": self.token_types}
        given = {name: tensor for name, tensor in named.items() if tensor is not None}
        return {"input_ids": self.input_ids, **given}

    @property
    def units(self) -> int:
        """Number of losses."""
        return sum(self.counts)

    @property
    def weight(self) -> float:
        """The same: all of them count alike."""
        return self.units

    def to(self, device: torch.device | str) -> LabelledBatch:
        """Return the batch on another device.

        Its ids go along: some encoders make positions and masks where these are.
        """
        tensors = ("input_ids", "targets", "mask", "token_types")
        given = {name: getattr(self, name) for name in tensors}
        moved = {
            name: tensor.to(device, non_blocking=True)
            for name, tensor in given.items()
            if tensor is not None
        }
        return replace(self, **moved)


class Measured(NamedTuple):
    """Logits (B, K), or (B, T, K) of words, and the loss of each row (B,), fp32."""

    logits: Tensor
    losses: Tensor


@dataclass(frozen=True)
class ClassifyObjective:
    """Classification on a loaded base.

    Attributes:
        base: a classifier, with or without an adapter.
        pad_token_id: fills short rows of a batch; no token of an encoder sees it.
        chunk_tokens: not used: there is no matrix of logits.
        loss: custom loss of logits and targets; that of `kind` if None.
        class_weights: weight of each label in the loss; all the same if empty.
    """

    base: Base
    pad_token_id: int = 0
    chunk_tokens: int = CHUNK_TOKENS
    loss: RowLoss | None = None
    class_weights: tuple[float, ...] = field(default=())

    @property
    def classes(self) -> ClassHead:
        """What the outputs mean."""
        assert self.base.spec.classes is not None, "loaded as a classifier"
        return self.base.spec.classes

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> LabelledBatch:
        """See `Objective`; padded to a width that suits the device."""
        masks = is_encoder(self.base.model.config)
        width = self.base.batch_width
        return collate_labelled(rows, self.classes, self.pad_token_id, masks=masks, width=width)

    def stand_in(
        self, rows: int, tokens: int, weight: int | None = None, answer_tokens: int | None = None
    ) -> LabelledBatch:
        """See `Objective`: as padded as a batch can be, which takes the most."""
        width = self.base.batch_width(tokens)
        ids = torch.zeros(rows, width, dtype=torch.int64, device="cpu")
        targets, counts = self._stand_in_targets(rows, width)
        is_padded = rows > 1 and is_encoder(self.base.model.config)
        mask = torch.ones(rows, width, dtype=torch.int64, device="cpu") if is_padded else None
        return LabelledBatch(ids, (tokens,) * rows, tuple(range(rows)), targets, counts, mask)

    def _stand_in_targets(self, rows: int, width: int) -> tuple[Tensor, tuple[int, ...]]:
        """Return targets that mean nothing, and the number of losses of each row."""
        targets = torch.zeros(rows, dtype=torch.int64, device="cpu")
        if self.classes.kind == "multi":
            targets = torch.zeros(rows, len(self.classes.names), device="cpu")
        elif self.classes.kind == "regression":
            targets = torch.zeros(rows, device="cpu")
        return targets, (1,) * rows

    def logits(self, batch: LabelledBatch) -> Tensor:
        """Return the logits of a batch, (B, K), or (B, T, K) of words, fp32.

        Args:
            batch: in host memory.
        """
        return self._logits(batch.to(self.base.hardware.device))

    def _logits(self, batch: LabelledBatch) -> Tensor:
        logits: Tensor = self.base.model(**batch.inputs).logits
        return logits.float()

    def loss_sum(self, batch: LabelledBatch) -> Tensor:
        """See `Objective`: summed over rows."""
        where = batch.to(self.base.hardware.device)
        logits = self._logits(where)
        if self.loss is not None:
            return self.loss(logits, where.targets)
        return self._row_losses(logits, where.targets).sum()

    def rows_of(self, batch: LabelledBatch) -> Tensor:
        """See `TellsUnits`: a row, whatever its number of words, has one loss."""
        return torch.arange(len(batch.rows), device="cpu")

    def weights_of(self, batch: LabelledBatch) -> Tensor:
        """See `TellsUnits`."""
        return torch.tensor(batch.counts, dtype=torch.float64, device="cpu")

    def loss_by_unit(self, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """See `TellsUnits`."""
        where = batch.to(self.base.hardware.device)
        losses = self._row_losses(self._logits(where), where.targets)
        return losses.sum(), losses.detach()

    def _row_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row, (B,): cross-entropy, the labels' mean of it, or a square."""
        weights = torch.tensor(self.class_weights, device=logits.device)
        if self.classes.kind == "regression":
            return F.mse_loss(logits.squeeze(1), targets, reduction="none")
        if self.classes.kind == "multi":
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            return (losses * weights if len(weights) else losses).mean(1)
        losses = F.cross_entropy(logits, targets, reduction="none")
        return losses * weights[targets] if len(weights) else losses

    @torch.no_grad()
    def measured(self, batch: LabelledBatch) -> Measured:
        """See `Objective`."""
        where = batch.to(self.base.hardware.device)
        logits = self._logits(where)
        return Measured(logits, self._row_losses(logits, where.targets))

    def row_sums(self, batch: LabelledBatch, measured: Measured) -> RowSums:
        """See `Objective`; the logits are kept, as no sum over rows gives a macro-F1."""
        ones = torch.ones(batch.units, dtype=torch.float64)
        return RowSums(ones, measured.losses.double().cpu(), {}, measured.logits.cpu().unbind())

    def figures(self, outputs: Sequence[Tensor], rows: Sequence[Mapping[str, Any]]) -> Figures:
        """See `Objective`; the outputs are the logits of each row, (K,)."""
        logits = torch.stack([*outputs])
        targets = targets_of([row["labels"] for row in rows], self.classes)
        if self.classes.kind == "regression":
            return number_figures(logits.squeeze(1), targets)
        if self.classes.kind == "multi":
            return class_figures((logits > 0).long(), targets.long(), self.classes.names)
        return class_figures(logits.argmax(1), targets, self.classes.names)


def collate_labelled(
    rows: Sequence[Mapping[str, Any]],
    classes: ClassHead,
    pad_token_id: int,
    *,
    masks: bool,
    width: Callable[[int], int] = lambda tokens: tokens,
) -> LabelledBatch:
    """Pad rows on the right to the longest of them, or further.

    Args:
        rows: with `input_ids`, `labels` (see `targets_of`; of words, a tag or `IGNORED` for each
            token), `row`, and `token_types` where a model
            tells two texts apart.
        classes: meaning of the labels.
        pad_token_id: fills `input_ids`.
        masks: whether tokens would see the padding, so that it has to be masked.
        width: returns T for the tokens of the longest row.
    """
    lengths = tuple(len(row["input_ids"]) for row in rows)
    wide = width(max(lengths))
    ids = _padded([row["input_ids"] for row in rows], wide, pad_token_id)
    assert ids is not None
    mask = None
    if masks and min(lengths) < wide:
        mask = (torch.arange(wide) < torch.tensor(lengths).unsqueeze(1)).long()
    labels = [row["labels"] for row in rows]
    if classes.kind == "tags":
        targets, counts = _padded(labels, wide, IGNORED), tuple(len(words_of(of)) for of in labels)
        assert targets is not None
    else:
        targets, counts = targets_of(labels, classes), (1,) * len(rows)
    types = _padded([row.get("token_types") for row in rows], wide, 0)
    samples = tuple(int(row["row"]) for row in rows)
    return LabelledBatch(ids, lengths, samples, targets, counts, mask, types)


def targets_of(labels: Sequence[Sequence[float]], classes: ClassHead) -> Tensor:
    """Return the targets of rows, see `LabelledBatch`.

    Args:
        labels: of each row: its class, its classes, or its number, in a list.
        classes: meaning of the labels.
    """
    if classes.kind == "single":
        return torch.tensor([int(label) for (label,) in labels])
    if classes.kind == "regression":
        return torch.tensor([float(number) for (number,) in labels])
    targets = torch.zeros(len(labels), len(classes.names))
    for row, chosen in enumerate(labels):
        targets[row, [int(label) for label in chosen]] = 1.0
    return targets


def classify(classes: ClassHead, makes: MakesRows, class_weights: tuple[float, ...] = ()) -> Task:
    """Return the task of texts with these labels.

    Args:
        classes: the labels.
        makes: turns samples into token rows with their targets.
        class_weights: weight of each label in the loss; all the same if empty.
    """
    is_number = classes.kind == "regression"
    return Task(
        name="classify",
        loads=SEQUENCE_CLASSIFICATION,
        peft_type="SEQ_CLS",
        makes=makes,
        weighs=LABELS,
        unit="squared" if is_number else "nats per row",
        metrics=_NUMBER_METRICS if is_number else _CLASS_METRICS,
        of_loss=lambda loss: {},
        generates=False,
        objective=partial(ClassifyObjective, class_weights=class_weights),
        classes=classes,
        tells_units=True,
    )


def _padded(rows: Sequence[Any], width: int, fill: int) -> Tensor | None:
    """Return rows of numbers as one tensor (B, T), padded on the right; None where all are."""
    if all(row is None for row in rows):
        return None
    padded = torch.full((len(rows), width), fill, dtype=torch.int64)
    for number, row in enumerate(rows):
        if row is not None:
            padded[number, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return padded
