"""A push to the hub: any form of an export, made here first, and then sent in one commit.

What is sent is kept in the cache until it is on the hub. So a push that was killed or refused goes
on without a second merge, and with the very same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qlora_kit
from qlora_kit.config import ExportConfig
from qlora_kit.errors import ConfigError, DataError, StorageError
from qlora_kit.events import Announce, Closing, Event, Facts, Notice, silent
from qlora_kit.lora.files import CONFIG, check_adapter_folder
from qlora_kit.model.hub import MAIN, PREFIX, HubName
from qlora_kit.opening.adapters import stored_options
from qlora_kit.recipe.exporting import export
from qlora_kit.recipe.sharing import OF_PUSHES, check_belongs, say_if_private
from qlora_kit.storage import (
    check_confined,
    clean_up,
    delete_folder,
    file_hash,
    is_sealed,
    only_writer,
    read_json,
    storage_errors,
    verify_folder,
    write_json,
)

if TYPE_CHECKING:
    from qlora_kit.export.push import FileToPush, Pushed

_MADE, _MADE_OF = "model", "made_of.json"
# Options that do not decide what the files hold.
_NOT_OF_FILES = {"adapter", "to", "overwrite", "device", *OF_PUSHES}
# Those that an export may be pushed with that is already made.
_FOR_READY = {"adapter", "to", "overwrite", *OF_PUSHES}


def push(
    config: ExportConfig, announce: Announce = silent, *, dry_run: bool = False
) -> dict[str, Any]:
    """Make what is asked for, and push it to the repository that `--to` names.

    Args:
        config: the options of the export.
        announce: receives what is pushed, and where to.
        dry_run: list the files, their sizes and hashes, and ask the hub nothing.

    Returns:
        The repository, the files and the commit, for programs.
    """
    name = _target(config)
    check_belongs(config)

    from qlora_kit.export.push import files_of, push_files, user_of_token

    # An hour of merging is not for nothing because the token has expired.
    user = "" if dry_run else user_of_token(name)
    with _made(config, name, announce, keep=dry_run) as folder:
        files = files_of(folder)
        announce(_listed(files, name, config, dry_run=dry_run))
        if dry_run:
            return _told(files, name, config)
        pushed = push_files(
            files,
            name,
            user=user,
            private=config.private,
            replace=config.overwrite,
            message=f"Pushed by qlora-kit {qlora_kit.__version__}",
        )
    announce(_outcome(pushed, name))
    announce(Closing((pushed.url,), _next(files, name, pushed)))
    return {**_told(files, name, config), **asdict(pushed)}


def list_push(config: ExportConfig, announce: Announce = silent) -> dict[str, Any]:
    """Show what `push` would send, without a request about the repository."""
    return push(config, announce, dry_run=True)


def _target(config: ExportConfig) -> HubName:
    assert config.repository is not None
    name = HubName.of(config.repository, "--to")
    if name.revision is not None:
        raise ConfigError(
            f"--to: found {config.repository!r}, with a branch; expected hub:owner/name; pass "
            f"--revision {name.revision}"
        )
    if config.revision is None:
        return name
    try:
        return HubName.of(f"{name.id}@{config.revision}", "--revision")
    except ConfigError as error:
        raise ConfigError(
            f"--revision: found {config.revision!r}; expected the name of a branch; correct it"
        ) from error


# ---------------------------------------------------------------- what is pushed


@contextlib.contextmanager
def _made(config: ExportConfig, name: HubName, announce: Announce, *, keep: bool) -> Iterator[Path]:
    """Yield the folder to push: an earlier export, or one that is made in the cache.

    What is made stays there until the block ends well, unless it is to be kept.
    """
    if is_sealed(config.adapter) and not (config.adapter / CONFIG).is_file():
        _check_ready(config)
        yield config.adapter
        return
    # Imports transformers.
    from qlora_kit.data.tokens import cache_folder

    check_adapter_folder(config.adapter)
    if config.form != "adapter":
        say_if_private(stored_options(config.adapter).get("model") or "", "", announce)
    home = cache_folder() / "pushes" / f"{name.id.replace('/', '--')}--{config.form}"
    with storage_errors(home):
        home.mkdir(parents=True, exist_ok=True)
    with only_writer(home):
        clean_up(home)
        _make(config, home, announce)
        yield home / _MADE
        if not keep:
            delete_folder(home / _MADE)
            (home / _MADE_OF).unlink()


def _check_ready(config: ExportConfig) -> None:
    """Check that the folder of an earlier export is as it was written, and is asked for nothing."""
    if strays := sorted(config.model_fields_set - _FOR_READY):
        raise ConfigError(
            f"--{strays[0].replace('_', '-')}: {config.adapter} is an export that is made, and is "
            "pushed as it is; leave the option out, or export again from the adapter"
        )
    check_confined(config.adapter)
    verify_folder(config.adapter)


def _make(config: ExportConfig, home: Path, announce: Announce) -> None:
    """Export to a folder of the cache, unless an earlier try has left the same there."""
    folder, note = home / _MADE, home / _MADE_OF
    asked = _made_of(config)
    if _is_made(folder, note, asked):
        announce(Notice("what an earlier try made is pushed: adapter and options are the same"))
        return

    def hear(event: Event) -> None:
        # What can be done next is told of the repository, not of this folder.
        if not isinstance(event, Closing):
            announce(event)

    note.unlink(missing_ok=True)
    given = config.model_dump(include=config.model_fields_set - {*OF_PUSHES})
    export(ExportConfig(**{**given, "to": folder, "overwrite": folder.exists()}), hear)
    write_json(note, asked)


def _made_of(config: ExportConfig) -> dict[str, Any]:
    """Return what decides the files: the options, the adapter's files, and the kit's version."""
    from qlora_kit.export.adapter_folder import adapter_files

    options = config.model_dump(mode="json", exclude=_NOT_OF_FILES)
    hashes = {path.name: file_hash(path) for path in adapter_files(config.adapter)}
    return {"version": qlora_kit.__version__, "options": options, "sha256": hashes}


def _is_made(folder: Path, note: Path, asked: dict[str, Any]) -> bool:
    try:
        if not note.is_file() or read_json(note) != asked:
            return False
        verify_folder(folder)
    except (DataError, StorageError):
        return False
    return True


# ---------------------------------------------------------------- what is said


def _listed(
    files: Sequence[FileToPush], name: HubName, config: ExportConfig, *, dry_run: bool
) -> Facts:
    """Return what is pushed; file by file where nothing but that is asked for."""
    size = sum(file.bytes for file in files)
    private = "yes" if config.private else "as the account has it for new repositories"
    each = ((file.name, f"{file.bytes:,} bytes  {file.sha256}") for file in files)
    rows = (
        ("branch", name.revision or MAIN),
        ("private", private),
        ("files", f"{len(files)}, {size / 1e6:,.3f} MB"),
    )
    return Facts(f"to {PREFIX}{name.id}", (*rows, *(each if dry_run else ())))


def _told(files: Sequence[FileToPush], name: HubName, config: ExportConfig) -> dict[str, Any]:
    listed = [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in files]
    return {
        "repository": name.id,
        "revision": name.revision or MAIN,
        "private": config.private,
        "files": listed,
    }


def _outcome(pushed: Pushed, name: HubName) -> Facts:
    changed = f"{len(pushed.sent)} files added or changed, {len(pushed.removed)} removed"
    same = "nothing: the branch had the same files"
    return Facts(
        f"pushed to {PREFIX}{name.id}",
        (
            ("account", pushed.user),
            ("readers", "those whom its owner lets in" if pushed.is_private else "everybody"),
            ("commit", pushed.commit),
            ("sent", changed if pushed.sent or pushed.removed else same),
            ("hashes", "all files of the commit have those of this machine"),
        ),
    )


def _next(files: Sequence[FileToPush], name: HubName, pushed: Pushed) -> tuple[str, ...]:
    """Return a command that uses what was pushed, where the kit has one."""
    names = {file.name for file in files}
    if CONFIG in names:
        use = f"--adapter {name.id}@{pushed.commit}"
    elif "config.json" in names:
        use = f"--model {name.id} --revision {pushed.commit}"
    else:
        return ()
    return (f'qlora-kit generate {use} --prompt "..."',)
