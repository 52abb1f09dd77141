"""A step by part: what a launch is counted to, and how a recording is read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from training import make_adapter, make_rows, options

import qlora_kit as qk
from qlora_kit.private_transformers import rotary_functions
from qlora_kit.step.parts import PARTS, Launch, Sizes, part_of
from qlora_kit.step.recording import (
    Recording,
    RecordingError,
    busy_seconds,
    launches_of,
    recorded,
    summarize,
)

CPU = torch.device("cpu")
SIZES = Sizes(rank=16, vocabulary=102400, weights=frozenset({(11008, 4096), (4096, 4096)}))
NODE = "autograd::engine::evaluate_function: "

# As torch names them on a GPU; kernels' names shortened.
LAUNCHES = [
    ("Memcpy HtoD (Pinned -> Device)", ("aten::copy_",), (), "copies"),
    ("nvjet_tst_128x256_64x4_TNN", ("aten::mm", "_LoRAProduct"), ((2048, 4096), (4096, 11008)),
     "base products"),
    ("aten::mm", ("aten::mm", "_LoRAProductBackward"), ((16, 11008), (11008, 4096)),
     "base products"),
    ("sm80_xmma_gemm_f32f32_f32f32", ("aten::mm", "_LoRAProduct"), ((2048, 4096), (4096, 16)),
     "LoRA"),
    ("nvjet_tst_64x8", ("aten::addmm_",), ((2048, 11008), (2048, 48), (48, 11008)), "LoRA"),
    ("vectorized_elementwise_kernel", ("aten::copy_", "_LoRAProduct"), (), "LoRA"),
    ("_unpack", ("qlora_kit::unpack", "_LoRAProduct"), (), "dequantisation"),
    ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>",
     ("bitsandbytes::dequantize_4bit", "_LoRAProduct"), (), "dequantisation"),
    ("vectorized_gather_kernel", ("aten::index", "part of step: dequantisation", "_LoRAProduct"),
     (), "dequantisation"),
    ("nvjet", ("aten::mm", f"{NODE}MatMul4BitBackward", "bitsandbytes::dequantize_4bit"),
     ((2048, 4096), (4096, 4096)), "base products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop",
     ("aten::_scaled_dot_product_cudnn_attention",), (), "attention"),
    ("gemm", ("aten::bmm", "aten::matmul"), ((8, 64, 16), (8, 16, 64)), "attention"),
    ("softmax_warp_forward", ("aten::_softmax", "aten::softmax"), (), "attention"),
    ("reduce_kernel<512>", ("aten::mean", "part of step: norms"), (), "norms"),
    ("vectorized_elementwise_kernel",
     ("aten::mul", f"{NODE}MulBackward0", "aten::mul", "part of step: norms"), (), "norms"),
    ("elementwise_kernel", ("aten::mul", "part of step: RoPE"), (), "RoPE"),
    ("silu_kernel", ("aten::silu", "part of step: MLP beside products"), (),
     "MLP beside products"),
    ("elementwise_kernel", ("aten::mul", "_LoRAProduct", "part of step: MLP beside products"), (),
     "LoRA"),
    ("nvjet_tst", ("aten::mm", "_CrossEntropySum"), ((256, 4096), (4096, 102400)),
     "head and loss"),
    ("nvjet_tst", ("aten::mm", "part of step: head and loss"), ((256, 4096), (4096, 4096)),
     "head and loss"),
    ("reduce_kernel", ("aten::amax", "_CrossEntropySum"), (), "head and loss"),
    ("multi_tensor_apply_kernel", ("aten::_fused_adamw_", "Optimizer.step#AdamW.step"), (),
     "optimizer"),
    ("multi_tensor_apply_kernel", ("aten::_foreach_norm",), (), "optimizer"),
    ("vectorized_elementwise_kernel", ("aten::add",), (), "everything else"),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "chain", "shape", "part"), LAUNCHES)
def test_a_launch_is_counted_to_its_part(
    kernel: str, chain: tuple[str, ...], shape: Any, part: str
) -> None:
    assert part in PARTS
    assert part_of(Launch(kernel, 1e-3, chain, shape), SIZES) == part


def event(name: str, start: float, parent: Any = None, **other: Any) -> Any:
    """Return an event as torch's profiler has it, by default on the host, in the main thread."""
    usual: dict[str, Any] = {
        "device_type": DeviceType.CPU, "thread": 1, "fwd_thread": 0, "sequence_nr": -1,
        "kernels": [], "input_shapes": [], "is_user_annotation": False, "self_cpu_time_total": 1.0,
    }  # fmt: skip
    span = SimpleNamespace(start=start, end=start + 1)
    return SimpleNamespace(name=name, cpu_parent=parent, time_range=span, **(usual | other))


def kernel(name: str, micros: float) -> Any:
    return SimpleNamespace(name=name, duration=micros)


def test_a_kernel_of_the_backward_pass_is_led_back_to_its_module() -> None:
    """On a GPU, torch records backward in a thread of its own, and labels on the device too."""
    on_gpu = {"device_type": DeviceType.CUDA}
    label = "part of step: norms"
    norm = event(label, 0, kernels=[kernel(label, 9)])
    forward = event("aten::mul", 1, norm, sequence_nr=7, kernels=[kernel("mul_kernel", 2)])
    # The same number in the other thread is that of a recomputed operation elsewhere.
    elsewhere = event("aten::add", 2, sequence_nr=7, thread=2)
    node = event(f"{NODE}MulBackward0", 3, thread=2, fwd_thread=1, sequence_nr=7)
    backward = event("aten::mul", 4, node, thread=2, kernels=[kernel("mul_kernel", 3)])
    device = [
        event("mul_kernel", 10, **on_gpu), event("mul_kernel", 10.5, **on_gpu),
        event(label, 0, is_user_annotation=True, **on_gpu),
    ]  # fmt: skip
    launches, spans = launches_of([norm, forward, elsewhere, node, backward, *device], on_gpu=True)
    found = summarize(launches, Sizes(16, 100), 1.0, busy_seconds(spans))
    assert found.seconds["norms"] == pytest.approx(5e-6)
    assert sum(found.seconds.values()) == pytest.approx(5e-6)
    assert found.launches["norms"] == 2
    assert found.operations["mul_kernel", "norms"] == (pytest.approx(5e-6), 2)
    assert [start for start, _ in spans] == pytest.approx([10e-6, 10.5e-6])
    assert found.idle_seconds == pytest.approx(1 - 1.5e-6)
    with pytest.raises(RecordingError, match="recorded no kernel"):
        launches_of([norm, forward], on_gpu=True)


def test_a_recomputed_layer_is_not_counted_to_the_operation_that_asked_for_it() -> None:
    node = event(f"{NODE}_LoRAProductBackward", 0, sequence_nr=3)
    layer = event("part of step: a layer", 1, node)
    residual = event("aten::add", 2, layer)
    launches, _ = launches_of([node, layer, residual], on_gpu=False)
    assert launches == [Launch("aten::add", 1e-6, ("aten::add",))]


def test_kernels_that_overlap_are_busy_once() -> None:
    assert busy_seconds([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.2, 5.4)]) == pytest.approx(4.0)
    assert busy_seconds([]) == 0


# ---------------------------------------------------------------- a recording


def changes_of(model: Any) -> Any:
    """Return what labels change in a model: its hooks, and the functions that rotate."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return hooks, rotary_functions(model)


@contextlib.contextmanager
def one_recorded(adapter: qk.Adapter, kept: list[Recording]) -> Iterator[None]:
    model = adapter.base.model
    with recorded(model, Sizes.of(model, adapter.spec.rank), CPU) as recording:
        yield
    kept.append(recording)


def test_every_part_of_a_step_is_found_and_they_add_up(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(save_tiny())
    kept: list[Recording] = []
    before = changes_of(adapter.base.model)
    qk.train_adapter(
        adapter, make_rows(4), options(max_steps=2),
        around_step=lambda number: one_recorded(adapter, kept) if number == 2 else nullcontext(),
    )  # fmt: skip
    (recording,) = kept
    time = recording.time()
    assert all(time.seconds[part] > 0 for part in PARTS if part != "copies"), time.seconds
    assert time.busy_seconds == pytest.approx(sum(time.seconds.values()))
    assert 0 < time.idle_seconds < time.whole_seconds
    # Each projection multiplies in forward and in backward, and most of them in recomputation.
    projections = len(adapter.layers)
    assert 2 * projections - 1 <= time.operations["aten::mm", "base products"][1] <= 3 * projections
    recording.save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {each.get("name") for each in events}
    assert {"part of step: norms", "part of step: RoPE", "aten::mm"} <= names
    # Nothing is left of the labels.
    assert changes_of(adapter.base.model) == before


def test_a_block_that_fails_leaves_no_label(save_tiny: Callable[..., Path]) -> None:
    model = make_adapter(save_tiny()).base.model
    before = changes_of(model)
    with pytest.raises(MemoryError), recorded(model, Sizes.of(model, 4), CPU):
        raise MemoryError
    assert changes_of(model) == before
