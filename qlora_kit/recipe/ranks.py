"""The ranks of a run with `--rank-budget`: decided once, then those of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import TokenRows
from qlora_kit.events import Announce, Facts
from qlora_kit.lora.files import read_peft_config
from qlora_kit.lora.ranks import with_ranks
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.model.load import Base
from qlora_kit.opening.model import Opened
from qlora_kit.parallel.one import Processes
from qlora_kit.train.checkpoint import find_checkpoint
from qlora_kit.train.rank_budget import decided


def with_decided_ranks(
    lora: LoraSpec,
    base: Base,
    rows: TokenRows,
    config: TrainConfig,
    opened: Opened,
    output: Path,
    announce: Announce,
    processes: Processes,
) -> LoraSpec:
    """Return the trained part with the rank of each layer; as it is, if it has no budget.

    A run that goes on takes the ranks of its checkpoint, and does not decide again.

    Args:
        lora: the trained part as it was asked for.
        base: the loaded base, without an adapter.
        rows: the training rows, or of a stream the first of them.
        config: the options of the run, with the settings of its steps.
        opened: the tokenizer and the task.
        output: the run folder.
        announce: receives the ranks.
        processes: the processes of the run; all compute, and the writer's ranks are taken.
    """
    if lora.variant.rank_budget is None:
        return lora
    stored = processes.from_writer(lambda: _stored(output, config.resume))
    if stored is None:
        spec = decided(base, lora, rows, config, opened.task, opened.tokenizer.pad_token_id)
        stored = processes.from_writer(lambda: dict(spec.rank_pattern))
    announce(Facts(f"ranks, {sum(stored.values())} in all", _table(stored)))
    return with_ranks(lora, stored)


def _stored(output: Path, resume: str | None) -> dict[str, int] | None:
    """Return the ranks of the checkpoint that a run goes on from; None if it begins."""
    found = None if resume is None else find_checkpoint(output, resume).folder
    return None if found is None else dict(read_peft_config(found).rank_pattern or {})


def _table(ranks: Mapping[str, int]) -> tuple[tuple[str, str], ...]:
    """Return one row for each kind of layer, with its ranks in the order of the blocks."""
    of_kind: dict[str, list[str]] = {}
    for path, rank in ranks.items():
        of_kind.setdefault(path.rpartition(".")[2], []).append(str(rank))
    return tuple((kind, " ".join(each)) for kind, each in of_kind.items())
