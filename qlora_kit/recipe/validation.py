"""Measure the validation rows of a run, each time with as large a batch as memory has allowed."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_kit.config import TrainConfig
from qlora_kit.data.tokens import Tokenized
from qlora_kit.events import Announce
from qlora_kit.infer.evaluate import Evaluation, evaluate_parts
from qlora_kit.model.load import Base
from qlora_kit.opening.model import Opened
from qlora_kit.parallel.one import Processes
from qlora_kit.train.best import loss_of_source


class Validation:
    """Measures the validation rows of a run, and keeps the last evaluation.

    Args:
        base: the base with the adapter that is trained.
        opened: its tokenizer and its task.
        held_out: the validation rows.
        config: the options of the run.
        announce: receives notices.
        processes: the processes of the run, which divide the rows.
    """

    def __init__(
        self,
        base: Base,
        opened: Opened,
        held_out: Tokenized,
        config: TrainConfig,
        announce: Announce,
        processes: Processes,
    ) -> None:
        self._base, self._opened, self._rows = base, opened, held_out.rows
        self._parts = {each.name: each.rows for each in held_out.sources}
        self._config, self._announce, self._processes = config, announce, processes
        self._batch_size = config.eval_batch_size
        self.last: Evaluation | None = None
        self.by_source: Mapping[str, Evaluation] = {}
        """of the last evaluation, by the name of the source; empty where there is one source"""

    def __call__(self) -> Mapping[str, float]:
        """Return the loss, the metrics of the task and each source's loss, see `loop.Measure`."""
        found, self.by_source = evaluate_parts(
            self._base,
            self._rows,
            self._parts,
            batch_size=self._batch_size,
            pad_token_id=self._opened.tokenizer.pad_token_id,
            chunk_tokens=self._config.loss_chunk_tokens,
            task=self._opened.task,
            announce=self._announce,
            processes=self._processes,
        )
        self.last, self._batch_size = found, found.batch_size
        losses = {loss_of_source(name): each.loss for name, each in self.by_source.items()}
        return {"loss": found.loss, **found.metrics, **losses}
