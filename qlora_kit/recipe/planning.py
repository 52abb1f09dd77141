"""Says how much memory and time a run would need, on this or another machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qlora_kit.config import PlanConfig
from qlora_kit.events import Announce, Closing, Facts, Notice, silent
from qlora_kit.lora.merge_aware import check_merge_aware
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.model.names import ModelSource, find_model
from qlora_kit.opening.model import base_spec
from qlora_kit.opening.tasks import asked_task, check_loss, check_searchable, planned_task
from qlora_kit.parallel.division import share_of
from qlora_kit.parallel.launch import check_sharing, planned_devices

if TYPE_CHECKING:
    from qlora_kit.model.image_processor import ImageProcessor
    from qlora_kit.model.load import BaseSpec
    from qlora_kit.plan.planning import Plan


def plan(config: PlanConfig, announce: Announce = silent) -> dict[str, Any]:
    """Predict the memory and the time of a run by running its code on fake tensors.

    Returns:
        The plan, for programs.
    """
    source = find_model(config.model)
    check_loss(config)
    check_merge_aware(LoraSpec.of(config), config.bits, is_shared=bool(config.shard_base))

    from qlora_kit.model.threads import choose_threads
    from qlora_kit.plan.budget import budget_of
    from qlora_kit.plan.sharing import plan_ways
    from qlora_kit.plan.subject import RowSizes, Subject, planned_ceilings, planned_hardware
    from qlora_kit.plan.watch import PURPOSES
    from qlora_kit.recipe.agreement import BATCH, of_all
    from qlora_kit.report.memory import breakdown_rows, draw_memory, phase_rows

    hardware = planned_hardware(config)
    if hardware.device.type == "cpu":
        choose_threads(config.threads)
    ceilings = planned_ceilings(hardware, config.card)
    processor = _image_processor(config, source)
    if processor is not None:
        config = config.model_copy(update={"max_length": processor.tokens})
    task = planned_task(config, processor)
    check_searchable(task, config)
    spec = base_spec(source, source.folder, config, task)
    config = config.model_copy(update=asdict(spec.quantization))
    config = _with_rows_that_fit(config, spec, announce)
    rows = RowSizes(config.max_length, answer_tokens=config.max_length)
    devices = planned_devices(config)
    if config.shard_base:
        check_sharing(devices, devices)
    budget = budget_of(config, on_gpu=hardware.device.type != "cpu", processes=devices)
    subject = Subject(spec, LoraSpec.of(config), hardware, rows, task, ceilings).divided(devices)
    share = share_of(config, devices)
    ways = plan_ways(share, subject, budget, on_machine=devices, compare=True)
    made = ways.chosen
    found, settled = made.as_json(), of_all(config, share, made)
    if devices > 1:
        found["settings"] |= {name: getattr(settled, name) for name in BATCH}
        found["devices"], found["ways"] = devices, ways.as_json()
    for warning in made.warnings:
        announce(Notice(warning))
    if made.found is not None:
        announce(Facts(f"settings for {budget.describe()}", made.choice_rows()))
    title = (
        f"{config.model}, {config.bits} bits, {settled.batch_size} × {config.max_length} tokens "
        f"on {f'each of {devices} × ' if devices > 1 else ''}"
        f"{found['settings']['device']} ({found['settings']['dtype']})"
    )
    if ways.rows():
        announce(Facts(f"the base on {devices} devices", ways.rows()))
    peaks = phase_rows(found["phase_peaks_bytes"], found["host_phase_peaks_bytes"])
    announce(Facts(f"predicted peak of each phase: {title}", peaks))
    parts = breakdown_rows(made.prediction.peak.by_purpose, PURPOSES)
    announce(Facts(f"at the largest of them, {made.prediction.peak_phase}", parts))
    if made.experts_bytes:
        announce(Facts("the experts of the mixture, in the same moment", made.expert_rows()))
    announce(Facts("predicted peak", _card_rows(made)))
    announce(Facts("predicted time, of rows as long as --max-length", made.time_rows()))
    if made.traffic is not None:
        announce(Facts("received by each device in a step", made.traffic.rows()))
    if config.plot is not None:
        draw_memory(found["breakdown_bytes"], PURPOSES, title, config.plot)
        announce(Closing((str(config.plot),), ()))
    return found


def _image_processor(config: PlanConfig, source: ModelSource) -> ImageProcessor | None:
    """Return what makes the images of a model, whose rows are as long as it says; None of text."""
    from qlora_kit.model.image_processor import NAME, default_processor, load_image_processor
    from qlora_kit.model.images import check_known, reads_images

    if config.task != "classify":
        return None
    architecture = base_spec(source, source.folder, config, asked_task()).architecture()
    check_known(architecture)
    if not reads_images(architecture):
        return None
    if source.folder is not None and (source.folder / NAME).is_file():
        return load_image_processor(source.folder, architecture)
    return default_processor(architecture)


def _with_rows_that_fit(config: PlanConfig, spec: BaseSpec, announce: Announce) -> PlanConfig:
    """Plan an encoder's rows no longer than it has positions: it cannot compute longer ones.

    A decoder's may be longer, and the plan warns of them.
    """
    from qlora_kit.model.class_head import is_encoder
    from qlora_kit.model.positions import positions_of

    architecture = spec.architecture()
    positions = positions_of(architecture)
    if positions is None or config.max_length <= positions or not is_encoder(architecture):
        return config
    announce(
        Notice(
            f"planned with rows of {positions:,} tokens instead of --max-length "
            f"{config.max_length:,}: the model has no more positions, and training refuses longer "
            "rows"
        )
    )
    return config.model_copy(update={"max_length": positions})


def _card_rows(made: Plan) -> tuple[tuple[str, str], ...]:
    from qlora_kit.plan.budget import FRAGMENTATION
    from qlora_kit.report.memory import size_text

    rows = [("allocated", f"{size_text(made.prediction.peak.bytes)}")]
    if made.budget.on_gpu:
        more = f"{made.budget.describe_beside()}, and {FRAGMENTATION:.0%} margin, assumed"
        rows.append(("of a card", f"{size_text(made.card_bytes)} (with {more})"))
    if made.budget.is_bounded:
        rows.append(("budget", f"{made.budget.describe()}: fits"))
    return tuple(rows)
