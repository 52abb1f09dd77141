"""Moments of a program at which a fault happens: a call, an event, a call to the disk.

This module replaces functions of its process, so it is used only in a child that ends afterwards.
"""

from __future__ import annotations

import builtins
import importlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.events import Event, announce_to

# The functions that change a disk, at Python's lowest level. Path methods and shutil call them.
DISK_CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def at_call(target: str, nth: int, act: Callable[[], None], *, after: bool = False) -> None:
    """Call `act` right before (or after) the nth call of a function, counted from 1.

    Args:
        target: "module:name" or "module:Class.name", by which callers look the function up.
        nth: number of the call.
        act: the fault.
        after: whether to wait until the call has returned.
    """
    owner, name = _owner(target)
    real = getattr(owner, name)
    calls = 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == nth
        if now and not after:
            act()
        result = real(*args, **kwargs)
        if now and after:
            act()
        return result

    setattr(owner, name, watched)


def _owner(target: str) -> tuple[Any, str]:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def on_events(listen: Callable[[Event], None]) -> None:
    """Let `listen` hear every event of a run or an export, after the run's own listeners."""
    from qlora_kit import recipe

    for name in ("train", "export"):
        real = getattr(recipe, name)

        def heard(config: Any, announce: Any, real: Any = real) -> Any:
            return real(config, announce_to((announce, listen)))

        setattr(recipe, name, heard)


def at_event(kind: type[Event], nth: int, act: Callable[[], None]) -> None:
    """Call `act` at the nth event of a kind, counted from 1."""
    seen = 0

    def listen(event: Event) -> None:
        nonlocal seen
        if isinstance(event, kind):
            seen += 1
            if seen == nth:
                act()

    on_events(listen)


# ---------------------------------------------------------------- the disk


@dataclass(frozen=True)
class DiskCall:
    """A call that changes the disk, about to happen.

    Attributes:
        index: number of the call, counted from 0.
        name: fsync, rename, open, write, save_file, ...
        halve: does half of the call, if it is a write; else None.
    """

    index: int
    name: str
    halve: Callable[[], None] | None = None


class Disk:
    """Watches the calls that change a folder on the disk, and lets a fault happen at any.

    Args:
        folder: only calls on this folder and its content count; an fsync always counts.
        fault: receives each call before it happens; may raise an error in its place.
    """

    def __init__(self, folder: Path, fault: Callable[[DiskCall], None]) -> None:
        self._folder = str(folder)
        self._fault = fault
        self.is_on = False
        self.calls: list[str] = []
        self._install()

    def _about_to(self, name: str, halve: Callable[[], None] | None = None) -> None:
        if self.is_on:
            self.calls.append(name)
            self._fault(DiskCall(len(self.calls) - 1, name, halve))

    def _install(self) -> None:
        import safetensors.torch

        for name in DISK_CALLS:
            self._watch_os(name)
        real_open = io.open
        builtins.open = io.open = self._opening(real_open)  # type: ignore[assignment]
        real_save = safetensors.torch.save_file

        def save_file(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            def halve() -> None:
                real_save(tensors, path, *args, **kwargs)
                os.truncate(path, os.path.getsize(path) // 2)

            self._about_to("save_file", halve)
            real_save(tensors, path, *args, **kwargs)

        safetensors.torch.save_file = save_file

    def _watch_os(self, name: str) -> None:
        real = getattr(os, name)

        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "fsync" or kwargs.get("dir_fd") is not None or self._is_inside(first):
                self._about_to(name)
            return real(first, *args, **kwargs)

        setattr(os, name, call)

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+") or not self._is_inside(file):
                return real(file, mode, *args, **kwargs)
            self._about_to("open")
            return _Written(real(file, mode, *args, **kwargs), self._about_to)

        return opened

    def _is_inside(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder)


class _Written:
    """A stream whose writes are watched."""

    def __init__(self, stream: Any, about_to: Callable[..., None]) -> None:
        self._stream, self._about_to = stream, about_to

    def write(self, content: Any) -> int:
        def halve() -> None:
            self._stream.write(content[: len(content) // 2])
            self._stream.flush()

        self._about_to("write", halve)
        return self._stream.write(content)

    def __enter__(self) -> _Written:
        self._stream.__enter__()
        return self

    def __exit__(self, *error: object) -> Any:
        return self._stream.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
