"""Measure the validation rows of a run, each time with as large a batch as memory has allowed."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import TokenRows
from qlora_kit.events import Announce
from qlora_kit.infer.evaluate import Evaluation, evaluate
from qlora_kit.model.load import Base
from qlora_kit.opening.model import Opened


class Validation:
    """Measures the validation rows of a run, and keeps the last evaluation.

    Args:
        base: the base with the adapter that is trained.
        opened: its tokenizer and its task.
        rows: the validation rows.
        config: the options of the run.
        announce: receives notices.
    """

    def __init__(
        self, base: Base, opened: Opened, rows: TokenRows, config: TrainConfig, announce: Announce
    ) -> None:
        self._base, self._opened, self._rows = base, opened, rows
        self._config, self._announce = config, announce
        self._batch_size = config.eval_batch_size
        self.last: Evaluation | None = None

    def __call__(self) -> Mapping[str, float]:
        """Return the loss and the metrics of the task, see `train.loop.Measure`."""
        self.last = found = evaluate(
            self._base,
            self._rows,
            batch_size=self._batch_size,
            pad_token_id=self._opened.tokenizer.pad_token_id,
            chunk_tokens=self._config.loss_chunk_tokens,
            task=self._opened.task,
            announce=self._announce,
        )
        self._batch_size = found.batch_size
        return {"loss": found.loss, **found.metrics}
