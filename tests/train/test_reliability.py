"""A step that cannot be taken, a run that is stopped, a run that is continued.

These are unit tests of the promises in docs/reliability.md; tests/faults counts them in many runs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import PROJECT, relative_error, run
from training import losses, make_adapter, make_rows, options, record, weights_of

import qlora_kit as qk
from qlora_kit import signals
from qlora_kit.config import compared, declared, that_decide
from qlora_kit.data.batch import TokenRows
from qlora_kit.errors import ConfigError, LearningError, NumericsError, OutOfMemory, TornStep
from qlora_kit.events import (
    Evaluated,
    Event,
    MicroBatchHalved,
    RunStarted,
    StepFinished,
    StepSkipped,
)
from qlora_kit.layers.draws import Draws
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.memory import is_out_of_memory
from qlora_kit.plan.ledger import Ledger
from qlora_kit.plan.rehearsal import rehearse
from qlora_kit.plan.watch import claim_trained
from qlora_kit.report.log import Log, read_log
from qlora_kit.tasks import causal, tokens
from qlora_kit.tasks.causal import CausalObjective
from qlora_kit.train import optimizer_step
from qlora_kit.train.checkpoint import (
    Progress,
    StoredState,
    checkpoints,
    delete_old,
    find_checkpoint,
    read_state,
)
from qlora_kit.train.loop import Saving
from qlora_kit.train.optimizer import build_optimizer, make_state
from qlora_kit.train.resume import COVERED, check_resumable, effects

Tiny = Callable[..., Path]


def state_of(identity: dict[str, Any], steps: int = 3, total: int = 6) -> StoredState:
    return StoredState(Progress(optimizer_step=steps), identity, total_steps=total)


# ---------------------------------------------------------------- not finite


class SpoilingLoss:
    """Cross-entropy that is `value` in the chunks of the given calls."""

    def __init__(self, calls: set[int], value: float = math.nan) -> None:
        self.calls, self.value, self.count = calls, value, 0

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.count += 1
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return loss * self.value if self.count in self.calls else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_no_weight_and_names_its_rows(
    save_tiny: Tiny, tmp_path: Path, value: float
) -> None:
    adapter, events = make_adapter(save_tiny()), []
    seen: list[dict[str, torch.Tensor]] = []

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepFinished | StepSkipped):
            seen.append(weights_of(adapter))

    # Two micro-batches a step: the fourth is the second of step 2.
    config = options(max_steps=3, gradient_accumulation_steps=2, packing=False)
    log = Log(tmp_path)
    result = qk.train_adapter(
        adapter, make_rows(6), config, loss=SpoilingLoss({4}, value),
        announce=lambda event: (listen(event), log(event))[0],
    )  # fmt: skip
    skipped = [event for event in events if isinstance(event, StepSkipped)]
    assert [event.optimizer_step for event in skipped] == [2]
    assert len(skipped[0].rows) == 1, "the rows of the micro-batch that spoiled it, no others"
    assert all(torch.equal(seen[0][name], weight) for name, weight in seen[1].items())
    assert any(not torch.equal(seen[1][name], weight) for name, weight in seen[2].items())
    assert all(torch.isfinite(weight).all() for weight in weights_of(adapter).values())
    assert (result.progress.skipped_steps, result.progress.skipped_in_a_row) == (1, 0)
    row = read_log(tmp_path / "trainer_log.jsonl")[1]
    assert (row["loss"], row["rows"]) == (str(value), list(skipped[0].rows))


def test_a_gradient_that_is_not_finite_is_skipped_too(save_tiny: Tiny) -> None:
    adapter, events = make_adapter(save_tiny()), []
    layer = next(iter(adapter.layers.values()))
    count = iter(range(100))
    layer.lora_B.register_hook(lambda grad: grad * (math.inf if next(count) == 1 else 1))
    qk.train_adapter(adapter, make_rows(4), options(), announce=record(events))
    (skipped,) = [event for event in events if isinstance(event, StepSkipped)]
    assert math.isfinite(skipped.loss)
    assert not math.isfinite(skipped.grad_norm)


def test_three_skipped_steps_in_a_row_end_the_run_with_the_last_good_weights_saved(
    save_tiny: Tiny, tmp_path: Path
) -> None:
    adapter = make_adapter(save_tiny())
    saving = Saving(tmp_path, qk.BaseRecord.of(adapter.base))
    with pytest.raises(NumericsError, match=r"step 5: loss nan.*on rows \[\d.*3 steps in a row"):
        qk.train_adapter(
            adapter, make_rows(8), options(max_steps=8, save_steps=2), saving=saving,
            loss=SpoilingLoss({3, 4, 5}),
        )  # fmt: skip
    found = find_checkpoint(tmp_path, "latest").folder
    assert found == tmp_path / "checkpoint-5"
    assert read_state(found).progress.skipped_in_a_row == 3
    good = qk.read_adapter(tmp_path / "checkpoint-2").tensors
    for path, pair in qk.read_adapter(found).tensors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, good[path], strict=True))


def test_two_and_two_are_not_three_in_a_row(save_tiny: Tiny) -> None:
    loss = SpoilingLoss({2, 3, 5, 6})
    result = qk.train_adapter(
        make_adapter(save_tiny()), make_rows(8), options(max_steps=8), loss=loss
    )
    assert result.progress.skipped_steps == 4


# ---------------------------------------------------------------- learning


def test_a_layer_without_a_gradient_is_named(save_tiny: Tiny) -> None:
    adapter = make_adapter(save_tiny())
    path, layer = next(iter(adapter.layers.items()))
    layer.lora_B.register_hook(torch.zeros_like)
    with pytest.raises(LearningError, match=f"after the first step {path} got no gradient"):
        qk.train_adapter(adapter, make_rows(4), options())


def test_a_matrix_that_stays_zero_is_named(
    save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(save_tiny())
    path, layer = next(iter(adapter.layers.items()))
    take_step = torch.optim.AdamW.step

    def forgetting_step(self: Any, *args: Any, **kwargs: Any) -> None:
        take_step(self, *args, **kwargs)
        layer.lora_B.data.zero_()

    monkeypatch.setattr(torch.optim.AdamW, "step", forgetting_step)
    with pytest.raises(LearningError, match=f"after 10 steps {path} did not move"):
        qk.train_adapter(adapter, make_rows(4), options(max_steps=12))


def test_rows_too_short_to_attend_do_not_look_like_a_dead_layer(save_tiny: Tiny) -> None:
    rows = [{"input_ids": [5, 7 + n], "labels": [5, 7 + n], "row": n} for n in range(3)]
    qk.train_adapter(make_adapter(save_tiny()), rows, options(max_steps=2))


# ---------------------------------------------------------------- out of memory


class ShortOfMemory:
    """Replaces `supervised_states`, and runs out of memory with more than `most` rows."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error, self.rows = most, error, []
        self.real = causal.supervised_states

    def __call__(self, model: Any, batch: Any) -> Any:
        result = self.real(model, batch)
        if len(batch.rows) > self.most:
            raise self.error
        self.rows.append(batch.rows)
        return result


SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
def test_a_step_is_taken_again_with_fewer_rows_at_a_time(
    save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    rows = make_rows(16)
    config = options(max_steps=2, batch_size=8)
    found, events = [], []
    for most in (8, 3):
        adapter, events = make_adapter(save_tiny()), []
        short = ShortOfMemory(most, error)
        monkeypatch.setattr(causal, "supervised_states", short)
        result = qk.train_adapter(adapter, rows, config, announce=record(events))
        monkeypatch.setattr(causal, "supervised_states", short.real)
        # A step that ran out of memory went through some of its rows twice; the last pass counts.
        taken = [row for batch in short.rows for row in batch][-16:]
        found.append((losses(events), weights_of(adapter), sorted(taken)))
    assert result.progress.micro_batch_rows == 2
    halved = [event for event in events if isinstance(event, MicroBatchHalved)]
    assert [(event.optimizer_step, event.rows_now) for event in halved] == [(1, 4), (1, 2)]
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert found[1][2] == found[0][2] == list(range(16)), "the effective batch is what it was"
    for name, weight in found[0][1].items():
        # Compared in norm: Adam first moves an element by the sign of its gradient, and if that is
        # nearly zero, the order of a sum decides its sign. Another batch would be off by 1e-3 or
        # more.
        assert relative_error(found[1][1][name], weight) < 2e-5, name


def noisy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A custom loss that draws random numbers of its own."""
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (loss * torch.rand(len(targets))).sum()


@pytest.mark.parametrize("loss", [None, noisy], ids=["dropout", "noisy"])
def test_a_replayed_step_draws_the_same_numbers(
    save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch, loss: Any
) -> None:
    """A micro-batch of two rows does not fit; its replay equals a step with one row at a time."""
    rows, found = make_rows(6), []
    for batch_size, most in ((1, 1), (2, 1)):
        adapter, events = make_adapter(save_tiny(), dropout=0.0 if loss else 0.3), []
        short = ShortOfMemory(most, MemoryError())
        monkeypatch.setattr(causal, "supervised_states", short)
        # The windows have two rows, in the same order whatever the batch size.
        monkeypatch.setattr(
            "qlora_kit.data.mixing.epoch_batches",
            lambda rows, size, seed, epoch, **_: [
                tuple(range(i, i + size)) for i in range(0, len(rows), size)
            ],
        )
        config = options(
            max_steps=3, batch_size=batch_size, gradient_accumulation_steps=2 // batch_size,
            packing=False,
        )  # fmt: skip
        qk.train_adapter(adapter, rows, config, loss=loss, announce=record(events))
        monkeypatch.setattr(causal, "supervised_states", short.real)
        found.append((losses(events), weights_of(adapter)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_masks_are_drawn_for_the_widest_batch_however_wide_their_own_is(
    save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU batches are wider than their rows, and a mask depends on the width of the draw."""
    drawn: list[int] = []

    def noted(seed: int, step: int, samples: Any, tokens: int, lengths: Any) -> Draws:
        drawn.append(tokens)
        return Draws(seed, step, samples, tokens, lengths)

    monkeypatch.setattr("qlora_kit.model.load.batch_width", lambda tokens, *_: -(-tokens // 8) * 8)
    monkeypatch.setattr(optimizer_step, "Draws", noted)
    rows = [{**make_rows(1)[0], "input_ids": [5] * n, "labels": [5] * n} for n in (3, 9, 11, 5)]
    config = options(max_steps=1, batch_size=1, gradient_accumulation_steps=4, packing=False)
    qk.train_adapter(make_adapter(save_tiny(), dropout=0.1), rows, config)
    assert drawn == [16] * 4


def test_a_resumed_run_draws_what_the_unbroken_one_draws(save_tiny: Tiny, tmp_path: Path) -> None:
    rows, found = make_rows(8), []
    for name, resume in (("whole", None), ("part", tmp_path / "whole" / "checkpoint-2")):
        adapter = make_adapter(save_tiny())
        (tmp_path / name).mkdir()
        saving = Saving(tmp_path / name, qk.BaseRecord.of(adapter.base), resume)
        config = options(max_steps=4, save_steps=2)
        qk.train_adapter(adapter, rows, config, loss=noisy, saving=saving)
        found.append(weights_of(adapter))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@contextmanager
def short_at(where: str, times: int, skip: int = 0) -> Iterator[list[str]]:
    """Let memory run out in a part of a step, after some passes; yield the refused calls."""
    owner, name = {
        "state": (optimizer_step, "make_state"),
        "clipping": (torch.nn.utils, "clip_grad_norm_"),
        "update": (torch.optim.AdamW, "step"),
    }[where]
    real, refused, calls = getattr(owner, name), [], itertools.count()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if next(calls) < skip or len(refused) == times:
            return real(*args, **kwargs)
        if where == "update":
            # As if memory ran out between two parameters.
            args[0].param_groups[0]["params"][0].data.fill_(torch.nan)
        refused.append(where)
        raise torch.OutOfMemoryError("CUDA out of memory")

    setattr(owner, name, refuse)
    try:
        yield refused
    finally:
        setattr(owner, name, real)


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("where", ["state", "clipping"])
def test_a_shortage_before_the_weights_change_replays_the_step(
    save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch, where: str, is_scaled: bool
) -> None:
    """The step has a loss scaler, which unscales the gradients of a step only once."""
    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=1024.0, enabled=is_scaled)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler())
    found = []
    for times in (0, 1):
        adapter, events = make_adapter(save_tiny()), []
        with short_at(where, times, skip=1) as refused:
            config = options(max_steps=3, batch_size=4)
            qk.train_adapter(adapter, make_rows(12), config, announce=record(events))
        assert len(refused) == times
        found.append((events, weights_of(adapter)))
    halved = [event for event in found[1][0] if isinstance(event, MicroBatchHalved)]
    assert [(event.optimizer_step, event.rows_now) for event in halved] == [(2, 2)]
    assert losses(found[1][0]) == pytest.approx(losses(found[0][0]), rel=1e-6)
    for name, weight in found[0][1].items():
        assert torch.allclose(weight, found[1][1][name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("where", ["state", "clipping"])
def test_a_shortage_that_stays_ends_in_one_line_with_the_weights_of_before(
    save_tiny: Tiny, tmp_path: Path, where: str
) -> None:
    adapter = make_adapter(save_tiny())
    saving = Saving(tmp_path, qk.BaseRecord.of(adapter.base))
    with (
        short_at(where, 99, skip=2),
        pytest.raises(OutOfMemory, match="one row at a time") as caught,
    ):
        qk.train_adapter(adapter, make_rows(8), options(batch_size=2), saving=saving)
    assert not isinstance(caught.value, TornStep)
    assert find_checkpoint(tmp_path, "latest").folder == tmp_path / "checkpoint-2"


def test_weights_that_were_changed_in_part_are_not_saved(save_tiny: Tiny, tmp_path: Path) -> None:
    adapter = make_adapter(save_tiny())
    saving = Saving(tmp_path, qk.BaseRecord.of(adapter.base))
    with short_at("update", 1, skip=3), pytest.raises(TornStep, match="are not saved; expected"):
        qk.train_adapter(adapter, make_rows(8), options(save_steps=2), saving=saving)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    weights = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_torn_step_of_a_rehearsal_is_undone(save_tiny: Tiny) -> None:
    adapter = make_adapter(save_tiny())
    before = weights_of(adapter)
    with (
        short_at("update", 1),
        pytest.raises(OutOfMemory, match="rehearsing the largest step, which was undone") as caught,
    ):
        qk.train_adapter(
            adapter, make_rows(4), options(), before_first_step=lambda step: rehearse(step, 2)
        )
    assert not isinstance(caught.value, TornStep)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(adapter).items())


@pytest.mark.parametrize("optimizer", ["fused", "adamw8bit", "paged-adamw"])
def test_an_update_on_a_gpu_takes_no_memory(optimizer: str) -> None:
    """Its state is made before the update, and the optimisers of a GPU are fused."""
    parameters = [torch.nn.Parameter(torch.randn(8192, 8)) for _ in range(3)]
    if optimizer == "fused":
        made: torch.optim.Optimizer = torch.optim.AdamW(parameters, fused=True)
    else:
        made = build_optimizer(parameters, options(optimizer=optimizer))
    make_state(made)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    ledger = Ledger("cpu")
    claim_trained(ledger, made)
    before = ledger.live_bytes
    with ledger:
        ledger.restart()
        made.step()
    smallest = min(parameter.nbytes for parameter in parameters)
    assert before > 2 * smallest
    assert ledger.peak().bytes - before < smallest / 8


def test_the_state_that_is_made_ahead_is_that_of_the_first_step() -> None:
    found = []
    for ahead in (True, False):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(9, 5)) for _ in range(2)]
        made = build_optimizer(parameters, options())
        if ahead:
            make_state(made)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        made.step()
        found.append(made.state_dict())
    assert found[0].keys() == found[1].keys()
    for mine, theirs in zip(found[0]["state"].values(), found[1]["state"].values(), strict=True):
        assert list(mine) == list(theirs)
        assert all(mine[name].dtype == theirs[name].dtype for name in mine)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_state_that_could_not_be_made_is_made_later(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = [torch.nn.Parameter(torch.randn(8192)) for _ in range(2)]
    made = build_optimizer(parameters, options(optimizer=optimizer))
    real, calls = torch.zeros_like, 0

    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(torch, "zeros_like", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        make_state(made)
    assert [bool(made.state.get(parameter)) for parameter in parameters] == [True, False]
    make_state(made)
    kept = [sorted(made.state[parameter]) for parameter in parameters]
    assert kept[0] == kept[1]


def test_backward_stays_on_the_thread_that_asks_for_it(
    save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of autograd's own would have a second cuBLAS workspace, which no plan counts."""
    allowed, real = [], tokens.loss_of

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        summed = real(*args, **kwargs)
        summed.register_hook(lambda _: allowed.append(torch._C._is_multithreading_enabled()))
        return summed

    monkeypatch.setattr(tokens, "loss_of", watched)
    qk.train_adapter(make_adapter(save_tiny()), make_rows(4), options(max_steps=2))
    assert allowed == [False, False]
    assert torch._C._is_multithreading_enabled()


def test_one_row_that_does_not_fit_ends_with_advice_and_a_checkpoint(
    save_tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(save_tiny())
    real, calls = causal.supervised_states, iter(range(100))

    def short(*args: Any) -> Any:
        if next(calls) >= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(causal, "supervised_states", short)
    saving = Saving(tmp_path, qk.BaseRecord.of(adapter.base))
    with pytest.raises(OutOfMemory, match=r"one row at a time, the longest of .*--max-length"):
        qk.train_adapter(adapter, make_rows(4), options(), saving=saving)
    assert find_checkpoint(tmp_path, "latest").folder == tmp_path / "checkpoint-2"


def test_the_halved_micro_batch_is_kept_over_a_resume(
    save_tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(save_tiny())
    saving = Saving(tmp_path, qk.BaseRecord.of(adapter.base))
    short = ShortOfMemory(2, MemoryError())
    config = options(max_steps=4, batch_size=4, save_steps=2)
    monkeypatch.setattr(causal, "supervised_states", short)
    qk.train_adapter(adapter, make_rows(8), config, saving=saving)
    again = ShortOfMemory(2, MemoryError())
    monkeypatch.setattr(causal, "supervised_states", again)
    resumed = Saving(tmp_path / "again", saving.record, tmp_path / "checkpoint-2")
    part, events = make_adapter(save_tiny()), []
    qk.train_adapter(part, make_rows(8), config, saving=resumed, announce=record(events))
    assert not [event for event in events if isinstance(event, MicroBatchHalved)]
    assert all(torch.equal(w, weights_of(part)[n]) for n, w in weights_of(adapter).items())


def test_evaluation_goes_on_with_fewer_rows(
    save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_adapter(save_tiny()).base
    rows, real, events = make_rows(9), causal.scores, []
    whole = qk.evaluate(base, rows, batch_size=4)

    def short(model: Any, batch: Any, *args: Any) -> Any:
        if len(batch.rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch, *args)

    monkeypatch.setattr(causal, "scores", short)
    found = qk.evaluate(base, rows, batch_size=4, announce=record(events))
    assert found.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (found.weight, found.rows) == (whole.weight, 9)
    assert (whole.batch_size, found.batch_size) == (4, 1)
    assert len(events) == 2
    monkeypatch.setattr(causal, "scores", lambda *args: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(OutOfMemory, match="in evaluation on one row of"):
        qk.evaluate(base, rows, batch_size=4)


def test_other_errors_are_not_taken_for_a_shortage() -> None:
    assert all(is_out_of_memory(error) for error in SHORTAGES)
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


# ---------------------------------------------------------------- half precision


def test_loss_scaling_finds_its_scale_and_resumes_with_the_same_bits(
    save_tiny: Tiny, tmp_path: Path
) -> None:
    def half_adapter() -> qk.Adapter:
        spec = qk.BaseSpec(qk.find_model(str(save_tiny())), save_tiny(), qk.Quantization(16))
        base = qk.load_base(spec, Hardware(torch.device("cpu"), torch.float16, "for this test"))
        return qk.attach(base, qk.LoraSpec(rank=4, targets=("all-linear",)), seed=1)

    adapter, events = half_adapter(), []
    saving = Saving(tmp_path, qk.BaseRecord.of(adapter.base))
    config = options(max_steps=8, save_steps=4)
    # The first gradient, 2¹⁶ times that of a large loss, overflows, so the scaler must act.
    large = SpoilingLoss(set(range(100)), 50.0)
    result = qk.train_adapter(
        adapter, make_rows(8), config, saving=saving, loss=large, announce=record(events)
    )
    state = read_state(tmp_path / "checkpoint-4")
    assert state.scaler["scale"] < 2**16, "it was halved"
    assert result.progress.skipped_steps == 0
    assert any(not math.isfinite(e.grad_norm) for e in events if isinstance(e, StepFinished))
    assert all(torch.isfinite(weight).all() for weight in weights_of(adapter).values())
    part = half_adapter()
    again = Saving(tmp_path / "again", saving.record, tmp_path / "checkpoint-4")
    qk.train_adapter(
        part, make_rows(8), config, saving=again, loss=SpoilingLoss(set(range(100)), 50.0)
    )
    assert all(torch.equal(w, weights_of(part)[n]) for n, w in weights_of(adapter).items())


# ---------------------------------------------------------------- signals


@pytest.fixture
def handled() -> Iterator[None]:
    # If the tests are started in the background, they inherit that SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with signals.stop_on_signals():
        yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handled")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_at_once_or_at_the_next_safe_point(number: int, code: int) -> None:
    def work() -> None:
        with signals.deferred():
            os.kill(os.getpid(), number)
            reached.append("still going")
            signals.safe_point()

    reached: list[str] = []
    with pytest.raises(signals.Stopped) as stopped:
        work()
    assert reached
    assert stopped.value.exit_code == code
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "a second one ends at once"


@pytest.mark.usefixtures("handled")
def test_a_signal_outside_of_training_is_raised_where_it_comes() -> None:
    with pytest.raises(signals.Stopped):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_of_an_earlier_run_is_forgotten() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for _ in range(2):
        with contextlib.suppress(signals.Stopped), signals.stop_on_signals():
            signals.safe_point()
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            signals.safe_point()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("handled")
def test_stopped_between_micro_batches_a_step_is_undone_and_the_run_continues_bit_equal(
    save_tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(12)
    config = options(max_steps=4, gradient_accumulation_steps=3, packing=False)
    whole = make_adapter(save_tiny(), dropout=0.2)
    qk.train_adapter(whole, rows, config)
    part = make_adapter(save_tiny(), dropout=0.2)
    real, calls = causal.supervised_states, iter(range(100))

    def stop_in_step_3(*args: Any) -> Any:
        if next(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    saving = Saving(tmp_path, qk.BaseRecord.of(part.base))
    monkeypatch.setattr(causal, "supervised_states", stop_in_step_3)
    with pytest.raises(signals.Stopped):
        qk.train_adapter(part, rows, config, saving=saving)
    found = find_checkpoint(tmp_path, "latest").folder
    assert found == tmp_path / "checkpoint-2", "step 3 was begun and undone"
    signals._received = None  # as in a new process
    again = make_adapter(save_tiny(), dropout=0.2)
    qk.train_adapter(again, rows, config, saving=Saving(tmp_path, saving.record, found))
    assert all(torch.equal(w, weights_of(again)[n]) for n, w in weights_of(whole).items())


@pytest.mark.usefixtures("handled")
def test_an_evaluation_that_was_stopped_is_done_again(save_tiny: Tiny, tmp_path: Path) -> None:
    adapter = make_adapter(save_tiny())
    saving = Saving(tmp_path, qk.BaseRecord.of(adapter.base))
    config = options(max_steps=3, eval_steps=1)
    measured = iter([3.0, None, 2.0, 1.0])

    def evaluate() -> float:
        value = next(measured)
        if value is None:
            os.kill(os.getpid(), signal.SIGINT)
            signals.safe_point()
        return value

    with pytest.raises(signals.Stopped):
        qk.train_adapter(adapter, make_rows(4), config, saving=saving, evaluate=evaluate)
    signals._received = None
    found = find_checkpoint(tmp_path, "latest").folder
    assert found == tmp_path / "checkpoint-2"
    events: list[Event] = []
    again = Saving(tmp_path, saving.record, found)
    result = qk.train_adapter(
        make_adapter(save_tiny()), make_rows(4), config, saving=again, evaluate=evaluate,
        announce=record(events),
    )  # fmt: skip
    assert [e.optimizer_step for e in events if isinstance(e, Evaluated)] == [2, 3]
    assert (result.progress.best_loss, result.progress.best_step) == (1.0, 3)


# ---------------------------------------------------------------- resume


def test_each_difference_is_listed_with_the_group_that_allows_it() -> None:
    stored = {name: 1 for names in COVERED.values() for name in names} | {"rank": 8}
    changed = stored | {"batch_size": 2, "base": 2, "rank": 16, "tokenizer": 2, "rows": 2}
    with pytest.raises(ConfigError) as caught:
        check_resumable(changed, state_of(stored))
    text = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 4, "other rows follow from another tokenizer"
    assert (
        "batch_size was 1 and is now 2; pass the stored one, or pass --allow-change batch" in text
    )
    assert "--allow-change base" in text
    assert "--allow-change tokenizer" in text
    assert "rank was 8 and is now 16; a run cannot change it" in text
    with pytest.raises(ConfigError) as caught:
        check_resumable(changed, state_of(stored), ["batch", "base", "tokenizer"])
    assert len(caught.value.faults) == 1
    allowed = check_resumable(
        changed | {"rank": 8}, state_of(stored), ["batch", "base", "tokenizer"]
    )
    assert len(allowed) == 4
    assert "new order of the rows" in allowed[-1]


def test_rows_that_changed_on_their_own_are_a_difference() -> None:
    before, now = {"rows": "a" * 32, "data": 1}, {"rows": "b" * 32, "data": 1}
    with pytest.raises(ConfigError) as caught:
        check_resumable(now, state_of(before))
    assert caught.value.faults == (
        "--resume: the token rows (of equal data and tokenizer) changed; restore what the run had, "
        "or pass --allow-change data to go on with other bits",
    )


def test_labels_that_changed_are_told_once_and_without_a_digest() -> None:
    before = {"labels": "a" * 64, "label_kind": "auto", "validation": "a" * 32}
    relabelled = before | {"labels": "b" * 64, "validation": "b" * 32}
    with pytest.raises(ConfigError) as caught:
        check_resumable(relabelled, state_of(before))
    assert caught.value.faults == (
        "--resume: the labels' kind, names, order or weights changed; restore what the run had, or "
        "pass --allow-change task to go on with other bits",
    )
    with pytest.raises(ConfigError) as caught:
        check_resumable(relabelled | {"label_kind": "multi"}, state_of(before))
    assert len(caught.value.faults) == 1, "other labels follow from another kind"
    assert "label_kind was 'auto' and is now 'multi'" in caught.value.faults[0]


def test_every_group_is_an_allowed_name_and_stands_in_the_documentation() -> None:
    page = (PROJECT / "docs" / "reliability.md").read_text(encoding="utf-8")
    lines = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, flags=re.MULTILINE))
    for group in COVERED:
        assert qk.TrainConfig(allow_change=(group,)).allow_change == (group,)
        documented = set(re.findall(r"`(\w+)`", lines[group]))
        assert documented == set(that_decide(qk.TrainConfig, group))
    sentence = re.search(r"shapes of stored tensors[^.]*\.", page)
    assert sentence is not None
    assert set(re.findall(r"`(\w+)`", sentence[0])) == {*that_decide(qk.TrainConfig, "shape")}


def test_the_identity_of_a_run_is_every_option_that_decides_its_bits() -> None:
    """Each such option is compared when a run is resumed, or is known by its result."""
    named = set(compared(qk.TrainConfig))
    for name in that_decide(qk.TrainConfig, "shape", *COVERED):
        assert name in named or declared(qk.TrainConfig, name)["known_by_result"], name
    assert not named & {*that_decide(qk.TrainConfig, "length")}


def test_more_steps_say_what_they_do_to_the_schedule() -> None:
    config = options(max_steps=12, scheduler="linear", warmup_ratio=0.0, learning_rate=1.0)
    (said,) = effects(state_of({}, steps=6, total=6), 12, config, {})
    assert "12 steps instead of 6" in said
    assert "step 7 has learning rate 0.5 (it was to be 0)" in said
    assert effects(state_of({}, total=12), 12, config, {}) == []
    (said,) = effects(state_of({}, steps=6), 6, config, {"torch": "3"}) or [""]
    assert said == ""
    stored = StoredState(Progress(), {}, 6, versions={"torch": "2"})
    (said,) = effects(stored, 6, config, {"torch": "3"})
    assert "torch 2 → 3" in said


def run_with_checkpoints(folder: Path, save_tiny: Tiny, steps: int = 4) -> qk.BaseRecord:
    adapter = make_adapter(save_tiny())
    base_record = qk.BaseRecord.of(adapter.base)
    config = options(max_steps=steps, save_steps=1)
    qk.train_adapter(adapter, make_rows(4), config, saving=Saving(folder, base_record))
    return base_record


def test_a_checkpoint_whose_name_was_not_yet_written_down_is_found(
    save_tiny: Tiny, tmp_path: Path
) -> None:
    run_with_checkpoints(tmp_path, save_tiny)
    (tmp_path / "last").write_text("checkpoint-3\n")  # killed just before it said 4
    assert find_checkpoint(tmp_path, "latest").folder == tmp_path / "checkpoint-4"
    (tmp_path / "last").write_bytes(b"\xff\x00")
    assert find_checkpoint(tmp_path, "latest").folder == tmp_path / "checkpoint-4"


def test_what_going_back_left_behind_is_not_taken_for_newer(
    save_tiny: Tiny, tmp_path: Path
) -> None:
    base_record = run_with_checkpoints(tmp_path, save_tiny)
    back = Saving(tmp_path, base_record, tmp_path / "checkpoint-1")
    other = options(max_steps=2, save_steps=1, learning_rate=1e-2)
    qk.train_adapter(make_adapter(save_tiny()), make_rows(4), other, saving=back)
    assert find_checkpoint(tmp_path, "latest").folder == tmp_path / "checkpoint-2"
    delete_old(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_a_checkpoint_under_another_steps_name_is_refused(save_tiny: Tiny, tmp_path: Path) -> None:
    run_with_checkpoints(tmp_path, save_tiny, steps=2)
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-7")
    found = find_checkpoint(tmp_path, "latest")
    assert found.folder == tmp_path / "checkpoint-1"
    assert "holds step 2; expected the step its name says" in found.damaged[0]


def test_a_resumed_log_has_each_row_once(tmp_path: Path) -> None:
    log = Log(tmp_path)

    def step(number: int) -> StepFinished:
        return StepFinished(number, 0.0, 1.0, 1.0, 1.0, 1, 1, 1.0, 1)

    for number in (1, 2):
        log(step(number))
        log(Evaluated(number, 0.0, 1.0, True, 1.0))
    log(StepSkipped(3, 0.0, math.nan, math.inf, (4,)))
    # The run stops in the evaluation after step 2, which the resumed run does again.
    log(RunStarted(first_step=3, total_steps=4, epochs=1.0, evaluated_step=1))
    rows = read_log(tmp_path / "trainer_log.jsonl")
    assert [(row["optimizer_step"], "eval_loss" in row) for row in rows] == [
        (1, False), (1, True), (2, False)
    ]  # fmt: skip


SMALL = ("--device", "cpu", "--max-steps", "2", "--save-steps", "1", "--max-length", "64")


@pytest.fixture(scope="module")
def small_run(simulated_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qlora_kit.cli import main

    folder = tmp_path_factory.mktemp("small")
    rows = [{"prompt": f"{n} plus {n} is ", "completion": str(2 * n)} for n in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as ended:
        main(["train", "--data", str(folder / "rows.jsonl"), "--output", str(folder / "run"),
              "--rank", "4", "--no-rehearse", "--samples", "0", *SMALL])  # fmt: skip
    assert ended.value.code == 0
    return folder / "run"


def test_a_resumed_run_takes_its_own_options(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        "train", "--output", str(small_run), "--resume", "--dry-run", "--json", capsys=capsys
    )
    found = json.loads(out)
    assert (code, found["rank"], found["max_steps"]) == (0, 4, 2)
    assert found["data"].endswith("rows.jsonl")
    code, out, _ = run(
        "train", "--resume", str(small_run / "checkpoint-1"), "--epochs", "3", "--dry-run",
        "--json", capsys=capsys,
    )  # fmt: skip
    found = json.loads(out)
    assert (found["max_steps"], found["epochs"]) == (None, 3.0), (
        "stored steps would win over epochs"
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (("--batch-size", "3"), ["batch_size was"]),
        (("--rank", "8", "--seed", "7"), ["rank was 4 and is now 8", "seed was 42 and is now 7"]),
        (("--max-length", "32"), ["max_length was 64 and is now 32"]),
        (("--data", "OTHER"), ["the training data changed"]),
        (("--bits", "8"), ["bits was 4 and is now 8"]),
        (("--train-on", "all"), ["train_on was"]),
    ],
)
def test_a_changed_run_is_refused_by_name(
    small_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: tuple[str, ...],
    named: list[str],
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "1", "completion": "2"}))
    changes = tuple(str(other) if change == "OTHER" else change for change in changes)
    code, _, err = run("train", "--output", str(small_run), "--resume", *changes, capsys=capsys)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == len(named), err
    for text, line in zip(named, lines, strict=True):
        assert text in line


def test_a_change_on_purpose_goes_on_and_says_so(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(
        "train", "--output", str(small_run), "--resume", "--max-steps", "3",
        "--gradient-accumulation-steps", "2", "--allow-change", "batch", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    text = " ".join(out.split())
    assert "resuming with a change: gradient_accumulation_steps was" in text
    assert "3 steps instead of 2" in text
    steps = [r["optimizer_step"] for r in read_log(small_run / "trainer_log.jsonl") if "loss" in r]
    assert steps == [1, 2, 3]


def test_a_folder_in_use_is_refused(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qlora_kit.storage import only_writer

    with only_writer(small_run):
        code, _, err = run("train", "--output", str(small_run), "--resume", capsys=capsys)
    assert code == 3
    assert err.startswith(f"error: {small_run}: another qlora-kit process writes here")
    assert err.count("\n") == 1


def test_runs_that_start_together_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_kit.train.folder import claimed_run

    monkeypatch.chdir(tmp_path)
    asked: dict[str, Any] = {"resume": None, "overwrite": False}
    with claimed_run(None, "demo", **asked) as one, claimed_run(None, "demo", **asked) as two:
        assert (str(one), str(two)) == ("runs/demo-1", "runs/demo-2")
        (two / "kept").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo-2"]


def test_a_disk_too_small_is_found_before_the_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr("qlora_kit.model.load.load_base", lambda *args: pytest.fail("loaded"))
    code, _, err = run("train", "--output", str(tmp_path / "run"), *SMALL, capsys=capsys)
    assert code == 3
    assert "0.00 GB free; expected" in err
    assert not (tmp_path / "run").exists()


def test_determinism_has_a_measured_cost(save_tiny: Tiny) -> None:
    adapter = make_adapter(save_tiny(), dropout=0.1)
    step = optimizer_step.OptimizerStep(
        adapter, CausalObjective(adapter.base), TokenRows.of(make_rows(4)),
        torch.optim.AdamW(adapter.parameters().values()),
        torch.amp.GradScaler("cpu", enabled=False), 1, 0.0,
    )  # fmt: skip
    before = torch.get_rng_state()
    assert 0.05 < step.cost_of_determinism([(0,), (1,)]) < 20
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in adapter.parameters().values())


def test_generation_goes_on_with_fewer_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_kit.infer import generate as module

    real = module._generate_batch

    def short(base: Any, tokenizer: Any, prompts: Any, sampling: Any) -> list[str]:
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(base, tokenizer, prompts, sampling)

    opened = qk.open_base(qk.BaseModelOptions(device="cpu"))
    prompts = [opened.tokenizer(text)["input_ids"] for text in ("one", "two hundred", "ten", "six")]
    sampling = qk.Sampling(max_new_tokens=4)
    expected = list(qk.generate(opened.base, opened.tokenizer, prompts, sampling))
    monkeypatch.setattr(module, "_generate_batch", short)
    assert list(qk.generate(opened.base, opened.tokenizer, prompts, sampling)) == expected
    monkeypatch.setattr(
        module, "_generate_batch", lambda *args: (_ for _ in ()).throw(MemoryError())
    )
    with pytest.raises(OutOfMemory, match="in generation after a prompt of"):
        list(qk.generate(opened.base, opened.tokenizer, prompts, sampling))
