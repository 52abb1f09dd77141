"""What the processes of a run must have alike: threads, hardware, settings, kernels and data.

Takes the options and the processes; each function is called by all of them. What may differ
between machines is decided by the writer; what must not is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_kit.config import TrainConfig
from qlora_kit.errors import EnvironmentFault
from qlora_kit.events import Announce, Notice
from qlora_kit.launched import place
from qlora_kit.model.ceilings import proposing_bfloat16
from qlora_kit.model.hardware import Hardware, choose_hardware
from qlora_kit.model.threads import Threads, choose_threads
from qlora_kit.parallel.division import share_of
from qlora_kit.parallel.one import Processes
from qlora_kit.plan.planning import Plan
from qlora_kit.plan.run import keep_to_budget, plan_run
from qlora_kit.plan.subject import Subject
from qlora_kit.step.kernels import Kernels, choose_kernels

BATCH = ("batch_size", "gradient_accumulation_steps")
"""the options whose product is the rows of a step"""


def shared_threads(config: TrainConfig, processes: Processes) -> Threads:
    """Choose the threads of each process of this machine, and let torch compute with them."""
    threads = processes.from_writer(lambda: choose_threads(config.threads, place().on_machine))
    torch.set_num_threads(threads.count)
    return threads


def chosen_hardware(config: TrainConfig, threads: Threads, processes: Processes) -> Hardware:
    """Choose the device of this process, and the dtype of all."""
    hardware = choose_hardware(config.device, config.dtype, threads)
    if config.dtype != "auto":
        return hardware
    told = processes.from_writer(lambda: proposing_bfloat16(hardware))
    return replace(hardware, dtype=told.dtype, reason=told.reason)


def planned_by_writer(
    config: TrainConfig, subject: Subject, announce: Announce, processes: Processes, *, choose: bool
) -> tuple[TrainConfig, Plan | None]:
    """Plan the memory of a run, which is that of its largest process.

    Args:
        config: the options of the run.
        subject: the run, on the hardware of this machine.
        announce: receives the prediction and the choice.
        processes: the processes of the run.
        choose: False for a resumed run, whose settings were chosen before.

    Returns:
        The options with the settings that the plan chose; and in the writer the plan, if one could
        be made.

    Raises:
        ConfigError: nothing fits the budget, or the settings do not fit the free memory.
    """
    share, on_machine = share_of(config, processes.count), place().on_machine
    of_one = subject.divided(processes.count)
    plan = processes.in_writer(
        lambda: plan_run(share, of_one, announce, choose=choose, on_machine=on_machine)
    )
    settled = processes.from_writer(lambda: of_all(config, share, plan))
    if not processes.is_writer:
        keep_to_budget(settled, subject.hardware, on_machine)
    return settled, plan


def of_all(config: TrainConfig, share: TrainConfig, plan: Plan | None) -> TrainConfig:
    """Return the options of a run with the settings that were planned for each of its processes."""
    if plan is None:
        return config
    rows, every = plan.config.batch_size, config.batch_size * config.gradient_accumulation_steps
    if rows == share.batch_size:
        batch = {name: getattr(config, name) for name in BATCH}
    else:
        # The effective batch stays as it is: as many rows at a time as divide it.
        fitting = max(each for each in range(1, rows + 1) if every % each == 0)
        batch = dict(zip(BATCH, (fitting, every // fitting), strict=True))
    return plan.config.model_copy(update=batch)


def serving_kernels(
    model: PreTrainedModel,
    config: TrainConfig,
    hardware: Hardware,
    announce: Announce,
    processes: Processes,
) -> tuple[TrainConfig, Kernels]:
    """Choose the kernels that serve in all processes; none, where those of their GPUs differ.

    Returns:
        The options, and the kernels.
    """
    kernels = choose_kernels(model, config, hardware)
    if len({*processes.each(lambda: kernels.names)}) > 1:
        announce(Notice("other kernels serve on other GPUs of this run: all compute without them"))
        config = config.model_copy(update={"kernels": "plain"})
        kernels = choose_kernels(model, config, hardware)
    return config, kernels


def check_alike(read: Callable[[], Mapping[str, Any]], processes: Processes) -> None:
    """Check that all processes read the same files.

    Args:
        read: returns hashes of what this process reads, by what it is in words.
        processes: the processes of the run.

    Raises:
        EnvironmentFault: a process reads something else.
        StorageError: a process cannot read it.
    """
    if processes.count == 1:
        return
    first, *others = processes.each(read)
    for rank, other in enumerate(others, start=1):
        if differing := [name for name in first if other[name] != first[name]]:
            raise EnvironmentFault(
                f"process {rank} of {processes.count}, counted from 0, reads another "
                f"{differing[0]} than process 0; expected the same files on every machine; share "
                "the folder, or copy it again"
            )
