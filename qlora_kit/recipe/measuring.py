"""Measures a model on a data file, with or without adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_kit.config import EvaluateConfig, pinned_name
from qlora_kit.data.fields import RowAdapters
from qlora_kit.data.samples import Samples, load_samples
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.events import Announce, Closing, Facts, Notice, silent
from qlora_kit.infer.predictions import check_predictions, write_predictions
from qlora_kit.model.environment import prepare_environment
from qlora_kit.opening.adapters import adapter_of, as_trained, check_base, put_on, put_several_on
from qlora_kit.opening.model import open_tokenizer
from qlora_kit.opening.tasks import check_generates, check_one_adapter, stored_task_name
from qlora_kit.report.labels import label_facts

if TYPE_CHECKING:
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.infer.answers import Answers, Question
    from qlora_kit.infer.evaluate import Evaluation
    from qlora_kit.infer.metrics import Figure
    from qlora_kit.lora.several import PerRow
    from qlora_kit.model.load import Base
    from qlora_kit.opening.model import Opened


@dataclass(frozen=True)
class _Measurement:
    """A model to be measured, and the rows that it is measured on.

    Attributes:
        config: the options of the command.
        opened: the model's tokenizer and its task.
        samples: the samples as they were read.
        rows: the tokenised samples.
        questions: the questions of the samples, where answers are generated; else none.
        base: the loaded base, which adapters are put on as they are measured.
        announce: receives the events.
    """

    config: EvaluateConfig
    opened: Opened
    samples: Samples
    rows: Tokenized
    questions: Sequence[Question]
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

    def answers(self, per_row: PerRow | None = None) -> Answers | None:
        """Let the model answer the questions; return None where there are none."""
        if not self.questions:
            return None
        from qlora_kit.infer.answers import answer
        from qlora_kit.infer.generate import TOGETHER

        config = self.config
        return answer(
            self.base,
            self.opened.tokenizer,
            self.questions,
            config.max_new_tokens,
            batch_size=config.batch_size if "batch_size" in config.model_fields_set else TOGETHER,
            per_row=per_row,
            announce=self.announce,
        )

    def result(self, found: Evaluation, answers: Answers | None) -> _Result:
        """Return what was measured of some rows and of the answers to the same rows."""
        metrics = self.config.answer_metrics
        return _Result(self.figures(found), answers.measured(metrics) if answers else {})

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
            **found.details,
        }

    def in_words(self, result: _Result) -> list[tuple[str, str]]:
        """Return the loss, the figures that follow from it, and the metrics, as printed."""
        task, figures = self.opened.task, result.forced
        formats = {name: form for name, (_, form) in task.of_loss(figures["loss"]).items()}
        rows = [("loss", f"{figures['loss']:.4f} {task.unit}")]
        for name, form in {**formats, **task.metrics}.items():
            rows.append((_words(name), format(figures[name], form)))
        rows += [(figure.words, figure.in_full()) for figure in result.answers.values()]
        return rows + result.signatures()

    def in_short(self, result: _Result) -> str:
        """Return the loss and the metrics in one line."""
        parts = [f"loss {result.forced['loss']:.4f}"]
        for name, form in self.opened.task.metrics.items():
            parts.append(f"{_words(name)} {format(result.forced[name], form)}")
        parts += [f"{each.words} {each.in_short()}" for each in result.answers.values()]
        return "  ".join(parts)

    def finish(
        self, facts: Sequence[tuple[str, str]], title: str, predictions: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """Tell what was measured, write the predictions that were asked for, and name their file.

        The figures are told first: they took long, and the file may be refused by the disk.
        """
        self.announce(Facts(title, tuple(facts)))
        path = self.config.predictions
        if path is None:
            return {}
        write_predictions(path, predictions)
        self.announce(Closing((str(path),), ()))
        return {"predictions": str(path)}

    @property
    def model(self) -> tuple[str, str]:
        """The name and quantisation of the model, as printed."""
        return ("model", f"{self.config.model}, {self.base.quantization.describe()}")


@dataclass(frozen=True)
class _Result:
    """What was measured of one adapter on its rows.

    Attributes:
        forced: of the rows as they are: loss, metrics and counts, by their names outside.
        answers: of what was generated, by their names outside.
    """

    forced: Mapping[str, Any]
    answers: Mapping[str, Figure]

    def as_json(self) -> dict[str, Any]:
        """Return all figures, those of sacrebleu with its signature."""
        result = dict(self.forced)
        for name, figure in self.answers.items():
            result[name] = figure.value
            if figure.signature:
                result[f"{name}_signature"] = figure.signature
        return result

    def signatures(self) -> list[tuple[str, str]]:
        """Return how figures were computed, as it is printed, where there is more than one way."""
        signed = [figure for figure in self.answers.values() if figure.signature]
        return [(f"{figure.words} signature", figure.signature) for figure in signed]


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
    if config.predictions is not None:
        check_predictions(config.predictions, config.data, overwrite=config.overwrite)
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
    check_one_adapter(opened.task, config.adapters)
    if adapter_of(config) is None:
        opened.check_head()
    if task == "preference" and config.adapters:
        raise ConfigError(
            f"--adapters: {len(config.adapters)} adapters, and each may have compared pairs of "
            "answers by a loss of its own; expected one; pass --adapter, one after the other"
        )
    if config.generates_for is not None:
        check_generates(opened.task, config.generates_for)
    rows = tokenize(samples, opened.tokenizer, config, makes=opened.task.makes)
    announce(Notice(f"data: {rows.describe()}"))
    opened.check_positions(config, rows)
    questions = _questions(config, opened, samples)
    base = opened.load(config, announce, choose_threads(config.threads))
    if opened.task.refers:
        rows = _compared_with(base, rows, opened, config, announce)
    what = _Measurement(config, opened, samples, rows, questions, base, announce)
    if config.adapters:
        return _evaluate_mixed(what) if by_row else _evaluate_several(what)
    return _evaluate_one(what)


def _compared_with(
    base: Base, rows: Tokenized, opened: Opened, config: EvaluateConfig, announce: Announce
) -> Tokenized:
    """Return pairs with what the base says of them, before an adapter is put on it."""
    from qlora_kit.infer.references import answer_logprobs, with_references

    announce(Notice("reference: the base without its adapter"))
    logprobs = answer_logprobs(
        base, rows.rows, opened.task, batch_size=config.batch_size,
        pad_token_id=opened.tokenizer.pad_token_id, chunk_tokens=config.loss_chunk_tokens,
        announce=announce,
    )  # fmt: skip
    return replace(rows, rows=with_references(rows.rows, logprobs))


def _questions(config: EvaluateConfig, opened: Opened, samples: Samples) -> Sequence[Question]:
    """Return what is to be answered; nothing where no answers are asked for.

    Raises:
        ConfigError: the model has no positions for the longest question and its answer.
        DataError: see `questions_of`.
    """
    if config.generates_for is None:
        return ()
    from qlora_kit.infer.answers import questions_of

    asks = opened.task.asks(opened.tokenizer, config.max_length)
    questions = questions_of(samples, asks, config.answer_metrics, config.generates_for)
    positions = opened.positions(config)
    longest = max(questions, key=lambda question: len(question.prompt))
    if positions is None or len(longest.prompt) + config.max_new_tokens <= positions:
        return questions
    room = positions - len(longest.prompt)
    if room < 1:
        raise DataError(
            f"{longest.place}: the question has {len(longest.prompt)} tokens and the model only "
            f"{positions} positions; expected room for an answer; leave the record out"
        )
    raise ConfigError(
        f"--max-new-tokens: found {config.max_new_tokens} after a question of "
        f"{len(longest.prompt)} tokens ({longest.place}), and the model has {positions} positions; "
        f"expected {room} or less; pass --max-new-tokens {room}"
    )


def _evaluate_one(what: _Measurement) -> dict[str, Any]:
    """Measure the base with the adapter that the user named, if any."""
    put_on(what.base, what.config, what.announce)
    result, answers = _measured(what)
    weighs = what.opened.task.weighs
    facts = [
        what.model,
        ("adapter", pinned_name(what.config.adapter) if what.config.adapter else "none"),
        ("rows", f"{result.forced['rows']:,}, {result.forced[weighs]:,} {_words(weighs)}"),
        *what.in_words(result),
    ]
    predictions = answers.predictions(result.answers) if answers else []
    written = what.finish(facts, "evaluation", predictions)
    if rows := label_facts(result.forced):
        what.announce(Facts("each label", rows))
    return {**result.as_json(), **written}


def _measured(what: _Measurement) -> tuple[_Result, Answers | None]:
    """Return the figures, and the answers, of the base with its adapter, if it has one."""
    from qlora_kit.infer.evaluate import evaluate as measure

    found = measure(what.base, what.rows.rows, **what.options)
    answers = what.answers()
    return what.result(found, answers), answers


def _evaluate_several(what: _Measurement) -> dict[str, Any]:
    """Measure all rows with one adapter after the other; the base is loaded once."""
    adapters = put_several_on(what.base, what.config, what.announce)
    results, predictions = {}, []
    for name in adapters.names:
        adapters.set_adapter(name)
        results[name], answers = _measured(what)
        if answers:
            given_by = [name] * len(answers.texts)
            predictions += answers.predictions(results[name].answers, given_by)
    facts = [
        what.model,
        ("rows", f"{len(what.rows.rows):,}"),
        ("adapters", f"{len(results)}, {adapters.bytes / 1e6:.1f} MB beside the base"),
    ]
    facts += [(name, what.in_short(result)) for name, result in results.items()]
    facts += next(iter(results.values())).signatures()
    written = what.finish(facts, "evaluation", predictions)
    return {"adapters": {name: each.as_json() for name, each in results.items()}, **written}


def _evaluate_mixed(what: _Measurement) -> dict[str, Any]:
    """Measure rows that name their adapters, in mixed batches, each row with its own adapter."""
    from qlora_kit.infer.evaluate import evaluate_mixed
    from qlora_kit.lora.several import PerRow

    adapters = put_several_on(what.base, what.config, what.announce)
    asked = [sample.adapter for sample in what.samples.items]
    rows = what.rows.rows
    per_row = PerRow(adapters, [asked[row] for row in rows["row"]])
    measured = evaluate_mixed(what.base, rows, per_row, **what.options)
    answers = what.answers(PerRow(adapters, asked))
    total = what.result(measured.total, answers)
    by_name = {}
    for name, part in measured.by_adapter.items():
        own = [row for row, asks in enumerate(asked) if asks == name]
        by_name[name] = what.result(part, answers.of(own) if answers else None)
    facts = [
        what.model,
        ("adapters", f"{len(adapters.names)}, {adapters.bytes / 1e6:.1f} MB beside the base"),
        ("all rows", f"{total.forced['rows']:,}: {what.in_short(total)}"),
    ]
    for name in (*adapters.names, None):
        if name in by_name:
            own_rows = f"{by_name[name].forced['rows']:,}: {what.in_short(by_name[name])}"
            facts.append((name or "the base alone", own_rows))
        elif name is not None:
            facts.append((name, "no row asks for it"))
    facts += total.signatures()
    predictions = answers.predictions(total.answers, asked) if answers else []
    written = what.finish(facts, "evaluation, each row with its adapter", predictions)
    parts = {name: result.as_json() for name, result in by_name.items()}
    alone = parts.pop(None, None)
    return {"total": total.as_json(), "base": alone, "adapters": parts, **written}
