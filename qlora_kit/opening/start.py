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
from qlora_kit.lora.spec import IS_PATTERN
from qlora_kit.opening.adapters import stored_options
from qlora_kit.storage import file_hash

if TYPE_CHECKING:
    from qlora_kit.lora.spec import LoraSpec
    from qlora_kit.lora.stored import StoredAdapter
    from qlora_kit.model.load import BaseSpec

_OF_4_BITS = ("bits", "quant_type", "double_quant")
# Starts that are computed of the first rows.
_OF_ROWS = ("eva", "lora-ga")


def check_start_options(config: TrainConfig) -> None:
    """Check that a start does not contradict another option; reads nothing.

    Raises:
        ConfigError: it does.
    """
    init = config.init
    if init == "kaiming":
        return
    if config.adapter is not None:
        raise ConfigError(
            f"--init {init}: decides what A and B start from, and so does --adapter "
            f"{config.adapter}; expected one of the two; leave one of them out"
        )
    if init in _OF_ROWS and config.shard_base:
        raise ConfigError(
            f"--init {init}: asks the whole base before training, of which --shard-base leaves "
            "each process a part; expected one of the two; leave one of them out"
        )
    if init in _OF_ROWS and config.task in ("preference", "seq2seq"):
        raise ConfigError(
            f"--init {init}: is not made for the rows of --task {config.task}; expected another "
            "start, such as pissa; pass it, or leave --init out"
        )


def options_of_start(adapter: Path, model: str | None) -> dict[str, Any]:
    """Return the options that a run takes from the adapter that it starts from.

    Args:
        adapter: its folder.
        model: the base that the user asked for, or None.

    Raises:
        AdapterError: there is no such adapter, or it is none that the kit can load.
    """
    stored = stored_options(adapter, model)
    record = read_base_record(adapter)
    if record is not None and record.start is not None:
        raise AdapterError(
            f"{adapter}: its start ({record.start.init}) has changed the base that it was trained "
            "on, and another run would begin on another; expected an adapter of an unchanged base; "
            "go on with --resume, or export it and train on the merged model"
        )
    config = read_peft_config(adapter)
    options = {**stored, **_lora_options(config), "lora_dropout": config.lora_dropout or 0.0}
    options["targets"] = _targets(config, adapter)
    if record is not None and record.new_tokens:
        options["new_tokens"] = record.new_tokens
    if record is not None and record.trained_codes is not None:
        options["merge_aware"] = True
    return options


def _targets(config: PeftConfig, adapter: Path) -> list[str]:
    """Return what an adapter was attached to: the names it gives, or the paths of its tensors.

    A stranger's regular expression is never matched, and what narrows names down is not needed: the
    tensors say where the adapter is.

    Raises:
        AdapterError: a tensor's name is a regular expression.
    """
    named = config.target_modules
    narrows = (config.exclude_modules, config.target_parameters, config.modules_to_save)
    is_plain = config.layers_to_transform is None and not any(narrows)
    if isinstance(named, list) and named and is_plain and not any(map(IS_PATTERN.search, named)):
        return named
    from qlora_kit.lora.reading import read_adapter

    paths = read_adapter(adapter).spec.targets
    if odd := [path for path in paths if IS_PATTERN.search(path)]:
        raise AdapterError(
            f"{adapter}: has tensors of {odd[0]!r}, which is no path of a layer; expected a LoRA "
            "adapter of PEFT; save the adapter again"
        )
    return list(paths)


def _lora_options(config: PeftConfig) -> dict[str, Any]:
    """Return the options that decide what the matrices of an adapter mean."""
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "rslora": bool(config.use_rslora),
        "dora": bool(config.use_dora),
        "rank_pattern": config.rank_pattern or {},
        "alpha_pattern": config.alpha_pattern or {},
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
    from qlora_kit.lora.reading import read_adapter
    from qlora_kit.lora.targets import targeted_paths

    faults = [*_contradictions(config, config.adapter)]
    if faults:
        raise ConfigError(*faults)
    stored = read_adapter(config.adapter)
    if biases := [*stored.biases, *stored.added]:
        field = "bias" if stored.biases else "lora_bias"
        raise AdapterError(
            f"{config.adapter}: has trained biases ({biases[0]}, {field}), which training leaves "
            "as they are here; expected LoRA matrices alone to start from; "
            "merge it with `qlora-kit export`, and train on the merged model"
        )
    if stored.saved or (stored.record and stored.record.classifies) or lora.whole:
        raise AdapterError(
            f"{config.adapter}: has layers that are trained whole, such as a classifier's head; "
            "expected LoRA matrices alone to start from; leave --adapter out"
        )
    trained, own = lora.token_rows, stored.spec.token_rows
    if own is not None and (trained is None or {**trained.ids} != {**own.ids}):
        tokens = stored.record.new_tokens if stored.record else ()
        raise ConfigError(
            f"--new-tokens: found {', '.join(config.new_tokens) or 'none'}, and {config.adapter} "
            f"has rows of {', '.join(tokens) or 'tokens'}; expected the same to go on with; leave "
            "--new-tokens out"
        )
    asked = {*targeted_paths(spec.skeleton(), lora)}
    if asked != {*stored.spec.targets}:
        raise ConfigError(
            f"--targets: name {len(asked)} layers, and {config.adapter} has matrices of "
            f"{len(stored.spec.targets)}; expected the same layers to go on with; leave --targets "
            "out"
        )
    return stored


def _contradictions(config: TrainConfig, adapter: Path) -> Iterator[str]:
    """Yield a line for each option that is another than the adapter's."""
    record = read_base_record(adapter)
    own = _lora_options(read_peft_config(adapter))
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
