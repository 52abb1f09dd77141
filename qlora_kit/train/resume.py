"""Decides whether a run may continue from a checkpoint, and says with what effect.

A run continues with the same bits if all values that decide them are the same. Values that differ
are listed. With `--allow-change` a user may change some of them on purpose, by group. Takes the
run's identity and a checkpoint's state; changes neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.config import (
    GROUPS,
    OptimizerOptions,
    TrainConfig,
    read_config_file,
    resolve,
    that_decide,
)
from qlora_kit.errors import ConfigError
from qlora_kit.events import Announce, Notice
from qlora_kit.lora.files import WEIGHTS, library_versions
from qlora_kit.storage import file_hash
from qlora_kit.train.checkpoint import StoredState, find_checkpoint, read_state
from qlora_kit.train.folder import CONFIG
from qlora_kit.train.optimizer import learning_rate_at

# Values of a run's identity that no option names, by the group of options that decides them.
_RESULTS: Mapping[str, tuple[str, ...]] = {
    "data": ("rows",), "tokenizer": ("tokenizer", "template"), "base": ("base",),
    "lora": ("starts_from",),
}  # fmt: skip
COVERED: Mapping[str, tuple[str, ...]] = {
    group: (*that_decide(TrainConfig, group), *_RESULTS.get(group, ())) for group in GROUPS
}
"""The values that each name of `--allow-change` covers."""

# A value that follows from other values counts as a difference only if those are equal.
_CAUSES = {*COVERED["data"], *COVERED["tokenizer"], "seed", "labels"} - {"rows", "validation"}
_DERIVED: Mapping[str, set[str]] = {
    "template": {"chat_template"}, "rows": {*_CAUSES, "validation"}, "validation": _CAUSES,
    "labels": {"label_kind", "class_weights"}, "data": {"stream_data", "tokenize_first"},
}  # fmt: skip
# What is compared by a digest has no value that a person could read, or pass.
_DIGEST = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")
_HOLDS: Mapping[str, str] = {
    "rows": "the token rows (of equal data and tokenizer)", "data": "the training data",
    "validation": "the validation data", "template": "the chat template",
    "labels": "the labels' kind, names, order or weights", "base": "the weights of the base",
    "starts_from": "the adapter that training starts from",
}  # fmt: skip
# After a change in one of these groups, the rows have another order.
_REORDERING = ("data", "tokenizer", "batch", "seed")

# Options that older checkpoints do not name, with the value that they had in effect.
_BEFORE: Mapping[str, Any] = {
    "head_bits": 16, "chat_template": None, "task": "causal", "labels": [], "label_kind": "auto",
    "class_weights": {}, "kernels": "plain", "packing": False, "group_by_length": True,
    "data_weights": [], "stream_data": False, "shuffle_buffer": None, "processes": 1,
    "loss": "dpo", "beta": 0.1,
}  # fmt: skip


def differences(
    identity: Mapping[str, Any], stored: Mapping[str, Any], allowed: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Compare the values that decide the bits of a run with those of a checkpoint.

    Args:
        identity: values of the run now, by name.
        stored: values of the checkpoint, by name.
        allowed: groups of `COVERED` that may differ.

    Returns:
        A line for each difference that is refused; and a line for each difference that is allowed,
        with a line on the order of the rows if that changes.
    """
    # Older checkpoints do not name their threads: they are assumed to be the same as now.
    # Nor do they name when rows are tokenised: those of a stream always were beside the training.
    tokenized_first = not stored.get("stream_data")
    stored = {
        **_BEFORE, "threads": identity.get("threads"), "tokenize_first": tokenized_first, **stored,
    }  # fmt: skip
    differing = [name for name, value in identity.items() if stored.get(name) != value]
    for name, causes in _DERIVED.items():
        if name in differing and set(differing) & causes:
            differing.remove(name)
    refused, accepted = [], []
    if "processes" in differing:
        differing.remove("processes")
        accepted.append(
            f"{stored['processes']} processes before and {identity['processes']} now: sums have "
            "another order, so other bits, within float tolerance"
        )
    for name in differing:
        before, now, group = stored.get(name), identity[name], _group_of(name)
        is_digest = all(_DIGEST.fullmatch(str(value)) for value in (before, now))
        changed = f"{_HOLDS.get(name, name)} changed"
        found = changed if is_digest else f"{name} was {before!r} and is now {now!r}"
        if group in allowed:
            accepted.append(f"resuming with a change: {found}")
        else:
            refused.append(f"--resume: {found}; {_remedy(group, is_digest=is_digest)}")
    if any(_group_of(name) in _REORDERING for name in differing) and not refused:
        accepted.append(
            "the rest of this epoch is taken from a new order of the rows: some of them may come "
            "twice in it, others not at all"
        )
    return refused, accepted


def _group_of(name: str) -> str | None:
    return next((group for group, names in COVERED.items() if name in names), None)


def _remedy(group: str | None, *, is_digest: bool) -> str:
    if group is None:
        return "a run cannot change it; pass the stored value, or start a new run"
    back = "restore what the run had" if is_digest else "pass the stored one"
    return f"{back}, or pass --allow-change {group} to go on with other bits"


def check_resumable(
    identity: Mapping[str, Any], stored: StoredState, allowed: Sequence[str] = ()
) -> list[str]:
    """Return a line for each allowed difference.

    Args:
        identity: values of the run now, by name.
        stored: the state of the checkpoint.
        allowed: groups of `COVERED` that may differ.

    Raises:
        ConfigError: a difference is not allowed; the error lists all of them.
    """
    refused, accepted = differences(identity, stored.identity, allowed)
    if refused:
        raise ConfigError(*refused)
    return accepted


def effects(
    stored: StoredState, total_steps: int, options: OptimizerOptions, versions: Mapping[str, str]
) -> list[str]:
    """Return a line for each other difference that is no reason to refuse.

    Args:
        stored: the state of the checkpoint.
        total_steps: number of steps of the whole run that the user asks for now.
        options: decide the learning rate of each step.
        versions: versions of the libraries that compute now.
    """
    found = [schedule_effect(stored, total_steps, options)]
    changed = [
        f"{name} {stored.versions[name]} → {version}"
        for name, version in versions.items()
        if stored.versions.get(name, version) != version
    ]
    if changed:
        found.append(f"other versions than before, so maybe other bits: {', '.join(changed)}")
    return [effect for effect in found if effect]


def schedule_effect(stored: StoredState, total_steps: int, options: OptimizerOptions) -> str | None:
    """Say how a new number of steps changes the learning rate.

    Args:
        stored: the state of the checkpoint.
        total_steps: number of steps of the whole run that the user asks for now.
        options: decide the learning rate of each step.

    Returns:
        A sentence; None if the number is the stored one.
    """
    before, step = stored.total_steps, stored.progress.optimizer_step
    if before == total_steps:
        return None
    if total_steps <= step:
        return f"{step} steps are done and {total_steps} asked for: nothing is left to train"
    rate = learning_rate_at(step + 1, total_steps, options)
    planned = learning_rate_at(step + 1, before, options) if step < before else 0.0
    return (
        f"{total_steps} steps instead of {before}: the {options.scheduler} schedule is laid over "
        f"all of them, so step {step + 1} has learning rate {rate:.3g} (it was to be "
        f"{planned:.3g}); the result is not that of {total_steps} steps from the start"
    )


# ---------------------------------------------------------------- where to continue


def resume_point(
    output: Path,
    config: TrainConfig,
    identity: Mapping[str, Any],
    total_steps: int,
    announce: Announce,
) -> Path | None:
    """Find the checkpoint to continue from, check that it fits, and say what differs.

    Args:
        output: run folder.
        config: says whether to resume at all, from which checkpoint, and which groups may differ.
        identity: the values that decide the bits of the run now, by name.
        total_steps: number of steps of the whole run that the user asks for now.
        announce: receives the notices.

    Returns:
        The checkpoint; None to start from the beginning.

    Raises:
        ConfigError: a difference is not allowed; the error lists all of them.
        InputError: the named checkpoint does not exist.
        StorageError: the named checkpoint is damaged, or all checkpoints of the run are.
    """
    if config.resume is None:
        return None
    found = find_checkpoint(output, config.resume)
    for fault in found.damaged:
        announce(Notice(f"passed over a damaged checkpoint: {fault}"))
    if found.folder is None:
        announce(Notice(f"{output}: no checkpoint yet; starting from the beginning"))
        return None
    stored = read_state(found.folder)
    said = check_resumable(identity, stored, config.allow_change)
    said.append(f"resuming from {found.folder}")
    said += effects(stored, total_steps, config, library_versions())
    for text in said:
        announce(Notice(text))
    return found.folder


def is_finished(output: Path, resume: Path, config: TrainConfig) -> bool:
    """Return whether a run ended, wrote its adapter, and is not asked to train further.

    Args:
        output: run folder.
        resume: the run's checkpoint to resume from.
        config: the options of this start.
    """
    # A run that was killed between its last checkpoint and its adapter still has its end to do.
    is_written = (output / WEIGHTS).is_file() and (output / CONFIG).is_file()
    if not is_written or not read_state(resume).progress.finished:
        return False
    asked = resolve(TrainConfig, [read_config_file(output / CONFIG)])
    same = (asked.epochs, asked.max_steps) == (config.epochs, config.max_steps)
    return same and file_hash(output / WEIGHTS) == file_hash(resume / WEIGHTS)
