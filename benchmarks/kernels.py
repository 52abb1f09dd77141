"""Time each fused kernel beside the plain code that it stands in for, on a GPU.

    python benchmarks/kernels.py [--json FILE]
    python benchmarks/kernels.py --rehearse     # tiny, on a CPU, through Triton's interpreter

The shapes are those of deepseek-7b, with one row and with four rows of 2,048 tokens. For each side
it prints the time on the GPU (the median, each run with a cold cache), the time that the host takes
to launch it, the bytes that must be read and written over the time, the memory taken on top of the
inputs, and the largest error against fp64, relative to the largest exact number (unpacked weights:
against bitsandbytes). A kernel that
fails has its error in its row. Everything together takes less than 40 s; cases that would begin
later are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from measure import machine_and_command, print_table

_LIMIT_SECONDS = 36.0
_EXACT_ROWS = 16
_COLUMNS = ["case", "side", "gpu_us", "host_us", "gb_per_s", "taken_mb", "error", "note"]


class Sizes(NamedTuple):
    """The sizes of a model and of its batches; the defaults are deepseek-7b's."""

    hidden: int = 4096
    width: int = 11008
    vocabulary: int = 102_400
    heads: int = 32
    head_width: int = 128
    tokens: int = 2048
    rows: tuple[int, ...] = (1, 4)
    chunks: tuple[int, ...] = (256, 1024)
    rounds: int = 50
    cold_bytes: int = 2**30


_TINY = Sizes(64, 96, 300, 2, 16, 3, (1, 2), (4, 8), 1, 2**10)


@dataclass
class Case:
    """One piece of work, done by the plain code and by a kernel.

    Attributes:
        name: its name and size.
        sides: the work by the name of its side; it returns tensors.
        moved_bytes: bytes that it must at least read and write.
        exact: returns the first rows of the same tensors, computed in fp64.
        reset: gives the inputs their values back, where the work overwrites them.
        rounds: how often it is timed.
    """

    name: str
    sides: dict[str, Callable[[], list[Any]]]
    moved_bytes: int
    exact: Callable[[], list[Any]]
    rounds: int
    reset: Callable[[], None] = lambda: None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.rehearse:
        # Triton reads it once, when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device found; this needs one, or --rehearse")
    sizes = _TINY if arguments.rehearse else Sizes()
    limit = float("inf") if arguments.rehearse else start + _LIMIT_SECONDS
    rows = []
    for make in (_unpacking, _rotating, _gating, _gate_back, _scoring, _whole_loss):
        for row in _measured(make, sizes, limit):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    print_table(rows, _COLUMNS)
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.json:
        found = {**machine_and_command(), "sizes": sizes._asdict(), "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


# ---------------------------------------------------------------- measuring


def _measured(
    make: Callable[[Sizes], Iterator[Case]], sizes: Sizes, limit: float
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the cases that a function makes; what fails has its error in its row."""
    try:
        for case in make(sizes):
            for side, work in case.sides.items():
                row: dict[str, Any] = {"case": case.name, "side": side}
                if time.perf_counter() > limit:
                    yield {**row, "note": "left out: no time"}
                    continue
                try:
                    row |= _figures(case, work, sizes)
                except Exception as error:
                    row["note"] = _first_line(error)
                yield row
    except Exception as error:
        yield {"case": make.__name__.strip("_"), "side": "inputs", "note": _first_line(error)}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def _figures(case: Case, work: Callable[[], list[Any]], sizes: Sizes) -> dict[str, Any]:
    import torch

    case.reset()
    error = _error(work(), case.exact())
    on_gpu = torch.cuda.is_available()
    taken = _taken_bytes(case, work) if on_gpu else 0
    gpu, host = _seconds(case, work, sizes, on_gpu)
    return {
        "gpu_us": round(gpu * 1e6, 1),
        "host_us": round(host * 1e6, 1),
        "gb_per_s": round(case.moved_bytes / gpu / 1e9),
        "taken_mb": round(taken / 1e6, 1),
        "error": f"{error:.1e}",
        "note": "",
    }


def _error(found: list[Any], exact: list[Any]) -> float:
    """Return the largest error of a number, relative to the largest exact number."""
    errors = [
        float((ours.detach()[: len(wanted)].double() - wanted).abs().max() / wanted.abs().max())
        for ours, wanted in zip(found, exact, strict=True)
    ]
    return max(errors)


def _taken_bytes(case: Case, work: Callable[[], list[Any]]) -> int:
    import torch

    case.reset()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def _seconds(
    case: Case, work: Callable[[], list[Any]], sizes: Sizes, on_gpu: bool
) -> tuple[float, float]:
    """Return the median time on the GPU, and the median time of the call on the host.

    Before each run the GPU fills memory, which takes it 0.4 ms. So it finds the inputs in no cache,
    and does not wait for the host, unless the host takes longer than that to launch.
    """
    import torch

    cold = torch.empty(sizes.cold_bytes, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    host, marks = [], []
    warm_up = 3 if on_gpu else 0
    for _ in range(warm_up + case.rounds):
        case.reset()
        cold.zero_()
        if on_gpu:
            marks.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            marks[-1][0].record()
        begin = time.perf_counter()
        work()
        host.append(time.perf_counter() - begin)
        if on_gpu:
            marks[-1][1].record()
    if not on_gpu:
        return statistics.median(host), statistics.median(host)
    torch.cuda.synchronize()
    gpu = [first.elapsed_time(second) / 1000 for first, second in marks]
    return statistics.median(gpu[warm_up:]), statistics.median(host[warm_up:])


# ---------------------------------------------------------------- the cases


def _with(names: list[str], work: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
    """Return the work, done with these kernels in use."""
    from qlora_kit.layers import kernels

    def run() -> list[Any]:
        kernels.use(names)
        return work()

    return run


def _random(*shape: int, seed: int = 0) -> Any:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)


def _unpacking(sizes: Sizes) -> Iterator[Case]:
    """Weights in 4 bits, unpacked; an error of zero means the numbers of bitsandbytes."""
    import torch

    from qlora_kit.layers.quantize import Quantization

    for double_quant, quant_type, out, into, dtype in (
        (True, "nf4", sizes.hidden, sizes.hidden, torch.bfloat16),
        (True, "nf4", sizes.width, sizes.hidden, torch.bfloat16),
        (True, "nf4", sizes.width, sizes.hidden, torch.float32),
        (False, "fp4", sizes.width, sizes.hidden, torch.float32),
    ):
        quantization = Quantization(4, quant_type, double_quant)  # type: ignore[arg-type]
        weight = quantization.freeze(_random(out, into))

        def work(weight: Any = weight, dtype: Any = dtype) -> list[Any]:
            return [weight.dequantize(dtype)]

        def exact(work: Any = work) -> list[Any]:
            return [_with([], work)()[0].double()]

        yield Case(
            f"{quant_type} {out}x{into} {_short(dtype)}" + (" double" if double_quant else ""),
            {"plain": _with([], work), "kernel": _with(["nf4"], work)},
            weight.stored_bytes + out * into * dtype.itemsize,
            exact, sizes.rounds,
        )  # fmt: skip


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def _rotating(sizes: Sizes) -> Iterator[Case]:
    """Rotary positions of queries and keys, forward and backward."""
    import torch

    from qlora_kit.layers.kernels.rotary import rotate

    def plain(q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        def turned(x: Any) -> Any:
            first, second = x.chunk(2, dim=-1)
            return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)

        return turned(q), turned(k)

    for rows in sizes.rows:
        shape = (rows, sizes.tokens, sizes.heads, sizes.head_width)
        q, k, grad_q, grad_k = (_random(*shape, seed=i).transpose(1, 2) for i in range(4))
        q.requires_grad_()
        k.requires_grad_()
        angle = _random(1, sizes.tokens, sizes.head_width // 2, seed=5).float().repeat(1, 1, 2)
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()

        def work(turn: Any, inputs: Any = (q, k, cos, sin), grads: Any = (grad_q, grad_k)) -> Any:
            found = turn(*inputs)
            return [*found, *torch.autograd.grad(found, inputs[:2], grads)]

        def exact(inputs: Any = (q, k, cos, sin), grads: Any = (grad_q, grad_k)) -> list[Any]:
            q, k, cos, sin = (x.detach()[:1].double() for x in inputs)
            found = plain(q.requires_grad_(), k.requires_grad_(), cos, sin)
            wide = [grad[:1].double() for grad in grads]
            return [*(x.detach() for x in found), *torch.autograd.grad(found, (q, k), wide)]

        yield Case(
            f"rotary {rows}x{sizes.tokens} forward + backward",
            {"plain": lambda w=work: w(plain), "kernel": lambda w=work: w(rotate)},  # type: ignore[misc]
            8 * q.nbytes, exact, sizes.rounds,
        )  # fmt: skip


def _wide(sizes: Sizes, rows: int) -> tuple[list[Any], list[Any], Callable[[], None]]:
    """Return gate, up and a gradient, copies of their values, and what gives them these back."""
    values = [_random(rows * sizes.tokens, sizes.width, seed=i) for i in range(3)]
    tensors = [value.clone() for value in values]

    def reset() -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

    return tensors, values, reset


def _gating(sizes: Sizes) -> Iterator[Case]:
    """The gate of an MLP, forward."""
    import torch
    from torch import nn

    from qlora_kit.layers.kernels.gate import gated

    act = nn.SiLU()
    for rows in sizes.rows:
        (gate, up, _), values, reset = _wide(sizes, rows)

        def plain(gate: Any = gate, up: Any = up) -> list[Any]:
            return [up.mul_(act(gate))]

        def kernel(gate: Any = gate, up: Any = up) -> list[Any]:
            return [gated("silu", gate, up)]

        def exact(values: Any = values) -> list[Any]:
            gate, up, _ = (value[:_EXACT_ROWS].double() for value in values)
            return [torch.nn.functional.silu(gate) * up]

        yield Case(
            f"gate {rows * sizes.tokens}x{sizes.width}", {"plain": plain, "kernel": kernel},
            3 * up.nbytes, exact, sizes.rounds, reset,
        )  # fmt: skip


def _gate_back(sizes: Sizes) -> Iterator[Case]:
    """The gradients of gate and up, under a down projection without LoRA."""
    import torch
    from torch import nn

    from qlora_kit.layers.mlp import _gate_gradients, _TileLayers
    from qlora_kit.layers.weight import PlainWeight

    act = nn.SiLU()
    outer = _TileLayers([PlainWeight(_random(1, 1))], [None], None)
    for rows in sizes.rows:
        (gate, up, grad), values, reset = _wide(sizes, rows)

        def work(gate: Any = gate, up: Any = up, grad: Any = grad) -> list[Any]:
            with torch.no_grad():
                return _gate_gradients(act, [grad, gate.detach(), up], outer, grad)[0]

        def exact(values: Any = values) -> list[Any]:
            gate, up, grad = (value[:_EXACT_ROWS].double() for value in values)
            gate.requires_grad_()
            up.requires_grad_()
            return list(torch.autograd.grad(torch.nn.functional.silu(gate) * up, (gate, up), grad))

        yield Case(
            f"gate backward {rows * sizes.tokens}x{sizes.width}",
            {"plain": _with([], work), "kernel": _with(["gate"], work)},
            5 * up.nbytes, exact, sizes.rounds, reset,
        )  # fmt: skip


def _scoring(sizes: Sizes) -> Iterator[Case]:
    """Log-probabilities and gradient of the logits of a chunk; the plain code has fp32 logits."""
    import torch

    from qlora_kit.layers.kernels.cross_entropy import target_logprobs

    for count in sizes.chunks:
        values = _random(count, sizes.vocabulary) * 3
        logits, wide = values.clone(), values.float()
        targets = torch.arange(count, device=values.device) * 7 % sizes.vocabulary

        def reset(logits: Any = logits, wide: Any = wide, values: Any = values) -> None:
            logits.copy_(values)
            wide.copy_(values)

        def plain(wide: Any = wide, targets: Any = targets) -> list[Any]:
            wide -= wide.amax(dim=1, keepdim=True)
            picked = wide.gather(1, targets[:, None])
            total = wide.exp_().sum(dim=1, keepdim=True)
            wide.scatter_add_(1, targets[:, None], -total)
            return [(picked - total.log()).squeeze(1), wide.to(torch.bfloat16) / total]

        def kernel(logits: Any = logits, targets: Any = targets) -> list[Any]:
            return [target_logprobs(logits, targets, gradient=True), logits]

        def exact(values: Any = values, targets: Any = targets) -> list[Any]:
            logprobs = torch.log_softmax(values[:_EXACT_ROWS].double(), 1)
            picked = targets[:_EXACT_ROWS, None]
            hot = torch.zeros_like(logprobs).scatter_(1, picked, 1.0)
            return [logprobs.gather(1, picked)[:, 0], logprobs.exp() - hot]

        yield Case(
            f"loss of logits {count}x{sizes.vocabulary}", {"plain": plain, "kernel": kernel},
            2 * logits.nbytes, exact, sizes.rounds, reset,
        )  # fmt: skip


def _whole_loss(sizes: Sizes) -> Iterator[Case]:
    """Head and loss of a whole micro-batch, with their products."""
    import torch

    from qlora_kit.layers.frozen import FrozenLinear
    from qlora_kit.layers.head import Head
    from qlora_kit.layers.loss import cross_entropy_sum
    from qlora_kit.layers.weight import PlainWeight

    linear = FrozenLinear(sizes.hidden, sizes.vocabulary, bias=False)
    linear.weight = PlainWeight(_random(sizes.vocabulary, sizes.hidden) * 0.02)
    head = Head(linear)
    for rows in sizes.rows:
        hidden = _random(rows * sizes.tokens, sizes.hidden, seed=1).requires_grad_()
        targets = torch.arange(len(hidden), device=hidden.device) * 7 % sizes.vocabulary
        for chunk in sizes.chunks:

            def work(hidden: Any = hidden, targets: Any = targets, chunk: int = chunk) -> list[Any]:
                total = cross_entropy_sum(hidden, targets, head, chunk)
                return [torch.autograd.grad(total, hidden)[0]]

            def exact(hidden: Any = hidden, targets: Any = targets) -> list[Any]:
                wide = hidden.detach()[:_EXACT_ROWS].float()
                weight = linear.weight.dequantize(torch.float32)
                grad = torch.softmax((wide @ weight.T).double(), 1)
                grad[torch.arange(len(grad)), targets[:_EXACT_ROWS]] -= 1
                return [(grad.float() @ weight).double()]

            yield Case(
                f"head and loss {len(hidden)} by {chunk}",
                {"plain": _with([], work), "kernel": _with(["loss"], work)},
                2 * linear.weight.stored_bytes * -(-len(hidden) // chunk),
                exact, max(sizes.rounds // 5, 2),
            )  # fmt: skip


if __name__ == "__main__":
    main()
