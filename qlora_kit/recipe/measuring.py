"""Measures a model on a data file, with or without adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.config import EvaluateConfig
from qlora_kit.data.fields import RowAdapters
from qlora_kit.data.samples import Samples, load_samples
from qlora_kit.events import Announce, Facts, Notice, silent
from qlora_kit.model.environment import prepare_environment
from qlora_kit.opening import (
    adapter_of,
    as_trained,
    check_base,
    check_generates,
    open_tokenizer,
    put_on,
    put_several_on,
    stored_task_name,
)

if TYPE_CHECKING:
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.infer.evaluate import Evaluation
    from qlora_kit.lora.several import PerRow
    from qlora_kit.model.load import Base
    from qlora_kit.opening import Opened


@dataclass(frozen=True)
class _Measurement:
    """A model to be measured, and the rows that it is measured on.

    Attributes:
        config: the options of the command.
        opened: the model's tokenizer and its task.
        samples: the samples as they were read.
        rows: the tokenised samples.
        base: the loaded base, which adapters are put on as they are measured.
        announce: receives the events.
    """

    config: EvaluateConfig
    opened: Opened
    samples: Samples
    rows: Tokenized
    base: Base
    announce: Announce

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `infer.evaluate` that say how rows are run."""
        return {
            "batch_size": self.config.batch_size,
            "pad_token_id": self.opened.tokenizer.pad_token_id,
            "chunk_tokens": self.config.loss_chunk_tokens,
            "task": self.opened.task,
            "announce": self.announce,
        }

    def exactly_right(self, per_row: PerRow | None = None) -> list[bool]:
        """Return whether each sample is answered exactly as expected."""
        from qlora_kit.infer.exact_match import exact_answers

        return exact_answers(
            self.base, self.opened.tokenizer, self.samples, self.config.max_new_tokens, per_row
        )

    def figures(self, found: Evaluation) -> dict[str, Any]:
        """Return the result under the names that programs and people know."""
        task = self.opened.task
        return {
            "loss": found.loss,
            **found.metrics,
            task.weighs: found.weight,
            "rows": found.rows,
            "batch_size": found.batch_size,
            **{name: value for name, (value, _) in task.of_loss(found.loss).items()},
        }

    def in_words(self, figures: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return the loss, the figures that follow from it, and the metrics, as printed."""
        task = self.opened.task
        formats = {name: form for name, (_, form) in task.of_loss(figures["loss"]).items()}
        rows = [("loss", f"{figures['loss']:.4f} {task.unit}")]
        for name, form in {**formats, **task.metrics}.items():
            rows.append((_words(name), format(figures[name], form)))
        return rows

    def in_short(self, figures: Mapping[str, Any]) -> str:
        """Return the loss and the metrics in one line."""
        parts = [f"loss {figures['loss']:.4f}"]
        for name, form in self.opened.task.metrics.items():
            parts.append(f"{_words(name)} {format(figures[name], form)}")
        if "exact_match" in figures:
            parts.append(f"exact match {figures['exact_match']:.1%}")
        return "  ".join(parts)

    @property
    def model(self) -> tuple[str, str]:
        """The name and quantisation of the model, as printed."""
        return ("model", f"{self.config.model}, {self.base.quantization.describe()}")


def _words(key: str) -> str:
    return key.replace("_", " ")


def evaluate(config: EvaluateConfig, announce: Announce = silent) -> dict[str, Any]:
    """Measure a model on a data file, with or without adapters.

    Returns:
        The figures by name, for programs; with several adapters, the figures of each.
    """
    prepare_environment()
    config = as_trained(config)
    check_base(config.model, adapter_of(config))
    named = RowAdapters(config.adapter_field, tuple(config.adapters)) if config.adapters else None
    task = stored_task_name(config.model, adapter_of(config))
    samples = load_samples(config.data, "test", config, named, task=task)
    by_row = any(sample.adapter for sample in samples.items)
    samples = samples.first(config.max_rows)
    for text in samples.notices:
        announce(Notice(text))
    if config.data is None:
        announce(Notice(f"no --data: the {len(samples.items)} held-out rows of the sample data"))

    from qlora_kit.data.tokens import tokenize
    from qlora_kit.model.threads import choose_threads

    opened = open_tokenizer(config, announce, adapter_of(config), config.chat_template)
    if config.exact_match:
        check_generates(opened.task, "--exact-match")
    rows = tokenize(samples, opened.tokenizer, config, makes=opened.task.makes)
    announce(Notice(f"data: {rows.describe()}"))
    opened.check_positions(config, rows)
    base = opened.load(config, announce, choose_threads(config.threads))
    what = _Measurement(config, opened, samples, rows, base, announce)
    if config.adapters:
        return _evaluate_mixed(what) if by_row else _evaluate_several(what)
    return _evaluate_one(what)


def _evaluate_one(what: _Measurement) -> dict[str, Any]:
    """Measure the base with the adapter that the user named, if any."""
    put_on(what.base, what.config, what.announce)
    result = _measured(what)
    weight = f"{result[what.opened.task.weighs]:,} {_words(what.opened.task.weighs)}"
    facts = [
        what.model,
        ("adapter", str(what.config.adapter or "none")),
        ("rows", f"{result['rows']:,}, {weight}"),
        *what.in_words(result),
    ]
    if what.config.exact_match:
        count = len(what.samples.items)
        share = result["exact_match"]
        facts.append(("exact match", f"{round(share * count)} of {count} ({share:.1%})"))
    what.announce(Facts("evaluation", tuple(facts)))
    return result


def _measured(what: _Measurement) -> dict[str, Any]:
    """Return the figures of the base with the adapter that it carries, or that was chosen."""
    from qlora_kit.infer.evaluate import evaluate as measure

    result = what.figures(measure(what.base, what.rows.rows, **what.options))
    if what.config.exact_match:
        right = what.exactly_right()
        result["exact_match"] = sum(right) / len(right)
    return result


def _evaluate_several(what: _Measurement) -> dict[str, Any]:
    """Measure all rows with one adapter after the other; the base is loaded once."""
    adapters = put_several_on(what.base, what.config, what.announce)
    results = {}
    for name in adapters.names:
        adapters.set_adapter(name)
        results[name] = _measured(what)
    facts = [
        what.model,
        ("rows", f"{len(what.rows.rows):,}"),
        ("adapters", f"{len(results)}, {adapters.bytes / 1e6:.1f} MB beside the base"),
    ]
    facts += [(name, what.in_short(result)) for name, result in results.items()]
    what.announce(Facts("evaluation", tuple(facts)))
    return {"adapters": results}


def _evaluate_mixed(what: _Measurement) -> dict[str, Any]:
    """Measure rows that name their adapters, in mixed batches, each row with its own adapter."""
    from qlora_kit.infer.evaluate import evaluate_mixed
    from qlora_kit.lora.several import PerRow

    adapters = put_several_on(what.base, what.config, what.announce)
    asked = [sample.adapter for sample in what.samples.items]
    rows = what.rows.rows
    per_row = PerRow(adapters, [asked[row] for row in rows["row"]])
    measured = evaluate_mixed(what.base, rows, per_row, **what.options)
    total = what.figures(measured.total)
    by_name = {name: what.figures(part) for name, part in measured.by_adapter.items()}
    if what.config.exact_match:
        right = what.exactly_right(PerRow(adapters, asked))
        total["exact_match"] = sum(right) / len(right)
        for name, result in by_name.items():
            own = [each for each, asks in zip(right, asked, strict=True) if asks == name]
            result["exact_match"] = sum(own) / len(own)
    facts = [
        what.model,
        ("adapters", f"{len(adapters.names)}, {adapters.bytes / 1e6:.1f} MB beside the base"),
        ("all rows", f"{total['rows']:,}: {what.in_short(total)}"),
    ]
    for name in (*adapters.names, None):
        if name in by_name:
            own_rows = f"{by_name[name]['rows']:,}: {what.in_short(by_name[name])}"
            facts.append((name or "the base alone", own_rows))
        elif name is not None:
            facts.append((name, "no row asks for it"))
    what.announce(Facts("evaluation, each row with its adapter", tuple(facts)))
    alone = by_name.pop(None, None)
    return {"total": total, "base": alone, "adapters": by_name}
