"""The rates that a device reaches at its best: matrix products, passes over memory, calls.

They are measured in a few seconds and kept in the user's cache, or taken from the data sheet of a
card that is not here (`model/cards.py`). No model is needed; the time of a step is predicted from
them (`plan/duration.py`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME

from qlora_kit.errors import DataError, StorageError
from qlora_kit.layers.quantize import Quantization
from qlora_kit.model.hardware import Hardware, dtype_named
from qlora_kit.model.memory import release_memory
from qlora_kit.storage import read_json, write_json

# Sizes that a product needs to reach its rate, and that a processor without units for the dtype
# still multiplies in a fraction of a second.
_PRODUCT_SIZE = {"cpu": 512, "cuda": 8192}
# Bytes that an operation reads and writes. Those of a small operation are still in a CPU's caches.
_PASS_BYTES = {"cpu": (1 << 16, 1 << 20, 1 << 23, 1 << 26), "cuda": (1 << 22, 1 << 28)}
_UNPACKED_SHAPE = {"cpu": (1024, 1024), "cuda": (4096, 4096)}
_LINK_BYTES = 1 << 26
_CALLS = 200
# The best of several tries counts, in rounds that lie a while apart: on a shared machine most tries
# share their core.
_LEAST_TRIES, _SECONDS_A_TRY, _ROUNDS = 2, 0.04, 4
# bfloat16 costs exactness, so a smaller gain is not worth a proposal.
_GAIN_WORTH_SAYING = 1.5
# Written into each file; a file of another layout is measured again.
_LAYOUT = 1


@dataclass(frozen=True)
class Ceilings:
    """The best rates of a device.

    Attributes:
        device: its name.
        flop_per_second: the rate of matrix products, by dtype.
        bytes_per_second: the rate of passes over memory, as pairs of the bytes that an operation
            reads and writes, and the rate; in ascending order.
        unpacked_per_second: bytes that unpacking 4-bit weights reads and writes in a second, by the
            dtype of the result; a dtype without a rate unpacks at the rate of its pass.
        link_bytes_per_second: the rate of copies between host and device; None on a CPU.
        call_seconds: the time that the host takes for one small operation of torch; None where the
            host is not known.
        is_measured: whether the rates were measured on the device, or are those of its data sheet.
    """

    device: str
    flop_per_second: Mapping[str, float]
    bytes_per_second: tuple[tuple[int, float], ...]
    unpacked_per_second: Mapping[str, float]
    link_bytes_per_second: float | None
    call_seconds: float | None
    is_measured: bool

    @property
    def is_of_gpu(self) -> bool:
        """Whether the device is a GPU, beside a host that calls its operations."""
        return self.link_bytes_per_second is not None

    def pass_seconds(self, moved_bytes: int) -> float:
        """Return the time of an operation that reads and writes these bytes.

        Between two measured sizes the rate lies on a line over the logarithm of the size.
        """
        (size, rate), *larger = self.bytes_per_second
        for next_size, next_rate in larger:
            if moved_bytes <= size:
                break
            share = min(1.0, math.log(moved_bytes / size) / math.log(next_size / size))
            size, rate = next_size, rate + share * (next_rate - rate)
        return moved_bytes / rate

    def gain(self, dtype: str) -> float:
        """Return how many times as fast products are in `dtype` as in float32."""
        return self.flop_per_second[dtype] / self.flop_per_second["float32"]


def ceilings_of(device: torch.device, *, cache: Path | None = None) -> Ceilings:
    """Return the rates of a device of this machine: from the cache, or measured now.

    Args:
        device: the CPU, or a GPU that is here.
        cache: the folder of the cache; by default beside that of the hub.
    """
    key = _key(device)
    name = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:16]
    file = (cache or Path(HF_HOME) / "qlora_kit") / f"ceilings-{name}.json"
    found = _from_cache(file, key)
    if found is None:
        found = measured(device)
        _forget(device)
        _keep(file, key, found)
    return found


def _forget(device: torch.device) -> None:
    """Give the memory of a measurement back, and take it out of a GPU's record of its peak."""
    release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def proposing_bfloat16(hardware: Hardware) -> Hardware:
    """Return a CPU in float32 with a word on bfloat16 beside the reason, where that is much faster.

    The dtype stays: float32 is exact, and the choice is the user's.
    """
    if hardware.device.type != "cpu" or hardware.dtype != torch.float32:
        return hardware
    gain = ceilings_of(hardware.device).gain("bfloat16")
    if gain < _GAIN_WORTH_SAYING:
        return hardware
    said = f"exact; --dtype bfloat16 multiplies {gain:.1f} times as fast here, measured"
    return replace(hardware, reason=said)


def _key(device: torch.device) -> dict[str, Any]:
    """Return everything that the rates depend on."""
    on_gpu = device.type == "cuda"
    return {
        "layout": _LAYOUT,
        "device": device_name(device),
        "torch": importlib.metadata.version("torch"),
        "threads": torch.get_num_threads(),
        "deterministic": on_gpu and torch.are_deterministic_algorithms_enabled(),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor with its vector units."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line[:10] == "model name")
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _from_cache(file: Path, key: dict[str, Any]) -> Ceilings | None:
    """Return the rates that a file keeps; None where it is missing, damaged or of another key."""
    try:
        kept = read_json(file)
        if kept["key"] != key:
            return None
        rates = dict(kept["ceilings"])
        rates["bytes_per_second"] = tuple(
            (int(size), float(rate)) for size, rate in rates["bytes_per_second"]
        )
        found = Ceilings(**rates)
        return found if _are_rates(found) else None
    except (DataError, StorageError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _are_rates(found: Ceilings) -> bool:
    rates = [
        *found.flop_per_second.values(),
        *found.unpacked_per_second.values(),
        *(number for pair in found.bytes_per_second for number in pair),
        *(each for each in (found.link_bytes_per_second, found.call_seconds) if each is not None),
    ]
    return bool(found.bytes_per_second) and all(float(rate) > 0 for rate in rates)


def _keep(file: Path, key: dict[str, Any], found: Ceilings) -> None:
    """Write the rates into the cache; where it cannot be written they are measured each time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"key": key, "ceilings": asdict(found)})
    except (OSError, StorageError):
        return


# ---------------------------------------------------------------- measuring


def measured(device: torch.device) -> Ceilings:
    """Measure the rates of a device of this machine."""
    with torch.no_grad():
        rounds = [_round(device) for _ in range(_ROUNDS)]
    return replace(
        rounds[0],
        flop_per_second=_fastest([each.flop_per_second for each in rounds]),
        bytes_per_second=tuple(
            max(rates) for rates in zip(*(each.bytes_per_second for each in rounds), strict=True)
        ),
        unpacked_per_second=_fastest([each.unpacked_per_second for each in rounds]),
        link_bytes_per_second=max(each.link_bytes_per_second or 0.0 for each in rounds) or None,
        call_seconds=min(each.call_seconds or math.inf for each in rounds),
    )


def _fastest(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: max(each[name] for each in rounds) for name in rounds[0]}


def _round(device: torch.device) -> Ceilings:
    """Measure every rate once."""
    on_gpu = device.type == "cuda"
    dtypes = ("float32", "bfloat16", *(("float16",) if on_gpu else ()))
    sizes = _PASS_BYTES[device.type]
    return Ceilings(
        device=device_name(device),
        flop_per_second={name: _product_rate(device, dtype_named(name)) for name in dtypes},
        bytes_per_second=tuple((size, _pass_rate(device, size)) for size in sizes),
        unpacked_per_second={name: _unpacking_rate(device, dtype_named(name)) for name in dtypes},
        link_bytes_per_second=_link_rate(device) if on_gpu else None,
        call_seconds=_call_seconds(device),
        is_measured=True,
    )


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = _PRODUCT_SIZE[device.type]
    left, right = (_numbers(device, size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(device, lambda: left @ right)


def _pass_rate(device: torch.device, moved_bytes: int) -> float:
    numbers = moved_bytes // (3 * torch.float32.itemsize)
    left, right, out = (torch.ones(numbers, device=device) for _ in range(3))
    return moved_bytes / _best_seconds(device, lambda: torch.add(left, right, out=out))


def _unpacking_rate(device: torch.device, dtype: torch.dtype) -> float:
    weight = Quantization(4).freeze(_numbers(device, *_UNPACKED_SHAPE[device.type]))
    made = weight.dequantize(dtype)
    moved = weight.stored_bytes + made.nbytes
    return moved / _best_seconds(device, lambda: weight.dequantize(dtype))


def _numbers(device: torch.device, *shape: int) -> torch.Tensor:
    """Return random numbers, without a draw from the generator that a run draws from."""
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0))


def _link_rate(device: torch.device) -> float:
    host = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    there = host.to(device)
    return _LINK_BYTES / _best_seconds(device, lambda: there.copy_(host, non_blocking=True))


def _call_seconds(device: torch.device) -> float:
    """Return the time that the host takes to call one small operation."""
    number = torch.ones(1, device=device)

    def calls() -> None:
        for _ in range(_CALLS):
            torch.add(number, number)

    return _best_seconds(device, calls) / _CALLS


def _best_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Return the shortest time that the work took, of several tries after the first."""
    clock = _clock(device)
    best, tries = math.inf, 0
    work()
    _wait_for(device)
    begin = time.perf_counter()
    while tries < _LEAST_TRIES or time.perf_counter() - begin < _SECONDS_A_TRY:
        start = clock()
        work()
        _wait_for(device)
        best, tries = min(best, clock() - start), tries + 1
    return best


def _clock(device: torch.device) -> Callable[[], float]:
    """Return the clock of the measurements.

    On one thread it is the time of the processor, which stands still while another process has the
    core. Rates that were measured on a busy machine would stay in the cache.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
