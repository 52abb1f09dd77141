"""Fixtures that several test files use: real inputs where this machine has them, small models."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from real_models import MINILM, SMOLLM2, real_models_folder
from support import assets_folder, remembering
from tiny_models import OTHERS, save_model, tiny_numbers

from qlora_kit.model.environment import prepare_environment

# No test may use the network: a hub that answers slowly would make the suite hang.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Allocator and cuBLAS read their settings only once, so they are set before anything imports torch.
prepare_environment(deterministic=True)

# Models this small are faster on one thread: several threads wait for each other longer than they
# work, and `make test` has a process on every core.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# bitsandbytes compiles what unpacks weights of odd shapes; a compiler at work for each shape takes
# longer than all tests of them. `test_odd_shapes_are_unpacked_the_same_compiled` has it on.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """Hide what is imported from the garbage collector, also what a test before imported late.

    The kit collects after each load and each merge. With all that tests import that took 0.4 s
    every time, far longer than the load of a small model itself.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real inputs; a test that needs it is skipped without it, and says so."""
    folder = assets_folder()
    if folder is None:
        pytest.skip("real inputs not found; set QLORA_KIT_ASSETS to their folder")
    return folder


@pytest.fixture(scope="session")
def stories(assets: Path) -> Path:
    """A real pretrained Llama of 260,032 parameters, with its tokenizer."""
    return assets / "models" / "stories260K"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: a real Llama that follows instructions, with its ChatML template."""
    return _real_model(SMOLLM2)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2: a real BERT encoder."""
    return _real_model(MINILM)


def _real_model(name: str) -> Path:
    folder = real_models_folder() / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}; `make real-models` fetches it")
    return folder


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves a tiny random model of a known architecture, once."""
    saved: dict[tuple[Any, ...], Path] = {}

    def save(name: str = "tinyllama", **changes: Any) -> Path:
        key = (name, *sorted((k, repr(v)) for k, v in changes.items()))
        if key not in saved:
            numbers = {**tiny_numbers(name), **changes}
            saved[key] = save_model(tmp_path_factory.mktemp(name), numbers)
        return saved[key]

    return save


@pytest.fixture(scope="session")
def folder_of(
    save_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that saves a tiny model of any of `tiny_models.NAMES`, once."""
    saved: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in OTHERS:
            return save_tiny(name)
        if name not in saved:
            saved[name] = save_model(tmp_path_factory.mktemp(name), OTHERS[name])
        return saved[name]

    return folder


@pytest.fixture(scope="module")
def simulated_once() -> Iterator[None]:
    """Let plans simulate each step only once a process, for tests that do not test simulation."""
    from qlora_kit.plan import planning, search

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "extrapolate", remembering(search.extrapolate))
        patch.setattr(planning, "predict", remembering(planning.predict))
        yield


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the built-in data have fewer rows, for tests that do not test learning from them."""
    from qlora_kit.data.samples import BUILT_IN

    folder = tmp_path_factory.mktemp("few")
    # Enough rows for some to be held out, see `MIN_ROWS_FOR_VALIDATION`.
    with pytest.MonkeyPatch.context() as patch:
        for split, count in (("train", 240), ("test", 60)):
            lines = BUILT_IN[split].read_text(encoding="utf-8").splitlines(keepends=True)
            part = folder / BUILT_IN[split].name
            part.write_text("".join(lines[:count]), encoding="utf-8")
            patch.setitem(BUILT_IN, split, part)
        yield
