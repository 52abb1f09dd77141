"""Build a command's flags from the fields of its configuration, and the configuration back.

So a flag, its default and its help stand in `config.py` only. Every synonym of a field is
accepted as a flag too, but only the field's own name is shown by `--help`.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
from pydantic.fields import FieldInfo

from qlora_kit import opening
from qlora_kit.config import (
    SWITCHES,
    AnyConfig,
    Layer,
    Options,
    TrainConfig,
    read_config_file,
    resolve,
)
from qlora_kit.errors import ConfigError
from qlora_kit.train.folder import stored_layer

_COMMON = ("config_file", "dry_run", "json", "debug")

Command = TypeVar("Command", bound=Callable[..., Any])


class _Option(click.Option):
    """An option whose synonyms parse but are not listed."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        shown, hidden = self.opts, self.opts[1:]
        self.opts = shown[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = [*shown[:1], *hidden]


def flags_of(
    config_class: type[Options], positional: Mapping[str, str] | None = None
) -> Callable[[Command], Command]:
    """Return a decorator that adds a flag for every field of a configuration.

    Args:
        config_class: the configuration of the command.
        positional: fields given as an argument instead, with their metavar.
    """
    positional = positional or {}

    def decorate(command: Command) -> Command:
        for switch, meanings in SWITCHES.items():
            if {name for name, _ in meanings.values()} <= config_class.model_fields.keys():
                settings: dict[str, Any] = {"is_flag": True, "default": None, "hidden": True}
                command = click.option(_flag(switch), **settings)(command)
        for name, field in reversed(config_class.model_fields.items()):
            if name in positional:
                command = click.argument(name, metavar=positional[name], type=str)(command)
            else:
                command = _option(name, field)(command)
        return command

    return decorate


def _option(name: str, field: FieldInfo) -> Callable[[Command], Command]:
    extra = field.json_schema_extra
    also = typing.cast("list[str]", extra.get("also", [])) if isinstance(extra, dict) else []
    flags = [_flag(each) for each in (name, *also)]
    text = f"{field.description}{_default(field)}"
    if bool in _kinds(field.annotation):
        pairs = [f"{flag}/--no-{flag[2:]}" for flag in flags]
        return click.option(name, *pairs, cls=_Option, default=None, help=text)
    settings: dict[str, Any] = {"default": None, "help": text, "metavar": _metavar(field)}
    if name == "adapter":
        settings["multiple"] = True
    if name == "resume":
        settings |= {"is_flag": False, "flag_value": "latest", "metavar": "[latest|PATH]"}
    return click.option(name, *flags, cls=_Option, type=str, **settings)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required() or value is None or value == {}:
        return ""
    if isinstance(value, bool):
        value = "on" if value else "off"
    if isinstance(value, tuple):
        value = ",".join(value)
    return f"  [default: {value}]"


def _metavar(field: FieldInfo) -> str:
    kinds = _kinds(field.annotation)
    choices = [value for kind in kinds for value in typing.get_args(kind)]
    if any(typing.get_origin(kind) is Literal for kind in kinds):
        return "|".join(str(value) for value in choices)
    if kinds & {int}:
        return "N"
    if kinds & {float}:
        return "X"
    return "PATH" if Path in kinds else "TEXT"


def _kinds(annotation: Any) -> set[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set(typing.get_args(annotation))
    return {annotation}


def common_flags(command: Command) -> Command:
    """Add the flags every run takes: --config, --dry-run, --json, --debug."""
    for flag, text in (
        ("--debug", "show the traceback of an error"),
        ("--json", "print JSON for programs"),
        ("--dry-run", "print the resolved configuration and stop"),
    ):
        command = click.option(flag, is_flag=True, help=text)(command)
    return click.option("--config", "config_file", metavar="FILE", help="YAML file of options")(
        command
    )


def configure(config_class: type[AnyConfig], given: Mapping[str, Any]) -> AnyConfig:
    """Resolve defaults, the model's file, `--config` and flags into a configuration.

    Raises:
        ConfigError: every fault at once.
        ModelError: `--model` names nothing.
    """
    flags = {k: v for k, v in given.items() if k not in _COMMON and v not in (None, ())}
    if isinstance(flags.get("adapter"), tuple):
        flags |= _adapters(flags.pop("adapter"))
    layers = [Layer("", flags)]
    if given.get("config_file"):
        layers.insert(0, read_config_file(Path(given["config_file"])))
    asked = resolve(config_class, layers)
    if isinstance(asked, TrainConfig) and (stored := _stored(asked)):
        layers.insert(0, stored)
    return opening.configure(config_class, layers)


def _adapters(given: tuple[str, ...]) -> dict[str, Any]:
    """Tell `--adapter FOLDER` from `--adapter NAME=FOLDER`, which may be given more than once."""
    named = [value.partition("=")[::2] for value in given if _is_named(value)]
    plain = [value for value in given if not _is_named(value)]
    if len(plain) > 1 or (plain and named) or len(dict(named)) < len(named):
        raise ConfigError(
            "--adapter: several adapters need a name each; give --adapter NAME=FOLDER for each"
        )
    return {"adapter": plain[0]} if plain else {"adapters": dict(named)}


def _is_named(value: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+=.+", value)) and not Path(value).exists()


def _stored(asked: TrainConfig) -> Layer | None:
    """Return the options of the run that `--resume` continues; they go below all others."""
    stored = stored_layer(asked.output, asked.resume)
    given = asked.model_fields_set
    if stored is not None and "epochs" in given and "max_steps" not in given:
        # A stored number of steps would silently win over the epochs that are asked for.
        return Layer(stored.origin, {**stored.values, "max_steps": None})
    return stored
