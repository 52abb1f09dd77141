"""From a data file to an adapter folder: the main job.

config → data → tokenizer → plan → base → LoRA → training → adapter → report
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qlora_kit.config import TrainConfig, compared
from qlora_kit.data.samples import Samples
from qlora_kit.errors import (
    NumericsError,
    OutOfMemory,
    TornStep,
)
from qlora_kit.events import (
    Announce,
    Closing,
    Facts,
    Notice,
    announce_to,
    silent,
)
from qlora_kit.model.environment import prepare_environment
from qlora_kit.model.names import find_model
from qlora_kit.recipe.rows import read_data, surveyed, token_rows
from qlora_kit.redact import redacted_values
from qlora_kit.report.trackers import Tracking, check_tracker
from qlora_kit.signals import Stopped
from qlora_kit.storage import (
    storage_errors,
    write_text,
)
from qlora_kit.train.folder import (
    CONFIG,
    checkpoints,
    claimed_run,
    clear_run,
    step_of,
)

if TYPE_CHECKING:
    from qlora_kit.data.survey import Survey
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.infer.samples import SampleAccount
    from qlora_kit.lora.adapter import BaseRecord
    from qlora_kit.lora.attach import Adapter
    from qlora_kit.model.load import Base
    from qlora_kit.plan.run import MemoryAccount
    from qlora_kit.train.loop import TrainResult


def train(config: TrainConfig, announce: Announce = silent) -> dict[str, Any]:
    """Train a LoRA adapter, from a data file to an adapter folder."""
    prepare_environment(deterministic=config.deterministic)
    check_tracker(config.report_to)
    source = find_model(config.model)
    with claimed_run(
        config.output, source.name, resume=config.resume, overwrite=config.overwrite
    ) as output:
        samples, validation = read_data(config, announce)
        return _train(config, output, samples, validation, announce)


def _train(
    config: TrainConfig,
    output: Path,
    samples: Samples,
    validation: Samples | None,
    announce: Announce,
) -> dict[str, Any]:
    from qlora_kit.infer.samples import SampleAccount
    from qlora_kit.lora.adapter import BaseRecord
    from qlora_kit.lora.attach import LoraSpec, attach
    from qlora_kit.model.hardware import make_deterministic
    from qlora_kit.model.threads import choose_threads
    from qlora_kit.plan.run import MemoryAccount, plan_run
    from qlora_kit.report import data_view
    from qlora_kit.report.facts import header
    from qlora_kit.train.checkpoint import check_room
    from qlora_kit.train.loop import Saving, plan_steps, train_adapter
    from qlora_kit.train.resume import is_finished, resume_point

    if config.deterministic:
        make_deterministic()
    threads = choose_threads(config.threads)
    config = config.model_copy(update={"threads": threads.count})
    opened, rows, held_out = token_rows(samples, validation, config, announce)
    lora = LoraSpec.of(config)
    trainable = opened.trainable(config, lora)
    goes_on = config.resume is not None and bool(checkpoints(output))
    memory_plan = plan_run(
        config,
        opened.spec(config),
        lora,
        rows.rows,
        held_out.rows if held_out else None,
        announce,
        choose=not goes_on,
    )
    config = memory_plan.config if memory_plan else config
    plan = plan_steps(len(rows.rows), config)
    check_room(output, trainable, plan, config)
    base = opened.load(config, announce, threads)
    adapter = attach(base, lora, config.seed)
    record = BaseRecord.of(base, opened.fetched.revision, rows.template_hash)
    identity = _identity(config, rows, held_out, base)
    resume = resume_point(output, config, identity, plan.total, announce)
    if resume is not None and is_finished(output, resume, config):
        announce(Notice(f"{output}: this run is finished; nothing to do"))
        return {"output": str(output), "finished": True}

    if config.overwrite:
        clear_run(output)
    facts = header(adapter, rows, held_out, samples, config)
    announce(Facts(f"qlora-kit: {find_model(config.model).name} → {output}", facts))
    _save_inputs(output, config, opened.tokenizer)
    found = surveyed(samples, validation, rows, held_out, opened, config, data_view.ROWS)
    _show_data(output, found, announce)
    account = MemoryAccount(output, memory_plan, announce)
    written = SampleAccount(output, base, opened.tokenizer, announce)
    # A token in a cache of keys and values takes up to what two take in training.
    tokens_at_once = config.batch_size * max(rows.rows.lengths()) // 2
    written.begin(config.samples, (held_out or rows).rows, tokens_at_once)
    try:
        first_step = 1 if resume is None else step_of(resume) + 1
        with Tracking(config, output, first_step, announce) as tracking:
            result = train_adapter(
                adapter,
                rows.rows,
                config,
                pad_token_id=opened.tokenizer.pad_token_id,
                evaluate=_validation(base, held_out, config, opened.tokenizer, announce),
                saving=Saving(output, record, resume, identity),
                before_first_step=account.rehearse if config.rehearse else None,
                announce=_with_log(output, config, tracking, announce),
            )
    except (Stopped, NumericsError, OutOfMemory) as end:
        if checkpoints(output):
            until = " until the last checkpoint" if isinstance(end, TornStep) else ""
            again = f"qlora-kit train --output {shlex.quote(str(output))} --resume"
            announce(Notice(f"what was trained{until} is saved; go on with: {again}"))
        raise
    return _finish_run(output, config, adapter, record, result, account, written, facts, announce)


def _validation(
    base: Base,
    held_out: Tokenized | None,
    config: TrainConfig,
    tokenizer: Any,
    announce: Announce,
) -> Callable[[], float] | None:
    """Return what measures the held-out rows, with as large a batch as memory has allowed."""
    from qlora_kit.infer.evaluate import evaluate as measure

    if held_out is None:
        return None
    batch_size = config.eval_batch_size

    def validation_loss() -> float:
        nonlocal batch_size
        measured = measure(
            base,
            held_out.rows,
            batch_size=batch_size,
            pad_token_id=tokenizer.pad_token_id,
            chunk_tokens=config.loss_chunk_tokens,
            announce=announce,
        )
        batch_size = measured.batch_size
        return measured.loss

    return validation_loss


def _identity(
    config: TrainConfig, rows: Tokenized, held_out: Tokenized | None, base: Base
) -> dict[str, Any]:
    """Return everything that must be equal for a resumed run to have the same bits."""
    return {
        **config.model_dump(mode="json", include=set(compared(TrainConfig))),
        **rows.origin,
        "rows": rows.rows.content_hash(),
        "validation": held_out.rows.content_hash() if held_out else None,
        "base": base.digest,
        "dtype": base.hardware.dtype_name,
        "device": base.hardware.device.type,
        # Where a sum is cut depends on them.
        "threads": config.threads if base.hardware.device.type == "cpu" else None,
    }


def _save_inputs(output: Path, config: TrainConfig, tokenizer: Any) -> None:
    write_text(
        output / CONFIG,
        yaml.safe_dump(redacted_values(config.model_dump(mode="json")), sort_keys=False),
    )
    with storage_errors(output):
        tokenizer.save_pretrained(output)


def _show_data(output: Path, found: Survey, announce: Announce) -> None:
    from qlora_kit.report import data_view

    write_text(output / data_view.NAME, data_view.data_page(found))
    for warning in found.warnings():
        announce(Notice(warning))


def _with_log(
    output: Path, config: TrainConfig, tracking: Tracking, announce: Announce
) -> Announce:
    from qlora_kit.report.log import Log

    return announce_to((Log(output, config.logging_steps), tracking, announce))


def _finish_run(
    output: Path,
    config: TrainConfig,
    adapter: Adapter,
    record: BaseRecord,
    result: TrainResult,
    account: MemoryAccount,
    written: SampleAccount,
    facts: tuple[tuple[str, str], ...],
    announce: Announce,
) -> dict[str, Any]:
    """Write the plot, the card, the page and the adapter; say what to do next."""
    from qlora_kit.lora.adapter import save_adapter
    from qlora_kit.plan.run import PICTURE
    from qlora_kit.report import card, log, plot, run_page
    from qlora_kit.report.facts import RunSummary, speed

    rows = log.read_log(output / log.NAME)
    plot.draw_loss(rows, output / plot.NAME)
    results = (*_results(result), *speed(rows), *account.close(result.peak_memory_bytes))
    commands = _next_commands(output, config)
    summary = RunSummary.of(config, record.base, facts, results, record.versions, commands)
    card.write_card(output, summary)
    run_page.write_run_page(
        output,
        summary,
        rows,
        [sample.rows() for sample in written.close()],
        loss_picture=output / plot.NAME,
        step_picture=output / PICTURE,
        on_gpu=adapter.base.hardware.device.type != "cpu",
        predicted_bytes=account.plan.prediction.peak.bytes if account.plan else None,
    )
    # Last: a run folder with the weights of its last checkpoint has all the rest.
    save_adapter(adapter, output, record)
    announce(Facts("result", results))
    files = tuple(sorted(str(path) for path in output.glob("[!.]*")))
    announce(Closing(files, commands))
    return {"output": str(output), "finished": True, **asdict(result)}


def _next_commands(output: Path, config: TrainConfig) -> tuple[str, ...]:
    name = shlex.quote(str(output))
    merged = shlex.quote(str(Path("merged") / output.name))
    commands = (
        f'qlora-kit generate --adapter {name} --prompt "..."',
        f"qlora-kit evaluate --adapter {name} --data test.jsonl",
        f"qlora-kit export {name} --to {merged}",
    )
    if config.report_to == "tensorboard":
        return (*commands, f"tensorboard --logdir {shlex.quote(str(output.parent))}")
    return commands


def _results(result: TrainResult) -> tuple[tuple[str, str], ...]:
    rows = [
        ("optimiser steps", f"{result.progress.optimizer_step} ({result.reason})"),
        ("training loss", f"{result.last_loss:.4f} in the last step"),
    ]
    if result.progress.best_loss is not None:
        step = result.progress.best_step
        rows.append(("validation loss", f"{result.progress.best_loss:.4f} at best, step {step}"))
    if result.progress.skipped_steps:
        rows.append(("skipped steps", f"{result.progress.skipped_steps} (not finite; see the log)"))
    if result.progress.micro_batch_rows is not None:
        fewer = f"{result.progress.micro_batch_rows} rows at a time, after memory ran out"
        rows.append(("micro-batch", fewer))
    rows.append(("time", f"{result.seconds:.1f} s"))
    rows.append(("memory of the process", f"{result.peak_memory_bytes / 1e9:.2f} GB"))
    return tuple(rows)
