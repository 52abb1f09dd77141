"""From a data file to an adapter folder: the main job.

config → data → tokenizer → plan → base → LoRA → training → adapter → report
"""

from __future__ import annotations

from typing import Any

from qlora_kit.config import TrainConfig
from qlora_kit.events import Announce, silent
from qlora_kit.model.environment import prepare_environment
from qlora_kit.model.names import find_model
from qlora_kit.recipe.rows import read_data
from qlora_kit.report.trackers import check_tracker
from qlora_kit.train.folder import claimed_run


def train(config: TrainConfig, announce: Announce = silent) -> dict[str, Any]:
    """Train a LoRA adapter, from a data file to an adapter folder.

    Returns:
        The outcome of the run, for programs.
    """
    prepare_environment(deterministic=config.deterministic)
    check_tracker(config.report_to)
    source = find_model(config.model)
    with claimed_run(
        config.output, source.name, resume=config.resume, overwrite=config.overwrite
    ) as output:
        samples, validation = read_data(config, announce)
        # torch is imported here, after everything that can be checked without it.
        from qlora_kit.recipe.run import Run

        run = Run.prepared(config, output, samples, validation, announce)
        return run.finished_before() or run.taken()
