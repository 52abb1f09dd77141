"""The log-probabilities that a preference run compares with: computed once, and kept beside it.

Takes the token rows of a run and its adapter, before the first step; returns the rows with the
log-probabilities of their answers. A resumed run reads them, so it goes on with the same bits, and
computes them again only where they are of other rows or other weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import TokenTable
from qlora_kit.errors import DataError, StorageError
from qlora_kit.events import Announce, Notice
from qlora_kit.infer.references import answer_logprobs, with_references
from qlora_kit.lora.attach import Adapter
from qlora_kit.opening.model import Opened
from qlora_kit.parallel.one import Processes
from qlora_kit.storage import file_hash, load_tensors, read_json, save_tensors, write_json

NAME = "reference.safetensors"
_ABOUT = "reference.json"
_DECIDES = ("base", "starts_from", "dtype", "device")

Parts = Mapping[str, TokenTable]
"""Token rows by what they are for: training, validation."""


def referring_rows(
    parts: Parts,
    adapter: Adapter,
    opened: Opened,
    config: TrainConfig,
    output: Path,
    identity: Mapping[str, Any],
    announce: Announce,
    processes: Processes,
) -> dict[str, TokenTable]:
    """Return token rows with what the reference says of their answers.

    The reference is the base, or the adapter that training starts from. Nothing of it is held
    twice: the adapter is taken off meanwhile, or still has the values that it starts with.

    Args:
        parts: the token rows.
        adapter: the adapter of the run, as training starts from it.
        opened: the tokenizer, and the task.
        config: the options of the run.
        output: the folder of the run.
        identity: the values that decide the bits of the run.
        announce: receives notices.
        processes: the processes of the run, which divide the rows.

    Raises:
        OutOfMemory: even one pair does not fit.
        StorageError: the log-probabilities could not be written.
        Stopped: a signal came.
    """
    of = {
        "rows": {name: rows.content_hash() for name, rows in parts.items()},
        **{name: identity[name] for name in _DECIDES},
    }
    kept = processes.from_writer(lambda: _kept(output, of, parts, announce))
    if kept is None:
        by = "the base without its adapter" if config.adapter is None else str(config.adapter)
        pairs = sum(map(len, parts.values()))
        announce(Notice(f"reference: {by}, asked once for both answers of {pairs:,} pairs"))
        # A base that is less its start is the model as it was only together with the adapter.
        is_bare = config.adapter is None and not adapter.start
        with adapter.disabled() if is_bare else nullcontext():
            found = {
                name: answer_logprobs(
                    adapter.base, rows, opened.task, batch_size=config.eval_batch_size,
                    pad_token_id=opened.tokenizer.pad_token_id,
                    chunk_tokens=config.loss_chunk_tokens, announce=announce, processes=processes,
                )
                for name, rows in parts.items()
            }  # fmt: skip
        processes.in_writer(lambda: _keep(output, of, found))
        kept = {name: values.tolist() for name, values in found.items()}
    as_tensors = {name: torch.tensor(kept[name], dtype=torch.float64) for name in parts}
    return {name: with_references(rows, as_tensors[name]) for name, rows in parts.items()}


def _keep(output: Path, of: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Write the log-probabilities, and last what they are of: without it they are not read."""
    save_tensors(output / NAME, found)
    write_json(output / _ABOUT, {"of": of, "sha256": file_hash(output / NAME)})


def _kept(
    output: Path, of: Mapping[str, Any], parts: Parts, announce: Announce
) -> dict[str, list[list[float]]] | None:
    """Return what an earlier start of the run has computed of the same rows and weights; or None.

    Plain lists, because they are sent to other processes.
    """
    if not (output / _ABOUT).is_file():
        return None
    try:
        about = read_json(output / _ABOUT)
        if about["of"] != of:
            why = "of other rows or other weights"
        elif about["sha256"] != file_hash(output / NAME):
            why = "changed since they were written"
        else:
            found = load_tensors(output / NAME)
            shapes = {name: tuple(values.shape) for name, values in found.items()}
            if shapes == {name: (len(rows), 2) for name, rows in parts.items()}:
                return {name: values.tolist() for name, values in found.items()}
            why = "not complete"
    except (DataError, StorageError, OSError, KeyError, TypeError):
        why = "not readable"
    announce(Notice(f"{output / NAME}: the reference's figures are {why}; computed again"))
    return None
