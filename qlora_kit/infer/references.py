"""What a model says of pairs of answers before it is trained, by which preferences are compared.

Takes a base, with or without an adapter, and token rows of pairs; returns the log-probabilities of
both answers of each pair, or the rows with them. Never changes the model.
"""

from __future__ import annotations

from torch import Tensor

from qlora_kit.data.batch import TokenTable
from qlora_kit.events import Announce, silent
from qlora_kit.infer.evaluate import evaluate_parts
from qlora_kit.layers.loss import CHUNK_TOKENS
from qlora_kit.model.load import Base
from qlora_kit.parallel.one import OneProcess, Processes
from qlora_kit.tasks.preference import LOGPROBS, REFERENCE, referring
from qlora_kit.tasks.task import Task


def answer_logprobs(
    base: Base,
    rows: TokenTable,
    task: Task,
    *,
    batch_size: int = 8,
    pad_token_id: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
    announce: Announce = silent,
    processes: Processes | None = None,
) -> Tensor:
    """Return the log-probabilities of the chosen and the rejected answer of each row.

    Args:
        base: the reference: a loaded base, with the adapter that it may carry.
        rows: token rows of pairs.
        task: the task of the rows.
        batch_size: pairs of a batch to begin with; halved where memory runs out.
        pad_token_id: id that fills short rows of a batch.
        chunk_tokens: tokens whose logits exist at one time.
        announce: receives a notice when the batch is halved.
        processes: the processes that divide the rows; each has the result of all rows.

    Returns:
        (rows, 2), fp64, nats, summed over the tokens of an answer.

    Raises:
        OutOfMemory: even one pair does not fit.
        Stopped: a signal came.
    """
    found, _ = evaluate_parts(
        base, rows, {}, batch_size=batch_size, pad_token_id=pad_token_id,
        chunk_tokens=chunk_tokens, task=referring(task), announce=announce,
        processes=processes or OneProcess(),
    )  # fmt: skip
    logprobs: Tensor = found.details[LOGPROBS]
    return logprobs


def with_references(rows: TokenTable, logprobs: Tensor) -> TokenTable:
    """Return rows that carry the log-probabilities of their answers, see `answer_logprobs`."""
    return TokenTable(rows.table.add_column(REFERENCE, logprobs.tolist()), rows.mixture)
