"""Stored adapters on loaded bases: whether one fits, and putting it on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_kit.errors import AdapterError
from qlora_kit.layers.projections import (
    Projection,
    by_lora_path,
    carriers,
)
from qlora_kit.layers.weight import PlainWeight
from qlora_kit.lora import biases as of_biases
from qlora_kit.lora.attach import Adapter, attach
from qlora_kit.lora.files import (
    CONFIG,
)
from qlora_kit.lora.reading import read_adapter
from qlora_kit.lora.saved import Unresized, check_saved, put_in_place
from qlora_kit.lora.stored import StoredAdapter
from qlora_kit.lora.token_files import (
    vocabulary_of,
)
from qlora_kit.lora.vocabulary import check_same
from qlora_kit.lora.whole import check_fits_rows
from qlora_kit.model.load import Base, BaseSpec, resized

_MOST_FAULTS = 5


def load_adapter(base: Base, folder: Path) -> Adapter:
    """Attach a stored adapter to `base`.

    Raises:
        AdapterError: see `read_adapter` and `check_fits`.
    """
    stored = read_adapter(folder)
    if stored.saved or stored.rows:
        stored = stored.with_twins(base.spec.skeleton())
    needed, before = vocabulary_of(stored, base.spec), None
    if needed is not None:
        before = Unresized.of(base)
        base = resized(base, needed)
    check_fits(stored, base)
    adapter = attach(base, stored.spec)
    adapter.fill(stored.tensors, stored.whole, stored.magnitudes)
    sums = of_biases.sums(base.model, stored.added)
    originals = put_in_place(base.model, {**stored.saved, **sums})
    return replace(
        adapter, saved=stored.saved, originals=originals, added=stored.added, resized_from=before
    )


def check_fits(stored: StoredAdapter, base: Base) -> None:
    """Check that an adapter was made for this base.

    Raises:
        AdapterError: a layer is missing or has another shape, or the adapter was trained on other
            weights than the base has.
    """
    check_layers(stored, carriers(base.model), base.spec.source.name)
    for name, tensor in stored.of_base.items():
        own = _held(base.model, name)
        if own is not None:
            check_same(name, tensor, own, stored.folder)
    if stored.saved or base.spec.classes is not None:
        skeleton = base.spec.skeleton()
        check_saved(stored.saved, base.spec, skeleton, stored.folder, stored.biases)
    check_token_rows(stored, base.spec)
    if stored.record is not None and stored.record.digest != base.digest:
        raise AdapterError(
            f"{stored.folder}: trained on other weights than {base.spec.source.name} has; "
            f"expected {stored.record.base} with digest {stored.record.digest}"
        )
    _check_start(stored, base)


def _check_start(stored: StoredAdapter, base: Base) -> None:
    """Check that a base is less what the training of an adapter started from, and nothing else."""
    start = base.spec.start
    taken = start.pairs if start is not None and start.changes_base else {}
    same = taken.keys() == stored.start.keys() and all(
        torch.equal(one, other)
        for path, pair in taken.items()
        for one, other in zip(pair, stored.start[path], strict=True)
    )
    if not same:
        init = stored.record.start.init if stored.record and stored.record.start else "no start"
        raise AdapterError(
            f"{stored.folder}: trained from {init}, and the base was not loaded for it; expected "
            "the base that its start leaves; load it with open_base(options, adapter=folder)"
        )


def _held(model: nn.Module, name: str) -> Tensor | None:
    """Return a parameter of a base if it is held as it is stored."""
    path, _, leaf = name.rpartition(".")
    held = getattr(model.get_submodule(path), leaf)
    held = held.values if isinstance(held, PlainWeight) else held
    return held if isinstance(held, Tensor) else None


def check_token_rows(stored: StoredAdapter, spec: BaseSpec) -> None:
    """Check that the base of an adapter has the rows of tokens that it trained.

    Raises:
        AdapterError: it does not.
    """
    rows = stored.spec.token_rows
    if rows is not None and (faults := [*check_fits_rows(rows, spec.skeleton(), stored.rows)]):
        raise AdapterError(
            f"{stored.folder}: {faults[0]}; expected the base {stored.base}; name it with --model"
        )


def check_layers(stored: StoredAdapter, found: Mapping[str, Projection], base: str) -> None:
    """Check that every layer of an adapter is in a base, with the right shape.

    Args:
        stored: the adapter.
        found: the projections of the base.
        base: the name of the base in an error.

    Raises:
        AdapterError: layers do not fit; the error has a line for each of the first five.
    """
    shapes = {path: (each.out_features, *each.kernel) for path, each in found.items()}
    sites = by_lora_path(found)
    faults = [
        f"{stored.folder}: its {path} has {count} experts, and {len(sites.get(path, ()))} in "
        f"{base}; expected the base {stored.base}; name it with --model"
        for path, count in stored.stacked.items()
        if count != len(sites.get(path, ()))
    ]
    if faults:
        raise AdapterError(*faults[:_MOST_FAULTS])
    for path, (a, b) in stored.tensors.items():
        own = (len(b), *stored.kernels.get(path, (a.shape[1],)))
        if shapes.get(path) != own:
            state = f"of shape {shapes[path]}" if path in shapes else "missing"
            faults.append(
                f"{stored.folder}: its layer {path} {own} is {state} in "
                f"{base}; expected the base {stored.base}; name it with --model"
            )
    if faults:
        raise AdapterError(*faults[:_MOST_FAULTS])
    there = stored.tensors.keys() | stored.stacked.keys()
    missing = sorted(
        path
        for path, (first, *_) in sites.items()
        if path not in there
        and f"{path}.weight" not in stored.saved
        and any(
            _is_named(path, name)
            for name in (stored.targeted_stacks if first.is_expert else stored.targeted)
        )
    )
    if missing:
        raise AdapterError(
            f"{stored.folder / CONFIG}: targets {missing[0]}, and its tensors are missing "
            f"({len(missing)} such layers); expected lora_A and lora_B; save the adapter again"
        )


def _is_named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
