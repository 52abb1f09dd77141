"""Brings a model's files onto this machine.

Takes a `ModelSource`, or the name of an adapter on the hub; returns the folder of its files, and
downloads them through huggingface_hub where they are not here yet. Fetches only tensors,
configuration and tokenizer files, never code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.errors import AdapterError, HubError, InputError, ModelError
from qlora_kit.model.hub import HubName, hub_errors, network_errors
from qlora_kit.model.names import DEMO, ModelSource, known_models
from qlora_kit.storage import check_confined

_TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_ADAPTER_WEIGHTS = ["adapter_model.safetensors", "adapter_model.bin"]
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
    folder = _download(
        source.hub_id,
        revision,
        lambda: _TEXT_FILES + ([] if random else _weight_patterns(source.hub_id, revision)),
        _MODEL,
    )
    check_confined(folder, ModelError)
    # snapshot_download names the folder after the commit.
    return Fetched(folder, folder, revision=folder.name)


def fetch_adapter(name: HubName) -> Path:
    """Return the folder of an adapter of the hub; download the files if they are not here.

    The folder is the snapshot of a commit, see `config.values.pinned_name`. A commit that is here
    needs no network.

    Raises:
        HubError: the hub is out of reach and no copy is cached, or it does not grant access.
        AdapterError: the hub has no such adapter, or a link in its folder leads out of it.
    """
    folder = _download(name.id, name.revision, lambda: _TEXT_FILES + _ADAPTER_WEIGHTS, _ADAPTER)
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(
            f"{name}: no adapter_config.json there; expected the repository of a LoRA adapter; a "
            "whole model goes to --model"
        )
    check_confined(folder, AdapterError)
    return folder


@dataclass(frozen=True)
class _Kind:
    """What is fetched, for the lines of errors."""

    what: str
    fault: type[InputError]


_MODEL, _ADAPTER = _Kind("model", ModelError), _Kind("adapter", AdapterError)


def _download(
    hub_id: str, revision: str | None, patterns: Callable[[], list[str]], kind: _Kind
) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    # The cache has a file named after the revision, so the name must be safe.
    if revision is not None and not _REVISION.fullmatch(revision):
        raise kind.fault(
            f"{hub_id}: revision {revision!r}; expected a commit, branch or tag; check --revision"
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns())
        )
    except errors.GatedRepoError as error:
        raise HubError(
            f"{hub_id}: its owner grants access on request; ask for it on the {kind.what}'s page, "
            "then run `hf auth login`"
        ) from error
    except errors.HFValidationError as error:
        raise kind.fault(f"{hub_id}: not a hub id; expected owner/name; check the name") from error
    except errors.RevisionNotFoundError as error:
        where = "--revision" if kind is _MODEL else "what stands behind the @"
        raise kind.fault(f"{hub_id}: no revision {revision!r} there; check {where}") from error
    except errors.RepositoryNotFoundError as error:
        raise kind.fault(
            f"{hub_id}: the hub has no such {kind.what}, or it is private; check the name, or run "
            "`hf auth login`"
        ) from error
    except (errors.LocalEntryNotFoundError, OSError, *network_errors()) as error:
        return _cached(hub_id, revision, error, kind)


def _weight_patterns(hub_id: str | None, revision: str | None) -> list[str]:
    """Return the patterns of the weight files.

    safetensors are preferred; some repositories, DeepSeek-7B's among them, have only `.bin`.
    """
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(hub_id, revision=revision)
    names = [file.rfilename for file in info.siblings or []]
    suffix = "safetensors" if any(n.endswith(".safetensors") for n in names) else "bin"
    return [f"model*.{suffix}" if suffix == "safetensors" else "pytorch_model*.bin"]


def _cached(hub_id: str, revision: str | None, error: Exception, kind: _Kind) -> Path:
    """Return a copy that was downloaded earlier.

    Raises:
        HubError: there is none, or the hub does not accept the token.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, local_files_only=True)
        )
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
            with hub_errors(hub_id):
                raise error from None
        raise HubError(
            f"{hub_id}: the model hub is out of reach ({type(error).__name__}) and no copy is "
            f"cached; check the network, or give --{kind.what} a folder"
        ) from error
