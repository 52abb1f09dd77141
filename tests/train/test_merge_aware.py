"""Merge-aware training: its weight is that of A and B to the bit, whatever happens to a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from training import Rows, losses, make_adapter, make_rows, options

import qlora_kit as qk
from qlora_kit.errors import ConfigError
from qlora_kit.events import Event, MicroBatchHalved
from qlora_kit.layers.merge_aware import hash_of_codes, packed_sum
from qlora_kit.lora.attach import count_trainable
from qlora_kit.lora.merge_aware import check_merge_aware
from qlora_kit.tasks.causal import CausalObjective
from qlora_kit.train.checkpoint import find_checkpoint
from qlora_kit.train.loop import Saving
from qlora_kit.train.optimizer_step import OptimizerStep

Tiny = Callable[..., Path]
VARIANT = qk.Variant(merge_aware=True)


def attached(folder: Path, **changes: Any) -> qk.Adapter:
    """Return a merge-aware adapter of all linear layers, on a base in 4 bits."""
    base = qk.detach(make_adapter(folder))
    lora = qk.LoraSpec(rank=4, targets=("all-linear",), variant=VARIANT, **changes)
    return qk.attach(base, lora, seed=1)


def codes_of(adapter: qk.Adapter) -> dict[str, str]:
    return {path: hash_of_codes(layer.merged) for path, layer in adapter.merge_aware.items()}


def made_anew(adapter: qk.Adapter) -> dict[str, str]:
    """Return the hashes of the weights that follow from A and B as they are."""
    return {
        path: hash_of_codes(
            packed_sum(layer.frozen.weight, layer.lora_A, layer.lora_B, layer.scaling)
        )
        for path, layer in adapter.merge_aware.items()
    }


def test_a_resumed_run_ends_with_the_bits_of_the_unbroken_one(
    save_tiny: Tiny, tmp_path: Path
) -> None:
    rows, config = make_rows(12), options(max_steps=6, save_steps=3)
    whole = attached(save_tiny())
    saving = Saving(tmp_path / "run", qk.BaseRecord.of(whole.base))
    qk.train_adapter(whole, rows, config, saving=saving)
    assert len(whole.merge_aware) == len(whole.layers) == 14
    assert codes_of(whole) == made_anew(whole)
    found = find_checkpoint(tmp_path / "run", str(tmp_path / "run/checkpoint-3")).folder
    again = attached(save_tiny())
    fresh = codes_of(again)
    resumed = Saving(tmp_path / "again", saving.record, resume=found)
    qk.train_adapter(again, rows, config, saving=resumed)
    assert codes_of(again) == codes_of(whole) != fresh
    pairs = zip(whole.parameters().values(), again.parameters().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("change", [{"mlp_tile_tokens": 8}, {"unpacked_layers": 2}, {}])
def test_how_a_step_is_computed_changes_no_figure(save_tiny: Tiny, change: dict[str, int]) -> None:
    rows = make_rows(6)
    plain, other = attached(save_tiny()), attached(save_tiny())
    expected = losses_of(plain, rows, options(max_steps=9, recompute=False))
    found = losses_of(other, rows, options(max_steps=9, **({"recompute": True} | change)))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0]
    assert codes_of(other) == made_anew(other)


def test_layers_that_see_one_x_compute_as_they_do_alone(save_tiny: Tiny) -> None:
    grouped, alone = attached(save_tiny()), attached(save_tiny())
    rows = make_rows(6)

    def undo_groups(step: OptimizerStep) -> None:
        for layer in step.adapter.layers.values():
            layer.partners = ()

    expected = qk.train_adapter(alone, rows, options(), before_first_step=undo_groups)
    found = qk.train_adapter(grouped, rows, options())
    assert any(layer.partners for layer in grouped.layers.values())
    assert found.last_loss == pytest.approx(expected.last_loss, rel=1e-5)


def test_a_step_that_is_undone_leaves_its_weights_to_the_bit(save_tiny: Tiny) -> None:
    adapter = attached(save_tiny())
    seen = []

    def rehearse(step: OptimizerStep) -> None:
        before = codes_of(adapter)
        with step.undone():
            step.take([(0, 1)], rate=0.1)
            seen.append(codes_of(adapter))
        seen.append(codes_of(adapter))
        seen.append(before)

    qk.train_adapter(adapter, make_rows(4), options(max_steps=1), before_first_step=rehearse)
    changed, after, before = seen
    assert after == before != changed


def test_a_step_that_runs_out_of_memory_is_replayed(
    save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(8)
    config = options(max_steps=2, batch_size=4, packing=False)
    expected = attached(save_tiny())
    qk.train_adapter(expected, rows, config)
    own = CausalObjective.loss_sum

    def short(self: CausalObjective, batch: Any) -> torch.Tensor:
        if len(batch.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, batch)

    monkeypatch.setattr(CausalObjective, "loss_sum", short)
    adapter, events = attached(save_tiny()), list[Event]()
    qk.train_adapter(adapter, rows, config, announce=events.append)
    assert any(isinstance(event, MicroBatchHalved) for event in events)
    assert codes_of(adapter) == made_anew(adapter)
    pairs = zip(adapter.parameters().values(), expected.parameters().values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in pairs)


def test_the_base_alone_computes_with_its_own_codes(save_tiny: Tiny) -> None:
    adapter = attached(save_tiny())
    qk.train_adapter(adapter, make_rows(6), options())
    model = adapter.base.model.eval()
    ids = torch.randint(3, 96, (2, 20))
    with adapter.disabled():
        alone = model(input_ids=ids).logits
    trained = model(input_ids=ids).logits
    assert not torch.equal(alone, trained)
    qk.detach(adapter)
    assert torch.equal(model(input_ids=ids).logits, alone)


def losses_of(adapter: qk.Adapter, rows: Rows, config: qk.TrainConfig) -> list[float]:
    events: list[Event] = []
    qk.train_adapter(adapter, rows, config, announce=events.append)
    return losses(events)


REFUSED = [
    (qk.LoraSpec(dropout=0.1, variant=VARIANT), {}, "found --lora-dropout 0.1"),
    (qk.LoraSpec(variant=VARIANT), {"bits": 16}, "found a base in 16 bits"),
    (qk.LoraSpec(variant=VARIANT), {"is_shared": True}, "found --shard-base"),
    (qk.LoraSpec(variant=VARIANT), {"experts": ["mlp.experts"]}, "found mlp.experts among"),
    *(
        (qk.LoraSpec(variant=qk.Variant(merge_aware=True, **other)), {}, f"found --{flag}")
        for flag, other in (
            ("dora", {"dora": True}),
            ("learned-scale", {"learned_scale": True}),
            ("vblora", {"vblora": True}),
            ("rank-budget", {"rank_budget": 32}),
            ("init pissa", {"init": "pissa"}),
        )
    ),
]


@pytest.mark.parametrize(("spec", "changes", "found"), REFUSED, ids=[each[2] for each in REFUSED])
def test_what_it_cannot_be_combined_with_is_refused(
    spec: qk.LoraSpec, changes: dict[str, Any], found: str
) -> None:
    check_merge_aware(qk.LoraSpec(variant=VARIANT), 4)
    with pytest.raises(ConfigError, match=f"--merge-aware: {found}.*expected"):
        check_merge_aware(spec, **{"bits": 4, **changes})


def test_experts_are_refused_before_anything_is_loaded(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("mixtral")
    skeleton = qk.BaseSpec(qk.find_model(str(folder)), folder, qk.Quantization(4)).skeleton()
    lora = partial(qk.LoraSpec, variant=VARIANT)
    with pytest.raises(ConfigError, match="a stack of experts"):
        count_trainable(skeleton, lora(targets=("experts",)))
    assert count_trainable(skeleton, lora(targets=("attention",)))
