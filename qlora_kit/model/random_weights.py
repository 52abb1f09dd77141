"""Random weights of a real architecture, given out as if they were read from a checkpoint.

Takes a skeleton; returns a `TensorSource`. Random weights give a model its true memory and speed
without a download. Each tensor exists only while it is quantised, so a 7B never needs 14 GB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.projections import transposed_weights
from qlora_kit.private_transformers import initialize

_SMALL = 1  # dimensions of biases and norm weights


class RandomWeights:
    """A `TensorSource` that draws every tensor when it is read.

    A tensor depends only on the seed and its own name, so it can be read again, in any order,
    with the same values: a merge sees the base that training saw.

    Args:
        skeleton: the model on the meta device.
        seed: the seed of all tensors.
        device: the device that draws them; values differ between devices.
    """

    gives_own = True

    def __init__(self, skeleton: PreTrainedModel, seed: int, device: torch.device) -> None:
        tied = skeleton.all_tied_weights_keys or {}
        self._meta = {n: t for n, t in skeleton.state_dict().items() if n not in tied}
        self._transposed = transposed_weights(skeleton)
        self._skeleton = skeleton
        self._seed = seed
        self._device = device
        self._std = getattr(skeleton.config, "initializer_range", 0.02)

    @property
    def names(self) -> Sequence[str]:
        """The names, in the order of the modules."""
        return list(self._meta)

    def read(self, name: str) -> Tensor:
        """Draw one tensor: normal matrices, and vectors as the architecture starts them."""
        meta = self._meta[name]
        if meta.dim() <= _SMALL:
            return self._initial_vector(name)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:8]) >> 1)
        tensor = torch.empty(meta.shape, dtype=meta.dtype, device=self._device)
        tensor.normal_(0.0, self._std, generator=generator)
        return tensor.T if name in self._transposed else tensor

    @torch.no_grad()
    def _initial_vector(self, name: str) -> Tensor:
        """Let the architecture say whether a norm starts at one or at zero."""
        path, _, leaf = name.rpartition(".")
        module: Any = self._skeleton.get_submodule(path)
        # By the time a bias is read, its layer may have become a frozen layer.
        if isinstance(module, nn.Linear | FrozenLinear):
            return torch.zeros_like(self._meta[name], device=self._device)
        probe: nn.Module = object.__new__(type(module))
        nn.Module.__init__(probe)
        for each, parameter in module.named_parameters(recurse=False):
            probe.register_parameter(each, nn.Parameter(torch.zeros_like(parameter, device="cpu")))
        for each, buffer in module.named_buffers(recurse=False):
            probe.register_buffer(each, torch.zeros_like(buffer, device="cpu"))
        initialize(self._skeleton, probe)
        found: Tensor = getattr(probe, leaf)
        return found.detach().to(self._device)
