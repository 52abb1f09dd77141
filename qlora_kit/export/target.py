"""Where an export may be written: never over what it reads, and over nothing but an export.

Takes names of folders; changes nothing. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_kit.errors import OutputError
from qlora_kit.storage import MANIFEST, is_sealed


def check_target(folder: Path, sources: Sequence[Path | None], overwrite: bool) -> None:
    """Check that writing a model to `folder` deletes nothing but an earlier model.

    Args:
        folder: the folder to write.
        sources: folders that are read while it is written.
        overwrite: whether an existing folder is replaced.

    Raises:
        OutputError: the folder holds one of `sources`; it stands inside a checkpoint or a model;
            or it would be replaced, and is no model of the kit.
    """
    target = folder.resolve()
    for source in (source.resolve() for source in sources if source is not None):
        if target == source or target in source.parents:
            raise OutputError(f"{folder}: holds {source}, which is read for it; name another --to")
    for parent in target.parents:
        if is_sealed(parent):
            raise OutputError(
                f"{folder}: is inside {parent}, which was written whole and is replaced or deleted "
                "as a whole; name another --to"
            )
    if overwrite and folder.exists() and not is_sealed(folder):
        raise OutputError(
            f"{folder}: --overwrite replaces a model that the kit wrote, but this holds no "
            f"{MANIFEST}; name another --to"
        )
