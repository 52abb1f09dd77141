"""The adapter that training starts from, `--adapter`: its options, and whether they can be kept.

Takes the folder of an adapter; returns its options, or the adapter itself once it is known to fit.
Attaches nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import TrainConfig
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.lora.files import (
    PICKLED_WEIGHTS,
    WEIGHTS,
    PeftConfig,
    read_base_record,
    read_peft_config,
)
from qlora_kit.opening.adapters import stored_options
from qlora_kit.storage import file_hash

if TYPE_CHECKING:
    from qlora_kit.lora.adapter import StoredAdapter
    from qlora_kit.lora.spec import LoraSpec
    from qlora_kit.model.load import BaseSpec

_OF_4_BITS = ("bits", "quant_type", "double_quant")


def options_of_start(adapter: Path, model: str | None) -> dict[str, Any]:
    """Return the options that a run takes from the adapter that it starts from.

    Args:
        adapter: its folder.
        model: the base that the user asked for, or None.

    Raises:
        AdapterError: there is no such adapter, or it is none that the kit can load.
    """
    stored = stored_options(adapter, model)
    config = read_peft_config(adapter)
    options = {**stored, **_lora_options(config), "lora_dropout": config.lora_dropout or 0.0}
    record = read_base_record(adapter)
    if record is not None and record.trained_codes is not None:
        options["merge_aware"] = True
    return options


def _lora_options(config: PeftConfig) -> dict[str, Any]:
    """Return the options that decide what the matrices of an adapter mean."""
    named = config.target_modules
    targets = {} if named is None else {"targets": [named] if isinstance(named, str) else named}
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "rslora": bool(config.use_rslora),
        "rank_pattern": config.rank_pattern or {},
        "alpha_pattern": config.alpha_pattern or {},
        **targets,
    }


def started_from(config: TrainConfig, spec: BaseSpec, lora: LoraSpec) -> StoredAdapter | None:
    """Read the adapter that a run starts from, and check that the run can go on with it.

    Args:
        config: the options of the run.
        spec: the base.
        lora: the layers that the run will train.

    Returns:
        The adapter; None where a run starts anew.

    Raises:
        AdapterError: there is no such adapter, or training cannot go on with it.
        ConfigError: an option contradicts it.
    """
    if config.adapter is None:
        return None
    from qlora_kit.lora.adapter import read_adapter
    from qlora_kit.lora.targets import targeted_paths

    faults = [*_contradictions(config, config.adapter)]
    if faults:
        raise ConfigError(*faults)
    stored = read_adapter(config.adapter)
    if stored.saved or (stored.record and stored.record.classifies) or lora.whole:
        raise AdapterError(
            f"{config.adapter}: has layers that are trained whole, such as a classifier's head; "
            "expected LoRA matrices alone to start from; leave --adapter out"
        )
    asked = {*targeted_paths(spec.skeleton(), lora)}
    if asked != stored.tensors.keys():
        raise ConfigError(
            f"--targets: name {len(asked)} layers, and {config.adapter} has matrices of "
            f"{len(stored.tensors)}; expected the same layers to go on with; leave --targets out"
        )
    return stored


def _contradictions(config: TrainConfig, adapter: Path) -> Iterator[str]:
    """Yield a line for each option that is another than the adapter's."""
    record = read_base_record(adapter)
    own = _lora_options(read_peft_config(adapter))
    own.pop("targets", None)
    if record is not None:
        of_base = _OF_4_BITS if record.bits == 4 else ("bits",)
        own |= {name: getattr(record, name) for name in of_base}
        own |= {"merge_aware": True} if record.trained_codes is not None else {}
    for name, has in own.items():
        asked = getattr(config, name)
        if asked != has:
            flag = name.replace("_", "-")
            yield (
                f"--{flag}: found {asked}, and {adapter} has {has}, which training goes on with; "
                f"expected the same; leave --{flag} out"
            )


def hash_of_start(adapter: Path | None) -> str | None:
    """Return the hash of the weights of the adapter that a run starts from; None of no adapter."""
    if adapter is None:
        return None
    file = adapter / WEIGHTS
    return file_hash(file if file.is_file() else adapter / PICKLED_WEIGHTS)
