"""The inputs of recomputed layers in host memory, between their forward and their backward.

An input is copied out while its layer computes, and copied back while the next layer is in
backward. So the device holds at most two inputs, and waits for no copy. Nothing is rounded: an
input comes back with the same bits.

torch's caching host allocator keeps the pinned memory that is freed here (in powers of two) and
hands it out again. So memory is pinned once, and not at every step. The allocator hands it out only
after the copies that read or write it are done.

Source: the offloaded activation checkpoints of Arctic Long Sequence Training (arXiv:2506.13996).
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_kit.layers.purpose import LAYER_CHECKPOINTS, purpose


class Lane(Protocol):
    """The place where copies run: beside the computation, or in its order."""

    def host_memory(self, like: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of `like` in host memory."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Queue a copy behind all computation so far; return its end, for `wait`."""
        ...

    def wait(self, end: Any) -> None:
        """Let all later computation wait for the end of a copy."""
        ...


class StreamLane:
    """Copies on a CUDA stream of its own; the processor waits for no copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def host_memory(self, like: Tensor) -> Tensor:
        """See `Lane`."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """See `Lane`."""
        # The tensor on the device belongs to the computing stream. As a source, it must have been
        # computed. As a target, its memory may be that of a tensor that was freed a moment ago,
        # and that kernels in the queue of the computing stream still read.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        end: torch.cuda.Event = self._stream.record_event()
        return end

    def wait(self, end: torch.cuda.Event) -> None:
        """See `Lane`."""
        torch.cuda.current_stream(self._device).wait_event(end)


class InPlaceLane:
    """Copies at once, for a CPU and for fake tensors.

    Args:
        is_pinned: whether to take as much host memory as a GPU's lane would pin; a simulation of
            a GPU does.
    """

    def __init__(self, *, is_pinned: bool = False) -> None:
        self._is_pinned = is_pinned

    def host_memory(self, like: Tensor) -> Tensor:
        """See `Lane`."""
        size = pinned_bytes(like.nbytes) if self._is_pinned else like.nbytes
        block = torch.empty(size, dtype=torch.uint8, device="cpu")
        return block[: like.nbytes].view(like.dtype).view(like.shape)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `Lane`."""
        target.copy_(source)

    def wait(self, end: None) -> None:
        """See `Lane`; there is nothing to wait for, as the copy is done already."""


def pinned_bytes(size: int) -> int:
    """Return the bytes that torch pins for a tensor of `size` bytes.

    Its caching host allocator rounds up to a power of two.
    """
    return 1 << (size - 1).bit_length()


class _Held:
    """The input of one layer: in host memory, and for some of the time on the device too.

    The graph owns it, through autograd's hooks: if a step ends early, the graph is freed and the
    held input with it.
    """

    _is_coming = False

    def __init__(self, x: Tensor, lane: Lane, before: _Held | None) -> None:
        self._lane = lane
        self._device = x.device
        self._on_device: Tensor | None = x.detach()
        with purpose(LAYER_CHECKPOINTS):
            self._on_host = lane.host_memory(x)
        self._end: Any = lane.copy(self._on_host, self._on_device)
        self._before = weakref.ref(before) if before is not None else lambda: None

    def free(self) -> None:
        """Give up the device's copy, if there is one.

        The wait makes its memory safe to use again: later computation comes after the copy that
        reads or writes it. Recording the stream on the tensor would be safe too, but then the
        memory would come back at a moment that depends on timing.
        """
        if self._on_device is not None:
            self._lane.wait(self._end)
            self._on_device, self._is_coming = None, False

    def fetch(self) -> None:
        """Begin to copy the input back to the device, unless it is there."""
        if self._on_device is None:
            self._on_device = torch.empty_like(self._on_host, device=self._device)
            self._end = self._lane.copy(self._on_device, self._on_host)
            self._is_coming = True

    def take(self) -> Tensor:
        """Hand the device's copy over, and begin to fetch the input of the layer before."""
        self.fetch()
        taken = self._on_device
        assert taken is not None
        self.free()
        if (before := self._before()) is not None:
            before.fetch()
        return taken

    def __del__(self) -> None:
        # The input was fetched and never taken: the copy may still write into memory that is free
        # from here on. (A copy to the host may go on: nothing will read its values.)
        if self._is_coming:
            self._lane.wait(self._end)


class Offload:
    """Saved-tensor hooks that hold saved tensors in host memory.

    It holds no tensor itself, so it may be used for any number of forwards and backwards, in any
    order. The input that was packed last stays on the device as well: backward begins with it.
    """

    def __init__(self, lane: Lane, device: torch.device) -> None:
        self._lane = lane
        self._device = device
        self._last: weakref.ref[_Held] | None = None

    @classmethod
    def on(cls, device: torch.device) -> Offload:
        """Return an offload for `device`; a GPU copies beside its computation.

        A `meta` device stands in for a GPU: its host memory is counted as a GPU's.
        """
        is_planned = device.type == "meta"
        lane = StreamLane(device) if device.type == "cuda" else InPlaceLane(is_pinned=is_planned)
        return cls(lane, device)

    def pack(self, x: Tensor) -> _Held | Tensor:
        """Begin to copy the input of a layer out, and free the input of the layer before.

        The copy of the earlier input had a whole layer's time, and its tensor is no longer in use.
        A tensor that is empty or on another device is no input of a layer (torch's checkpoint
        saves an empty one of its own), and is returned as it is.
        """
        if not x.numel() or x.device.type != self._device.type:
            return x
        before = None if self._last is None else self._last()
        if before is not None:
            before.free()
        held = _Held(x, self._lane, before)
        self._last = weakref.ref(held)
        return held

    def unpack(self, held: _Held | Tensor) -> Tensor:
        """Return the input of the layer whose backward begins."""
        return held if isinstance(held, Tensor) else held.take()
