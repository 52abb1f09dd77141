"""Finds a model by name, folder or hub id.

Takes the value of `--model`; returns a `ModelSource`: the place of its weights, and the numbers of
its architecture. Reads the small YAML files in `configs/`. Never imports torch, and never uses the
network.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qlora_kit.errors import ModelError
from qlora_kit.model.config_file import read_model_config

DEMO = "demo"
_PACKAGE = Path(__file__).parent.parent
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MOST_SHOWN = 200


@dataclass(frozen=True)
class ModelSource:
    """A base model, before any of its files is read.

    Attributes:
        name: the user's name for the model; a run's folder is named after it.
        hub_id: repository on the hub, or None for a local folder.
        folder: local folder of its files, or None for a hub id.
        architecture: the numbers of its config.json, where `configs/` has them.
        parameters: number of parameters, where `configs/` has it.
        settings: options whose defaults its file in `configs/` changes, with their values.
    """

    name: str
    hub_id: str | None = None
    folder: Path | None = None
    architecture: Mapping[str, Any] | None = None
    parameters: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """The name that an adapter records for its base: the hub id, `demo`, or the folder."""
        if self.name == DEMO:
            return DEMO
        return self.hub_id or str(self.folder)


def configs_folder() -> Path:
    """Return the folder `configs/`: inside an installed package, or beside it in a checkout."""
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


@functools.cache
def known_models() -> Mapping[str, ModelSource]:
    """Return the models of `configs/`, by name."""
    sources = {}
    for path in sorted(configs_folder().glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        sources[path.stem] = ModelSource(
            name=path.stem,
            hub_id=content.get("hub_id"),
            folder=_PACKAGE / content["folder"] if "folder" in content else None,
            architecture=content["architecture"],
            parameters=content["parameters"],
            settings=content["settings"] or {},
        )
    return sources


def find_model(name: str) -> ModelSource:
    """Resolve the value of `--model`: a known name, a bare config.json, a folder, a hub id.

    Raises:
        ModelError: the value is none of these, and the error gives the nearest known name; or it
            is another file; or a folder without a model.
    """
    known = known_models()
    if name in known:
        return known[name]
    # `os.path` answers where `Path` raises: for the home of an unknown user, or an overlong name.
    folder = Path(os.path.expanduser(name))
    if os.path.isfile(folder) and folder.suffix == ".json":
        return ModelSource(name=folder.stem, architecture=read_model_config(folder))
    if os.path.isfile(folder):
        raise ModelError(f"{name}: is a file; expected the folder of a model")
    if name and os.path.isdir(folder):
        if (folder / "model_index.json").is_file():
            raise ModelError(
                f"{name}: the folder of a diffusion pipeline, and diffusion models are not trained "
                "here; expected the folder of a transformers model"
            )
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: no config.json; expected the folder of a transformers model")
        return ModelSource(name=folder.resolve().name, folder=folder.resolve())
    by_hub_id = {source.hub_id: source for source in known.values() if source.hub_id}
    if name in by_hub_id:
        return by_hub_id[name]
    if _HUB_ID.fullmatch(name):
        return ModelSource(name=name.rsplit("/", 1)[1], hub_id=name)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "`qlora-kit models` lists the names"
    name = name if len(name) <= _MOST_SHOWN else f"{name[:_MOST_SHOWN]}…"
    raise ModelError(f"model {name!r}: no such name, folder or hub id (owner/name); {hint}")
