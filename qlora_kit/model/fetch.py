"""Brings a model's files onto this machine.

Takes a `ModelSource`; returns the folder of its files, and downloads them through huggingface_hub
where they are not here yet. Fetches only tensors, configuration and tokenizer files, never code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import HubError, ModelError
from qlora_kit.model.names import DEMO, ModelSource, known_models
from qlora_kit.storage import check_confined

_TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][\w./+@-]*")


@dataclass(frozen=True)
class Fetched:
    """A model's files on this machine.

    Attributes:
        folder: the folder of config.json and the weights; None where random weights need none.
        tokenizer_folder: the folder of the tokenizer.
        revision: the commit of the hub repository, or None.
    """

    folder: Path | None
    tokenizer_folder: Path
    revision: str | None = None


def fetch(source: ModelSource, *, random: bool = False, revision: str | None = None) -> Fetched:
    """Return the folders of a model's files; download the files if they are not here.

    Random weights of a known architecture need no network: the demo's tokenizer, whose 1,024
    or fewer entries fit every vocabulary, stands in for the model's own.

    Args:
        source: the model.
        random: fetch no weights.
        revision: commit, branch or tag; the newest if None.

    Raises:
        HubError: the hub is out of reach and no copy is cached, or it does not grant access.
        ModelError: the hub has no such model, or a link in its folder leads out of it.
    """
    if source.folder is not None:
        check_confined(source.folder, ModelError)
        return Fetched(source.folder, source.folder)
    if random and source.architecture is not None:
        demo = known_models()[DEMO].folder
        assert demo is not None
        return Fetched(None, demo)
    if source.hub_id is None:
        raise ModelError(
            f"{source.name}: a config.json alone has no weights; expected the folder of a model; "
            "pass --weights random, or plan with it"
        )
    folder = _download(source.hub_id, revision, with_weights=not random)
    check_confined(folder, ModelError)
    # snapshot_download names the folder after the commit.
    return Fetched(folder, folder, revision=folder.name)


def _download(hub_id: str, revision: str | None, *, with_weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    # The cache has a file named after the revision, so the name must be safe.
    if revision is not None and not _REVISION.fullmatch(revision):
        raise ModelError(
            f"{hub_id}: revision {revision!r}; expected a commit, branch or tag; check --revision"
        )
    try:
        patterns = _TEXT_FILES + (_weight_patterns(hub_id, revision) if with_weights else [])
        return Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
        )
    except errors.GatedRepoError as error:
        raise HubError(
            f"{hub_id}: its owner grants access on request; ask for it on the model's page, then "
            "run `hf auth login`"
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(f"{hub_id}: not a hub id; expected owner/name; check the name") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{hub_id}: no revision {revision!r} there; check --revision") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{hub_id}: the hub has no such model, or it is private; check the name, or run "
            "`hf auth login`"
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, *_network()) as error:
        return _cached(hub_id, revision, error)


def _weight_patterns(hub_id: str, revision: str | None) -> list[str]:
    """Return the patterns of the weight files.

    safetensors are preferred; some repositories, DeepSeek-7B's among them, have only `.bin`.
    """
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(hub_id, revision=revision)
    names = [file.rfilename for file in info.siblings or []]
    suffix = "safetensors" if any(n.endswith(".safetensors") for n in names) else "bin"
    return [f"model*.{suffix}" if suffix == "safetensors" else "pytorch_model*.bin"]


def _network() -> tuple[type[Exception], ...]:
    from huggingface_hub import errors

    found: list[type[Exception]] = [errors.OfflineModeIsEnabled]
    for package in ("httpx2", "httpx"):
        try:
            module: Any = __import__(package)
        except ImportError:
            continue
        found.append(module.HTTPError)
    return tuple(found)


def _cached(hub_id: str, revision: str | None, error: Exception) -> Path:
    """Return a copy that was downloaded earlier.

    Raises:
        HubError: there is none.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, local_files_only=True)
        )
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        raise HubError(
            f"{hub_id}: the model hub is out of reach ({type(error).__name__}) and no copy is "
            "cached; check the network, or give --model a folder"
        ) from error
