"""A packed run learns what a padded one learns, from the same samples in each step."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_error
from training import losses, make_adapter, make_rows, options, record, weights_of

import qlora_kit as qk
from qlora_kit.data.batch import TokenRows
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.layers import segments
from qlora_kit.model.segments import agrees_packed
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.tasks.seq2seq import SEQ2SEQ
from qlora_kit.tasks.tokens import packing
from qlora_kit.train.loop import Saving
from qlora_kit.train.optimizer_step import OptimizerStep
from qlora_kit.train.packing import Packing, choose_packing

Tiny = Callable[..., Path]


def trained(
    folder: Path, *, dropout: float = 0.0, **changes: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    events: list[Any] = []
    adapter = make_adapter(folder, dropout=dropout)
    config = options(**{"batch_size": 2, "gradient_accumulation_steps": 4, **changes})
    qk.train_adapter(adapter, make_rows(20), config, announce=record(events))
    return losses(events), weights_of(adapter)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_steps_are_those_of_a_padded_run(save_tiny: Tiny, dropout: float) -> None:
    folder = save_tiny()
    plain, weights = trained(folder, packing=False, dropout=dropout)
    packed, others = trained(folder, packing=True, dropout=dropout)
    assert packed == pytest.approx(plain, rel=1e-5)
    for name, weight in weights.items():
        assert relative_error(others[name], weight) <= 1e-3, name
    other_masks, _ = trained(folder, packing=True, dropout=0.4)
    assert other_masks != pytest.approx(plain, rel=1e-4)


def test_a_step_has_fewer_micro_batches(save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    real = CAUSAL.objective.loss_sum  # type: ignore[attr-defined]

    def noted(objective: Any, batch: Any) -> Any:
        sizes.append(tuple(batch.input_ids.shape))
        return real(objective, batch)

    monkeypatch.setattr(CAUSAL.objective, "loss_sum", noted)
    trained(save_tiny(), packing=True, max_steps=2)
    lengths = TokenRows(make_rows(20)).lengths()
    assert all(rows == 1 and tokens <= 2 * max(lengths) for rows, tokens in sizes)
    assert len(sizes) < 2 * 4


def test_a_leak_between_samples_is_seen(save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(save_tiny())
    assert agrees_packed(adapter.base.model)
    monkeypatch.setattr(segments, "slices_of", lambda lengths: iter([slice(0, sum(lengths))]))
    assert not agrees_packed(adapter.base.model)
    with pytest.raises(ModelError, match="--packing: two samples in one row are not computed"):
        qk.train_adapter(adapter, make_rows(20), options(packing=True))


def test_positions_that_go_on_are_seen(save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(save_tiny("gpt2"))  # whose positions are learnt
    assert agrees_packed(adapter.base.model)
    monkeypatch.setattr(
        "qlora_kit.model.segments.positions_within",
        lambda lengths: torch.arange(sum(lengths))[None],
    )
    assert not agrees_packed(adapter.base.model)


def test_a_resumed_run_has_the_bits_of_the_unbroken_one(save_tiny: Tiny, tmp_path: Path) -> None:
    folder, rows, found = save_tiny(), make_rows(12), []
    for name, resume in (("whole", None), ("part", tmp_path / "whole" / "checkpoint-3")):
        adapter = make_adapter(folder, dropout=0.2)
        (tmp_path / name).mkdir()
        saving = Saving(tmp_path / name, qk.BaseRecord.of(adapter.base), resume)
        config = options(
            max_steps=5, save_steps=3, batch_size=2, gradient_accumulation_steps=2, packing=True
        )
        qk.train_adapter(adapter, rows, config, saving=saving)
        found.append(weights_of(adapter))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_memory_that_runs_out_makes_the_micro_batches_smaller(
    save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny()
    expected, _ = trained(folder, packing=True, batch_size=4, max_steps=2)
    longest = max(TokenRows(make_rows(20)).lengths())
    refused: list[int] = []
    real = CAUSAL.objective.loss_sum  # type: ignore[attr-defined]

    def short(objective: Any, batch: Any) -> Any:
        if batch.input_ids.numel() > longest:
            refused.append(batch.input_ids.numel())
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(objective, batch)

    monkeypatch.setattr(CAUSAL.objective, "loss_sum", short)
    found, _ = trained(folder, packing=True, batch_size=4, max_steps=2)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(refused) == 2  # 4 rows at a time, then 2, then 1


# ---------------------------------------------------------------- where it is on


def test_it_is_on_by_default_where_it_saves_micro_batches(save_tiny: Tiny) -> None:
    model, rows = make_adapter(save_tiny()).base.model, TokenRows(make_rows(20))
    config = options(gradient_accumulation_steps=4)
    found = choose_packing(config, CAUSAL, model, rows)
    assert found.settled(config).packing is True
    assert "micro-batches a step instead of 4, of at most" in found.described(config, rows)
    same = TokenRows([{"input_ids": [1] * 9, "labels": [1] * 9, "row": n} for n in range(8)])
    nothing_to_save = choose_packing(config, CAUSAL, model, same)
    assert nothing_to_save.described(config, same) == "off: a step would have as many micro-batches"
    refused = choose_packing(options(packing=False), CAUSAL, model, rows)
    assert refused.described(config, rows) == "off: --no-packing"


def test_a_run_begun_before_there_was_packing_goes_on_without(save_tiny: Tiny) -> None:
    model, rows = make_adapter(save_tiny()).base.model, TokenRows(make_rows(20))
    config = options(gradient_accumulation_steps=4)
    assert not choose_packing(config, CAUSAL, model, rows, goes_on=True).is_on


def test_a_model_that_leaks_is_not_packed_by_default(
    save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_adapter(save_tiny()).base.model
    assert Packing(True).tried(model).is_on
    monkeypatch.setattr(segments, "slices_of", lambda lengths: iter([slice(0, sum(lengths))]))
    assert not Packing(True).tried(model).is_on
    assert Packing(True, is_asked=True).tried(model).is_on, "refused before the first step"
    whole = options(gradient_accumulation_steps=4, max_steps=1)
    qk.train_adapter(make_adapter(save_tiny()), make_rows(8), whole)


# ---------------------------------------------------------------- where it is refused


def test_a_task_that_does_not_pack_says_so(save_tiny: Tiny) -> None:
    model, rows = make_adapter(save_tiny()).base.model, TokenRows(make_rows(8))
    with pytest.raises(ConfigError, match="--packing: --task seq2seq computes a row as one"):
        choose_packing(options(packing=True), SEQ2SEQ, model, rows)
    left_open = choose_packing(options(), SEQ2SEQ, model, rows)
    assert left_open == Packing(False, "--task seq2seq computes a row as one sample")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_attn_implementation": "flex_attention"}, "its attention, flex_attention, is not"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of linear_attention"),
        (
            {"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 9},
            "scaled by the longest row beyond 9 tokens",
        ),
    ],
)
def test_models_whose_samples_would_see_each_other_say_so(
    save_tiny: Tiny, change: dict[str, Any], reason: str
) -> None:
    model = make_adapter(save_tiny()).base.model
    rows = TokenRows([{"input_ids": [1] * 10, "labels": [1] * 10, "row": 0}])
    assert choose_packing(options(packing=True), CAUSAL, model, rows).is_on
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ConfigError, match=f"--packing: .*{reason}"):
        choose_packing(options(packing=True), CAUSAL, model, rows)
    left_open = choose_packing(options(), CAUSAL, model, rows)
    assert not left_open.is_on
    assert re.search(reason, left_open.described(options(), rows))


def test_masks_of_a_sample_do_not_depend_on_the_packing(save_tiny: Tiny) -> None:
    """Two rows packed, and each alone, with dropout: the gradients add up."""
    rows, found = make_rows(2), []
    for packs, windows in ((True, [[(0,), (1,)]]), (False, [[(0,), (1,)]])):
        adapter = make_adapter(save_tiny(), dropout=0.3)
        adapter.base.model.train()
        objective = CAUSAL.objective(adapter.base, 0, 64, None)
        if packs:
            objective = packing(objective)
        step = OptimizerStep(
            adapter, objective, TokenRows.of(rows),
            torch.optim.AdamW(adapter.parameters().values()),
            torch.amp.GradScaler("cpu", enabled=False), 2, 0.0, packs=packs,
        )  # fmt: skip
        found.append(step.take(windows[0], 0.0).grad_norm)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
