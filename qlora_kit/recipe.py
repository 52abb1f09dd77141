"""The order of the stages. The only file that knows it; it reads like the README.

    config → data → tokenizer → base → LoRA → training → adapter → report

Each function is one command: it takes the command's configuration and a listener, and
returns a plain dictionary for programs. torch is imported only after everything that can be
checked without it has been.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qlora_kit.config import (
    BaseModelOptions,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PlanConfig,
    TrainConfig,
)
from qlora_kit.data.samples import Samples, load_samples
from qlora_kit.data.shapes import Conversation
from qlora_kit.errors import (
    AdapterError,
    ConfigError,
    NumericsError,
    OutOfMemory,
    OutputError,
)
from qlora_kit.events import Announce, Answered, Closing, Facts, Notice, announce_to, silent
from qlora_kit.model.names import find_model
from qlora_kit.opening import as_trained, open_tokenizer, put_on, stored_options
from qlora_kit.redact import redacted_values
from qlora_kit.signals import Stopped
from qlora_kit.storage import (
    check_writable,
    storage_errors,
    write_text,
)
from qlora_kit.train.folder import CONFIG, checkpoints, claimed_run, clear_run

if TYPE_CHECKING:
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.lora.adapter import BaseRecord
    from qlora_kit.lora.attach import Adapter
    from qlora_kit.model.load import Base
    from qlora_kit.plan.planning import Plan
    from qlora_kit.train.loop import TrainResult


# ---------------------------------------------------------------- train


def train(config: TrainConfig, announce: Announce = silent) -> dict[str, Any]:
    """Train a LoRA adapter, from a data file to an adapter folder."""
    source = find_model(config.model)
    with claimed_run(
        config.output, source.name, resume=config.resume, overwrite=config.overwrite
    ) as output:
        samples, validation = _read_data(config, announce)
        return _train(config, output, samples, validation, announce)


def _train(
    config: TrainConfig,
    output: Path,
    samples: Samples,
    validation: Samples | None,
    announce: Announce,
) -> dict[str, Any]:
    from qlora_kit.lora.adapter import BaseRecord
    from qlora_kit.lora.attach import LoraSpec, attach
    from qlora_kit.model.hardware import make_deterministic
    from qlora_kit.model.tokenizer import template_hash
    from qlora_kit.report.facts import header
    from qlora_kit.train.checkpoint import check_room
    from qlora_kit.train.loop import Saving, plan_steps, train_adapter
    from qlora_kit.train.resume import is_finished, resume_point

    if config.deterministic:
        make_deterministic()
    opened = open_tokenizer(config, announce)
    rows, held_out = _tokenize_data(samples, validation, opened.tokenizer, config, announce)
    opened.check_positions(config, rows)
    _check_validation(config, held_out, announce)
    lora = LoraSpec.of(config)
    plan = plan_steps(len(rows.rows), config)
    check_room(output, opened.trainable(config, lora), plan, config)
    base = opened.load(config, announce)
    adapter = attach(base, lora, config.seed)
    is_chat = isinstance(samples.items[0], Conversation)
    hash_ = template_hash(opened.tokenizer) if is_chat else None
    record = BaseRecord.of(base, opened.fetched.revision, hash_)
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
    try:
        result = train_adapter(
            adapter,
            rows.rows,
            config,
            pad_token_id=opened.tokenizer.pad_token_id,
            evaluate=_validation(base, held_out, config, opened.tokenizer, announce),
            saving=Saving(output, record, resume, identity),
            announce=_with_log(output, config, announce),
        )
    except (Stopped, NumericsError, OutOfMemory):
        if checkpoints(output):
            again = f"qlora-kit train --output {shlex.quote(str(output))} --resume"
            announce(Notice(f"what was trained is saved; go on with: {again}"))
        raise
    return _finish_run(output, adapter, record, result, facts, announce)


def _read_data(config: TrainConfig, announce: Announce) -> tuple[Samples, Samples | None]:
    samples = load_samples(config.data)
    if config.data is None:
        announce(
            Notice(
                f"no --data: training on the built-in sample data ({len(samples.items)} spoken "
                "amounts to be written in figures)"
            )
        )
    return samples, load_samples(config.validation) if config.validation else None


def _tokenize_data(
    samples: Samples,
    validation: Samples | None,
    tokenizer: Any,
    config: TrainConfig,
    announce: Announce,
) -> tuple[Tokenized, Tokenized | None]:
    """Tokenise, hold out validation rows, and say what became of every row."""
    from qlora_kit.data.tokens import split_validation, tokenize

    rows = tokenize(samples, tokenizer, config)
    announce(Notice(f"data: {rows.counts.describe()}"))
    if validation is not None:
        held_out = tokenize(validation, tokenizer, config)
        announce(Notice(f"validation: {held_out.counts.describe()}"))
        return rows, held_out
    kept, split = split_validation(rows, config.validation_fraction, config.seed)
    if not len(kept.rows):
        raise ConfigError("--validation-fraction: holds out every row; expected some to train on")
    if split is not None:
        announce(Notice(f"validation: {len(split.rows)} rows held out of the data"))
    return kept, split


def _check_validation(config: TrainConfig, held_out: Tokenized | None, announce: Announce) -> None:
    """Options that need validation rows must not be silently without effect."""
    if held_out is not None:
        return
    remedy = "give --validation FILE, or 200 rows or more with --validation-fraction above 0"
    if config.early_stopping_patience is not None:
        raise ConfigError(f"--early-stopping-patience: there are no validation rows; {remedy}")
    if config.eval_steps is not None:
        announce(Notice(f"--eval-steps has no effect: there are no validation rows; {remedy}"))


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
    from qlora_kit.train.resume import OPTIONS

    return {
        **config.model_dump(mode="json", include=set(OPTIONS)),
        **rows.origin,
        "rows": rows.content_hash(),
        "validation": held_out.content_hash() if held_out else None,
        "base": base.digest,
        "dtype": base.hardware.dtype_name,
        "device": base.hardware.device.type,
    }


# ---------------------------------------------------------------- the run folder


def _save_inputs(output: Path, config: TrainConfig, tokenizer: Any) -> None:
    write_text(
        output / CONFIG,
        yaml.safe_dump(redacted_values(config.model_dump(mode="json")), sort_keys=False),
    )
    with storage_errors(output):
        tokenizer.save_pretrained(output)


def _with_log(output: Path, config: TrainConfig, announce: Announce) -> Announce:
    from qlora_kit.report.log import Log

    return announce_to((Log(output, config.logging_steps), announce))


def _finish_run(
    output: Path,
    adapter: Adapter,
    record: BaseRecord,
    result: TrainResult,
    facts: tuple[tuple[str, str], ...],
    announce: Announce,
) -> dict[str, Any]:
    """Write the plot, the card and the adapter; say what to do next."""
    from qlora_kit.lora.adapter import save_adapter
    from qlora_kit.report import card, log, plot

    rows = log.read_log(output / log.NAME)
    plot.draw_loss(rows, output / plot.NAME)
    results = _results(result)
    card.write_card(
        output, base=record.base, facts=facts, results=results, versions=record.versions
    )
    # Last: a run folder with the weights of its last checkpoint has all the rest.
    save_adapter(adapter, output, record)
    announce(Facts("result", results))
    name = shlex.quote(str(output))
    announce(
        Closing(
            written=tuple(sorted(str(path) for path in output.glob("[!.]*"))),
            commands=(
                f'qlora-kit generate --adapter {name} --prompt "..."',
                f"qlora-kit evaluate --adapter {name} --data test.jsonl",
                f"qlora-kit export {name} --to {shlex.quote(str(Path('merged') / output.name))}",
            ),
        )
    )
    return {"output": str(output), "finished": True, **asdict(result)}


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
    rows.append(("peak memory", f"{result.peak_memory_bytes / 1e9:.2f} GB"))
    return tuple(rows)


# ---------------------------------------------------------------- evaluate, generate


def evaluate(config: EvaluateConfig, announce: Announce = silent) -> dict[str, Any]:
    """Measure a model, with or without an adapter, on a data file."""
    config = as_trained(config)
    find_model(config.model)
    samples = load_samples(config.data, split="test").first(config.max_rows)
    if config.data is None:
        announce(Notice(f"no --data: the {len(samples.items)} held-out rows of the sample data"))

    from qlora_kit.data.tokens import tokenize
    from qlora_kit.infer.evaluate import evaluate as measure

    opened = open_tokenizer(config, announce, config.adapter)
    rows = tokenize(samples, opened.tokenizer, config)
    announce(Notice(f"data: {rows.counts.describe()}"))
    opened.check_positions(config, rows)
    base = opened.load(config, announce)
    put_on(base, config, announce)
    measured = measure(
        base,
        rows.rows,
        batch_size=config.batch_size,
        pad_token_id=opened.tokenizer.pad_token_id,
        chunk_tokens=config.loss_chunk_tokens,
        announce=announce,
    )
    result = {**asdict(measured), "perplexity": measured.perplexity}
    facts = [
        ("model", f"{config.model}, {base.quantization.describe()}"),
        ("adapter", str(config.adapter or "none")),
        ("rows", f"{measured.rows:,}, {measured.supervised_tokens:,} supervised tokens"),
        ("loss", f"{measured.loss:.4f} nats per token"),
        ("perplexity", f"{measured.perplexity:.3f}"),
        ("token accuracy", f"{measured.token_accuracy:.2%}"),
    ]
    if config.exact_match:
        from qlora_kit.infer.exact_match import count_exact

        right = count_exact(base, opened.tokenizer, samples, config.max_new_tokens)
        result["exact_match"] = right / len(samples.items)
        facts.append(
            ("exact match", f"{right} of {len(samples.items)} ({result['exact_match']:.1%})")
        )
    announce(Facts("evaluation", tuple(facts)))
    return result


def generate(config: GenerateConfig, announce: Announce = silent) -> dict[str, Any]:
    """Continue a prompt, or answer it where the model has a chat template."""
    config = as_trained(config)
    find_model(config.model)
    if not config.prompt:
        raise ConfigError('--prompt: missing; give the text to continue, as --prompt "..."')

    from qlora_kit.data.encode import prompt_ids
    from qlora_kit.data.shapes import Message
    from qlora_kit.data.template import Renderer
    from qlora_kit.infer.generate import Sampling
    from qlora_kit.infer.generate import generate as continue_prompts

    opened = open_tokenizer(config, announce, config.adapter)
    base = opened.load(config, announce)
    record = put_on(base, config, announce)
    raw = config.raw or not opened.has_template or (record is not None and not record.template_hash)
    turns = config.prompt if raw else (Message("user", config.prompt),)
    ids = prompt_ids(opened.tokenizer, Renderer(opened.tokenizer).prompt_text(turns))
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed)
    (text,) = continue_prompts(base, opened.tokenizer, [ids], sampling)
    announce(Answered(text.strip()))
    return {"prompt": config.prompt, "text": text}


# ---------------------------------------------------------------- plan


def plan(config: PlanConfig, announce: Announce = silent) -> dict[str, Any]:
    """Predict the memory of a run by running its code on fake tensors."""
    from qlora_kit.plan.planning import make_plan
    from qlora_kit.plan.simulate import PURPOSES
    from qlora_kit.report.memory import breakdown_rows, draw_memory, phase_rows

    made = make_plan(config)
    found = made.as_json()
    for warning in made.warnings:
        announce(Notice(warning))
    title = (
        f"{config.model}, {config.bits} bits, {config.batch_size} × {config.max_length} tokens "
        f"on {found['settings']['device']} ({found['settings']['dtype']})"
    )
    peaks = phase_rows(found["phase_peaks_bytes"], found["host_phase_peaks_bytes"])
    announce(Facts(f"predicted peak of each phase: {title}", peaks))
    announce(
        Facts("at the largest of them", breakdown_rows(made.prediction.peak.by_purpose, PURPOSES))
    )
    announce(Facts("predicted peak", _card_rows(made)))
    if config.plot is not None:
        draw_memory(found["breakdown_bytes"], PURPOSES, title, config.plot)
        announce(Closing((str(config.plot),), ()))
    if made.fits is False:
        raise ConfigError(
            f"--vram: the run takes {made.card_bytes / 1e9:.2f} GB of a card and the budget is "
            f"{(config.vram or 0) / 1e9:.2f} GB; pass a smaller --max-length, --batch-size or "
            "--eval-batch-size, or fewer --bits"
        )
    return found


def _card_rows(made: Plan) -> tuple[tuple[str, str], ...]:
    from qlora_kit.plan.planning import CONTEXT_BYTES, FRAGMENTATION

    rows = [("allocated", f"{made.prediction.peak.bytes / 1e9:.2f} GB")]
    if made.settings["device"] == "cuda":
        assumed = f"{CONTEXT_BYTES / 1e9:.1f} GB context and {FRAGMENTATION:.0%} margin, assumed"
        rows.append(("of a card", f"{made.card_bytes / 1e9:.2f} GB (with {assumed})"))
    if made.budget_bytes is not None:
        verdict = "fits" if made.fits else "does not fit"
        rows.append(("budget", f"{made.budget_bytes / 1e9:.2f} GB: {verdict}"))
    return tuple(rows)


# ---------------------------------------------------------------- export


def export(config: ExportConfig, announce: Announce = silent) -> dict[str, Any]:
    """Dequantise the base, merge an adapter into it and write an unquantised model."""
    if config.to.exists() and not config.overwrite:
        raise OutputError(f"{config.to}: exists; pass --overwrite, or name another --to")
    check_writable(config.to)
    stored = stored_options(config.adapter, config.model)
    model = stored.get("model")
    if model is None:
        raise AdapterError(f"{config.adapter}: does not say what its base is; name it with --model")
    options = BaseModelOptions(**stored, device=config.device)

    from qlora_kit.export.merge import merge_to
    from qlora_kit.lora.adapter import read_adapter
    from qlora_kit.model.hardware import choose_hardware, dtype_named

    adapter = read_adapter(config.adapter)
    opened = open_tokenizer(options, announce, config.adapter)
    spec = opened.spec(options)
    merged = merge_to(
        config.to,
        adapter,
        spec,
        opened.tokenizer,
        dtype=dtype_named(config.dtype),
        device=choose_hardware(config.device).device,
        shard_bytes=config.max_shard_size,
        overwrite=config.overwrite,
        announce=announce,
    )
    result = {**asdict(merged), "folder": str(merged.folder)}
    facts = (
        ("base", f"{model}, dequantised from {spec.quantization.describe()}"),
        ("merged", f"{merged.layers} layers of {merged.tensors} tensors"),
        ("size", f"{merged.bytes / 1e9:.3f} GB in {merged.shards} file(s), {config.dtype}"),
    )
    announce(Facts(f"merged into {config.to}", facts))
    evaluate_it = (
        f"qlora-kit evaluate --model {shlex.quote(str(config.to))} --bits 16 --data test.jsonl"
    )
    announce(Closing((str(config.to),), (evaluate_it,)))
    return result
