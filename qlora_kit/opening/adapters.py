"""Adapters that are there: what they were trained on, and putting them on a base.

Takes folders of adapters; changes a loaded base. Trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_kit.config import (
    AdapterOption,
    ChatConfig,
    EvaluateConfig,
    GenerateConfig,
    ServeConfig,
)
from qlora_kit.errors import AdapterError, ConfigError, HubError, ModelError
from qlora_kit.events import Announce, Notice
from qlora_kit.lora.files import (
    UNKNOWN_TEMPLATE,
    check_adapter_folder,
    read_base_record,
    read_peft_config,
)
from qlora_kit.model.hub import PREFIX, HubName
from qlora_kit.model.names import find_model

if TYPE_CHECKING:
    from qlora_kit.lora.attach import Adapter
    from qlora_kit.lora.several import AdapterSet, PerRow
    from qlora_kit.model.load import Base


AdapterConfig = TypeVar("AdapterConfig", EvaluateConfig, GenerateConfig, ChatConfig, ServeConfig)


def put_on(base: Base, config: AdapterOption, announce: Announce) -> Adapter | None:
    """Attach the adapter that is configured, if any, and return it.

    A notice says so if the adapter was trained on other bits than those of the base.
    """
    from qlora_kit.lora.adapter import load_adapter

    if config.adapter is None:
        return None
    adapter = load_adapter(base, config.adapter)
    record = read_base_record(config.adapter)
    if record is not None and record.bits != base.quantization.bits:
        announce(
            Notice(
                f"the adapter was trained on {record.bits} bits and is used on "
                f"{base.quantization.bits}: expect other numbers"
            )
        )
    return adapter


def put_by_row_on(
    base: Base, config: AdapterOption, asked: Sequence[str | None], announce: Announce
) -> PerRow | None:
    """Put on a base what is configured: one adapter, or several of which each row asks for one.

    Args:
        base: a loaded base.
        config: names the adapter or the adapters.
        asked: the name of the adapter of each row; None for the base alone.
        announce: receives notices.

    Returns:
        The adapter of each row, where several are on the base.
    """
    from qlora_kit.lora.several import PerRow

    put_on(base, config, announce)
    return PerRow(put_several_on(base, config, announce), asked) if config.adapters else None


def put_several_on(
    base: Base, config: AdapterOption, announce: Announce, *, own_templates: bool = False
) -> AdapterSet:
    """Put several adapters on a base.

    A notice names each adapter that was trained on other bits, or with another chat template.

    Args:
        base: a loaded base.
        config: names the adapters.
        announce: receives the notices.
        own_templates: whether each adapter is given its prompts by its own chat template.
    """
    from qlora_kit.lora.several import load_adapters

    adapters = load_adapters(base, config.adapters)
    records = {name: read_base_record(folder) for name, folder in config.adapters.items()}
    first = next(iter(records.values()))
    for name, record in records.items():
        if record is None:
            continue
        if record.bits != base.quantization.bits:
            announce(
                Notice(
                    f"adapter {name}: trained on {record.bits} bits and used on "
                    f"{base.quantization.bits}: expect other numbers"
                )
            )
        if (
            own_templates
            or first is None
            or UNKNOWN_TEMPLATE in (record.template_hash, first.template_hash)
        ):
            continue
        if record.template_hash != first.template_hash:
            announce(
                Notice(
                    f"adapter {name}: trained with another chat template than "
                    f"{next(iter(records))}, whose is used for all: expect other answers"
                )
            )
    return adapters


def folder_of_adapter(named: Path) -> Path:
    """Return the folder of an adapter; of one that is on the hub, fetch its files.

    Raises:
        AdapterError: neither a folder nor the hub has it, or it is no LoRA adapter.
        HubError: it is no folder, and the hub is out of reach or does not grant access.
    """
    name = HubName.of_adapter(named)
    if name is None:
        return named
    from qlora_kit.model.fetch import fetch_adapter

    try:
        return fetch_adapter(name)
    except (AdapterError, HubError) as error:
        if str(named).startswith(PREFIX):
            raise
        # Whoever meant a folder must not look for the fault at the hub.
        raise type(error)(f"{named}: no such folder; as a hub id, {error.faults[0]}") from error


def stored_options(adapter: Path, model: str | None = None) -> dict[str, Any]:
    """Return the base options that an adapter was trained with, as far as its files say.

    Args:
        adapter: the folder of the adapter.
        model: the base that the user asked for, which goes before the recorded base. The recorded
            commit belongs to the recorded base, and is left out for any other.
    """
    options = _recorded_options(adapter)
    if model is None or model == options.get("model"):
        return options
    return {**options, "model": model, "revision": None}


def _recorded_options(adapter: Path) -> dict[str, Any]:
    check_adapter_folder(adapter)
    config, record = read_peft_config(adapter), read_base_record(adapter)
    if record is not None:
        names = {"bits", "quant_type", "double_quant", "weights", "revision"}
        return {"model": record.base, **record.model_dump(include=names)}
    named = config.base_model_name_or_path
    return {"model": named} if named else {}


def adapter_of(config: AdapterOption) -> Path | None:
    """Return the folder of the adapter, or of the first of several; None if there is none."""
    return config.adapter or next(iter(config.adapters.values()), None)


def as_trained(config: AdapterConfig) -> AdapterConfig:
    """Return the configuration with the adapter's base and bits, unless the user named others.

    Raises:
        ConfigError: the configuration has both one adapter and several.
    """
    if config.adapter is not None and config.adapters:
        raise ConfigError("--adapter and --adapters contradict each other; pass one of them")
    adapter = adapter_of(config)
    if adapter is None:
        return config
    model = config.model if "model" in config.model_fields_set else None
    stored = stored_options(adapter, model)
    missing = {name: v for name, v in stored.items() if name not in config.model_fields_set}
    return config.model_copy(update=missing)


def check_base(model: str, adapter: Path | None) -> None:
    """Check that a model is known.

    Raises:
        ModelError: it is not; the error names the adapter that was trained on it, if there is one.
    """
    try:
        find_model(model)
    except ModelError as error:
        if adapter is None:
            raise
        raise ModelError(
            f"{error.faults[0]}; {adapter} goes on it: name where it is now with --model"
        ) from error
