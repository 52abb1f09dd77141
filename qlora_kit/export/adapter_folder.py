"""An adapter alone, in a folder that others open: without checkpoints, log and pages of its run.

Takes the folder of a run or of any LoRA adapter of PEFT; writes a new folder, with a manifest. The
pages of a run show text of its data, so they stay where they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from qlora_kit.errors import AdapterError, raised_as, said
from qlora_kit.export.target import check_target
from qlora_kit.lora.files import (
    CONFIG,
    PICKLED_WEIGHTS,
    RECORD,
    WEIGHTS,
    check_adapter_folder,
    read_base_record,
    read_peft_config,
)
from qlora_kit.storage import read_json, staged_folder, write_json

CARD = "README.md"
# What opens an adapter with PEFT and transformers, or with the kit; and its card with a picture.
_TAKEN = (
    WEIGHTS, PICKLED_WEIGHTS, CONFIG, RECORD, CARD, "loss.png", "tokenizer*", "*.jinja", "*.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "preprocessor_config.json",
)  # fmt: skip


def adapter_files(adapter: Path) -> list[Path]:
    """Return the files of a folder that are taken: those that open the adapter, and its card."""
    return sorted(
        path
        for path in adapter.iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _TAKEN)
    )


def write_adapter(
    folder: Path,
    adapter: Path,
    *,
    base: str | None,
    overwrite: bool,
    finish: Callable[[Path], None],
) -> None:
    """Copy an adapter to a new folder.

    Args:
        folder: the folder to write; it is visible only when it is whole.
        adapter: the folder of the adapter.
        base: what the adapter is to name as its base; None to leave it as it is.
        overwrite: replace an existing folder.
        finish: changes the folder before it becomes visible.

    Raises:
        AdapterError: it is no LoRA adapter, or its weights are damaged.
        OutputError: the folder exists, see `target.check_target`.
        StorageError: it could not be written.
    """
    check_adapter_folder(adapter)
    read_peft_config(adapter)
    read_base_record(adapter)
    _check_weights(adapter / WEIGHTS)
    check_target(folder, [adapter], overwrite)
    with staged_folder(folder, replace=overwrite) as staging:
        for path in adapter_files(adapter):
            shutil.copyfile(path, staging / path.name)
        if base is not None:
            _name_base(staging, base)
        finish(staging)


def _check_weights(path: Path) -> None:
    """Check that a safetensors file has the bytes that its header says."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return  # only a pickled file, which whoever opens it checks
    line = lambda error: f"{path}: not a complete safetensors file ({said(error)}); restore it"  # noqa: E731
    with raised_as(AdapterError, line, of=(SafetensorError, OSError)), safe_open(path, "numpy"):
        pass


def _name_base(folder: Path, base: str) -> None:
    """Name another base in the files of an adapter; its commit belongs to the base before."""
    for name, key in ((CONFIG, "base_model_name_or_path"), (RECORD, "base")):
        path = folder / name
        if path.is_file():
            write_json(path, {**read_json(path), key: base, "revision": None})
