"""Training: weighing by tokens, resuming bit for bit, saving, and announcing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_error, slow
from training import losses, make_adapter, make_rows, options, record, weights_of

import qlora_kit as qk
from qlora_kit.errors import EnvironmentFault, NumericsError
from qlora_kit.events import CheckpointSaved, Evaluated, Event
from qlora_kit.parallel.one import OneProcess
from qlora_kit.signals import Stopped
from qlora_kit.train.checkpoint import checkpoints, find_checkpoint
from qlora_kit.train.loop import Saving
from qlora_kit.train.optimizer import learning_rate_at


def test_one_row_eight_times_equals_eight_rows_once(save_tiny: Callable[..., Path]) -> None:
    rows, found = make_rows(8), []
    for batch_size in (1, 2, 8):
        adapter, events = make_adapter(save_tiny()), []
        config = options(
            batch_size=batch_size, gradient_accumulation_steps=8 // batch_size, max_steps=3
        )
        qk.train_adapter(adapter, rows, config, announce=record(events))
        found.append((losses(events), weights_of(adapter)))
    for other_losses, other_weights in found[1:]:
        assert other_losses == pytest.approx(found[0][0], rel=1e-6)
        for name, weight in found[0][1].items():
            # Compared in norm: Adam first moves an element by the sign of its gradient, and if that
            # is nearly zero, the order of a sum decides its sign.
            assert relative_error(other_weights[name], weight) < 2e-5, name


def test_the_loss_falls_on_rows_seen_again_and_again(save_tiny: Callable[..., Path]) -> None:
    events: list[Event] = []
    adapter = make_adapter(save_tiny())
    qk.train_adapter(
        adapter, make_rows(2), options(max_steps=40, batch_size=2), announce=record(events)
    )
    assert losses(events)[-1] < 0.7 * losses(events)[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit"])
def test_every_optimizer_trains_and_moves_every_matrix(
    save_tiny: Callable[..., Path], optimizer: str
) -> None:
    adapter = make_adapter(save_tiny())
    before = weights_of(adapter)
    qk.train_adapter(adapter, make_rows(6), options(optimizer=optimizer))
    after = weights_of(adapter)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(weight).all() for weight in after.values())


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
def test_the_learning_rate_warms_up_and_never_reaches_zero(scheduler: str) -> None:
    config = options(scheduler=scheduler, warmup_ratio=0.2, learning_rate=1.0)
    rates = [learning_rate_at(step, 20, config) for step in range(1, 21)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert max(rates) == 1.0
    assert all(rate > 0 for rate in rates)
    if scheduler == "constant":
        assert set(rates[4:]) == {1.0}
    else:
        assert all(later < earlier for earlier, later in pairwise(rates[4:]))


# The optimiser's state does not depend on the base's bits, so by default each is tested once.
@pytest.mark.parametrize(
    ("optimizer", "bits"),
    [
        *(("adamw", 4), ("adamw", 8), ("adamw", 16), ("adamw8bit", 4)),
        *slow(("adamw8bit", 8), ("adamw8bit", 16)),
    ],
)
def test_a_resumed_run_ends_with_the_bits_of_the_unbroken_one(
    save_tiny: Callable[..., Path], tmp_path: Path, bits: int, optimizer: str
) -> None:
    rows = make_rows(10)
    config = options(
        max_steps=7, batch_size=2, gradient_accumulation_steps=2, save_steps=1, optimizer=optimizer
    )
    # At rank 64 the matrices have the 4,096 elements from which 8-bit state is 8-bit.
    whole = make_adapter(save_tiny(), bits, dropout=0.2, rank=64)
    events: list[Event] = []
    saving = Saving(tmp_path, qk.BaseRecord.of(whole.base))
    qk.train_adapter(whole, rows, config, saving=saving, announce=record(events))
    for step in (1, 3, 6):
        part = make_adapter(save_tiny(), bits, dropout=0.2, rank=64)
        resumed: list[Event] = []
        again = Saving(tmp_path / "again", saving.record, tmp_path / f"checkpoint-{step}")
        qk.train_adapter(part, rows, config, saving=again, announce=record(resumed))
        assert losses(resumed) == losses(events)[step:]
        for name, weight in weights_of(whole).items():
            assert torch.equal(weight, weights_of(part)[name]), name


def test_the_newest_undamaged_checkpoint_is_taken(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(save_tiny())
    saving = Saving(tmp_path, qk.BaseRecord.of(adapter.base))
    qk.train_adapter(adapter, make_rows(4), options(max_steps=3, save_steps=1), saving=saving)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (1, 2, 3)]
    (tmp_path / "checkpoint-3" / "optimizer.safetensors").write_bytes(b"damaged")
    found = find_checkpoint(tmp_path, "latest")
    assert found.folder == tmp_path / "checkpoint-2"
    assert "checkpoint-3/optimizer.safetensors: changed since" in found.damaged[0]


def test_old_checkpoints_go_and_the_best_stays(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter, events = make_adapter(save_tiny()), []
    saving = Saving(tmp_path, qk.BaseRecord.of(adapter.base))
    measured = iter([3.0, 1.0, 2.0, 2.5, 2.2, 2.1])
    config = options(max_steps=6, eval_steps=1, save_steps=1, save_total_limit=2)
    result = qk.train_adapter(
        adapter, make_rows(4), config, saving=saving, evaluate=lambda: next(measured),
        announce=record(events),
    )  # fmt: skip
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (2, 5, 6)]
    assert (tmp_path / "best").read_text() == "checkpoint-2\n"
    assert (tmp_path / "last").read_text() == "checkpoint-6\n"
    assert (result.progress.best_loss, result.progress.best_step) == (1.0, 2)
    assert [e.is_best for e in events if isinstance(e, Evaluated)] == [True, True] + [False] * 4
    saved = [e.optimizer_step for e in events if isinstance(e, CheckpointSaved)]
    assert saved == [1, 2, 3, 4, 5, 6]


def test_a_run_stops_when_validation_stops_falling(save_tiny: Callable[..., Path]) -> None:
    measured = iter([1.0, 2.0, 0.5, 0.6, 0.7, 0.8, 0.9])
    config = options(max_steps=7, eval_steps=1, early_stopping_patience=2)
    result = qk.train_adapter(
        make_adapter(save_tiny()), make_rows(4), config, evaluate=lambda: next(measured)
    )
    assert result.progress.optimizer_step == 5
    assert result.reason == "validation loss stopped falling"


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"epochs": 2.0, "max_steps": None}, 6),
        ({"epochs": 0.5, "max_steps": None}, 2),
        ({"epochs": 1.0, "max_steps": 10}, 10),
    ],
)
def test_epochs_and_max_steps_set_the_length(
    save_tiny: Callable[..., Path], changes: dict[str, Any], steps: int
) -> None:
    config = options(batch_size=2, gradient_accumulation_steps=2, **changes)
    result = qk.train_adapter(make_adapter(save_tiny()), make_rows(11), config)
    assert result.progress.optimizer_step == steps


def test_a_custom_loss_is_what_is_minimised(save_tiny: Callable[..., Path]) -> None:
    def smoothed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=0.1
        )

    def always_seven(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # This falls only if the custom loss is minimised, and not the loss of the rows' own tokens.
        return plain(logits, torch.full_like(targets, 7))

    def plain(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    found = {}
    for loss in (None, plain, smoothed, always_seven):
        events: list[Event] = []
        qk.train_adapter(
            make_adapter(save_tiny()), make_rows(2), options(max_steps=20, batch_size=2),
            loss=loss, announce=record(events),
        )  # fmt: skip
        found[loss] = losses(events)
    assert found[plain] == pytest.approx(found[None], rel=1e-5)
    assert found[smoothed] != found[None]
    assert all(math.isfinite(value) for value in found[smoothed])
    assert found[smoothed][-1] < found[smoothed][0]
    assert found[always_seven][-1] < 0.5 * found[always_seven][0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputation_changes_nothing_but_memory(
    save_tiny: Callable[..., Path], dropout: float
) -> None:
    """Only an MLP in tiles, which recomputation brings by default, sums in another order."""
    found = []
    for recompute in (True, False):
        adapter, events = make_adapter(save_tiny(), dropout=dropout), []
        config = options(recompute=recompute, mlp_tile_tokens=0)
        qk.train_adapter(adapter, make_rows(6), config, announce=record(events))
        found.append((losses(events), weights_of(adapter)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


class AnotherIsAsked(OneProcess):
    """One of two processes, the other of which gets a signal after some meetings."""

    def __init__(self, meetings: int) -> None:
        self.left = meetings

    def most(self, *values: float) -> tuple[float, ...]:
        self.left -= 1
        return (15, *values[1:]) if self.left < 0 else values


def test_a_signal_to_another_process_stops_this_one_at_the_same_step(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The processes of a step meet before it, before its micro-batch, and behind that.
    monkeypatch.setattr("qlora_kit.train.loop.processes_of_this_run", lambda: AnotherIsAsked(6))
    adapter = make_adapter(save_tiny("tinyllama"))
    saving = Saving(tmp_path, qk.BaseRecord.of(adapter.base))
    with pytest.raises(Stopped) as stopped:
        qk.train_adapter(adapter, make_rows(4), options(), saving=saving)
    assert stopped.value.exit_code == 143
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two", "RANK": "0"}, {"WORLD_SIZE": ""}]
)
def test_a_launcher_that_contradicts_itself_is_refused(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentFault, match=r"WORLD_SIZE=.*--devices N or torchrun"):
        qk.train_adapter(make_adapter(save_tiny()), make_rows(4), options())


def test_checkpoints_hold_no_pickle_and_no_path(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(save_tiny())
    saving = Saving(tmp_path / "run", qk.BaseRecord.of(adapter.base))
    qk.train_adapter(adapter, make_rows(4), options(), saving=saving)
    folder = tmp_path / "run" / "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "manifest.json",
        "optimizer.safetensors", "qlora_kit.json", "random.safetensors", "state.json",
    }  # fmt: skip
    for path in folder.glob("*.safetensors"):
        assert str(tmp_path).encode() not in path.read_bytes()
    assert json.loads((folder / "state.json").read_text())["progress"]["optimizer_step"] == 4


def test_a_validation_loss_that_is_not_finite_stops_the_run(save_tiny: Callable[..., Path]) -> None:
    with pytest.raises(NumericsError, match="step 2: the validation loss is nan"):
        qk.train_adapter(
            make_adapter(save_tiny()),
            make_rows(4),
            options(eval_steps=2),
            evaluate=lambda: math.nan,
        )


def test_going_back_to_an_older_checkpoint_goes_on_from_there(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(save_tiny())
    record = qk.BaseRecord.of(adapter.base)
    config = options(max_steps=6, save_steps=2, save_total_limit=1)
    keep_all = options(max_steps=6, save_steps=2)
    qk.train_adapter(adapter, make_rows(4), keep_all, saving=Saving(tmp_path, record))
    back = Saving(tmp_path, record, tmp_path / "checkpoint-2")
    shorter = config.model_copy(update={"max_steps": 3})
    qk.train_adapter(make_adapter(save_tiny()), make_rows(4), shorter, saving=back)
    assert (tmp_path / "last").read_text() == "checkpoint-3\n"
    found = find_checkpoint(tmp_path, "latest").folder
    assert found == tmp_path / "checkpoint-3", "the last written, not the highest number"


def test_without_save_steps_a_run_saves_at_each_epochs_end(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(save_tiny())
    saving = Saving(tmp_path, qk.BaseRecord.of(adapter.base))
    config = options(max_steps=None, epochs=3.0, batch_size=2)
    qk.train_adapter(adapter, make_rows(4), config, saving=saving)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (2, 4, 6)]


@pytest.mark.parametrize("unnamed", ["last", "best"])
def test_a_last_checkpoint_not_yet_named_is_named_by_resuming(
    save_tiny: Callable[..., Path], tmp_path: Path, unnamed: str
) -> None:
    """A run that was killed right after its last save has nothing left to save when resumed."""
    adapter = make_adapter(save_tiny())
    record = qk.BaseRecord.of(adapter.base)
    measured = iter([3.0, 2.0, 1.0])
    config = options(max_steps=3, save_steps=1, eval_steps=1, save_total_limit=1)
    qk.train_adapter(
        adapter, make_rows(4), config.model_copy(update={"save_total_limit": 2}),
        saving=Saving(tmp_path, record), evaluate=lambda: next(measured),
    )  # fmt: skip
    (tmp_path / unnamed).write_text("checkpoint-2\n")
    found = find_checkpoint(tmp_path, "latest").folder
    assert found == tmp_path / "checkpoint-3"
    again = Saving(tmp_path, record, found)
    qk.train_adapter(make_adapter(save_tiny()), make_rows(4), config, saving=again)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]
    assert (tmp_path / "last").read_text() == (tmp_path / "best").read_text() == "checkpoint-3\n"


def test_a_fused_optimizer_goes_on_where_it_was() -> None:
    """A fused optimiser, as used on a GPU, counts its steps on the device; it runs on CPUs too."""
    from qlora_kit.train.optimizer import optimizer_tensors, restore_optimizer

    def stepped(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
        parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
        return parameter.detach().clone()

    first = torch.nn.Parameter(torch.ones(5))
    optimizer = torch.optim.AdamW([first], lr=0.1, fused=True)
    second = torch.nn.Parameter(stepped(optimizer, first))
    tensors, values = optimizer_tensors(optimizer, {"p": first})
    fresh = torch.optim.AdamW([second], lr=0.1, fused=True)
    restore_optimizer(fresh, {"p": second}, tensors, values)
    assert torch.equal(stepped(fresh, second), stepped(optimizer, first))
    assert float(fresh.state[second]["step"]) == 2
