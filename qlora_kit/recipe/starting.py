"""What A and B of a run start from: computed when it begins, read when it is resumed.

Takes the options of a run; returns the base with its start, to which the adapter is then attached.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qlora_kit.config import TrainConfig
from qlora_kit.errors import ConfigError
from qlora_kit.lora.files import read_base_record
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.lora.starts.check import OF_WEIGHTS, check_start
from qlora_kit.lora.starts.loading import FreshStart, stored_start
from qlora_kit.lora.targets import targeted_paths
from qlora_kit.model.load import BaseSpec
from qlora_kit.parallel.one import Processes
from qlora_kit.train.checkpoint import find_checkpoint


def with_start(
    config: TrainConfig, spec: BaseSpec, lora: LoraSpec, output: Path, processes: Processes
) -> BaseSpec:
    """Return the spec of a base with the start that its weights give, new or of a checkpoint.

    Args:
        config: the options of the run.
        spec: the base.
        lora: the trained part.
        output: the run folder.
        processes: the processes of the run; one of them computes for all.

    Raises:
        ConfigError: the start cannot be computed, or the run has begun with another.
    """
    skeleton = spec.skeleton()
    check_start(lora, spec, skeleton)
    resumed = None
    if config.resume is not None:
        wanted = config.resume
        resumed = processes.from_writer(lambda: find_checkpoint(output, wanted).folder)
    if resumed is not None:
        _check_same(resumed, lora)
        return replace(spec, start=stored_start(resumed))
    if lora.variant.init not in OF_WEIGHTS:
        return spec
    start = FreshStart(
        lora,
        targeted_paths(skeleton, lora),
        bits=spec.quantization.bits,
        seed=config.seed,
        decide=processes.from_writer,
    )
    return replace(spec, start=start)


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
