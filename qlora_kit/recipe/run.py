"""One run of training that is ready to begin: its parts, and its story up to the report."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from qlora_kit.config import TrainConfig, compared
from qlora_kit.data.batch import TokenTable
from qlora_kit.data.mixed_stream import MixedPlace
from qlora_kit.data.samples import Samples
from qlora_kit.data.source_figures import source_figures
from qlora_kit.data.tokens import Counts, Tokenized
from qlora_kit.errors import DataError, HubError, NumericsError, OutOfMemory, TornStep, WorkerLost
from qlora_kit.events import Announce, Closing, Facts, Notice, announce_to
from qlora_kit.infer.evaluate import Evaluation
from qlora_kit.infer.samples import SampleAccount
from qlora_kit.infer.together import Together
from qlora_kit.lora.attach import Adapter, count_trainable
from qlora_kit.lora.files import BaseRecord
from qlora_kit.lora.writing import save_adapter
from qlora_kit.opening.model import Opened
from qlora_kit.opening.start import hash_of_start
from qlora_kit.opening.tasks import is_of_images
from qlora_kit.parallel.division import share_of
from qlora_kit.parallel.one import Processes
from qlora_kit.plan.planning import Plan
from qlora_kit.plan.rehearsal import rehearse
from qlora_kit.plan.run import PICTURE, MemoryAccount, StepTimes
from qlora_kit.plan.subject import Subject
from qlora_kit.recipe.agreement import check_alike, planned_by_writer
from qlora_kit.recipe.references import referring_rows
from qlora_kit.recipe.rows import surveyed
from qlora_kit.recipe.streaming import Learnt
from qlora_kit.recipe.validation import Validation
from qlora_kit.redact import redacted_values
from qlora_kit.report import card, data_view, log, plot, run_page
from qlora_kit.report.facts import RunSummary, header, speed
from qlora_kit.report.labels import write_labels
from qlora_kit.report.live_page import LivePage
from qlora_kit.report.profile import Profile, read_profile
from qlora_kit.report.tables import Rows
from qlora_kit.report.trackers import Tracking
from qlora_kit.signals import Stopped
from qlora_kit.step.kernels import Kernels
from qlora_kit.storage import manifest_hash, storage_errors, write_text
from qlora_kit.train.checkpoint import check_room
from qlora_kit.train.folder import CONFIG, checkpoints, clear_run, goes_on, step_of
from qlora_kit.train.loop import Saving, TrainResult, train_adapter
from qlora_kit.train.optimizer_step import OptimizerStep
from qlora_kit.train.packing import Packing
from qlora_kit.train.resume import is_finished, resume_point
from qlora_kit.train.windows import plan_steps


def planned(
    config: TrainConfig,
    subject: Subject,
    rows: int | None,
    output: Path,
    announce: Announce,
    processes: Processes,
) -> tuple[TrainConfig, Plan | None]:
    """Plan a run before any weight is loaded, and check that memory and disk have room for it.

    Args:
        config: the options of the run.
        subject: the run, on the hardware of this machine.
        rows: number of training rows of an epoch; None if they are not counted.
        output: the run folder.
        announce: receives the prediction and the choice.
        processes: the processes of the run. The plan is that of the largest of them.

    Returns:
        The options with the settings that the plan chose; and in the writer the plan, if one could
        be made.

    Raises:
        ConfigError: a target or pattern names no layer, or nothing fits the memory.
        StorageError: the disk is too full.
    """
    trainable = count_trainable(subject.spec.skeleton(), subject.lora)
    choose = processes.from_writer(lambda: not goes_on(output, config.resume))
    config, plan = planned_by_writer(config, subject, announce, processes, choose=choose)
    processes.in_writer(lambda: check_room(output, trainable, plan_steps(rows, config), config))
    return config, plan


@dataclass(frozen=True)
class Run:
    """A run that is ready to begin.

    Attributes:
        config: the options of the run, with the settings that the plan chose.
        output: the run folder, claimed for this process, or for the writer of several.
        announce: receives the events.
        samples: the training data as it was read.
        validation: the validation data as it was read, if there is a file of it.
        opened: the tokenizer, and the place of the base.
        rows: the training rows, or those of the first samples of a stream.
        learnt: all that is learnt from.
        held_out: the validation rows, if there are any.
        plan: the plan of the memory of a process, in the writer, if one could be made.
        adapter: the adapter, attached to the loaded base.
        kernels: the kernels that serve the loaded base.
        packing: whether the samples of a step are packed, and why.
        processes: the processes of the run. The writer alone prepares and finishes the folder.
    """

    config: TrainConfig
    output: Path
    announce: Announce
    samples: Samples
    validation: Samples | None
    opened: Opened
    rows: Tokenized
    learnt: Learnt
    held_out: Tokenized | None
    plan: Plan | None
    adapter: Adapter
    kernels: Kernels
    packing: Packing
    processes: Processes

    @cached_property
    def record(self) -> BaseRecord:
        """The record of the base for the adapter's files."""
        revision = self.opened.fetched.revision
        config = self.config
        compared_by = (config.loss, config.beta) if config.task == "preference" else None
        return BaseRecord.of(
            self.adapter.base, revision, self.rows.template_hash, compared_by, config.new_tokens
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All values that must be equal for a resumed run to have the same bits, by name."""
        config, base = self.config, self.adapter.base
        return {
            **config.model_dump(mode="json", include=set(compared(TrainConfig))),
            **self.learnt.identity,
            "data_weights": [*config.source_weights],
            "validation": self.held_out.rows.content_hash() if self.held_out else None,
            "base": base.digest,
            "starts_from": hash_of_start(config.adapter),
            "dtype": base.hardware.dtype_name,
            "device": base.hardware.device.type,
            "kernels": self.kernels.names,
            # The number of threads decides how a sum is divided.
            "threads": config.threads if base.hardware.device.type == "cpu" else None,
            "processes": self.processes.count,
        }

    @cached_property
    def resume(self) -> Path | None:
        """The checkpoint to resume from, which is looked for once; None to start anew."""
        check_alike(
            lambda: {words: self.identity.get(name) for name, words in _READ.items()},
            self.processes,
        )
        steps = plan_steps(self.learnt.in_epoch, self.config)
        found = self.processes.from_writer(
            lambda: resume_point(
                self.output, self.config, self.identity, steps.total, self.announce
            )
        )
        if found is not None:
            check_alike(lambda: {"checkpoint": manifest_hash(found)}, self.processes)
        return found

    def finished_before(self) -> dict[str, Any] | None:
        """Return the outcome of a run that was finished before; None if it has work left."""
        resume = self.resume
        if resume is None or not self.processes.from_writer(
            lambda: is_finished(self.output, resume, self.config)
        ):
            return None
        self.processes.part()
        self.announce(Notice(f"{self.output}: this run is finished; nothing to do"))
        return {"output": str(self.output), "finished": True}

    # ------------------------------------------------------------ from its beginning to its end

    def taken(self) -> dict[str, Any]:
        """Train, and write all files of the run; return its outcome, for programs."""
        begun: _Begun | None = self._by_writer(self.processes.in_writer, self._begun)
        with begun.live if begun else nullcontext():
            return self._taken(begun)

    def _taken(self, begun: _Begun | None) -> dict[str, Any]:
        """Train, and finish the folder; say how to go on if that ends before the last step."""
        try:
            validation = self._validation()
            result = self._trained(begun, validation)
        except (Stopped, NumericsError, OutOfMemory, DataError, HubError, WorkerLost) as end:
            if isinstance(end, WorkerLost) and self.processes.count > 1:
                raise WorkerLost(*self._with_way_on(end)) from end
            self._say_how_to_go_on(end)
            raise
        outcome: dict[str, Any] = self._by_writer(
            self.processes.from_writer, lambda: self._outcome(result, begun, validation)
        )
        self.processes.part()
        return outcome

    @cached_property
    def _together(self) -> Together:
        return Together(self.adapter.base, self.opened.tokenizer, self.processes)

    def _by_writer(self, meet: Callable[..., Any], work: Callable[[], Any]) -> Any:
        """Let the writer work; the others generate with it where its samples need all of them.

        Args:
            meet: the call of `Processes` that tells what became of the work.
            work: what the writer does.
        """
        if not self.processes.computes_together:
            return meet(work)
        if not self.processes.is_writer:
            self._together.follow()
        return meet(lambda: self._together.led(work))

    def _begun(self) -> _Begun:
        """Write the files of the run that are there before it, and say what it is."""
        if self.config.overwrite:
            clear_run(self.output)
        facts = header(
            self.adapter, self.learnt, self.rows, self.held_out, self.config, self.kernels,
            self.packing.described(self.config, self.rows.rows), self.processes.count,
        )  # fmt: skip
        name = self.opened.source.name
        self.announce(Facts(f"qlora-kit: {name} → {self.output}", facts))
        self._save_inputs()
        self._show_data()
        memory = MemoryAccount(
            self.output, self.plan, self.announce, has_sources=self.opened.task.has_sources,
            micro_batches=self._micro_batches,
        )  # fmt: skip
        samples = self._samples()
        return _Begun(facts, memory, samples, self._live_page(facts, samples))

    @property
    def _micro_batches(self) -> int:
        """Micro-batches of a step in each process."""
        return share_of(self.config, self.processes.count).gradient_accumulation_steps

    def _outcome(
        self, result: TrainResult, begun: _Begun | None, validation: Validation | None
    ) -> dict[str, Any]:
        assert begun is not None, "the writer has begun"
        last = validation.last if validation else None
        outcome = self._finished(result, begun, last.details if last else {})
        return {**outcome, **self._of_sources(validation)}

    def _of_sources(self, validation: Validation | None) -> dict[str, Any]:
        """Return the figures of each source, with its last evaluation, where there are several."""
        figures = source_figures(self.rows, self.held_out)
        measured = validation.by_source if validation else {}
        sources = [{**each.as_json(), **_evaluated(measured.get(each.name))} for each in figures]
        return {"sources": redacted_values(sources)} if sources else {}

    def _save_inputs(self) -> None:
        settings = redacted_values(self.config.model_dump(mode="json"))
        write_text(self.output / CONFIG, yaml.safe_dump(settings, sort_keys=False))
        with storage_errors(self.output):
            self.opened.tokenizer.save_pretrained(self.output)

    def _show_data(self) -> None:
        found = surveyed(
            self.samples, self.validation, self.rows, self.held_out, self.opened, self.config,
            data_view.ROWS, self.packing,
        )  # fmt: skip
        write_text(self.output / data_view.NAME, data_view.data_page(found))
        for warning in found.warnings():
            self.announce(Notice(warning))

    def _samples(self) -> SampleAccount:
        """Return the account of the run's samples, with those from before training written."""
        is_shared = self.processes.computes_together
        account = SampleAccount(
            self.output, self.adapter.base, self.opened.tokenizer, self.announce,
            continues=self._together.continued if is_shared else None,
        )  # fmt: skip
        # In a cache of keys and values, a token takes up to as much memory as two in training.
        tokens_at_once = self.config.batch_size * max(self.rows.rows.lengths()) // 2
        count = self.config.samples if self.opened.task.generates else 0
        account.begin(count, (self.held_out or self.rows).rows, tokens_at_once)
        return account

    def _live_page(self, facts: Rows, samples: SampleAccount) -> LivePage:
        """Return the page of the run while it goes on."""
        record = self.record
        return LivePage(
            self.output,
            RunSummary.of(self.config, record.base, facts, (), record.versions, (self._again,)),
            [sample.rows_before() for sample in samples.samples],
            on_gpu=self._on_gpu,
            predicted_bytes=self._predicted_bytes,
            announce=self.announce,
        )

    @property
    def _on_gpu(self) -> bool:
        return self.adapter.base.hardware.device.type != "cpu"

    @property
    def _predicted_bytes(self) -> int | None:
        return self.plan.prediction.peak.bytes if self.plan else None

    def _trained(self, begun: _Begun | None, validation: Validation | None) -> TrainResult:
        """Train; the writer reports it.

        Args:
            begun: what the writer has before the first step.
            validation: what measures the validation rows.
        """
        rehearsal = begun.memory.rehearse if begun else self._rehearse
        train = partial(
            train_adapter,
            self.adapter,
            self._compared.get("training", self.learnt.rows),
            self.config,
            task=self.opened.task,
            pad_token_id=self.opened.tokenizer.pad_token_id,
            evaluate=validation,
            saving=Saving(self.output, self.record, self.resume, self.identity),
            before_first_step=rehearsal if self.config.rehearse else None,
        )
        return self._reported(train, begun.live) if begun else train()

    def _rehearse(self, step: OptimizerStep) -> None:
        """Rehearse a step beside the writer, which gives account of it."""
        rehearse(step, self._micro_batches, has_sources=self.opened.task.has_sources)

    def _reported(self, train: Callable[..., TrainResult], live: LivePage) -> TrainResult:
        """Train with all reports of the run: log, page, trackers, profile, terminal."""
        profile = None
        if self.config.profile is not None:
            profile = Profile(self.output, self.config.profile, self.adapter, self.announce)
        with Tracking(self.config, self.output, self._first_step, self.announce) as tracking:
            written = log.Log(self.output, self.config.logging_steps)
            result = train(
                around_step=profile.step if profile else nullcontext,
                announce=announce_to((written, live, tracking, self.announce)),
            )
        if profile:
            profile.close()
        return result

    @property
    def _first_step(self) -> int:
        """The first step that this process takes."""
        return 1 if self.resume is None else step_of(self.resume) + 1

    def _validation(self) -> Validation | None:
        """Return what measures the validation rows; None if there are none."""
        if self.held_out is None:
            return None
        base = self.adapter.base
        rows = self._compared.get("validation", self.held_out.rows)
        held_out = replace(self.held_out, rows=rows)
        return Validation(base, self.opened, held_out, self.config, self.announce, self.processes)

    @cached_property
    def _compared(self) -> Mapping[str, TokenTable]:
        """The token rows with what a reference says of them; none where there is no reference."""
        if not self.opened.task.refers:
            return {}
        parts = {"training": self.rows.rows}
        if self.held_out is not None:
            parts["validation"] = self.held_out.rows
        return referring_rows(
            parts, self.adapter, self.opened, self.config, self.output, self.identity,
            self.announce, self.processes,
        )  # fmt: skip

    def _say_how_to_go_on(self, end: BaseException) -> None:
        if checkpoints(self.output):
            until = " until the last checkpoint" if isinstance(end, TornStep) else ""
            self.announce(Notice(f"what was trained{until} is saved; go on with: {self._again}"))

    @property
    def _again(self) -> str:
        return f"qlora-kit train --output {shlex.quote(str(self.output))} --resume"

    def _with_way_on(self, lost: WorkerLost) -> Iterator[str]:
        """Say how to go on in the error itself: whichever process is left tells it."""
        is_saved = bool(checkpoints(self.output))
        until = "what was trained until the last checkpoint is saved; go on with: "
        for fault in lost.faults:
            yield f"{fault}; {until}{self._again}" if is_saved else fault

    # ------------------------------------------------------------ what it leaves behind

    def _finished(
        self,
        result: TrainResult,
        begun: _Begun,
        labels: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write the plot, the card, the page and the adapter; say what to do next."""
        output, facts = self.output, begun.facts
        rows = log.read_log(output / log.NAME)
        plot.draw_loss(rows, output / plot.NAME, self.opened.task.unit)
        if labels:
            write_labels(output, labels)
        times = StepTimes.of(rows, self.plan, self._first_step, self.processes.count)
        results = (
            *_results(result, self.config),
            *self._streamed(result),
            *speed(rows),
            *(times.rows() if times else ()),
            *begun.memory.close(result.peak_memory_bytes),
        )
        of_images = is_of_images(self.opened.task)
        commands = _next_commands(output, self.config, of_images=of_images)
        record = self.record
        summary = replace(
            RunSummary.of(self.config, record.base, facts, results, record.versions, commands),
            labels=record.labels or (),
            pad_token_id=self.opened.tokenizer.pad_token_id,
            of_images=of_images,
            metrics=_best_metrics(result, self.config),
        )
        card.write_card(output, summary)
        run_page.write_run_page(
            output,
            summary,
            rows,
            [sample.rows() for sample in begun.samples.close()],
            loss_picture=output / plot.NAME,
            step_picture=output / PICTURE,
            on_gpu=self._on_gpu,
            predicted_bytes=self._predicted_bytes,
            labels=labels,
            profile=read_profile(output),
        )
        # The adapter is written last: if a run folder has the weights of its last checkpoint, it
        # has all other files too.
        save_adapter(self.adapter, output, record)
        self.announce(Facts("result", results))
        files = tuple(sorted(str(path) for path in output.glob("[!.]*")))
        self.announce(Closing(files, commands))
        step = times.as_json() if times else None
        told = asdict(result)
        if not result.last_metrics:
            del told["last_metrics"]
        return {"output": str(output), "finished": True, **told, "step_times": step}

    def _streamed(self, result: TrainResult) -> Iterator[tuple[str, str]]:
        """Yield what became of the samples of a stream, in all passes so far."""
        place, stream = result.progress.place, self.samples.stream
        if place is None or stream is None:
            return
        counts = Counts(self.samples.shape, self.rows.counts.weighs, **place.counts)
        how = "streamed" if stream.whole is None else "tokenised"
        yield how, counts.describe()
        if isinstance(place, MixedPlace):
            for part, each in zip(self.rows.sources, place.sources, strict=True):
                own = Counts(part.counts.shape, part.counts.weighs, **each.place.counts)
                yield f"{how} {part.name}", own.describe()
        if stream.skipped:
            yield "skipped", f"{stream.skipped:,} for a fault; the first: {stream.first_skipped}"


_READ = {
    "data": "training data", "rows": "training rows", "validation": "validation data",
    "base": "base model",
}  # fmt: skip


@dataclass(frozen=True)
class _Begun:
    """What the writer has before the first step.

    Attributes:
        facts: the table that says what the run is.
        memory: the account of its memory.
        samples: the account of its samples.
        live: its page while it goes on.
    """

    facts: tuple[tuple[str, str], ...]
    memory: MemoryAccount
    samples: SampleAccount
    live: LivePage


def _evaluated(found: Evaluation | None) -> dict[str, Any]:
    if found is None:
        return {"validation_loss": None}
    return {"validation_loss": found.loss, "validation_metrics": dict(found.metrics)}


def _next_commands(
    output: Path, config: TrainConfig, *, of_images: bool = False
) -> tuple[str, ...]:
    name = shlex.quote(str(output))
    merged = shlex.quote(str(Path("merged") / output.name))
    asked, measured = ("image.png", "images/") if of_images else ('"..."', "test.jsonl")
    commands = (
        f"qlora-kit generate --adapter {name} --prompt {asked}",
        f"qlora-kit evaluate --adapter {name} --data {measured}",
        f"qlora-kit export {name} --to {merged}",
    )
    if config.report_to == "tensorboard":
        return (*commands, f"tensorboard --logdir {shlex.quote(str(output.parent))}")
    return commands


def _best_metrics(result: TrainResult, config: TrainConfig) -> dict[str, float]:
    """Return what was measured of the validation rows at the best step."""
    progress = result.progress
    found = {} if progress.best_loss is None else {"loss": progress.best_loss}
    if progress.best_metric is not None:
        found[config.best_metric] = progress.best_metric
    return found


def _results(result: TrainResult, config: TrainConfig) -> tuple[tuple[str, str], ...]:
    progress = result.progress
    rows = [
        ("optimiser steps", f"{progress.optimizer_step} ({result.reason})"),
        ("training loss", f"{result.last_loss:.4f} in the last step"),
    ]
    for name, value in result.last_metrics.items():
        rows.append((name.replace("_", " "), f"{value:.4f} in the last step"))
    if progress.best_loss is not None:
        best = f"{progress.best_loss:.4f} at best, step {progress.best_step}"
        rows.append(("validation loss", best))
    if progress.best_metric is not None:
        rows.append(
            (config.best_metric.replace("_", " "), f"{progress.best_metric:.4f} in that step")
        )
    if progress.skipped_steps:
        rows.append(("skipped steps", f"{progress.skipped_steps} (not finite; see the log)"))
    if progress.micro_batch_rows is not None:
        fewer = f"{progress.micro_batch_rows} rows at a time, after memory ran out"
        rows.append(("micro-batch", fewer))
    rows.append(("time", f"{result.seconds:.1f} s"))
    rows.append(("memory of the process", f"{result.peak_memory_bytes / 1e9:.2f} GB"))
    return tuple(rows)
