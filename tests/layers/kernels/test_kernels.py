"""The fused kernels: computed by Triton's interpreter, compiled for GPUs, simulated as ops."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_kit.layers import kernels
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.head import Head
from qlora_kit.layers.kernels import cross_entropy, gate, nf4, rotary, split
from qlora_kit.layers.kernels.dialect import IS_INSTALLED
from qlora_kit.layers.loss import cross_entropy_sum
from qlora_kit.layers.mlp import TiledMLP
from qlora_kit.layers.quantize import Quantization, empty_4bit
from qlora_kit.layers.weight import PlainWeight
from qlora_kit.plan.ledger import Ledger
from qlora_kit.private_torch import FakeTensorMode

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(not IS_INSTALLED, reason="Triton is not installed")


@needs_triton
def test_in_the_interpreter() -> None:
    """Triton decides at its import whether to interpret, so this takes a process of its own."""
    checks = sorted(map(str, HERE.glob("checks_*.py")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *checks],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parents[2], check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# ---------------------------------------------------------------- compiled

KINDS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.uint8: "*u8", torch.int64: "*i64",
}  # fmt: skip
# Compute capabilities; the first has no bfloat16.
TARGETS = {75: torch.float16, 80: torch.bfloat16, 90: torch.bfloat16}


class Compiler:
    """Stands in for a kernel: compiles each launch for a GPU, and computes nothing."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability = kernel, capability
        self.assembly: list[str] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(count > 0 for count in grid)
        assert all(count < 2**16 for count in grid[1:])
        return self.compile

    def compile(self, *arguments: Any, **options: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        for position, (each, value) in enumerate(zip(self.kernel.params, arguments, strict=True)):
            if each.is_constexpr:
                signature[each.name], constants[each.name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[each.name] = KINDS[value.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[each.name] = "fp32"
            else:
                signature[each.name] = "i32"
                if value % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(
            source, target=GPUTarget("cuda", self.capability, 32), options=options
        )
        assert compiled.asm["cubin"]
        self.assembly.append(compiled.asm["ptx"])


def unpack(dtype: torch.dtype) -> None:
    one = torch.zeros(1)
    for absmax, second in (
        (one.to(torch.uint8), (one, one, one)),
        (one, (None, None, None)),
    ):
        for block_size in (64, 4096):
            for out in (dtype, torch.float32):
                nf4._run(
                    one.to(torch.uint8), absmax, *second, (4, 4096), block_size, 256, "nf4", out
                )


def rotate(dtype: torch.dtype) -> None:
    for rotated, angles in ((128, dtype), (96, torch.float32)):
        q = torch.zeros(1, 2, 32, 128, dtype=dtype).transpose(1, 2)
        k = torch.zeros(1, 2, 8, 128, dtype=dtype).transpose(1, 2)
        cos = torch.zeros(1, 2, rotated, dtype=angles)
        for back in (False, True):
            rotary._run(q, k, cos, cos, back)


def gated(dtype: torch.dtype) -> None:
    gate_, up = torch.zeros(2, 2 * 11008, dtype=dtype).chunk(2, dim=-1)
    for name in ("silu", "gelu_tanh"):
        gate._run_forward(name, gate_, up)


def gated_back(dtype: torch.dtype) -> None:
    gate_, up, grad = (torch.zeros(2, 1000, dtype=dtype) for _ in range(3))
    for name in ("silu", "gelu_tanh"):
        for product in (False, True):
            gate._run_backward(name, gate_, up, grad, product)


def logprobs(dtype: torch.dtype) -> None:
    targets = torch.zeros(2, dtype=torch.int64)
    for vocabulary, each in ((102_400, dtype), (317, torch.float32)):
        for gradient in (False, True):
            logits = torch.zeros(2, vocabulary, dtype=each)
            cross_entropy._run(logits, targets, 1.0, gradient)


def split_matrices(dtype: torch.dtype) -> None:
    for layers in (1, 3):
        a, b = ([torch.zeros(size)] * layers for size in ((16, 4096), (4096, 16)))
        split._run_matrices(a, b)


def split_left(dtype: torch.dtype) -> None:
    for rank in (1, 16):
        split._run_left(torch.zeros(3, 64, 2, rank), 2.0, True)


def add_product(dtype: torch.dtype) -> None:
    for rank in (1, 16, 192):
        left, right = torch.zeros(64, 2 * rank), torch.zeros(2 * rank, 96)
        kept = torch.ones(64, 96, dtype=torch.bool)
        for mask in (None, kept):
            split._run_add(torch.zeros(64, 96).to(dtype), left.to(dtype), right.to(dtype), mask)


LAUNCHES: dict[str, tuple[Any, str, Callable[[torch.dtype], None], int]] = {
    "nf4": (nf4, "_unpack", unpack, 8),
    "rotary": (rotary, "_rotate", rotate, 4),
    "gate": (gate, "_gate", gated, 2),
    "gate back": (gate, "_gate_back", gated_back, 4),
    "loss": (cross_entropy, "_cross_entropy", logprobs, 4),
    "LoRA matrices": (split, "_matrices", split_matrices, 2),
    "LoRA left factors": (split, "_left", split_left, 2),
    "LoRA sum": (split, "_add", add_product, 6),
}


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled here")
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles_for_a_gpu(
    name: str,
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The interpreter accepts code that the compiler refuses; ptxas needs no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, kernel, launch, count = LAUNCHES[name]
    monkeypatch.setattr(split, "_can_launch", lambda tensor: True)
    compiler = Compiler(getattr(module, kernel), capability)
    monkeypatch.setattr(module, kernel, compiler)
    launch(TARGETS[capability])
    assert len(compiler.assembly) == count
    if name == "nf4":
        # One rounding for a product and a sum together would not give bitsandbytes' bits.
        assert not any("fma." in each for each in compiler.assembly)


# ---------------------------------------------------------------- simulated


def test_simulated_shapes_need_no_triton() -> None:
    with FakeTensorMode():
        byte = torch.empty(32, dtype=torch.uint8, device="meta")
        one = torch.empty(1, device="meta")
        weight = nf4.unpack_4bit(byte, one, None, None, None, (8, 8), 64, 256, "nf4", torch.half)
        assert (weight.shape, weight.dtype, weight.device.type) == ((8, 8), torch.half, "meta")

        q = torch.empty(2, 5, 4, 16, device="meta").transpose(1, 2)
        k = torch.empty(2, 5, 2, 16, device="meta").transpose(1, 2)
        angle = torch.empty(1, 5, 16, device="meta")
        turned = rotary.rotate(q, k, angle, angle)
        assert [x.shape for x in turned] == [q.shape, k.shape]
        assert [x.stride() for x in turned] == [q.stride(), k.stride()]

        logits = torch.empty(3, 17, dtype=torch.bfloat16, device="meta")
        targets = torch.empty(3, dtype=torch.int64, device="meta")
        found = cross_entropy.target_logprobs(logits, targets, gradient=True)
        assert (found.shape, found.dtype) == ((3,), torch.float32)

        up = torch.empty(3, 17, device="meta")
        assert gate.gated("silu", torch.empty_like(up), up) is up


def test_simulated_memory_is_less_than_that_of_the_plain_code() -> None:
    width = 2048
    layers = {"gate_proj": (width, 64), "up_proj": (width, 64), "down_proj": (64, width)}

    def step() -> None:
        mlp = nn.Module()
        for name, shape in layers.items():
            layer = FrozenLinear(shape[1], shape[0], bias=False)
            layer.weight = empty_4bit(shape, Quantization(4), torch.device("meta"))
            setattr(mlp, name, layer)
        mlp.act_fn = nn.SiLU()
        x = torch.empty(512, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        TiledMLP(mlp, 512)(x).sum().backward()

    def loss() -> None:
        head = FrozenLinear(64, 5000, bias=False)
        head.weight = PlainWeight(torch.empty(5000, 64, dtype=torch.bfloat16, device="meta"))
        x = torch.empty(512, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        targets = torch.empty(512, dtype=torch.int64, device="meta")
        cross_entropy_sum(x, targets, Head(head)).backward()

    def peak(run: Callable[[], None], names: list[str]) -> int:
        kernels.use(names)
        try:
            with FakeTensorMode(), Ledger("meta") as ledger:
                run()
            return ledger.peak().bytes
        finally:
            kernels.use([])

    wide = 512 * width * 2
    assert peak(step, ["gate", "nf4"]) <= peak(step, []) - 2 * wide + 2**20
    assert peak(loss, ["loss"]) <= peak(loss, []) - 256 * 5000 * 4
