"""Writes an adapter in PEFT's exact format, and `qlora_kit.json` beside it.

`qlora_kit.json` records the base that the adapter was trained on, so that a merge can quantise the
base in exactly the same way.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qlora_kit.layers.dora import DoRALinear
from qlora_kit.layers.merge_aware import hash_of_all, hash_of_codes
from qlora_kit.layers.projections import (
    base_prefix,
    carriers,
    projections,
    stacks,
)
from qlora_kit.lora import biases as of_biases
from qlora_kit.lora.attach import Adapter
from qlora_kit.lora.files import (
    CONFIG,
    RECORD,
    WEIGHTS,
    BaseRecord,
)
from qlora_kit.lora.stacked import (
    folded,
    key_paths,
    taken_for_experts,
    target_parameters,
)
from qlora_kit.lora.starts.form import doubled, with_start
from qlora_kit.lora.token_files import (
    is_of_rows,
    tied_pair,
    token_fields,
    trained_tensors,
)
from qlora_kit.lora.vector_bank_files import as_bank_config, bank_tensors
from qlora_kit.lora.vocabulary import as_files
from qlora_kit.redact import redacted_values
from qlora_kit.storage import save_tensors, write_json

_PREFIX = "base_model.model."


def save_adapter(adapter: Adapter, folder: Path, record: BaseRecord) -> None:
    """Write the adapter into an existing folder.

    Args:
        adapter: the adapter.
        folder: an existing folder.
        record: the record of the base that it was trained on.

    Raises:
        StorageError: it could not be written.
    """
    has_bank = adapter.spec.variant.vblora
    tensors = bank_tensors(adapter) if has_bank else {}
    for path, layer in adapter.layers.items() if not has_bank else ():
        a, b = map(Tensor.cpu, layer.filed())
        a, b = with_start((a, b), adapter.start.get(path))
        if isinstance(layer, DoRALinear):
            magnitude = layer.lora_magnitude_vector.detach().cpu().contiguous()
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = magnitude
        if (window := layer.frozen.window) is not None:
            a, b = a.view(len(a), *window.kernel), b.view(*b.shape, *(1 for _ in window.size))
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = b.contiguous()
    for path, embedding in adapter.embeddings.items():
        tensors |= {f"{_PREFIX}{name}": each for name, each in as_files(path, embedding).items()}
    for path, key in key_paths(adapter.stacks).items():
        stack = adapter.stacks[path]
        for side, matrix in zip("AB", folded(stack.lora_A, stack.lora_B), strict=True):
            tensors[f"{_PREFIX}{key}.lora_{side}.weight"] = matrix.detach().cpu().contiguous()
    biases = set(_trained_biases(adapter))
    for name, tensor in {
        **_rest_of_heads(adapter),
        **adapter.saved,
        **trained_tensors(adapter),
    }.items():
        key = of_biases.key_of(name, adapter.layers) if name in biases else name
        tensors[f"{_PREFIX}{key}"] = tensor.detach().cpu().contiguous()
    for name, add in adapter.added.items():
        path = name.removesuffix(".bias")
        tensors[f"{_PREFIX}{path}.lora_B.bias"] = add / adapter.layers[path].scaling
    save_tensors(folder / WEIGHTS, tensors)
    if adapter.merge_aware:
        layers = adapter.merge_aware.items()
        codes = hash_of_all({path: hash_of_codes(layer.merged) for path, layer in layers})
        record = record.model_copy(update={"trained_codes": codes})
    # The name of a base may be a folder or an address, and have a secret in it.
    write_json(folder / CONFIG, redacted_values(peft_config(adapter, record)))
    write_json(folder / RECORD, redacted_values(record.as_json()))


def peft_config(adapter: Adapter, record: BaseRecord) -> dict[str, Any]:
    """Return the content of `adapter_config.json`."""
    spec = doubled(adapter.spec) if adapter.start else adapter.spec
    alpha = int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha
    model = adapter.base.model
    of_mixture = stacks(model)
    aside = taken_for_experts(adapter.layers) if of_mixture else []
    parameters = target_parameters(adapter.stacks, of_mixture, aside, projections(model))
    content = {
        "peft_type": "LORA",
        "task_type": spec.task_type or None,
        "base_model_name_or_path": record.base,
        "revision": record.revision,
        "r": spec.rank,
        "lora_alpha": alpha,
        # PEFT opens no parameters with dropout, which only training has.
        "lora_dropout": 0.0 if parameters else spec.dropout,
        "use_rslora": spec.rslora,
        **({"use_dora": True} if spec.variant.dora else {}),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "target_modules": _target_modules(
            model, (adapter.layers.keys() - set(aside)) | adapter.embeddings.keys()
        ),
        **({"target_parameters": parameters} if parameters else {}),
        "bias": of_biases.mode_of(_trained_biases(adapter), adapter.layers),
        **({"lora_bias": True} if adapter.added else {}),
        "fan_in_fan_out": any(layer.frozen.is_transposed for layer in adapter.layers.values()),
        "modules_to_save": _modules_to_save(adapter) or None,
        **token_fields(adapter),
        "inference_mode": True,
    }
    return as_bank_config(content, adapter) if spec.variant.vblora else content


def _trained_biases(adapter: Adapter) -> list[str]:
    """Return the names of the biases that replace those of the base, without their weights."""
    whole = adapter.whole_parameters()
    return of_biases.trained_alone(adapter.saved.keys() - whole.keys())


def _modules_to_save(adapter: Adapter) -> list[str]:
    """Return the modules that are saved whole; of a head that has several layers, the head.

    PEFT itself saves the head of a classifier by the name of its outermost module.
    """
    prefix = base_prefix(adapter.base.model)
    biases = {*_trained_biases(adapter)}
    whole = {path for path, layer in adapter.whole.items() if not is_of_rows(layer)}
    whole.discard(tied_pair(adapter) or "")
    paths = {name.rpartition(".")[0] for name in adapter.saved if name not in biases} | whole
    in_head = {path for path in paths if prefix and not path.startswith(prefix)}
    is_classifier = adapter.base.spec.classes is not None
    heads = {path.partition(".")[0] for path in in_head} if is_classifier else in_head
    return sorted((paths - in_head) | heads)


def _rest_of_heads(adapter: Adapter) -> dict[str, Tensor]:
    """Return the parameters of a classifier's head that nothing trains, such as those of a norm.

    They are those of the base; PEFT wants a head that it replaces to be complete.
    """
    if adapter.base.spec.classes is None:
        return {}
    prefix = base_prefix(adapter.base.model)
    named = adapter.base.model.named_parameters()
    return {name: each for name, each in named if prefix and not name.startswith(prefix)}


def _target_modules(model: nn.Module, targeted: Set[str]) -> list[str]:
    """Return the last parts of the paths, or the whole paths if the parts name other layers too."""
    endings = sorted({path.rsplit(".", 1)[-1] for path in targeted})
    every = carriers(model)
    named = {path for path in every if path.rsplit(".", 1)[-1] in endings}
    # PEFT takes a number for every module of that number, whatever it is.
    is_plain = named == targeted and not any(each.isdecimal() for each in endings)
    return endings if is_plain else sorted(targeted)
