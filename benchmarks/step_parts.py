"""The time of a step on the device, by the part of the step that each kernel is for.

A kernel is recognised by its name, by the operations that launched it, and by the module they ran
in. A kernel of the backward pass is launched by autograd, outside of any module. There torch's
sequence numbers lead back to the operation of the forward pass, and so to its module.

On a CPU operations take the place of kernels, with their own time.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

# The beginning of the labels that modules and functions get while a step is recorded.
_LABEL = "part of step: "
_TOP = 12
_LONGEST_NAME = 120
_NODE = "autograd::engine::evaluate_function: "
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_")
# A matrix whose rows or columns are at most this many times the rank is one of LoRA: several LoRA
# matrices may share a product.
_MOST_RANKS = 8
_ATTENTION = ("scaled_dot_product", "flash_attention", "fmha", "_sdpa", "planned_attention")

PARTS = (
    "base products", "LoRA", "dequantisation", "attention", "norms", "RoPE", "MLP beside products",
    "head and loss", "optimizer", "copies", "everything else",
)  # fmt: skip


Span = tuple[float, float]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel on the device.

    Attributes:
        name: the name of the kernel.
        seconds: the seconds that it took.
        chain: names of the operation that launched it and of the operations around that one,
            innermost first; then the same for the operation of forward whose backward it is.
        shape: shapes of the operands of the nearest matrix product in the chain; () without one.
    """

    name: str
    seconds: float
    chain: tuple[str, ...]
    shape: tuple[tuple[int, ...], ...] = ()


@dataclass
class StepTime:
    """The time of one step by part.

    Attributes:
        seconds: seconds of each part, in the order of `PARTS`.
        launches: number of kernels of each part.
        top: the kernels that took most time, each with its part, seconds and number of launches.
    """

    seconds: dict[str, float]
    launches: dict[str, int]
    top: list[dict[str, Any]] = field(default_factory=list)


def part_of(launch: Launch, rank: int, vocabulary: int) -> str:
    """Return the part of a step that a kernel is for.

    Args:
        launch: the launch of the kernel.
        rank: rank of the adapter.
        vocabulary: size of the model's vocabulary.
    """
    names, kernel = launch.chain, launch.name.lower()
    text = " ".join(names).lower()
    if kernel.startswith(("memcpy", "memset")):
        return "copies"
    if own := _OWN_KERNELS.get(launch.name):
        return own
    if "optimizer.step" in text or _LABEL + "clipping" in text or "fused_adam" in text:
        return "optimizer"
    if "dequant" in kernel or "dequant" in text.split(_NODE.lower())[0]:
        return "dequantisation"
    if any(word in kernel or word in text for word in _ATTENTION):
        return "attention"
    if launch.shape:
        return _part_of_product(launch.shape, rank, vocabulary)
    if "crossentropy" in text or "lossum" in text or "cross_entropy" in text:
        return "head and loss"
    for word, part in _WORDS:
        if word in kernel or word in text:
            return part
    return "everything else"


# The kit's kernels in Triton, whose names are those of their functions.
_OWN_KERNELS = {
    "_unpack": "dequantisation", "_rotate": "RoPE", "_matrices": "LoRA", "_left": "LoRA",
    "_add": "LoRA",
    "_gate": "MLP beside products", "_gate_back": "MLP beside products",
    "_cross_entropy": "head and loss",
}  # fmt: skip

_WORDS = (
    (_LABEL + "rope", "RoPE"),
    ("rotary", "RoPE"),
    ("rope", "RoPE"),
    (_LABEL + "norms", "norms"),
    ("rms_norm", "norms"),
    ("rmsnorm", "norms"),
    ("lora", "LoRA"),
    ("mlp", "MLP beside products"),
    ("swiglu", "MLP beside products"),
)


def _part_of_product(shape: tuple[tuple[int, ...], ...], rank: int, vocabulary: int) -> str:
    sizes = [size for operand in shape for size in operand[-2:]]
    if vocabulary in sizes:
        return "head and loss"
    return "LoRA" if min(sizes) <= _MOST_RANKS * rank else "base products"


def summarise(launches: Iterable[Launch], rank: int, vocabulary: int) -> StepTime:
    """Add up the launches by part, see `part_of`."""
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    by_name: dict[tuple[str, str], list[float]] = defaultdict(list)
    for launch in launches:
        part = part_of(launch, rank, vocabulary)
        seconds[part] += launch.seconds
        counts[part] += 1
        by_name[launch.name[:_LONGEST_NAME], part].append(launch.seconds)
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:_TOP]
    return StepTime(
        {part: seconds[part] for part in PARTS},
        {part: counts[part] for part in PARTS},
        [
            {"name": name, "part": part, "seconds": sum(times), "launches": len(times)}
            for (name, part), times in top
        ],
    )


# ---------------------------------------------------------------- recording


@contextlib.contextmanager
def labelled(model: Any) -> Iterator[None]:
    """Label modules and functions of the model in a recording with the part they are for."""
    import sys

    from torch import nn

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            kind = type(module).__name__.lower()
            part = "norms" if "norm" in kind else "mlp" if kind.endswith("mlp") else None
            if part:
                stack.enter_context(_labelled_module(module, part))
            rotate = "apply_rotary_pos_emb"
            home = sys.modules[type(module).__module__]
            if "attention" in kind and callable(getattr(home, rotate, None)):
                function = _labelled_function(getattr(home, rotate), "rope")
                stack.enter_context(mock.patch.object(home, rotate, function))
        clip = _labelled_function(nn.utils.clip_grad_norm_, "clipping")
        stack.enter_context(mock.patch.object(nn.utils, "clip_grad_norm_", clip))
        yield


@contextlib.contextmanager
def _labelled_module(module: Any, part: str) -> Iterator[None]:
    from torch.profiler import record_function

    open_labels: list[Any] = []

    def enter(*_: Any) -> None:
        label = record_function(_LABEL + part)
        label.__enter__()
        open_labels.append(label)

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


def _labelled_function(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    from torch.profiler import record_function

    if getattr(function, "is_labelled", False):
        return function

    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(_LABEL + part):
            return function(*arguments, **options)

    call.is_labelled = True  # type: ignore[attr-defined]
    return call


def launches_of(record: Any, *, on_gpu: bool) -> tuple[list[Launch], list[Span]]:
    """Return the launches on the device, and the start and end of each, in seconds.

    Args:
        record: a `torch.profiler.profile` that has ended, made with `record_shapes`.
        on_gpu: whether kernels were to be recorded; if not, operations take their place.

    Raises:
        RuntimeError: no kernel was recorded.
    """
    from torch.autograd import DeviceType

    events = record.events()
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    kernels = [
        event
        for event in events
        if event.device_type != DeviceType.CPU and not event.is_user_annotation
    ]
    if on_gpu and not kernels:
        raise RuntimeError("the profiler recorded no kernel; it may have no access to the GPU here")
    forward = _forward_operations(on_host)
    launches = []
    for event in on_host:
        if on_gpu:
            # A label appears among the kernels too, under its own name.
            ran = [(k.name, k.duration) for k in event.kernels if k.name != event.name]
        else:
            is_range = event.name.startswith((_LABEL, _NODE))
            ran = [] if is_range else [(event.name, event.self_cpu_time_total)]
        if ran:
            chain, shape = _chain(event, forward)
            launches += [Launch(name, micros / 1e6, chain, shape) for name, micros in ran]
    # On a CPU only the outermost operations are taken: the operations in them would count twice.
    timed = kernels if on_gpu else [event for event in on_host if event.cpu_parent is None]
    return launches, [(e.time_range.start / 1e6, e.time_range.end / 1e6) for e in timed]


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


def _chain(event: Any, forward: dict[tuple[int, int], Any]) -> tuple[Any, Any]:
    chain: list[str] = []
    shape: tuple[tuple[int, ...], ...] = ()
    at, node = event, None
    while at is not None:
        chain.append(at.name)
        if not shape and at.name in _PRODUCTS:
            shape = tuple(tuple(s) for s in at.input_shapes or () if len(s) >= 2)
        if at.name.startswith(_NODE):
            node = at
        at = at.cpu_parent
    if node is not None:
        at = forward.get((node.fwd_thread, node.sequence_nr))
        while at is not None:
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
