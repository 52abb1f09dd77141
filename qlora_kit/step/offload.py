"""The inputs of recomputed layers in host memory, between their forward and their backward.

An input is copied out while its layer computes, and copied back while the layer behind it is
in backward, so that the device holds two of them at most and waits for none. Nothing is
rounded: what comes back is what went out.

torch keeps the pinned memory that is freed here and hands it out again (its caching host
allocator, in powers of two), so it is pinned once and not at every step; and it does so only
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
    """Where copies run, beside the computation or in it."""

    def host_memory(self, like: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of `like` in host memory."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Begin a copy once all that was computed so far is done; return when it ends."""
        ...

    def wait(self, end: Any) -> None:
        """Let what is computed from here on wait for the end of a copy."""
        ...


class StreamLane:
    """Copies on a stream of their own; the processor waits for none of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def host_memory(self, like: Tensor) -> Tensor:
        """See `Lane`."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """See `Lane`."""
        # Of the two the one on the device belongs to the computing stream: as a source it must
        # have been computed; as a target its memory may be that of a tensor which was freed a
        # moment ago, and which kernels in the queue of that stream still read.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        end: torch.cuda.Event = self._stream.record_event()
        return end

    def wait(self, end: torch.cuda.Event) -> None:
        """See `Lane`."""
        torch.cuda.current_stream(self._device).wait_event(end)


class InPlaceLane:
    """Copies at once: what a CPU does, and fake tensors.

    Args:
        is_pinned: whether host memory is taken as a GPU's lane takes it, which is simulated.
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
        """See `Lane`: what is copied at once is there."""


def pinned_bytes(size: int) -> int:
    """Return what torch pins for a tensor: its caching host allocator rounds to powers of two."""
    return 1 << (size - 1).bit_length()


class _Held:
    """The input of one layer: in host memory, and for some of the time on the device.

    Belongs to the graph, through autograd's hooks: where a step ends in the middle, the graph
    goes and this with it.
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

        The wait is what makes its memory free for others: what is computed from here on comes
        after the copy that reads or writes it. Recording the stream on the tensor would do as
        well, but its memory would come back at a moment that depends on the timing.
        """
        if self._on_device is not None:
            self._lane.wait(self._end)
            self._on_device, self._is_coming = None, False

    def fetch(self) -> None:
        """Begin to bring it back to the device, unless it is there."""
        if self._on_device is None:
            self._on_device = torch.empty_like(self._on_host, device=self._device)
            self._end = self._lane.copy(self._on_device, self._on_host)
            self._is_coming = True

    def take(self) -> Tensor:
        """Return the device's copy for good, and begin to fetch the one before it."""
        self.fetch()
        taken = self._on_device
        assert taken is not None
        self.free()
        if (before := self._before()) is not None:
            before.fetch()
        return taken

    def __del__(self) -> None:
        # Fetched and never taken: the copy may still be writing into memory that is free from
        # here on. (A copy to the host that nobody will read may be of anything.)
        if self._is_coming:
            self._lane.wait(self._end)


class Offload:
    """Saved-tensor hooks that hold what they are given in host memory.

    Holds no tensor itself, so it may be used for any number of forwards and backwards, in any
    order. The input that was packed last stays on the device as well: backward begins with it.
    """

    def __init__(self, lane: Lane, device: torch.device) -> None:
        self._lane = lane
        self._device = device
        self._last: weakref.ref[_Held] | None = None

    @classmethod
    def on(cls, device: torch.device) -> Offload:
        """Return an offload whose copies run beside what a GPU computes."""
        is_planned = device.type == "meta"
        lane = StreamLane(device) if device.type == "cuda" else InPlaceLane(is_pinned=is_planned)
        return cls(lane, device)

    def pack(self, x: Tensor) -> _Held | Tensor:
        """Begin to copy the input of a layer out, and free that of the layer before.

        That one's copy has had a whole layer's time; its tensor is no longer in use. What is
        empty, or on another device, is no such input (torch's checkpoint has one of its own) and
        stays as it is.
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
        """Return an input to its layer, whose backward begins."""
        return held if isinstance(held, Tensor) else held.take()
