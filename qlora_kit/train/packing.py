"""Says whether the samples of a run are packed.

Packing changes nothing but speed. So a run packs by default wherever the samples of a row do not
depend on each other and a step has fewer micro-batches for it; elsewhere it is off, with the
reason, and refused where the user asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedModel

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import TokenRows
from qlora_kit.data.packing import Fill
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.model.segments import agrees_packed, why_not_packed
from qlora_kit.tasks.task import Task

_Options = TypeVar("_Options", bound=TrainConfig)

_DIFFERS = "two samples in one row are not computed as if alone by this model"


@dataclass(frozen=True)
class Packing:
    """Whether the samples of a run are packed.

    Attributes:
        is_on: whether they are.
        why_off: the reason that they are not, in words.
        longest: tokens of the longest row of all, where only some are at hand.
        is_asked: whether the user asked for it.
    """

    is_on: bool
    why_off: str = ""
    longest: int | None = None
    is_asked: bool = False

    def described(self, config: TrainConfig, rows: TokenRows) -> str:
        """Return one line for people: how full the micro-batches are, or why it is off.

        Args:
            config: the options of the run.
            rows: the training rows, or some of them.
        """
        if not self.is_on:
            return f"off: {self.why_off}"
        return Fill.of(config, rows, self.longest).described()

    def settled(self, config: _Options) -> _Options:
        """Return the options of a run that packs or does not."""
        return config.model_copy(update={"packing": self.is_on})

    def tried(self, model: PreTrainedModel) -> Packing:
        """Return the choice for a loaded model: off where the model does not compute as it says.

        What the user asked for stays, and is refused before the first step, see `try_packing`.
        """
        if self.is_on and not self.is_asked and not agrees_packed(model):
            return Packing(False, _DIFFERS)
        return self


def choose_packing(
    config: TrainConfig,
    task: Task,
    model: PreTrainedModel,
    rows: TokenRows,
    *,
    longest: int | None = None,
    goes_on: bool = False,
) -> Packing:
    """Choose whether to pack, where `--packing` leaves it open.

    Args:
        config: the options of the run.
        task: the task of the run.
        model: loaded, or a skeleton without values.
        rows: the training rows, or some of them.
        longest: tokens of the longest row of all; None: the longest of these.
        goes_on: whether the run is resumed; one that does not name the choice was begun before
            there was any.

    Raises:
        ConfigError: `--packing` is asked for, and the samples would not be as if alone.
    """
    if config.packing is False:
        return Packing(False, "--no-packing")
    if config.packing is None and goes_on:
        return Packing(False, "the run was begun without it")
    reason = _why_not(task, model, longest or max(rows.lengths()))
    if reason is not None:
        if config.packing is None:
            return Packing(False, reason)
        raise ConfigError(
            f"--packing: {reason}; expected a task and a model whose samples do not depend on "
            "each other in one row; leave it out"
        )
    if config.packing is None and not Fill.of(config, rows, longest).saves:
        return Packing(False, "a step would have as many micro-batches")
    return Packing(True, longest=longest, is_asked=config.packing is not None)


def _why_not(task: Task, model: PreTrainedModel, tokens: int) -> str | None:
    if not task.packs:
        return f"--task {task.name} computes a row as one sample"
    return why_not_packed(model, tokens)


def try_packing(model: PreTrainedModel) -> None:
    """Compute two short samples packed and alone, before the first step of a packed run.

    Raises:
        ModelError: they differ.
    """
    if not agrees_packed(model):
        raise ModelError(
            f"--packing: {_DIFFERS}; expected the same hidden states; pass --no-packing"
        )
