"""Examines this machine: versions, devices, and whether 4 and 8 bits compute correctly on it.

Returns findings, each with a remedy where one is needed. Changes nothing on the machine.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from qlora_kit.errors import first_line

_PACKAGES = ("torch", "bitsandbytes", "transformers", "datasets", "accelerate", "safetensors")
# Earlier versions of transformers lose the spaces of some tokenizers, DeepSeek-LLM's among them.
_MINIMUM = {"transformers": (5, 22)}
# NF4 keeps about 90 % of a normal weight's norm, int8 above 99 %.
_TOLERANCE = {4: 0.12, 8: 0.02}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: the thing that was examined.
        found: its state, in words.
        ok: whether training can work with it.
        remedy: advice where training cannot work with it, or where the user should know more.
    """

    name: str
    found: str
    ok: bool = True
    remedy: str = ""


def examine() -> list[Finding]:
    """Return all findings. Imports torch and bitsandbytes; works without them too."""
    return [*_versions(), *_devices(), *_bits()]


def _versions() -> Iterator[Finding]:
    yield Finding("python", platform.python_version())
    for package in _PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "not installed", False, f"pip install {package}")
            continue
        remedy = _upgrade(package, version)
        yield Finding(package, version, not remedy, remedy)


def _upgrade(package: str, version: str) -> str:
    """Return the command that upgrades a version that is too old; "" where it is not too old."""
    least = _MINIMUM.get(package, (0,))
    numbers = tuple(int(n) for n in version.split("+")[0].split(".")[:2] if n.isdigit())
    return "" if numbers >= least else f"pip install '{package}>={'.'.join(map(str, least))}'"


def too_old() -> Iterator[str]:
    """Yield a line for each package older than the kit is tested with; imports no package."""
    for package in _MINIMUM:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if command := _upgrade(package, version):
            yield f"{package} {version} is older than what this is tested with; {command}"


def _devices() -> Iterator[Finding]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    yield Finding(
        "cpu",
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
    )
    if not torch.cuda.is_available():
        yield Finding("gpu", "none visible to torch", remedy="training runs on the CPU, slowly")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield Finding(
            f"gpu {index}",
            f"{torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free",
        )


def _bits() -> Iterator[Finding]:
    import torch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for bits in (4, 8):
            yield _try_bits(bits, device)


def _try_bits(bits: int, device: str) -> Finding:
    """Quantise a weight, multiply through it, and compare with the weight itself."""
    name = f"{bits}-bit on {device}"
    try:
        import torch

        from qlora_kit.layers.frozen import FrozenLinear
        from qlora_kit.layers.quantize import Quantization

        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(192, 320, generator=generator).to(device)
        x = torch.randn(8, 320, generator=generator).to(device)
        layer = FrozenLinear(320, 192, bias=False)
        layer.weight = Quantization(bits=bits).freeze(weight)  # type: ignore[arg-type]
        exact = x @ weight.T
        error = float((layer(x) - exact).norm() / exact.norm())
    except Exception as error_:  # a broken installation may raise anything
        return Finding(
            name, f"{type(error_).__name__}: {first_line(error_, 120)}", False,
            "reinstall bitsandbytes for this CPU or CUDA version: `python -m bitsandbytes`",
        )  # fmt: skip
    ok = error < _TOLERANCE[bits]
    remedy = "" if ok else "wrong numbers: reinstall bitsandbytes"
    return Finding(name, f"works, output error {error:.1%}", ok, remedy)
