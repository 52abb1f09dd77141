"""The random states of a process, as tensors: Python's, numpy's, torch's and the GPU's.

Reads them and puts them back; never draws. The kit itself draws from torch only (dropout), but a
custom loss may draw from the others.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed every random state that `random_states` knows."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return all random states by name, including the one of `device` if it is a GPU."""
    _, words, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=True)
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*legacy[1].tolist(), legacy[2], legacy[3]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([legacy[4]], dtype=torch.float64),
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put every random state back to the value that `random_states` returned."""
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    *words, position, has_gauss = states["numpy"].tolist()
    cached = float(states["numpy_gauss"])
    key = numpy.array(words, dtype=numpy.uint32)
    numpy.random.set_state(("MT19937", key, position, has_gauss, cached))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
