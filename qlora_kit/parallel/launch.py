"""`--devices N`: torch's own launcher, around the same command.

Takes the options and the command line; starts N processes of it, waits for them, and returns the
exit code of the run. Signals are passed on to the processes, which stop together and save.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from qlora_kit.config import TrainConfig
from qlora_kit.errors import ConfigError, EnvironmentFault, WorkerLost
from qlora_kit.launched import BY_DEVICES, place
from qlora_kit.signals import passed_on

_EXIT_ENVIRONMENT = EnvironmentFault.exit_code


def started_processes(config: TrainConfig, command: Sequence[str]) -> int | None:
    """Start the processes that `--devices` asks for, and wait for their end.

    Args:
        config: the options of the run.
        command: the program and its arguments, which every process is started with.

    Returns:
        The exit code of the run; None where this process is to train itself.

    Raises:
        ConfigError: there are fewer GPUs; or a launcher has started another number of processes.
        WorkerLost: the processes were ended by force, and none of them could say so.
    """
    asked, launched = config.devices, place().count
    if launched > 1:
        if asked not in (None, "auto", launched):
            raise ConfigError(
                f"--devices {asked}: the launcher has started {launched} processes; expected the "
                "same number; leave --devices out"
            )
        return None
    if asked in (None, 1):
        return None
    count = _count(config)
    return None if count == 1 else _run(command, count)


def planned_devices(config: TrainConfig) -> int:
    """Return the number of devices of a run that is planned, here or for elsewhere."""
    if config.devices != "auto":
        return config.devices or 1
    import torch

    return max(1, torch.cuda.device_count()) if config.device != "cpu" else 1


def check_sharing(processes: int, on_machine: int) -> None:
    """Check that there are devices that can hold a base together.

    Args:
        processes: number of processes of the run.
        on_machine: number of those on one machine.

    Raises:
        ConfigError: there are none.
    """
    if processes == 1:
        raise ConfigError(
            "--shard-base: the run has one process, which holds all of the base; expected several; "
            "pass --devices N, or --no-shard-base"
        )
    if on_machine == 1:
        raise ConfigError(
            f"--shard-base: of {processes} processes, one is on this machine; expected several, "
            "because parts of a base do not leave a machine; start a process for each of its GPUs"
        )


def _count(config: TrainConfig) -> int:
    """Return the number of processes: one for each GPU, or on a CPU as many as are asked for."""
    import torch

    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    if config.devices == "auto":
        return max(1, gpus)
    assert isinstance(config.devices, int)
    if gpus and config.devices > gpus:
        raise ConfigError(
            f"--devices {config.devices}: torch sees {gpus} GPU{'s' * (gpus != 1)}; expected at "
            f"most a process for each; pass --devices {gpus}, or --device cpu"
        )
    return config.devices


def _run(command: Sequence[str], count: int) -> int:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _be_silent()
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="qlora-kit",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        # A run goes on by --resume; the launcher would start it anew.
        max_restarts=0,
        local_addr="localhost",
        # The other signals are passed on here: the launcher would end the processes after 30 s,
        # however long a checkpoint takes.
        signals_to_handle="SIGQUIT",
    )
    stopped: list[int] = []

    def pass_on(signum: int) -> bool:
        stopped.append(signum)
        return _signal_children(signum)

    os.environ[BY_DEVICES] = str(os.getpid())
    program, *arguments = command
    failures: Mapping[int, Any] = {}
    try:
        with passed_on(pass_on):
            elastic_launch(launch, program)(*arguments)
    except Exception as error:
        # torch's error of processes that failed; its class is known by the failures that it has.
        if (found := getattr(error, "failures", None)) is None:
            raise EnvironmentFault(
                f"torch's launcher failed ({type(error).__name__}: {error}); expected it to start "
                f"{count} processes; run with --devices 1, or with torchrun to see its log"
            ) from error
        failures = found
    finally:
        del os.environ[BY_DEVICES]
    return _code(failures, stopped, count)


def _be_silent() -> None:
    """Leave the words to the processes: the launcher would print a log and a table of failures."""
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)


def _signal_children(signum: int) -> bool:
    children = psutil.Process().children()
    for child in children:
        try:
            child.send_signal(signum)
        except psutil.NoSuchProcess:
            continue
    return bool(children)


def _code(failures: Mapping[int, Any], stopped: Sequence[int], count: int) -> int:
    """Return the exit code of the run from those of its processes.

    Raises:
        WorkerLost: no process lived to say what happened.
    """
    if not failures:
        return 0
    told: list[int] = [failure.exitcode for failure in failures.values() if failure.exitcode > 0]
    if not told:
        if stopped:
            return 128 + stopped[0]
        rank, first = min(failures.items(), key=lambda item: (item[1].timestamp, item[0]))
        raise WorkerLost(
            f"process {rank} of {count}, counted from 0, was ended by "
            f"{signal.Signals(-first.exitcode).name}; expected it to work until the end of the "
            "run; look for what ended it, such as memory that ran out"
        )
    if stopped and 128 + stopped[0] in told:
        return 128 + stopped[0]
    # One process has a fault of its own; the others lose it, or are asked to end by the launcher.
    secondary = (_EXIT_ENVIRONMENT, *(128 + number for number in (signal.SIGTERM, signal.SIGINT)))
    return next((code for code in told if code not in secondary), min(told))
