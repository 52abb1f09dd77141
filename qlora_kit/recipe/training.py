"""From a data file to an adapter folder: the main job.

config → data → tokenizer → plan → base → LoRA → training → adapter → report
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_kit.config import TrainConfig
from qlora_kit.events import Announce, silent
from qlora_kit.launched import place
from qlora_kit.model.environment import prepare_environment
from qlora_kit.model.names import find_model
from qlora_kit.opening.start import started_from
from qlora_kit.opening.tasks import check_loss
from qlora_kit.opening.variants import check_variants
from qlora_kit.parallel.launch import check_sharing
from qlora_kit.parallel.one import processes_of_this_run
from qlora_kit.recipe.rows import read_data, token_rows
from qlora_kit.recipe.streaming import learning_from, settled
from qlora_kit.report.trackers import check_tracker
from qlora_kit.train.folder import claimed_run, goes_on, stored_layer

if TYPE_CHECKING:
    from qlora_kit.recipe.bases import KeptBase


def train(
    config: TrainConfig, announce: Announce = silent, bases: KeptBase | None = None
) -> dict[str, Any]:
    """Train a LoRA adapter, from a data file to an adapter folder.

    Of several processes each reads the data and loads the base, and all of them train. One of them
    decides what may differ between them, writes the files and announces the events.

    Args:
        config: the options of the run.
        announce: receives the events.
        bases: keeps the base for the next run of this process; by default it is loaded for this.

    Returns:
        The outcome of the run, for programs.
    """
    prepare_environment(deterministic=config.deterministic)
    processes = processes_of_this_run()
    announce = announce if processes.is_writer else silent
    check_tracker(config.report_to)
    check_loss(config)
    check_variants(config)
    if config.shard_base:
        check_sharing(place().count, place().on_machine)
    source = find_model(config.model)
    with ExitStack() as at_the_end:
        claimed = claimed_run(
            config.output, source.name, resume=config.resume, overwrite=config.overwrite
        )
        output = processes.from_writer(lambda: at_the_end.enter_context(claimed))
        is_new = processes.from_writer(lambda: stored_layer(output, config.resume) is None)
        samples, validation = processes.writer_first(
            lambda: read_data(config, announce, chooses=is_new)
        )
        config = settled(config, samples, validation, announce, is_new=is_new)

        # torch is imported here, after everything that can be checked without it.
        from qlora_kit.lora.adapter import check_fits
        from qlora_kit.lora.attach import attach
        from qlora_kit.lora.galore import check_galore
        from qlora_kit.lora.ranks import largest_ranks
        from qlora_kit.lora.spec import LoraSpec
        from qlora_kit.model.hardware import make_deterministic
        from qlora_kit.model.load import Placement, load_base
        from qlora_kit.parallel.sharded import load_shared_base
        from qlora_kit.plan.subject import RowSizes, Subject, UsualRows
        from qlora_kit.recipe.agreement import chosen_hardware, serving_kernels, shared_threads
        from qlora_kit.recipe.ranks import with_decided_ranks
        from qlora_kit.recipe.run import Run, planned
        from qlora_kit.recipe.starting import beginning_of
        from qlora_kit.train.packing import choose_packing

        if config.deterministic:
            make_deterministic()
        threads = shared_threads(config, processes)
        config = config.model_copy(update={"threads": threads.count})
        opened, rows, held_out = processes.writer_first(
            lambda: token_rows(samples, validation, config, announce)
        )
        learnt = processes.writer_first(
            lambda: at_the_end.enter_context(learning_from(samples, opened, rows, config))
        )
        spec, rows_of = opened.spec(config), opened.token_rows(config)
        lora = LoraSpec.of(config, opened.task.peft_type, spec.trained_whole(), rows_of)
        check_galore(lora, spec.quantization.bits)
        start = started_from(config, spec, lora)
        beginning = beginning_of(config, spec, lora, output, processes)
        spec = beginning.spec
        hardware = chosen_hardware(config, threads, processes)
        packing = processes.from_writer(
            lambda: choose_packing(
                config, opened.task, spec.skeleton(), rows.rows, longest=max(learnt.rows.lengths()),
                goes_on=goes_on(output, config.resume),
            )
        )  # fmt: skip
        config = packing.settled(config)
        sizes_of = RowSizes.of_sources if opened.task.has_sources else RowSizes.of
        sizes = sizes_of(learnt.rows, held_out.rows if held_out else None, config)
        if samples.stream is not None:
            usual = UsualRows.of(
                rows.rows, config, has_sources=opened.task.has_sources, longest=packing.longest
            )
            sizes = replace(sizes, usual=replace(usual, rows=learnt.in_epoch or usual.rows))
        most = lora if config.rank_budget is None else largest_ranks(lora, spec.skeleton())
        subject = Subject(spec, most, hardware, sizes, opened.task)
        if bases is not None:
            subject = replace(subject, held_bytes=bases.held_bytes(spec, hardware))
        config, plan = planned(config, subject, learnt.in_epoch, output, announce, processes)
        load = load_shared_base if config.shard_base else load_base
        load = bases.load if bases is not None else load
        base = beginning.base(
            lambda asked: load(asked, hardware, announce, Placement.of(config)),
            config, opened, rows.rows, processes,
        )  # fmt: skip
        lora = with_decided_ranks(
            lora, base, rows.rows, config, opened, output, announce, processes
        )
        adapter = attach(base, lora, config.seed)
        if bases is not None:
            at_the_end.callback(bases.take_back, adapter)
        if start is not None:
            check_fits(start, base)
            adapter.start_from(start.tensors, start.whole, start.magnitudes)
        tried = packing.tried(base.model)
        packing = processes.from_writer(lambda: tried)
        config = packing.settled(config)
        config, kernels = serving_kernels(base.model, config, hardware, announce, processes)
        run = Run(
            config, output, announce, samples, validation, opened, rows, learnt, held_out, plan,
            adapter, kernels, packing, processes,
        )  # fmt: skip
        return run.finished_before() or run.taken()
