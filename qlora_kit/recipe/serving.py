"""Answers requests over HTTP, until it is stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import ServeConfig
from qlora_kit.errors import AdapterError, ConfigError, EnvironmentFault
from qlora_kit.events import Announce, Notice, silent
from qlora_kit.lora.files import read_base_record
from qlora_kit.model.environment import prepare_environment
from qlora_kit.opening.adapters import (
    adapter_of,
    as_trained,
    check_base,
    put_on,
    put_several_on,
)
from qlora_kit.opening.model import Opened, open_tokenizer
from qlora_kit.opening.tasks import check_generates

if TYPE_CHECKING:
    from qlora_kit.infer.serving.app import Served, ServedModel
    from qlora_kit.lora.several import AdapterSet
    from qlora_kit.model.load import Base

_EXTRA = ("starlette", "uvicorn")
_LEAST_KEY = 8
# Of a model that does not say how many tokens it has positions for.
_POSITIONS_UNSAID = 4096


def serve(config: ServeConfig, announce: Announce = silent) -> dict[str, Any]:
    """Answer requests until a signal comes, and let running answers end.

    Returns:
        What was served, for programs; a signal raises `Stopped` instead.
    """
    _check_extra()
    prepare_environment()
    config = _named(as_trained(config))
    check_base(config.model, adapter_of(config))
    api_key = _api_key(config, announce)

    from qlora_kit.infer.serving.server import listening_socket, run_until_stopped
    from qlora_kit.infer.unpacked import keep_unpacked
    from qlora_kit.model.threads import choose_threads

    with listening_socket(config.host, config.port) as listening:
        opened = _opened(config, announce)
        first = opened[next(iter(config.adapters), None)]
        base = first.load(config, announce, choose_threads(config.threads))
        on_base = _put_on(base, config, opened, announce)
        keep_unpacked(base, announce)
        served = _served(config, on_base, api_key, announce)
        served.engine.start()
        # From here on callers wait and are not refused: whoever reads that it listens may ask.
        listening.listen()
        port = listening.getsockname()[1]
        announce(Notice(f"serving {', '.join(served.models)}, {served.most_tokens} tokens each"))
        announce(Notice(f"listening on http://{_host_text(config.host)}:{port}"))
        try:
            run_until_stopped(served.app(), listening, config.timeout)
        finally:
            served.engine.stop()
    return {"models": [*served.models], "host": config.host, "port": port}


def _check_extra() -> None:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise EnvironmentFault(
            f"serve: {', '.join(missing)} not installed; expected the extra `serve`; "
            "pip install 'qlora-kit[serve]'"
        )


def _named(config: ServeConfig) -> ServeConfig:
    """Return the configuration with a name for its one adapter: that of the folder.

    Raises:
        ConfigError: an adapter is named as the base is.
    """
    base = _base_name(config.model)
    if base in config.adapters:
        raise ConfigError(
            f"--adapter {base}=…: that is the name of the base; expected another; give --adapter "
            "NAME=FOLDER with one"
        )
    if config.adapter is None:
        return config
    name = config.adapter.resolve().name
    name = f"{name}-adapter" if name == base else name
    return config.model_copy(update={"adapter": None, "adapters": {name: config.adapter}})


def _api_key(config: ServeConfig, announce: Announce) -> str | None:
    """Return the key that callers must show; None where none is asked for.

    Raises:
        ConfigError: the variable that should hold it is not set, or too short.
    """
    if config.api_key_env is None:
        from qlora_kit.infer.serving.server import is_loopback

        if not is_loopback(config.host):
            announce(
                Notice(
                    f"--host {config.host} without --api-key-env: whoever reaches this machine "
                    "may ask, and read the reports"
                )
            )
        return None
    key = os.environ.get(config.api_key_env, "")
    if len(key) < _LEAST_KEY:
        raise ConfigError(
            f"--api-key-env {config.api_key_env}: that variable is not set, or shorter than "
            f"{_LEAST_KEY} characters; expected it to hold the key; export it first"
        )
    return key


def _host_text(host: str) -> str:
    return f"[{host}]" if ":" in host else host


# ---------------------------------------------------------------- models


def _opened(config: ServeConfig, announce: Announce) -> dict[str | None, Opened]:
    """Open the base, under None, and each adapter, each with its own tokenizer and template.

    Raises:
        ConfigError: a model writes no text, or reads its source apart from what it writes.
    """
    opened: dict[str | None, Opened] = {}
    for name in (None, *config.adapters):
        folder = None if name is None else config.adapters[name]
        found = open_tokenizer(config, announce, folder, config.chat_template)
        if name is not None or not config.adapters:
            check_generates(found.task, "serve")
        if found.task.has_sources:
            raise ConfigError(
                f"serve: a model of task {found.task.name} reads a source, and writes apart from "
                "it; expected one that continues text; use `qlora-kit generate`"
            )
        opened[name] = found
    return opened


@dataclass(frozen=True)
class _OnBase:
    """A loaded base with what is on it.

    Attributes:
        base: the base.
        adapters: the adapters that rows choose of; None where there is none, or one for all.
        opened: the tokenizers of what can be asked for, by the name of the adapter.
    """

    base: Base
    adapters: AdapterSet | None
    opened: Mapping[str | None, Opened]


def _put_on(
    base: Base, config: ServeConfig, opened: Mapping[str | None, Opened], announce: Announce
) -> _OnBase:
    """Put the adapters on the base, so that each row may have another.

    An adapter that others cannot share a base with, such as one that trained whole layers, is put
    on for good, where it is the only one: then the base alone is not served.
    """
    if not config.adapters:
        return _OnBase(base, None, opened)
    try:
        return _OnBase(base, put_several_on(base, config, announce, own_templates=True), opened)
    except AdapterError as error:
        if len(config.adapters) > 1:
            raise
        (name, folder), *_ = config.adapters.items()
        alone = config.model_copy(update={"adapter": folder, "adapters": {}})
        put_on(base, alone, announce)
        announce(Notice(f"the base alone is not served: {error.faults[0].partition(';')[0]}"))
        return _OnBase(base, None, {name: opened[name]})


def _served(
    config: ServeConfig, on_base: _OnBase, api_key: str | None, announce: Announce
) -> Served:
    from qlora_kit.infer.serving.app import Served
    from qlora_kit.infer.serving.engine import Engine
    from qlora_kit.infer.serving.server import is_loopback

    first = next(iter(on_base.opened.values()))
    models = [_model(name, each, on_base, config) for name, each in on_base.opened.items()]
    return Served(
        {model.name: model for model in models},
        Engine(on_base.base, on_base.adapters, config.max_batch, config.queue, announce),
        _most_tokens(config, first),
        first.embeddings(config) or len(first.tokenizer),
        config.timeout,
        is_loopback(config.host) and api_key is None,
        api_key,
        announce,
    )


def _model(name: str | None, opened: Opened, on_base: _OnBase, config: ServeConfig) -> ServedModel:
    from qlora_kit.data.template import end_token_ids
    from qlora_kit.infer.generate import configured_ends
    from qlora_kit.infer.serving.app import ServedModel

    folder = None if name is None else config.adapters[name]
    record = None if folder is None else read_base_record(folder)
    # An adapter whose record has no template was trained on texts as they are.
    on_texts = record is not None and not record.template_hash and config.chat_template is None
    report = None if folder is None else folder / "report.html"
    return ServedModel(
        _base_name(config.model) if name is None else name,
        name if on_base.adapters is not None else None,
        opened.task.asks(opened.tokenizer, None),
        opened.tokenizer,
        frozenset(end_token_ids(opened.tokenizer, configured_ends(on_base.base))),
        opened.has_template and not on_texts,
        report if report is not None and report.is_file() else None,
    )


def _base_name(model: str) -> str:
    """Return the name of the base: of a folder its last part, else what the user calls it."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _most_tokens(config: ServeConfig, opened: Opened) -> int:
    """Return how many tokens a prompt and its answer may have together.

    Raises:
        ConfigError: more are asked for than the model has positions.
    """
    from qlora_kit.model.positions import alike_positions

    architecture = opened.spec(config).architecture()
    positions = alike_positions(architecture, opened.positions(config)) or _POSITIONS_UNSAID
    if config.max_length is not None and config.max_length > positions:
        raise ConfigError(
            f"--max-length {config.max_length}: the model answers rows of different length "
            f"together up to {positions} positions; pass --max-length {positions} or less"
        )
    return config.max_length or positions
