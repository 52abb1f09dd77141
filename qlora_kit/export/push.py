"""Pushes a folder to a repository of the hub, in one commit that has all of it or nothing.

Takes a folder that an export wrote; returns the commit. The weights are sent first, each under its
SHA-256, and the commit names them last. So a push that is killed leaves the branch as it was, a
second one sends only what the hub does not have yet, and nobody ever downloads half a model.
Afterwards the hashes that the hub has are compared with those of the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import HubError, OutputError, VerificationError
from qlora_kit.model.hub import MAIN, HubName, hub_errors
from qlora_kit.storage import file_hash, storage_errors

# The hub makes this file itself; it says which files are stored by their hash.
_OF_THE_HUB = ".gitattributes"
_MOST_SHOWN = 3
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileToPush:
    """A file of a push.

    Attributes:
        name: its path in the repository.
        path: its path on this machine.
        bytes: its size.
        sha256: SHA-256 of its content, by which the hub stores large files.
    """

    name: str
    path: Path
    bytes: int
    sha256: str

    @property
    def git_hash(self) -> str:
        """The hash by which git, and so the hub, stores small files."""
        digest = hashlib.sha1(f"blob {self.bytes}\0".encode(), usedforsecurity=False)
        with storage_errors(self.path), self.path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class Pushed:
    """The outcome of a push.

    Attributes:
        url: the page of the commit.
        commit: the commit that has the files.
        user: the account whose token was used.
        is_private: whether only some can read the repository.
        sent: names of the files that the commit added or changed; none where the branch had all.
        removed: names of the files that the commit removed.
    """

    url: str
    commit: str
    user: str
    is_private: bool
    sent: tuple[str, ...]
    removed: tuple[str, ...]


def files_of(folder: Path) -> tuple[FileToPush, ...]:
    """Return the files of a folder by name, hashed; hidden files are left out.

    Raises:
        StorageError: a file cannot be read.
    """
    with storage_errors(folder):
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        named = [(path.relative_to(folder), path) for path in found]
        return tuple(
            FileToPush(name.as_posix(), path, path.stat().st_size, file_hash(path))
            for name, path in named
            if not any(part.startswith(".") for part in name.parts)
        )


def user_of_token(name: HubName) -> str:
    """Return the account whose token is used, which the hub is asked for.

    Raises:
        HubError: there is no token, the hub does not accept it, or it is out of reach.
    """
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise HubError(
            f"{name.id}: no token for the hub; expected one that may write; run `hf auth login`, "
            "or set HF_TOKEN"
        )
    with hub_errors(name.id):
        user: str = huggingface_hub.HfApi().whoami()["name"]
    return user


def push_files(
    files: Sequence[FileToPush],
    name: HubName,
    *,
    user: str,
    private: bool,
    replace: bool,
    message: str,
) -> Pushed:
    """Make the repository and the branch where they are not there, and commit the files.

    Args:
        files: what the branch is to have, and nothing else.
        name: the repository and the branch.
        user: the account, see `user_of_token`.
        private: make the repository private.
        replace: replace what the branch has, where it has something else.
        message: the summary of the commit.

    Raises:
        HubError: the hub refuses, or is out of reach.
        OutputError: the branch has other content, or the repository is public and `private` asks
            for the opposite.
        VerificationError: the hub does not have what was sent.
    """
    from huggingface_hub import HfApi

    api, branch = HfApi(), name.revision or MAIN
    with hub_errors(name.id), _bars_on_terminals():
        is_private = _made(api, name.id, private)
        if branch != MAIN:
            api.create_branch(name.id, branch=branch, exist_ok=True)
        parent = api.repo_info(name.id, revision=branch).sha
        there = _tree(api, name.id, parent)
        changed = [file for file in files if not _has(there, file)]
        surplus = sorted(there.keys() - {file.name for file in files} - {_OF_THE_HUB})
        if not replace:
            _check_free(name, there, changed, surplus)
        commit, url = parent, f"{api.endpoint}/{name.id}/tree/{branch}"
        if changed or surplus:
            made = api.create_commit(
                name.id,
                _operations(changed, surplus),
                commit_message=message,
                revision=branch,
                parent_commit=parent,
            )
            commit, url = made.oid, made.commit_url
            there = _tree(api, name.id, commit)
    _check_same(name, files, there)
    sent = tuple(file.name for file in changed)
    return Pushed(url, commit, user, is_private, sent, tuple(surplus))


@contextlib.contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Leave progress bars to people: in a file they are pages of lines."""
    from huggingface_hub import constants, utils

    if sys.stderr.isatty() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _made(api: Any, repository: str, private: bool) -> bool:
    """Make a repository that is not there; return whether it is private."""
    from huggingface_hub import errors

    try:
        found = api.repo_info(repository)
    except errors.RepositoryNotFoundError:
        # Without --private it is as the account has it for new repositories.
        api.create_repo(repository, private=private or None, exist_ok=True)
        found = api.repo_info(repository)
    if private and not found.private:
        raise OutputError(
            f"{repository}: everybody can read this repository, and --private asks for the "
            "opposite; expected a private one; change it in its settings, or name another"
        )
    return bool(found.private)


def _tree(api: Any, repository: str, commit: str) -> dict[str, Any]:
    """Return the files of a commit by name."""
    entries = api.list_repo_tree(repository, recursive=True, revision=commit)
    # Folders have no blob.
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def _has(there: Mapping[str, Any], file: FileToPush) -> bool:
    found = there.get(file.name)
    if found is None or found.size != file.bytes:
        return False
    if found.lfs is not None:
        return bool(found.lfs.sha256 == file.sha256)
    return bool(found.blob_id == file.git_hash)


def _check_free(
    name: HubName, there: Mapping[str, Any], changed: Iterable[FileToPush], surplus: Sequence[str]
) -> None:
    """Check that a push would only add files."""
    others = sorted({file.name for file in changed if file.name in there} | {*surplus})
    if others:
        shown = ", ".join(others[:_MOST_SHOWN]) + (", …" if len(others) > _MOST_SHOWN else "")
        raise OutputError(
            f"{name}: has other content ({shown}); expected a new repository, or the same files; "
            "pass --overwrite to replace it in one commit, or name another, or a --revision"
        )


def _operations(changed: Iterable[FileToPush], surplus: Iterable[str]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    return [
        *(CommitOperationAdd(file.name, str(file.path)) for file in changed),
        *(CommitOperationDelete(path, is_folder=False) for path in surplus),
    ]


def _check_same(name: HubName, files: Iterable[FileToPush], there: Mapping[str, Any]) -> None:
    for file in files:
        if not _has(there, file):
            state = "other bytes" if file.name in there else "no such file"
            raise VerificationError(
                f"{name}: {file.name}: the hub has {state} after the push; expected SHA-256 "
                f"{file.sha256}; look for a .gitignore there, and push again"
            )
