"""Time one LoRA linear layer on a GPU: the plain term beside the term of bf16 parts.

    python benchmarks/lora_products.py [--json FILE] [--rehearse]

Each case is a size of the layer, a number of tokens and a rank, under a frozen weight in bf16 that
nothing has to unpack. Its sides are the frozen layer alone, the plain term and the split term. The
time is the median of 30 by CUDA events; the host's is the time to queue the work, without waiting.
The errors are those of h = x Aᵀ and of the gradients of A and B, relative to fp64. A case that
fails says why in its row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from clocks import clock_of_this_machine
from measure import machine_and_command, print_table

_SIZES = ((4096, 4096), (4096, 11008))
_TOKENS = (2048, 8192)
_RANKS = (16, 64)
_REHEARSED = (((48, 80),), (33,), (8,))
_SIDES = ("frozen", "plain", "split")
_COLUMNS = [
    "D", "K", "tokens", "rank", "side", "forward_ms", "backward_ms", "host_ms",
    "forward_launches", "backward_launches", "error_h", "error_dA", "error_dB",
]  # fmt: skip
_WARMUP, _ROUNDS = 5, 30
_SCALING = 2.0
_FORWARD = "forward of the layer"


def main() -> None:
    """Run all cases and print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file for the rows, with the machine")
    parser.add_argument("--rehearse", action="store_true", help="one tiny case, on a CPU as well")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        if not arguments.rehearse:
            parser.error("no GPU is visible to torch, and a CPU has no such kernels; --rehearse")
        # The kernels serve on a CPU under Triton's interpreter only; without Triton, torch's own
        # operations compute the same.
        os.environ["TRITON_INTERPRET"] = "1"
    sizes, tokens, ranks = _REHEARSED if arguments.rehearse else (_SIZES, _TOKENS, _RANKS)
    cases = itertools.product(sizes, tokens, ranks, _SIDES)
    rows: list[dict[str, Any]] = []
    around = machine_and_command()
    for (d, k), count, rank, side in cases:
        rows.append(_row(side, d, k, count, rank))
        if arguments.json:
            # Written after each row, so a run that is killed keeps its figures.
            arguments.json.write_text(json.dumps({**around, "rows": rows}, indent=2) + "\n")
    print_table(rows, _COLUMNS)
    for row in rows:
        if "failed" in row:
            print(*(row[name] for name in (*_COLUMNS[:5], "failed")))


def _row(side: str, d: int, k: int, tokens: int, rank: int) -> dict[str, Any]:
    row: dict[str, Any] = {"D": d, "K": k, "tokens": tokens, "rank": rank, "side": side}
    try:
        case = _Case(side, d, k, tokens, rank)
        for figures in (case.times, case.launches, case.errors):
            row |= figures()
    except Exception as error:
        lines = str(error).strip().splitlines()
        row["failed"] = f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
    return row


class _Case:
    """One layer with an input and a gradient of its output."""

    def __init__(self, side: str, d: int, k: int, tokens: int, rank: int) -> None:
        import torch

        from qlora_kit.layers import kernels
        from qlora_kit.layers.frozen import FrozenLinear
        from qlora_kit.layers.lora import LoRALinear
        from qlora_kit.layers.quantize import Quantization

        kernels.use(["lora"] if side == "split" else [])
        self.side = side
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        frozen = FrozenLinear(d, k, bias=False)
        frozen.weight = Quantization(16).freeze(self._random(k, d, scale=d**-0.5).bfloat16())
        self.layer: Any = frozen
        if side != "frozen":
            self.layer = LoRALinear(frozen, rank=rank, scaling=_SCALING)
            self.layer.lora_B.data = self._random(k, rank, scale=1e-3)
        self.x = self._random(tokens, d).bfloat16().requires_grad_()
        self.grad_y = self._random(tokens, k).bfloat16()

    def _random(self, *shape: int, scale: float = 1.0) -> Any:
        import torch

        return torch.randn(shape, device=self.device) * scale

    def _backward(self, y: Any) -> None:
        y.backward(self.grad_y)

    def _forget(self) -> None:
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)

    def times(self) -> dict[str, float]:
        """Return the times of forward and backward, and of the host for both, in ms."""
        clock = clock_of_this_machine()
        host: list[float] = []
        for _ in range(_WARMUP + _ROUNDS):
            self._forget()
            started = time.perf_counter()
            clock.mark()
            y = self.layer(self.x)
            clock.mark()
            self._backward(y)
            clock.mark()
            host.append(time.perf_counter() - started)
        # Between the last mark of a round and the first of the next lies no work.
        seconds = clock.seconds()[_WARMUP * 3 :]
        return {
            "forward_ms": _median_ms(seconds[::3]),
            "backward_ms": _median_ms(seconds[1::3]),
            "host_ms": _median_ms(host[_WARMUP:]),
        }

    def launches(self) -> dict[str, int]:
        """Return the kernels of forward and of backward; on a CPU, the operations."""
        import torch
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile, record_function

        self._forget()
        is_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
        with profile(activities=activities, acc_events=True) as record:
            with record_function(_FORWARD):
                y = self.layer(self.x)
                if is_gpu:
                    torch.cuda.synchronize()
            self._backward(y)
            if is_gpu:
                torch.cuda.synchronize()
        events = [e for e in record.events() if (e.device_type != DeviceType.CPU) is is_gpu]
        starts = [e.time_range.start for e in events if e.name != _FORWARD]
        if not starts:
            raise RuntimeError("the profiler recorded no kernel")
        (end,) = [
            e.time_range.end
            for e in record.events()
            if e.name == _FORWARD and e.device_type == DeviceType.CPU
        ]
        forward = sum(start < end for start in starts)
        return {"forward_launches": forward, "backward_launches": len(starts) - forward}

    def errors(self) -> dict[str, float]:
        """Return the errors of h and of the gradients of A and B, relative to fp64."""
        import torch

        from qlora_kit.layers.lora import term_of

        if self.side == "frozen":
            return {}
        self._forget()
        self._backward(self.layer(self.x))
        with torch.no_grad():
            h = term_of([self.layer], self.x).inner(self.x).double()
            if self.side == "split":
                h = h[0].unflatten(1, (2, -1)).sum(1) / _SCALING
            a, b = self.layer.lora_A.double(), self.layer.lora_B.double()
            x, grad_y = self.x.double(), self.grad_y.double()
            exact_h = x @ a.T
            exact_grad_a = _SCALING * (grad_y @ b).T @ x
            exact_grad_b = _SCALING * grad_y.T @ exact_h
            return {
                "error_h": _relative(h, exact_h),
                "error_dA": _relative(self.layer.lora_A.grad, exact_grad_a),
                "error_dB": _relative(self.layer.lora_B.grad, exact_grad_b),
            }


def _median_ms(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 3)


def _relative(found: Any, exact: Any) -> float:
    return float(f"{float((found.double() - exact).norm() / exact.norm()):.1e}")


if __name__ == "__main__":
    main()
