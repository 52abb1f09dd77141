"""The memory that a run may take, and the memory that it takes besides its tensors.

Takes sizes that the user asked for, or asks the machine; returns a `Budget`. GB is 10⁹ bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
import torch.nn.functional as F

from qlora_kit.config import BudgetOptions
from qlora_kit.errors import ConfigError
from qlora_kit.layers.quantize import Quantization
from qlora_kit.model.environment import has_tight_heap
from qlora_kit.report.memory import size_text

# Besides the allocated memory a card holds the CUDA context (0.55 GB on an H100 with CUDA 13, and
# 0.82 GB once the libraries of a step are loaded: `benchmarks/results/gpu/peaks.json`), and the
# parts of its blocks that the caching allocator cannot use, assumed to be 5 %. The context is
# measured where there is a card.
CONTEXT_BYTES = 820_000_000
FRAGMENTATION = 0.05
# Besides its tensors a process takes the holes of the C library's heap and Python objects. The
# holes are a share of the tensors, measured on SmolLM2's shape (2 × 256) with glibc 2.36.
TIGHT_HEAP_SHARE = 0.3
HEAP_SHARE = 1.3
OBJECT_BYTES = 60_000_000
# Resident memory of the process after its imports, measured on a CPU: 0.45 to 0.6 GB.
PROCESS_BYTES = 600_000_000


@dataclass(frozen=True)
class Budget:
    """The memory that a run may take; None sets no bound.

    Attributes:
        card_bytes: bytes of the whole card, context and other processes included; on a CPU, bytes
            of the memory that the model computes in.
        host_bytes: bytes of host memory, the process itself included.
        on_gpu: whether the model runs on a card.
        beside_bytes: bytes of the card that torch cannot reserve: the context, and the memory of
            other processes.
        is_measured: whether `beside_bytes` was measured on the card; assumed otherwise.
    """

    card_bytes: int | None = None
    host_bytes: int | None = None
    on_gpu: bool = True
    beside_bytes: int = CONTEXT_BYTES
    is_measured: bool = False

    @property
    def is_bounded(self) -> bool:
        """Whether the card or the host has a bound."""
        return self.card_bytes is not None or self.host_bytes is not None

    @property
    def allocatable_bytes(self) -> int | None:
        """The bytes of the card that torch may reserve; None without a bound."""
        if self.card_bytes is None:
            return None
        return self.card_bytes - (self.beside_bytes if self.on_gpu else 0)

    def taken_of_card(self, peak_bytes: int) -> int:
        """Return the bytes of the whole card that a run with this peak of allocated bytes takes."""
        if not self.on_gpu:
            return peak_bytes
        return self.beside_bytes + round(peak_bytes * (1 + FRAGMENTATION))

    def taken_by_process(self, before_bytes: int, peak_bytes: int) -> int:
        """Return the anonymous memory, in bytes, of a process that computes on a CPU.

        Args:
            before_bytes: anonymous memory of the process before it loads the model.
            peak_bytes: peak of the tensors of the run.
        """
        share = TIGHT_HEAP_SHARE if has_tight_heap() else HEAP_SHARE
        return before_bytes + OBJECT_BYTES + round(peak_bytes * (1 + share))

    def taken_of_host(self, host_peak_bytes: int, peak_bytes: int) -> int:
        """Return the bytes that a run takes of the host; without a card, the model is there too."""
        return PROCESS_BYTES + host_peak_bytes + (0 if self.on_gpu else peak_bytes)

    def over_bytes(self, peak_bytes: int, host_peak_bytes: int) -> int:
        """Return the bytes by which a run goes over the budget; 0 where it fits."""
        over = 0
        if self.card_bytes is not None:
            over = max(over, self.taken_of_card(peak_bytes) - self.card_bytes)
        if self.host_bytes is not None:
            over = max(over, self.taken_of_host(host_peak_bytes, peak_bytes) - self.host_bytes)
        return over

    def describe(self) -> str:
        """Return the budget in words: "10.00 GB of the card and 16.00 GB of host memory"."""
        where = "the card" if self.on_gpu else "memory"
        parts = []
        if self.card_bytes is not None:
            parts.append(f"{size_text(self.card_bytes)} of {where}")
        if self.host_bytes is not None:
            parts.append(f"{size_text(self.host_bytes)} of host memory")
        return " and ".join(parts)

    def describe_beside(self) -> str:
        """Return `beside_bytes` in words: "0.82 GB of context, assumed"."""
        if self.is_measured:
            return f"{size_text(self.beside_bytes)} of context and other processes, measured"
        return f"{size_text(self.beside_bytes)} of context, assumed"


def budget_of(
    options: BudgetOptions, *, on_gpu: bool, processes: int = 1, held_bytes: int = 0
) -> Budget:
    """Return the budget that was asked for; `auto` is all memory that nobody else has taken.

    Args:
        options: the sizes that were asked for.
        on_gpu: whether the model will run on a card.
        processes: processes that share the memory of the host. Each has a card of its own.
        held_bytes: bytes of the model that this process holds already, see `Subject`.

    Raises:
        ConfigError: `auto`, and there is no GPU to ask; or less memory than a process takes by
            itself.
    """
    card, host = options.vram, options.ram
    available = psutil.virtual_memory().available + (0 if on_gpu else held_bytes)
    beside, is_measured = CONTEXT_BYTES, False
    if on_gpu and torch.cuda.is_available():
        _grow_context()
        free, total = torch.cuda.mem_get_info()
        # CUDA does not tell a process which part of this is its own context; the sum is enough.
        beside, is_measured = total - free - torch.cuda.memory_reserved(), True
        card = total if card == "auto" else card
    elif card == "auto" and on_gpu:
        raise ConfigError(
            "--vram auto: there is no GPU here to ask; name the size of its memory, as --vram 10GB"
        )
    elif card == "auto":
        card = available
    host = available if host == "auto" else host
    host = host // processes if host is not None else None
    card = card // processes if card is not None and not on_gpu else card
    budget = Budget(card, host, on_gpu, beside, is_measured)
    _check_budget(budget)
    return budget


def _grow_context() -> None:
    """Use each library that a step uses: they load code into the context, which then grows."""
    weight = Quantization(4).freeze(torch.ones(64, 64, device="cuda")).dequantize(torch.float16)
    x = (weight @ weight).view(1, 1, 64, 64).requires_grad_()
    attended = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    torch.autograd.backward(attended.float().sum())
    torch.cuda.synchronize()


def _check_budget(budget: Budget) -> None:
    allocatable = budget.allocatable_bytes
    if allocatable is not None and allocatable <= 0:
        raise ConfigError(
            f"--vram: {size_text(budget.card_bytes or 0)} are no more than the "
            f"{budget.describe_beside()}; "
            "expected the memory of the whole card; pass a larger --vram"
        )
    if budget.host_bytes is not None and budget.host_bytes <= PROCESS_BYTES:
        raise ConfigError(
            f"--ram: {size_text(budget.host_bytes)} are no more than the "
            f"{size_text(PROCESS_BYTES)} of the process itself; pass a larger --ram"
        )
