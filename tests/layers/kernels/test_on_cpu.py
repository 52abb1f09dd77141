"""The kernels' form for a CPU: the checks of the kernels themselves, and what only a CPU has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_kit.layers import kernels
from qlora_kit.layers.kernels import on_cpu
from qlora_kit.plan.ledger import Ledger
from qlora_kit.private_torch import FakeTensorMode

HERE = Path(__file__).parent


def test_they_pass_the_checks_of_the_kernels() -> None:
    """Without Triton's interpreter a kernel takes its form for a CPU.

    The checks for 16 bits are left out: on a CPU kernels serve for fp32 only.
    """
    checks = [HERE / f"checks_{name}.py" for name in ("rotary", "gate", "cross_entropy", "layers")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not float16",
         *map(str, checks)],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=HERE.parents[2], check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_kernel_serves_on_a_cpu_if_it_has_a_form_for_it_and_in_fp32_only() -> None:
    kernels.use(kernels.NAMES)
    try:
        serving = [name for name in kernels.NAMES if kernels.serves(name, torch.empty(1))]
        assert serving == ["norm", "rotary", "gate", "loss"]
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.uint8):
            assert not any(kernels.serves(n, torch.empty(1, dtype=dtype)) for n in kernels.NAMES)
    finally:
        kernels.use(())


def peak_in_tensors(compute: object, *tensors: tuple[int, ...]) -> float:
    """Return the largest memory that a function takes besides its arguments, in its first one's."""
    with FakeTensorMode(), Ledger("cpu") as ledger:
        arguments = [torch.empty(shape) for shape in tensors]
        before = ledger.live_bytes
        ledger.restart()
        kept = compute(*arguments)  # type: ignore[operator]
        taken = ledger.peak().bytes - before
        del kept
    return taken / arguments[0].nbytes


def test_they_make_few_tensors() -> None:
    """The plain code makes four to six tensors in the same places."""
    wide, token = (64, 1024), (64, 1)

    def back(grad: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
        return on_cpu.rms_norm_back(grad, x, x[0], rstd)

    small = 0.05
    assert peak_in_tensors(lambda x: on_cpu.rms_norm(x, x[0], 1e-5), wide) <= 1 + small
    assert peak_in_tensors(back, wide, wide, token) <= 2 + small
    turned = (1, 8, 16, 64), (1, 16, 64), (1, 16, 64)
    for way in (False, True):
        found = peak_in_tensors(lambda *a, way=way: on_cpu.rotated(*a, back=way), *turned)
        assert found <= 1 + small
    gate = lambda g, u: on_cpu.gated("silu", g, u)  # noqa: E731
    assert peak_in_tensors(gate, wide, wide) <= small
    for product, most in ((False, 2), (True, 3)):
        found = peak_in_tensors(
            lambda g, u, d, product=product: on_cpu.gated_back("silu", g, u, d, product),
            wide, wide, wide,
        )  # fmt: skip
        assert found <= most + small


@pytest.mark.parametrize("threads", [1, 2])
def test_softmax_in_place_has_the_bits_of_softmax(threads: int) -> None:
    """torch does not promise that its softmax may write over its input; the loss relies on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits = torch.randn(37, 20_011, generator=torch.Generator().manual_seed(0)) * 8
        wanted = torch.softmax(logits, 1)
        torch.softmax(logits, 1, out=logits)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(logits, wanted)
