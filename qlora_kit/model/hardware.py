"""The device a model runs on, the dtype it computes in, and the settings of torch there."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from qlora_kit.errors import ConfigError, EnvironmentFault
from qlora_kit.launched import place
from qlora_kit.model.environment import (
    CUBLAS_WORKSPACE,
    DETERMINISTIC_WORKSPACES,
    prepare_environment,
)
from qlora_kit.model.threads import Threads

# Whether torch may use cuDNN's attention, which it prefers to the flash kernel on Hopper. Torch
# keeps the choice until both have been measured.
_CUDNN_ATTENTION = True

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Hardware:
    """The device and compute dtype of a run, and the reason for the dtype.

    Attributes:
        device: the device that the model runs on.
        dtype: the dtype that it computes in.
        reason: the reason for the dtype, in words.
        threads: the threads that were chosen for a CPU; None: as many as torch has.
    """

    device: torch.device
    dtype: torch.dtype
    reason: str
    threads: Threads | None = None

    @property
    def device_name(self) -> str:
        """Name of the GPU, or the number of CPU threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        threads = self.threads or Threads(torch.get_num_threads(), "as torch has it")
        return f"CPU, {threads.describe()}"

    @property
    def dtype_name(self) -> str:
        """The name of the compute dtype, such as "bfloat16"."""
        return dtype_name(self.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return float32, bfloat16 or float16 by name."""
    return _DTYPES[name]


def choose_hardware(
    device: str = "auto", dtype: str = "auto", threads: Threads | None = None
) -> Hardware:
    """Resolve `--device` and `--dtype`, and settle how a GPU computes.

    Args:
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16" or "float16".
        threads: the threads that were chosen for a CPU, for its description.

    Raises:
        ConfigError: a GPU is asked for and there is none, or float16 on a CPU.
    """
    _settle_kernels()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: no GPU is visible to torch; use --device cpu, or run `qlora-kit doctor`"
        )
    where = _own_gpu() if device == "cuda" else torch.device(device)
    if dtype != "auto":
        if dtype == "float16" and device == "cpu":
            raise ConfigError("--dtype float16: the CPU has no loss scaling; use float32")
        return Hardware(where, _DTYPES[dtype], "as asked", threads)
    if device == "cpu":
        reason = "most CPUs emulate bfloat16, which is far slower"
        return Hardware(where, torch.float32, reason, threads)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Hardware(where, torch.bfloat16, "the GPU computes in bfloat16")
    return Hardware(where, torch.float32, "the GPU has no bfloat16, and float16 overflows")


def _own_gpu() -> torch.device:
    """Return the GPU of this process: of several processes of a machine each has its own.

    Raises:
        ConfigError: there are fewer GPUs than processes.
    """
    here = place()
    if here.count > 1:
        gpus = torch.cuda.device_count()
        if here.local_rank >= gpus:
            raise ConfigError(
                f"{here.on_machine} processes on a machine where torch sees {gpus} "
                f"GPU{'s' * (gpus != 1)}; expected one for each; start fewer, or pass --device cpu"
            )
        torch.cuda.set_device(here.local_rank)
    return torch.device("cuda", torch.cuda.current_device())


def _settle_kernels() -> None:
    """Choose kernels of a GPU where torch offers a choice; without a GPU this has no effect."""
    # cuBLAS may cut a product along its inner dimension, and add the parts in 16 bits, unless this
    # is forbidden. In the head's backward the inner dimension is the whole vocabulary.
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(_CUDNN_ATTENTION)


def make_deterministic() -> None:
    """Choose the same kernels, and so the same bits, in each run on a GPU.

    Call it before anything is computed on the GPU.

    Raises:
        EnvironmentFault: cuBLAS has read its setting already, or has been given another one.
    """
    prepare_environment(deterministic=True)
    found, expected = os.environ.get(CUBLAS_WORKSPACE), " or ".join(DETERMINISTIC_WORKSPACES)
    if found is None:
        raise EnvironmentFault(
            f"--deterministic: this process has opened the GPU before, without {CUBLAS_WORKSPACE}; "
            f"expected {expected} from its start; export it, or begin a new process"
        )
    if torch.cuda.is_available() and found not in DETERMINISTIC_WORKSPACES:
        raise EnvironmentFault(
            f"--deterministic: {CUBLAS_WORKSPACE} is {found!r}; expected {expected}; unset it"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
