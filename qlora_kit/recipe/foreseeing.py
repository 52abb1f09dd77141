"""What can be known of a sweep before its first trial: faults, the memory, and the time.

Takes the options of the trials' runs; reads their data and opens their models as the runs will, and
plans the runs. Loads no weight, writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import PreTrainedModel

from qlora_kit.config import TrainConfig, that_decide
from qlora_kit.data.batch import TokenRows
from qlora_kit.data.samples import Samples
from qlora_kit.data.tokens import Tokenized
from qlora_kit.errors import ConfigError
from qlora_kit.events import silent
from qlora_kit.lora.attach import count_trainable
from qlora_kit.lora.galore import check_galore
from qlora_kit.lora.ranks import largest_ranks
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.model.hardware import choose_hardware
from qlora_kit.model.load import BaseSpec
from qlora_kit.opening.model import Opened
from qlora_kit.opening.variants import check_variants
from qlora_kit.plan.duration import about
from qlora_kit.plan.planning import Plan
from qlora_kit.plan.run import plan_run
from qlora_kit.plan.subject import RowSizes, Subject, UsualRows
from qlora_kit.recipe.rows import read_data, token_rows
from qlora_kit.recipe.streaming import longest_rows, settled
from qlora_kit.report.memory import size_text
from qlora_kit.report.tables import Rows
from qlora_kit.report.trackers import check_tracker
from qlora_kit.train.packing import choose_packing

# Runs that are alike in these read the same rows with the same model.
_READ = (
    *that_decide(TrainConfig, "task", "data", "tokenizer", "base", "precision", "seed"),
    "best_metric", "early_stopping_patience", "vram", "report_to",
)  # fmt: skip
# Runs that are alike in these as well have the same plan.
_PLANNED = (*_READ, *that_decide(TrainConfig, "memory", "shape", "batch", "length"), "ram")


@dataclass(frozen=True)
class Foreseen:
    """The runs of a sweep before the first, checked.

    Attributes:
        runs: the options of each.
    """

    runs: Sequence[TrainConfig]
    _read: Mapping[str, _Read] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Sequence[TrainConfig]) -> Foreseen:
        """Check all that can be checked of runs: data, model, layers to train.

        Raises:
            QloraKitError: a run cannot be.
        """
        read: dict[str, _Read] = {}
        for config in runs:
            key = _values(config, _READ)
            if key not in read:
                check_tracker(config.report_to)
                read[key] = _Read.of(config)
            read[key].check(config)
        return cls(runs, read)

    def rows(self) -> Rows:
        """Return the predicted peak of the largest run and the time of all, as a table.

        What is not known of all of them is left out.
        """
        plans: dict[str, Plan | None] = {}
        for config in self.runs:
            key = _values(config, _PLANNED)
            if key not in plans:
                plans[key] = self._read[_values(config, _READ)].plan(config)
        of_runs = [plans[_values(config, _PLANNED)] for config in self.runs]
        known = [plan for plan in of_runs if plan is not None]
        if not known or len(known) < len(of_runs):
            return ()
        peak = max(plan.prediction.peak.bytes for plan in known)
        rows = [("predicted peak", f"{size_text(peak)}, of the largest")]
        seconds = [plan.pace.step.all * plan.pace.steps for plan in known
                   if plan.pace is not None and plan.pace.steps is not None]  # fmt: skip
        if len(seconds) == len(known):
            rows.append(("predicted time", f"{about(sum(seconds))} of steps, in all"))
        return tuple(rows)


@dataclass(frozen=True)
class _Read:
    """What runs that read the same have in common.

    Attributes:
        samples: the training data.
        opened: the model, without weights.
        rows: the training rows, or those of the first samples of a stream.
        held_out: the validation rows, if there are any.
        spec: the base.
    """

    samples: Samples
    opened: Opened
    rows: Tokenized
    held_out: Tokenized | None
    spec: BaseSpec

    @classmethod
    def of(cls, config: TrainConfig) -> _Read:
        samples, validation = read_data(config, silent, chooses=True)
        config = settled(config, samples, validation, silent)
        opened, rows, held_out = token_rows(samples, validation, config, silent)
        return cls(samples, opened, rows, held_out, opened.spec(config))

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        return self.spec.skeleton()

    def lora(self, config: TrainConfig) -> LoraSpec:
        task, rows = self.opened.task, self.opened.token_rows(config)
        lora = LoraSpec.of(config, task.peft_type, self.spec.trained_whole(), rows)
        check_galore(lora, self.spec.quantization.bits)
        return largest_ranks(lora, self.skeleton)

    def check(self, config: TrainConfig) -> None:
        """Check the layers to train, the device, and whether samples can be packed as asked."""
        check_variants(config)
        choose_hardware(config.device, config.dtype)
        count_trainable(self.skeleton, self.lora(config))
        self.packed(config)

    def packed(self, config: TrainConfig) -> TrainConfig:
        """Return the options with the choice of packing."""
        longest = None if self.samples.stream is None else config.max_length
        task = self.opened.task
        chosen = choose_packing(config, task, self.skeleton, self.rows.rows, longest=longest)
        return chosen.settled(config)

    def plan(self, config: TrainConfig) -> Plan | None:
        """Plan a run; None where it does not fit, which its trial will say."""
        config = self.packed(config)
        sizes = self._sizes(config)
        hardware = choose_hardware(config.device, config.dtype)
        subject = Subject(self.spec, self.lora(config), hardware, sizes, self.opened.task)
        try:
            return plan_run(config, subject, silent)
        except ConfigError:
            return None

    def _sizes(self, config: TrainConfig) -> RowSizes:
        """Return the sizes of the rows of a run, as the run itself plans for them."""
        has_sources, rows = self.opened.task.has_sources, self.rows.rows
        held_out = self.held_out.rows if self.held_out else None
        sizes_of = RowSizes.of_sources if has_sources else RowSizes.of
        if self.samples.stream is None:
            return sizes_of(rows, held_out, config)
        longest = TokenRows(longest_rows(self.opened, self.rows, config))
        usual = UsualRows.of(rows, config, has_sources=has_sources, longest=max(longest.lengths()))
        in_epoch = self.rows.stream_pass.rows if self.rows.stream_pass else None
        return replace(
            sizes_of(longest, held_out, config), usual=replace(usual, rows=in_epoch or usual.rows)
        )


def _values(config: TrainConfig, names: Iterable[str]) -> str:
    return repr([getattr(config, name) for name in names])
