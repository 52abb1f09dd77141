"""What A and B of a run start from: computed when it begins, read when it is resumed.

Takes the options of a run; returns the base with its start, which `attach` gives to A and B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import TokenRows
from qlora_kit.errors import ConfigError
from qlora_kit.lora.files import read_base_record
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.lora.starts.check import OF_ROWS, OF_WEIGHTS, check_start
from qlora_kit.lora.starts.loading import FreshStart, KnownStart, stored_start
from qlora_kit.lora.targets import targeted_paths
from qlora_kit.model.load import Base, BaseSpec
from qlora_kit.model.memory import release_memory
from qlora_kit.model.start import Pair
from qlora_kit.opening.model import Opened
from qlora_kit.parallel.one import Processes
from qlora_kit.train.checkpoint import find_checkpoint
from qlora_kit.train.first_rows import (
    MOST_BATCHES,
    MOST_ROWS,
    first_batches,
    pairs_of_gradients,
    pairs_of_inputs,
)
from qlora_kit.train.folder import checkpoints


@dataclass(frozen=True)
class Beginning:
    """What a run starts from.

    Attributes:
        lora: the trained part.
        spec: the base, with the start that its weights give, or that a checkpoint holds.
        is_new: whether the run begins, so that its first rows may have to be asked.
    """

    lora: LoraSpec
    spec: BaseSpec
    is_new: bool

    def base(
        self,
        load: Callable[[BaseSpec], Base],
        config: TrainConfig,
        opened: Opened,
        rows: TokenRows,
        processes: Processes,
    ) -> Base:
        """Load the base; where the start is one of the first rows, ask them first.

        All processes compute alike, and take what the writer has found. A base that becomes less
        its start is loaded a second time, so that each weight is quantised once.

        Args:
            load: loads a base.
            config: the options of the run.
            opened: the tokenizer and the task.
            rows: the training rows, or the first of them.
            processes: the processes of the run.
        """
        base = load(self.spec)
        if not self.is_new or self.lora.variant.init not in OF_ROWS:
            return base
        found = _of_first_rows(base, self.lora, config, opened, rows)
        pairs: dict[str, Pair] = processes.from_writer(lambda: found)
        if not self.lora.variant.changes_base:
            return replace(base, spec=replace(self.spec, start=KnownStart(pairs, self.lora)))
        device = base.hardware.device
        del base
        release_memory(device)
        bits = self.spec.quantization.bits
        start = FreshStart(self.lora, [*pairs], bits=bits, seed=config.seed, given=pairs)
        return load(replace(self.spec, start=start))


def _of_first_rows(
    base: Base, lora: LoraSpec, config: TrainConfig, opened: Opened, rows: TokenRows
) -> dict[str, Pair]:
    objective = opened.task.objective(
        base, opened.tokenizer.pad_token_id, config.loss_chunk_tokens, None
    )
    if lora.variant.init == "eva":
        batches = first_batches(rows, objective, config, MOST_BATCHES * config.batch_size)
        return pairs_of_inputs(base, lora, objective, batches, config.seed)
    seen = [*first_batches(rows, objective, config, MOST_ROWS)]
    return pairs_of_gradients(base, lora, objective, seen, config, config.seed)


def beginning_of(
    config: TrainConfig, spec: BaseSpec, lora: LoraSpec, output: Path, processes: Processes
) -> Beginning:
    """Return what a run starts from, as far as it is known before the base is loaded.

    Args:
        config: the options of the run.
        spec: the base.
        lora: the trained part.
        output: the run folder.
        processes: the processes of the run; one of them computes for all.

    Raises:
        ConfigError: the start cannot be computed, or the run has begun with another.
    """
    if lora.variant.init == "kaiming":
        if config.resume is not None:
            _check_plain(output, config.resume)
        return Beginning(lora, spec, is_new=True)
    skeleton = spec.skeleton()
    check_start(lora, spec, skeleton)
    resumed = None
    if config.resume is not None:
        wanted = config.resume
        resumed = processes.from_writer(lambda: find_checkpoint(output, wanted).folder)
    if resumed is not None:
        _check_same(resumed, lora)
        return Beginning(lora, replace(spec, start=stored_start(resumed)), is_new=False)
    if lora.variant.init not in OF_WEIGHTS:
        return Beginning(lora, spec, is_new=True)
    start = FreshStart(
        lora,
        targeted_paths(skeleton, lora),
        bits=spec.quantization.bits,
        seed=config.seed,
        decide=processes.from_writer,
    )
    return Beginning(lora, replace(spec, start=start), is_new=True)


def _check_plain(output: Path, resume: str) -> None:
    """Check that a run of plain LoRA goes on from one; reads the record of a checkpoint alone."""
    every = checkpoints(output) if resume == "latest" else [Path(resume)]
    for checkpoint in every[-1:]:
        _check_same(checkpoint, LoraSpec())


def _check_same(checkpoint: Path, lora: LoraSpec) -> None:
    """Check that a run goes on on the base that it began on: --allow-change cannot change it."""
    record = read_base_record(checkpoint)
    began = record.start.init if record is not None and record.start is not None else None
    now = lora.variant.init if lora.variant.changes_base else None
    if began != now:
        raise ConfigError(
            f"--init {lora.variant.init}: {checkpoint} began with {began or 'an unchanged base'}; "
            "a run cannot change that; pass the stored value, or start a new run"
        )
