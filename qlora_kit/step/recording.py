"""One step under torch's profiler: the time of its work on the device, by the part it is for.

Takes a model and a block of code; returns the `StepTime` of the block, and its trace. While the
block runs, modules and functions of the model carry labels with the part that they are for, and
purposes that the code announces become labels too. No computation changes, and without a
recording nothing of all this exists.

A kernel of the backward pass is launched by autograd, outside of any module. There torch's sequence
numbers lead back to the operation of the forward pass, and so to its module. On a CPU operations
take the place of kernels, with their own time; what is left of the step is Python.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.layers.projections import group_of
from qlora_kit.layers.purpose import LAYER_CHECKPOINTS, LOSS_CHUNK, UNPACKED, heard_by
from qlora_kit.private_transformers import rotary_functions, rotate_by
from qlora_kit.step.parts import LABEL, NODE, PARTS, PRODUCTS, Launch, Shape, Sizes, part_of

_STEP = LABEL + "the whole"
_LAYER = LABEL + "a layer"
_OF_PURPOSE = {
    UNPACKED: "dequantisation", LOSS_CHUNK: "head and loss", LAYER_CHECKPOINTS: "copies",
}  # fmt: skip
_LONGEST_NAME = 120

Span = tuple[float, float]
"""The start and the end of a piece of work, in seconds."""


class RecordingError(RuntimeError):
    """The device is a GPU, and the profiler recorded none of its kernels."""


@dataclass(frozen=True)
class StepTime:
    """The time of one step, by part.

    Attributes:
        whole_seconds: seconds from the beginning of the step to the end of its work.
        busy_seconds: seconds of them in which the device had work; work that overlaps counts once.
        seconds: seconds of the work of each part, in the order of `PARTS`.
        launches: number of launches of each part.
        operations: seconds and number of launches, by name and part.
    """

    whole_seconds: float
    busy_seconds: float
    seconds: dict[str, float]
    launches: dict[str, int]
    operations: dict[tuple[str, str], tuple[float, int]]

    @property
    def idle_seconds(self) -> float:
        """Seconds in which the device had no work: on a CPU the time of Python."""
        return max(0.0, self.whole_seconds - self.busy_seconds)


@dataclass
class Recording:
    """A step while and after it is recorded.

    Attributes:
        sizes: the sizes by which products are told apart.
        on_gpu: whether the device is a GPU.
        record: the profiler of torch.
    """

    sizes: Sizes
    on_gpu: bool
    record: profile = field(repr=False)

    def time(self) -> StepTime:
        """Add up the recorded work.

        Raises:
            RecordingError: there is a GPU, and none of its kernels was recorded.
        """
        events = self.record.events() or []
        launches, spans = launches_of(events, on_gpu=self.on_gpu)
        start, end = _whole(events)
        busy = busy_seconds(spans) if self.on_gpu else sum(launch.seconds for launch in launches)
        return summarize(launches, self.sizes, end - start, busy)

    def save_trace(self, path: Path) -> None:
        """Write the trace as JSON, for chrome://tracing and Perfetto."""
        self.record.export_chrome_trace(str(path))


@contextlib.contextmanager
def recorded(model: nn.Module, sizes: Sizes, device: torch.device) -> Iterator[Recording]:
    """Record the block, which takes one step of a model.

    Args:
        model: a model of transformers, with or without an adapter.
        sizes: the sizes by which products are told apart.
        device: the device that the step runs on.
    """
    on_gpu = device.type != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with labelled(model):
        finish(device)
        record = profile(activities=activities, record_shapes=True)
        with record, record_function(_STEP):
            yield Recording(sizes, on_gpu, record)
            finish(device)


def finish(device: torch.device) -> None:
    """Wait for the work of a GPU; a CPU has done its work when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarize(
    launches: Iterable[Launch], sizes: Sizes, whole_seconds: float, busy_seconds: float
) -> StepTime:
    """Add up launches by part, see `part_of`, and by name."""
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    operations: dict[tuple[str, str], tuple[float, int]] = {}
    for launch in launches:
        part = part_of(launch, sizes)
        seconds[part] += launch.seconds  # type: ignore[assignment]
        counts[part] += 1
        key = launch.name[:_LONGEST_NAME], part
        spent, number = operations.get(key, (0.0, 0))
        operations[key] = spent + launch.seconds, number + 1
    return StepTime(
        whole_seconds,
        busy_seconds,
        {part: float(seconds[part]) for part in PARTS},
        {part: counts[part] for part in PARTS},
        operations,
    )


# ---------------------------------------------------------------- labels


@contextlib.contextmanager
def labelled(model: nn.Module) -> Iterator[None]:
    """Label the modules, functions and purposes of a model's step with the part they are for."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(heard_by(_Purposes()))
        for module, label in _labels(model):
            stack.enter_context(_labelled_module(module, label))
        for file, function in rotary_functions(model).items():
            rotate_by(file, _labelled_function(function, LABEL + "RoPE"))
            stack.callback(rotate_by, file, function)
        yield


def _labels(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield module, _LAYER
        elif "norm" in type(module).__name__.lower():
            yield module, LABEL + "norms"
        elif group_of(f"{path}.layer") == "mlp" != group_of(path):
            yield module, LABEL + "MLP beside products"


class _Purposes:
    """Hears the purposes that code announces, and makes labels of those that tell a part."""

    def purpose(self, name: str) -> AbstractContextManager[None]:
        """Return a block under the label of the part that a purpose tells."""
        part = _OF_PURPOSE.get(name)
        return contextlib.nullcontext() if part is None else record_function(LABEL + part)

    def claim(self, tensor: Tensor, purpose: str) -> None:
        """Hear nothing: a tensor takes memory and no time."""


@contextlib.contextmanager
def _labelled_module(module: nn.Module, label: str) -> Iterator[None]:
    open_labels: list[Any] = []

    def enter(*_: Any) -> None:
        range_ = record_function(label)
        range_.__enter__()
        open_labels.append(range_)

    def leave(*_: Any) -> None:
        open_labels.pop().__exit__(None, None, None)

    # Recomputation leaves a module by an exception, as soon as it has the tensors of backward.
    hooks = [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _labelled_function(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(label):
            return function(*arguments, **options)

    return call


# ---------------------------------------------------------------- events of torch's profiler


def launches_of(events: Iterable[Any], *, on_gpu: bool) -> tuple[list[Launch], list[Span]]:
    """Return the launches on the device; and the start and end of each kernel of a GPU.

    Args:
        events: the events of a `torch.profiler.profile` that has ended, with shapes.
        on_gpu: whether kernels were to be recorded; if not, operations take their place.

    Raises:
        RecordingError: no kernel was recorded.
    """
    events = list(events)
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    kernels = [
        event
        for event in events
        if event.device_type != DeviceType.CPU and not event.is_user_annotation
    ]
    if on_gpu and not kernels:
        raise RecordingError(
            "the profiler recorded no kernel; expected access to the GPU's counters"
        )
    forward = _forward_operations(on_host)
    launches = []
    for event in on_host:
        if ran := _ran(event, on_gpu):
            chain, shape = _chain(event, forward)
            launches += [Launch(name, micros / 1e6, chain, shape) for name, micros in ran]
    return launches, [(e.time_range.start / 1e6, e.time_range.end / 1e6) for e in kernels]


def _ran(event: Any, on_gpu: bool) -> list[tuple[str, float]]:
    """Return the name and microseconds of the work that an event of the host did itself."""
    if on_gpu:
        # A label appears among the kernels too, under its own name.
        return [(k.name, k.duration) for k in event.kernels if k.name != event.name]
    # Ranges without a namespace are Python or autograd's own work.
    is_operation = "::" in event.name and not event.name.startswith(NODE)
    return [(event.name, event.self_cpu_time_total)] if is_operation else []


def _whole(events: Iterable[Any]) -> Span:
    """Return the start and the end of the recorded step."""
    (step,) = (e for e in events if e.name == _STEP and e.device_type == DeviceType.CPU)
    return step.time_range.start / 1e6, step.time_range.end / 1e6


def _forward_operations(events: Iterable[Any]) -> dict[tuple[int, int], Any]:
    """Return the operations of the forward pass, by thread and sequence number.

    Of several operations with the same number the first is taken: the operations inside it lie in
    the same module, and its own backward comes later, on a CPU in the same thread.
    """
    found: dict[tuple[int, int], Any] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0:
            found.setdefault((event.thread, event.sequence_nr), event)
    return found


def _chain(event: Any, forward: dict[tuple[int, int], Any]) -> tuple[Any, tuple[Shape, ...]]:
    """Return the chain and the shape of a launch, see `Launch`."""
    chain: list[str] = []
    shape: tuple[Shape, ...] = ()
    at, node = event, None
    # A layer that is recomputed runs inside the node of some other operation, which says nothing.
    while at is not None and at.name != _LAYER:
        chain.append(at.name)
        if not shape and at.name in PRODUCTS:
            shape = tuple(tuple(s) for s in at.input_shapes or () if len(s) >= 2)
        if at.name.startswith(NODE):
            node = at
        at = at.cpu_parent
    if node is not None and at is None:
        at = forward.get((node.fwd_thread, node.sequence_nr))
        while at is not None and at.name != _LAYER:
            chain.append(at.name)
            at = at.cpu_parent
    return tuple(chain), shape


def busy_seconds(spans: Iterable[Span]) -> float:
    """Return the seconds in which at least one of the spans was under way."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
