"""Builds a command's flags from the fields of its configuration, and the configuration from flags.

So a flag, its default and its help are declared once, with the option (`config/options.py`). Every
synonym of a field is accepted as a flag too, but `--help` shows only the field's own name.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click
from pydantic.fields import FieldInfo

from qlora_kit.config import SWITCHES, AnyConfig, Layer, Options, declared, read_config_file
from qlora_kit.errors import ConfigError
from qlora_kit.opening import options as opening

_COMMON = ("config_file", "dry_run", "json", "debug")


class _Option(click.Option):
    """An option whose synonyms are accepted, but not shown in the help."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        shown, hidden = self.opts, self.opts[1:]
        self.opts = shown[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = [*shown[:1], *hidden]


def parameters_of(config_class: type[Options], positional: str | None) -> list[click.Parameter]:
    """Return a flag for every field of a configuration, and the flags that every command takes.

    Args:
        config_class: the configuration of the command.
        positional: the field that is given as an argument instead.
    """
    found: list[click.Parameter] = []
    for name, field in config_class.model_fields.items():
        if name == positional:
            shown = name.upper() if field.is_required() else f"[{name.upper()}]"
            required = field.is_required()
            found.append(click.Argument([name], metavar=shown, type=str, required=required))
        else:
            found.append(_flag_option(name, field, declared(config_class, name)))
    return [*found, *_switches(config_class), *_common()]


def _switches(config_class: type[Options]) -> list[click.Parameter]:
    """Return peers' switches that set an option of this configuration; the help hides them."""
    fields = config_class.model_fields.keys()
    return [
        click.Option([_flag(switch)], is_flag=True, default=None, hidden=True)
        for switch, meanings in SWITCHES.items()
        if {name for name, _ in meanings.values()} <= fields
    ]


def _common() -> list[click.Parameter]:
    switches = (
        ("--dry-run", "print the resolved configuration and stop"),
        ("--json", "print JSON for programs"),
        ("--debug", "show the traceback of an error"),
    )
    return [
        click.Option(["--config", "config_file"], metavar="FILE", help="YAML file of options"),
        *(click.Option([flag], is_flag=True, help=text) for flag, text in switches),
    ]


def _flag_option(name: str, field: FieldInfo, extra: Mapping[str, Any]) -> click.Option:
    flags = [_flag(each) for each in (name, *extra["also"])]
    bare = extra["bare"]
    text = f"{field.description}{_default(field)}"
    if bool in _kinds(field.annotation):
        pairs = [f"{flag}/--no-{flag[2:]}" for flag in flags]
        return _Option([name, *pairs], default=None, help=text)
    settings: dict[str, Any] = {"default": None, "help": text, "metavar": _metavar(field)}
    settings["multiple"] = extra["repeats"]
    if bare is not None:
        kind = "N" if isinstance(bare, int) else "PATH"
        settings |= {"is_flag": False, "flag_value": str(bare), "metavar": f"[{bare}|{kind}]"}
    return _Option([name, *flags], type=str, **settings)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required() or value in (None, {}, ()):
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


def configure(config_class: type[AnyConfig], given: Mapping[str, Any]) -> AnyConfig:
    """Resolve defaults, the model's file, `--config` and flags into a configuration.

    Args:
        config_class: the configuration of the command.
        given: the values of its flags, by name.

    Raises:
        ConfigError: every fault at once.
        ModelError: `--model` names nothing.
    """
    flags = {k: v for k, v in given.items() if k not in _COMMON and v not in (None, ())}
    if isinstance(flags.get("data"), tuple):
        flags["data"] = [*flags["data"]]
    if isinstance(flags.get("adapter"), tuple):
        flags |= _adapters(flags.pop("adapter"))
    layers = [Layer("", flags)]
    if given.get("config_file"):
        layers.insert(0, read_config_file(Path(given["config_file"])))
    return opening.configure(config_class, layers)


def _adapters(given: tuple[str, ...]) -> dict[str, Any]:
    """Return the option that `--adapter FOLDER` or several `--adapter NAME=FOLDER` set."""
    named = [value.partition("=")[::2] for value in given if _has_name(value)]
    plain = [value for value in given if not _has_name(value)]
    if len(plain) > 1 or (plain and named) or len(dict(named)) < len(named):
        raise ConfigError(
            "--adapter: several adapters need a name each; give --adapter NAME=FOLDER for each"
        )
    return {"adapter": plain[0]} if plain else {"adapters": dict(named)}


def _has_name(value: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+=.+", value)) and not Path(value).exists()
