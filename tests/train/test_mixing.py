"""A run on mixed rows takes the steps of its mixture, and goes on with them when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training import make_adapter, make_rows, options, weights_of

import qlora_kit as qk
from qlora_kit.data.batch import TokenRows
from qlora_kit.data.mixing import Mixture, epoch_windows
from qlora_kit.train.loop import Saving
from qlora_kit.train.optimizer_step import OptimizerStep

Tiny = Callable[..., Path]


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_takes_the_steps_of_its_mixture_and_resumes_with_them(
    save_tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    rows = TokenRows(make_rows(20), Mixture((14, 6), (2, 1)))
    # An epoch has 18 rows, 5 steps: the run is broken in its second epoch.
    config = options(
        max_steps=8, save_steps=6, batch_size=2, gradient_accumulation_steps=2, packing=packing
    )
    taken: list[Any] = []
    real = OptimizerStep.take

    def noted(step: OptimizerStep, window: Any, *rest: Any, **more: Any) -> Any:
        taken.append(window)
        return real(step, window, *rest, **more)

    monkeypatch.setattr(OptimizerStep, "take", noted)
    found = []
    for name, resume in (("whole", None), ("part", tmp_path / "whole" / "checkpoint-6")):
        adapter = make_adapter(save_tiny(), dropout=0.2)
        (tmp_path / name).mkdir()
        saving = Saving(tmp_path / name, qk.BaseRecord.of(adapter.base), resume)
        qk.train_adapter(adapter, rows, config, saving=saving)
        found.append(weights_of(adapter))
    epochs = [window for epoch in (0, 1) for window in epoch_windows(rows, config, epoch)]
    assert taken == [*epochs[:8], *epochs[6:8]]
    assert [sum(row >= 14 for batch in window for row in batch) for window in taken[:4]] == [
        1, 2, 1, 1,
    ]  # fmt: skip
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
