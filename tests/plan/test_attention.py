"""The memory of attention on a GPU, seen in the tensors of a plan."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_numbers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qlora_kit as qk
from qlora_kit.config import TrainConfig
from qlora_kit.model.architecture import build_skeleton
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.names import ModelSource
from qlora_kit.plan.simulate import BatchShape, SimulatedRun, simulated_run
from qlora_kit.plan.subject import RowSizes, Subject

GPU = Hardware(torch.device("meta"), torch.bfloat16, "stands in for a GPU")
TOKENS = 200
WIDTH = 256


class _Shapes(TorchDispatchMode):
    """Records the dtype and shape of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[torch.dtype, tuple[int, ...]]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.made |= {(leaf.dtype, tuple(leaf.shape)) for leaf in leaves}
        return result


def made_in(name: str, what: str, **numbers: Any) -> set[tuple[torch.dtype, tuple[int, ...]]]:
    """Return the tensors made in a step or evaluation of three rows, simulated for a GPU."""
    numbers = {**tiny_numbers(name), "max_position_embeddings": 4096, **numbers}
    source = ModelSource(name, architecture=numbers)
    spec = qk.BaseSpec(source, None, qk.Quantization(4), random=True)
    skeleton, shapes = build_skeleton(spec.architecture()), _Shapes()
    config = TrainConfig(batch_size=3, gradient_accumulation_steps=1)
    subject = Subject(spec, qk.LoraSpec(), GPU, RowSizes(TOKENS))
    with simulated_run(subject, config, skeleton) as run, shapes:
        take(run, what, config)
    return shapes.made


def take(run: SimulatedRun, what: str, config: TrainConfig) -> None:
    if what == "step":
        run.step(config, BatchShape(3, TOKENS))
    elif what == "packed step":
        run.step(config.model_copy(update={"packing": True}), BatchShape(3, TOKENS))
    else:
        run.evaluate(config, BatchShape(3, TOKENS))


def squares(made: set[tuple[torch.dtype, tuple[int, ...]]]) -> set[torch.dtype]:
    """Return the dtypes of the tensors with an entry for each pair of tokens of a row."""
    return {
        dtype for dtype, shape in made if shape[-2:] in ((TOKENS, TOKENS), (WIDTH, WIDTH))
    }  # fmt: skip


@pytest.mark.parametrize("what", ["step", "evaluation"])
@pytest.mark.parametrize("name", sorted({*ARCHITECTURES} - {"gemma-2-9b"}))
def test_no_attention_of_padded_rows_holds_a_mask(name: str, what: str) -> None:
    """Gemma-2 is left out: no kernel caps scores as it does, so it holds them all."""
    made = made_in(name, what, sliding_window=None)
    assert squares(made) == set()
    widths = {shape[1] for _, shape in made if len(shape) == 3 and math.prod(shape[:2]) > 3}
    assert WIDTH in widths
    assert TOKENS not in widths


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES} - {"gemma-2-9b"}))
def test_no_attention_of_packed_rows_holds_a_matrix(name: str) -> None:
    """The row has 3 samples of 200 tokens and 40 of padding."""
    made = made_in(name, "packed step", sliding_window=None)
    assert 640 in {shape[1] for _, shape in made if len(shape) == 3}
    sides = {TOKENS, TOKENS + 40, 3 * TOKENS, 640}
    assert not [shape for _, shape in made if len(shape) > 1 and {*shape[-2:]} <= sides]


def test_a_mask_would_be_seen() -> None:
    assert torch.bool in squares(made_in("phi-4-mini", "step", sliding_window=32))
