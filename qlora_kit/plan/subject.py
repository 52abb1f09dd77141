"""The subject of a plan: the base, the trained part, the device that is planned for, the rows.

Takes the options of `train`; only the architecture need be on this machine. Never reads weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from operator import itemgetter
from statistics import fmean

import torch
from transformers import PreTrainedModel

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import Row, TokenRows, largest_batch, widest_batch
from qlora_kit.data.encode import CHOSEN_TOKENS, IGNORED
from qlora_kit.data.mixing import epoch_windows
from qlora_kit.data.packing import Fill
from qlora_kit.errors import ConfigError
from qlora_kit.lora.shortened import shortened
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.model.cards import ceilings_of_card
from qlora_kit.model.ceilings import Ceilings, ceilings_of
from qlora_kit.model.checkpoint import stored_dtype
from qlora_kit.model.hardware import Hardware, dtype_named
from qlora_kit.model.images import layer_count
from qlora_kit.model.load import BaseSpec
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.tasks.task import Task


@dataclass(frozen=True)
class UsualRows:
    """The means over the rows of a run's first epoch, which decide its time.

    Attributes:
        rows: number of rows.
        tokens: tokens of a row, padding not counted.
        supervised: targets of a row.
        width: tokens to which a micro-batch is padded; of its sources, where rows have sources.
            It is that of the micro-batch that was asked for.
        answer_width: tokens to which its targets are padded, where rows have sources.
        at_once: rows of a micro-batch, where the samples of a step are packed.
    """

    rows: int
    tokens: float
    supervised: float
    width: float
    answer_width: float | None = None
    at_once: float | None = None

    @classmethod
    def of(
        cls,
        rows: TokenRows,
        config: TrainConfig,
        *,
        has_sources: bool = False,
        longest: int | None = None,
    ) -> UsualRows:
        """Return the means over token rows, in the micro-batches of a run's first epoch.

        Args:
            rows: the training rows, or some of them.
            config: says how many rows a micro-batch has.
            has_sources: whether rows are sources and targets.
            longest: tokens of the longest row of all; None: the longest of these.
        """
        batches = [batch for window in epoch_windows(rows, config, 0) for batch in window]
        of_rows = rows.source_lengths()
        sizes = [of_rows[index] for batch in batches for index in batch]
        of_all = rows.all_tokens()
        tokens = fmean(of_all[index] for batch in batches for index in batch)
        supervised = fmean(target for _, target in sizes)
        if config.packing:
            fill = Fill.of(config, rows, longest)
            at_once = fill.tokens / fill.micro_batches / tokens
            return cls(len(sizes), tokens, supervised, width=tokens, at_once=at_once)

        def mean_width(length: Callable[[tuple[int, int]], int]) -> float:
            return fmean(max(length(of_rows[index]) for index in batch) for batch in batches)

        return cls(
            rows=len(sizes),
            tokens=tokens,
            supervised=supervised,
            width=mean_width(itemgetter(0) if has_sources else sum),
            answer_width=mean_width(itemgetter(1)) if has_sources else None,
        )


@dataclass(frozen=True)
class RowSizes:
    """The sizes that decide the memory and the time of the rows of a run.

    Attributes:
        tokens: tokens of the longest row; of its source, where rows have sources.
        supervised: targets of the largest batch of one row, of two rows, and so on; if None, all
            tokens but the first of each row are targets.
        evaluation_tokens: tokens of the longest row in evaluation; if None, the same as `tokens`.
        answer_tokens: tokens of the longest target, where rows have sources.
        evaluation_answer_tokens: the same in evaluation.
        usual: the means over all rows; if None, every row is as long as the longest.
        is_weighted: whether the loss of tokens is weighted.
    """

    tokens: int
    supervised: tuple[int, ...] | None = None
    evaluation_tokens: int | None = None
    answer_tokens: int | None = None
    evaluation_answer_tokens: int | None = None
    usual: UsualRows | None = None
    is_weighted: bool = False

    def supervised_of(self, rows: int) -> int | None:
        """Return the targets of the largest batch of this number of rows."""
        if self.supervised is None:
            return None
        return self.supervised[min(rows, len(self.supervised)) - 1]

    @classmethod
    def of(cls, rows: TokenRows, held_out: TokenRows | None, config: TrainConfig) -> RowSizes:
        """Return the sizes of tokenised rows, from the largest batches that they can make.

        Args:
            rows: token rows of training.
            held_out: token rows of validation, or None.
            config: says how many rows a batch may have.
        """
        lengths = rows.lengths()
        most = config.batch_size * config.gradient_accumulation_steps
        # The largest batch contains every smaller one, so each of its rows is read only once.
        largest = largest_batch(lengths, most)
        learns_text = config.task == "preference" and config.loss == "orpo"
        supervised = tuple(accumulate(_targets(rows[index], learns_text) for index in largest))
        evaluated = None if held_out is None else max(held_out.lengths())
        usual = UsualRows.of(rows, config)
        return cls(max(lengths), supervised, evaluated, usual=usual, is_weighted=rows.is_weighted)

    @classmethod
    def of_sources(
        cls, rows: TokenRows, held_out: TokenRows | None, config: TrainConfig
    ) -> RowSizes:
        """Return the sizes of sources and targets, from the widest batch that they can make.

        Args:
            rows: token rows of training.
            held_out: token rows of validation, or None.
            config: says how many rows a batch has.
        """
        lengths = rows.source_lengths()
        widest = [lengths[index] for index in widest_batch(lengths, config.batch_size)]
        supervised = tuple(accumulate(target for _, target in widest))
        measured = held_out.source_lengths() if held_out is not None else widest
        (source, target), (others, answers) = (_widths(part) for part in (widest, measured))
        usual = UsualRows.of(rows, config, has_sources=True)
        return cls(source, supervised, others, target, answers, usual, rows.is_weighted)


def _widths(lengths: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(source for source, _ in lengths), max(target for _, target in lengths)


def _targets(row: Row, learns_text: bool) -> int:
    """Return the predicted tokens of a row; of a pair, with all of the chosen text if learnt."""
    labels: Sequence[int] = row["labels"]
    targets = sum(label != IGNORED for label in labels[1:])
    if CHOSEN_TOKENS not in row or not learns_text:
        return targets
    chosen = row[CHOSEN_TOKENS]
    return targets + sum(label == IGNORED for label in labels[1:chosen])


@dataclass(frozen=True)
class Subject:
    """A run that is planned, without its settings.

    Attributes:
        spec: the base; of its folder the config.json is read, and no weight.
        lora: the trained part.
        hardware: the device; `meta` stands in for a GPU and is told apart from the host.
        rows: the sizes of the rows.
        task: the task of the run.
        ceilings: the rates of the device, or the reason why they are not known.
        devices: the number of processes of the run, each with a device; this is one of them.
        sharing: the number of them that hold the base together; 1: each holds all of it.
        held_bytes: bytes of the device that the base takes already, because an earlier run of this
            process has loaded it; they are not free, and not needed once more.
    """

    spec: BaseSpec
    lora: LoraSpec
    hardware: Hardware
    rows: RowSizes
    task: Task = CAUSAL
    ceilings: Ceilings | str = "the rates of the device are not known"
    devices: int = 1
    sharing: int = 1
    held_bytes: int = 0

    def divided(self, count: int) -> Subject:
        """Return the share of each of several processes: as large rows, and fewer of them."""
        usual, one = self.rows.usual, replace(self, devices=count)
        if count == 1 or usual is None:
            return one
        fewer = replace(usual, rows=math.ceil(usual.rows / count))
        return replace(one, rows=replace(self.rows, usual=fewer))

    def shortened_to(self, skeleton: PreTrainedModel) -> Subject:
        """Return the run with a skeleton of its base, which may have fewer blocks.

        To be asked for before a simulation begins, in which the skeletons would take memory.
        """
        if layer_count(skeleton.config) == layer_count(self.spec.architecture()):
            return self
        return replace(self, lora=shortened(self.lora, self.spec.skeleton(), skeleton))

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the checkpoint: that of config.json, else of its files, else bfloat16.

        Old files of encoders do not name it. Ask before a simulation begins: it opens files.
        """
        named = self.spec.architecture().get_text_config().dtype
        if named is None and self.spec.folder is not None:
            named = stored_dtype(self.spec.folder)
        return named if isinstance(named, torch.dtype) else torch.bfloat16


def planned_hardware(config: TrainConfig) -> Hardware:
    """Return the hardware to plan for; the device `meta` stands in for a GPU, present or not."""
    if config.device == "cpu":
        dtype = torch.float32 if config.dtype == "auto" else dtype_named(config.dtype)
        return Hardware(torch.device("cpu"), dtype, "planned")
    dtype = torch.bfloat16 if config.dtype == "auto" else dtype_named(config.dtype)
    return Hardware(torch.device("meta"), dtype, "planned")


def planned_ceilings(hardware: Hardware, card: str | None) -> Ceilings | str:
    """Return the rates of the hardware to plan for, or the reason why they are not known.

    Args:
        hardware: as `planned_hardware` returns it.
        card: the name of a card that is not here, or None.

    Raises:
        ConfigError: the card is not known, or the plan is for a CPU.
    """
    on_cpu = hardware.device.type == "cpu"
    if card is not None:
        if on_cpu:
            raise ConfigError(f"--card {card}: this plan is for a CPU; expected --device cuda")
        return ceilings_of_card(card)
    if on_cpu:
        return rates_of(hardware.device)
    if torch.cuda.is_available():
        return rates_of(torch.device("cuda", torch.cuda.current_device()))
    return "there is no GPU here to measure; --card names one, such as --card 'RTX 4090'"


def rates_of(device: torch.device) -> Ceilings | str:
    """Return the rates of a device of this machine, or the reason why they are not known.

    A device that cannot be measured now, because others have its memory, costs only the time.
    """
    try:
        return ceilings_of(device)
    except RuntimeError as error:
        return f"the device could not be measured ({type(error).__name__})"


def standing_in_for(hardware: Hardware) -> Hardware:
    """Return the hardware to plan for on this machine; `meta` stands in for its GPU."""
    if hardware.device.type == "cpu":
        return hardware
    return replace(hardware, device=torch.device("meta"))
