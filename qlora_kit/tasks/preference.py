"""Preference: of two answers to a prompt one is to become likelier than the other.

Takes a loaded causal model and batches of pairs; returns sums over pairs. With log π the
log-probability of an answer y, c the chosen and r the rejected one, and ρ = log π(y) − log π_ref(y)
by the reference that the rows carry:

    dpo     −log σ(β (ρ_c − ρ_r))
    ipo     (ρ_c / |y_c| − ρ_r / |y_r| − 1 / 2β)²
    orpo    −log p̄ of the prompt and the chosen answer − β log σ(log odds(y_c) − log odds(y_r)),
            odds(y) = π̄ / (1 − π̄), where π̄ is the geometric mean of the probabilities of y's tokens

Sources: Direct Preference Optimization (arXiv:2305.18290), section 4, equation 7. IPO, A General
Theoretical Paradigm (arXiv:2310.12036), section 5, equation 17, with the mean over the tokens of an
answer that its authors used, as in trl. ORPO (arXiv:2403.07691), section 4, equations 4 to 7.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.config import PreferenceLoss
from qlora_kit.data.batch import Batch, Indices, PaddedRows, collate
from qlora_kit.data.encode import IGNORED
from qlora_kit.data.preference_rows import PAIRS, PreferenceRows, sides_of
from qlora_kit.errors import ConfigError
from qlora_kit.layers.head import Head
from qlora_kit.layers.loss import CHUNK_TOKENS, token_logprobs
from qlora_kit.lora.spec import TASK_TYPE
from qlora_kit.model.architecture import CAUSAL_LM
from qlora_kit.model.head import head_of
from qlora_kit.model.load import Base
from qlora_kit.tasks.causal import supervised_states
from qlora_kit.tasks.task import Figures, RowSums, Task

REFERENCE = "reference"
"""name of the column with log π_ref of the chosen and of the rejected answer"""
METRICS: Mapping[str, str] = {
    "accuracy": ".2%", "margin": ".4f", "chosen_reward": ".4f", "rejected_reward": ".4f",
}  # fmt: skip
"""share of the pairs whose chosen answer has the larger reward, and the means of the difference and
of both rewards; a reward is β ρ, and for ORPO, which has no reference, β times the mean
log-probability of an answer's tokens"""
LOGPROBS = "logprobs"
_LOG_HALF = math.log(0.5)


@dataclass(frozen=True)
class PairBatch(PaddedRows):
    """One micro-batch of B pairs: 2B sequences, first all chosen ones, then all rejected ones."""

    sequences: Batch
    """the sequences, with every token whose log-probability is asked for supervised"""
    answers: Tensor
    """(N,) bool, whether each of these tokens is of an answer, and not of its prompt"""
    counts: tuple[int, ...]
    """(2B,) number of these tokens of each sequence, which lie one sequence behind the other"""
    lengths: tuple[int, ...]
    """(B,) tokens of the longer sequence of each pair, without padding"""
    rows: Indices
    """(B,) index of the source sample of each pair"""
    reference: Tensor | None = None
    """(2B,) fp64, log-probability of each answer by the reference"""
    pairs_a_token: float | None = None
    """pairs of the whole step over tokens of its chosen sequences; None: every pair by itself"""

    sequences_a_row = 2

    @property
    def tokens(self) -> int:
        """Tokens without padding, of all sequences."""
        return self.sequences.tokens

    @property
    def units(self) -> int:
        """Number of pairs."""
        return len(self.rows)

    @property
    def weight(self) -> float:
        """The same: all of them count alike."""
        return self.units

    @property
    def chosen_tokens(self) -> int:
        """Number of the tokens of chosen sequences that are predicted."""
        return sum(self.counts[: self.units])

    def to(self, device: torch.device | str) -> PairBatch:
        """Return the batch on another device; its ids stay in host memory, as those of `Batch`."""
        return replace(
            self,
            sequences=self.sequences.to(device),
            answers=self.answers.to(device, non_blocking=True),
            reference=None if self.reference is None else self.reference.to(device),
        )


class Measured(NamedTuple):
    """What is measured of a batch of pairs.

    Attributes:
        losses: (B,), fp64.
        metrics: (B,), fp64, by the names of `METRICS`.
        logprobs: of the tokens of each answer, summed, (2B,), fp64.
    """

    losses: Tensor
    metrics: Mapping[str, Tensor]
    logprobs: Tensor


@dataclass(frozen=True)
class PreferenceObjective:
    """Preference on a loaded base.

    Attributes:
        base: the loaded base, with or without an adapter.
        pad_token_id: id that fills short rows of a batch; the loss never sees it.
        chunk_tokens: tokens whose logits exist at one time.
        loss: None: no loss of one's own is possible.
        kind: the loss.
        beta: β above: how dear it is to move away from the reference.

    Raises:
        ConfigError: there is a loss of one's own.
    """

    base: Base
    pad_token_id: int = 0
    chunk_tokens: int = CHUNK_TOKENS
    loss: Any = None
    kind: PreferenceLoss = "dpo"
    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.loss is not None:
            raise ConfigError(
                "loss: a loss of your own sees logits of one text; expected none with the task "
                "preference, which compares two; choose its kind instead"
            )

    @property
    def head(self) -> Head:
        """The formula of the model's logits, with what is trained of them just now."""
        return head_of(self.base.model)

    @property
    def step_metrics(self) -> tuple[str, ...]:
        """The names of what `loss_and_metrics` returns beside the loss."""
        return tuple(METRICS)

    @property
    def learns_text(self) -> bool:
        """Whether chosen sequences are learnt as text as well, so that all tokens are predicted."""
        return self.kind == "orpo"

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> PairBatch:
        """See `Objective`; padded to a width that suits the device."""
        chosen, rejected = zip(*map(sides_of, rows), strict=True)
        asked = [_all_predicted(side) for side in chosen] if self.learns_text else chosen
        sequences = collate([*asked, *rejected], self.pad_token_id, self.base.batch_width)
        width = sequences.input_ids.shape[1]
        answers = torch.full((len(sequences.rows), width), False)
        for number, side in enumerate((*chosen, *rejected)):
            learnt = torch.as_tensor(side["labels"], dtype=torch.int64) != IGNORED
            answers[number, : len(learnt)] = learnt
        of_row = (sequences.positions // width).bincount(minlength=len(sequences.rows))
        given = [row.get(REFERENCE) for row in rows]
        reference = None if None in given else torch.tensor(given, dtype=torch.float64).T.flatten()
        return PairBatch(
            sequences,
            answers.flatten().index_select(0, sequences.positions + 1),
            tuple(of_row.tolist()),
            tuple(map(max, sequences.lengths[: len(rows)], sequences.lengths[len(rows) :])),
            tuple(int(row["row"]) for row in rows),
            reference,
        )

    def stand_in(
        self, rows: int, tokens: int, weight: int | None = None, answer_tokens: int | None = None
    ) -> PairBatch:
        """See `Objective`: two sequences a row, and `weight` tokens of them are predicted."""
        most = 2 * rows * (tokens - 1)
        count = min(weight or most, most)
        each, more = divmod(count, 2 * rows)
        counts = tuple(each + (number < more) for number in range(2 * rows))
        ids = torch.zeros(2 * rows, self.base.batch_width(tokens), dtype=torch.int64, device="cpu")
        positions = torch.zeros(count, dtype=torch.int64, device="cpu")
        numbers = tuple(range(rows))
        sequences = Batch(ids, ids, (tokens,) * 2 * rows, numbers * 2, positions)
        answers = torch.ones(count, dtype=torch.bool, device="cpu")
        reference = torch.zeros(2 * rows, dtype=torch.float64, device="cpu")
        return PairBatch(sequences, answers, counts, (tokens,) * rows, numbers, reference)

    # ------------------------------------------------------------ a whole step

    def step_figures(self, batches: Sequence[PairBatch]) -> tuple[float, ...]:
        """Return what has to be summed over a step before its losses: pairs and chosen tokens."""
        if not self.learns_text:
            return ()
        return sum(each.units for each in batches), sum(each.chosen_tokens for each in batches)

    def within_step(self, batch: PairBatch, figures: Sequence[float]) -> PairBatch:
        """Return a batch that knows the sums of its step, see `step_figures`.

        So the mean over tokens and the mean over pairs, of which ORPO is the sum, are those of the
        step, however it is cut into micro-batches.
        """
        if not figures:
            return batch
        pairs, tokens = figures
        return replace(batch, pairs_a_token=pairs / tokens)

    # ------------------------------------------------------------ losses

    def loss_sum(self, batch: PairBatch) -> Tensor:
        """See `Objective`: summed over pairs."""
        return self.loss_and_metrics(batch)[0]

    def loss_and_metrics(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Return the summed loss, a scalar, and the sums of `step_metrics`, (4,), fp64."""
        found = self._measured(batch.to(self.base.hardware.device))
        sums = torch.stack([found.metrics[name].detach().sum() for name in METRICS])
        return found.losses.sum().float(), sums

    @torch.no_grad()
    def measured(self, batch: PairBatch) -> Measured:
        """See `Objective`."""
        return self._measured(batch.to(self.base.hardware.device))

    def _measured(self, batch: PairBatch) -> Measured:
        hidden, targets, _, kept = supervised_states(self.base.model, batch.sequences)
        head = self.head.keeping(kept)
        logprobs = token_logprobs(hidden, targets, head, self.chunk_tokens)
        # fp64: a reward is a small difference of sums over many tokens.
        wide = logprobs.double()
        of_answers = _by_sequence(wide * batch.answers, batch.counts)
        counted = _by_sequence(batch.answers.double(), batch.counts)
        if self.kind == "orpo":
            text = -_by_sequence(wide, batch.counts)[: batch.units]
            if batch.pairs_a_token is None:
                text = text / torch.tensor(batch.counts[: batch.units], device=text.device)
            else:
                text = text * batch.pairs_a_token
            means = of_answers / counted
            losses = text - self.beta * F.logsigmoid(_difference(_log_odds(means)))
            return Measured(losses, self._metrics(means.detach()), of_answers.detach())
        assert batch.reference is not None, "the rows have been given the reference's"
        ratios = of_answers - batch.reference
        if self.kind == "ipo":
            losses = (_difference(ratios / counted) - 1 / (2 * self.beta)).square()
        else:
            losses = -F.logsigmoid(self.beta * _difference(ratios))
        return Measured(losses, self._metrics(ratios.detach()), of_answers.detach())

    def _metrics(self, scores: Tensor) -> dict[str, Tensor]:
        """Return the metrics of each pair, given the scores of its answers, (2B,)."""
        chosen, rejected = (self.beta * scores).chunk(2)
        values = ((chosen > rejected).double(), chosen - rejected, chosen, rejected)
        return dict(zip(METRICS, values, strict=True))

    def row_sums(self, batch: PairBatch, measured: Measured) -> RowSums:
        """See `Objective`."""
        metrics = {name: values.cpu() for name, values in measured.metrics.items()}
        ones = torch.ones(batch.units, dtype=torch.float64)
        return RowSums(ones, measured.losses.cpu(), metrics)

    def figures(self, outputs: Sequence[Tensor], rows: Sequence[Mapping[str, Any]]) -> Figures:
        """See `Objective`: all that is measured are sums, and no outputs are kept."""
        return {}


class ReferenceObjective(PreferenceObjective):
    """Measures the log-probabilities of answers, by which a preference is compared later."""

    def measured(self, batch: PairBatch) -> Measured:
        """See `Objective`: the rows have no reference yet, so their loss means nothing."""
        none = torch.zeros(2 * batch.units, dtype=torch.float64)
        return super().measured(replace(batch, reference=none))

    def row_sums(self, batch: PairBatch, measured: Measured) -> RowSums:
        """See `Objective`; the log-probabilities of both answers of a pair are kept."""
        both = measured.logprobs.cpu().view(2, -1).T
        return super().row_sums(batch, measured)._replace(outputs=both.unbind())

    def figures(self, outputs: Sequence[Tensor], rows: Sequence[Mapping[str, Any]]) -> Figures:
        """Return the log-probabilities of all pairs, (rows, 2), fp64."""
        return {LOGPROBS: torch.stack([*outputs])}


def _all_predicted(side: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sequence with every token supervised that another is before."""
    return {**side, "labels": [IGNORED, *side["input_ids"][1:]]}


def _by_sequence(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Sum values (N,) that lie one sequence behind the other, by sequence: (2B,)."""
    return torch.stack([part.sum() for part in torch.split(values, list(counts))])


def _difference(scores: Tensor) -> Tensor:
    """Return what the chosen answers have more than the rejected ones, (B,)."""
    chosen, rejected = scores.chunk(2)
    return chosen - rejected


def _log_odds(logprobs: Tensor) -> Tensor:
    """Return log(p / (1 − p)), given log p; two formulas of log(1 − p), each where it is exact."""
    safe_low = logprobs.clamp(max=_LOG_HALF)
    safe_high = logprobs.clamp(min=_LOG_HALF)
    low, high = torch.log1p(-safe_low.exp()), torch.log(-torch.expm1(safe_high))
    return logprobs - torch.where(logprobs < _LOG_HALF, low, high)


def preference(kind: PreferenceLoss, beta: float) -> Task:
    """Return the task of pairs with this loss.

    Args:
        kind: the loss.
        beta: its β.
    """
    return Task(
        name="preference",
        loads=CAUSAL_LM,
        peft_type=TASK_TYPE,
        makes=PreferenceRows,
        weighs=PAIRS,
        unit="a pair",
        metrics=METRICS,
        of_loss=lambda loss: {},
        generates=True,
        objective=partial(PreferenceObjective, kind=kind, beta=beta),
        refers=kind != "orpo",
    )


def referring(task: Task) -> Task:
    """Return a task that measures what the pairs of another task refer to."""
    return replace(task, objective=ReferenceObjective)
