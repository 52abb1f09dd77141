"""An adapter alone, for others: `export --form adapter`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from qlora_kit.config import ExportConfig
from qlora_kit.errors import ConfigError
from qlora_kit.events import Announce, Closing, Facts, Notice
from qlora_kit.lora.files import read_base_record, read_peft_config
from qlora_kit.model.names import find_model
from qlora_kit.opening.adapters import stored_options
from qlora_kit.report.tables import Rows

_OF_MERGES = (
    "base", "requantize", "dtype", "max_shard_size", "data", "verify_tokens", "verify_threshold",
    "device",
)  # fmt: skip
OF_PUSHES = ("private", "revision")


def check_belongs(config: ExportConfig) -> None:
    """Check that each option that was given has a meaning for the form and the target.

    Raises:
        ConfigError: one has none.
    """
    given = config.model_fields_set
    strays = [] if config.repository else [(name, "--to hub:owner/name") for name in OF_PUSHES]
    strays += [(name, "--form merged") for name in _OF_MERGES if config.form == "adapter"]
    faults = [
        f"--{name.replace('_', '-')}: belongs to {place}; expected that, or none; leave it out"
        for name, place in strays
        if name in given
    ]
    if faults:
        raise ConfigError(*faults)


def export_adapter(config: ExportConfig, announce: Announce) -> dict[str, Any]:
    """Copy an adapter with its tokenizer and its card; what a run has besides stays behind.

    Returns:
        The facts of the files, for programs.
    """
    assert config.to is not None
    base = stored_options(config.adapter).get("model") or ""
    named = None if config.model is None else find_model(config.model).identity

    from qlora_kit.export.adapter_folder import write_adapter
    from qlora_kit.report.card import finish_card

    def finish(folder: Path) -> None:
        finish_card(folder, named or base, base, config.license, _facts(folder))

    write_adapter(
        config.to, config.adapter, base=named, overwrite=config.overwrite, finish=finish
    )  # fmt: skip
    say_if_private(named or base, "; --model owner/name gives it the name they know", announce)
    files = sorted(path.name for path in config.to.iterdir())
    size = sum(path.stat().st_size for path in config.to.iterdir())
    facts = (("base", named or base or "not named"), *_facts(config.to))
    announce(Facts(f"adapter in {config.to}", (*facts, ("size", f"{size / 1e6:.3f} MB"))))
    folder = shlex.quote(str(config.to))
    announce(Closing((str(config.to),), (f'qlora-kit generate --adapter {folder} --prompt "..."',)))
    return {"folder": str(config.to), "base": named or base or None, "files": files, "bytes": size}


def say_if_private(base: str, remedy: str, announce: Announce) -> None:
    """Say that the files name a folder of this machine as their base, if they do."""
    if Path(base).is_absolute():
        announce(
            Notice(
                f"the files name {base} as their base: others read this path, and do not have that "
                f"folder{remedy}"
            )
        )


def _facts(folder: Path) -> Rows:
    config, record = read_peft_config(folder), read_base_record(folder)
    rows = [("rank", f"{config.r}, alpha {config.lora_alpha:g}")]
    if record is not None:
        rows.append(("trained on", f"{record.bits} bits"))
    return tuple(rows)
