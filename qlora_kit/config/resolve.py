"""From layers of values to a configuration.

A later layer wins over an earlier one:

    defaults  <  configs/NAME.yaml  <  --config FILE  <  flags

Takes layers, or reads one from a YAML file; returns a frozen configuration, or raises every fault
at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from qlora_kit.config.decisions import declared
from qlora_kit.config.options import DataSource, Options
from qlora_kit.config.values import switch
from qlora_kit.errors import ConfigError, raised_as, reason

AnyConfig = TypeVar("AnyConfig", bound=Options)

# Switches of peers: each value of a switch stands for a value of another key.
SWITCHES: dict[str, dict[bool, tuple[str, Any]]] = {
    "load_in_4bit": {True: ("bits", 4)},
    "load_in_8bit": {True: ("bits", 8)},
    "bf16": {True: ("dtype", "bfloat16")},
    "fp16": {True: ("dtype", "float16")},
    "completion_only_loss": {True: ("train_on", "completion"), False: ("train_on", "all")},
}
# Switched off, these do not say how many bits are meant: the default is 4 here and 16 with peers.
_NOT_SAID_WHAT = ("load_in_4bit", "load_in_8bit")


@dataclass(frozen=True)
class Layer:
    """Values from one place, and the name of that place in an error."""

    origin: str
    values: Mapping[str, Any]


class _AsWritten(yaml.SafeLoader):
    """YAML's safe loader, for options: a value stays the text that was written, as in a flag.

    The option's type says what the text means. YAML itself would make a date of the folder
    2024-01-01, 1.1 of the revision 1.10, false of the name no, 90 of 1:30, and text of 1e-4.

    It refuses two equal keys, of which YAML would take the last without a word. It also refuses
    aliases: options have no use for them, and a few lines of aliases of aliases become gigabytes
    when they are printed.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML declares it
        first: [(tag, form) for tag, form in known if tag == "tag:yaml.org,2002:null"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="an alias (*name)", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"{key} stands twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


def read_config_file(path: Path) -> Layer:
    """Read a YAML configuration file; its values are texts, lists, mappings and None.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping.
    """
    with raised_as(ConfigError, lambda error: _not_yaml(path, error), of=(OSError, *_OF_YAML)):
        content = yaml.load(path.read_text(encoding="utf-8"), _AsWritten)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: found a {type(content).__name__}; expected `key: value` lines")
    return Layer(str(path), {str(key).replace("-", "_"): value for key, value in content.items()})


# Errors of bytes that are no text, of values that do not fit their tag, of endless nesting.
_OF_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)


def _not_yaml(path: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{path}: {reason(error)}; expected a YAML file"
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = f"{path}:{mark.line + 1}" if mark else path
    found = f" ({problem})" if problem else ""
    return f"{place}: not valid YAML{found}; write `key: value` lines"


def resolve(config_class: type[AnyConfig], layers: Sequence[Layer]) -> AnyConfig:
    """Fill `config_class` from `layers`; a later layer wins over an earlier one.

    Raises:
        ConfigError: every fault at once, one a line: unknown keys (each with the nearest known
            key), an option given twice in a layer, and values that are not usable.
    """
    faults: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        for name, (value, origin) in _canonical(config_class, layer, faults).items():
            values[name], origins[name] = _with_sources(name, value, origin, faults), origin
    try:
        config = config_class.model_validate(values)
    except ValidationError as error:
        faults += _value_faults(error, origins)
    if faults:
        raise ConfigError(*faults)
    return config


def _canonical(
    config_class: type[Options], layer: Layer, faults: list[str]
) -> dict[str, tuple[Any, str]]:
    """Translate a layer's keys to field names; add unknown and doubled keys to `faults`."""
    names = field_names(config_class)
    found: dict[str, tuple[Any, str]] = {}
    for key, value in layer.values.items():
        origin = f"{layer.origin}: {key}" if layer.origin else _as_flag(key)
        is_on = switch(value)
        if key in SWITCHES and is_on is None:
            faults.append(f"{origin}: found {_as_yaml(value)}; expected true or false")
            continue
        if key in SWITCHES and SWITCHES[key].get(bool(is_on), ("",))[0] in names:
            name, value = SWITCHES[key][bool(is_on)]
        elif key in names:
            name = names[key]
        elif key in _NOT_SAID_WHAT and is_on is False:
            faults.append(f"{origin}: false does not say how; give bits: 4, 8 or 16 instead")
            continue
        elif key in SWITCHES and is_on is False:
            continue
        else:
            faults.append(f"{origin}: unknown key{did_you_mean(key, names)}")
            continue
        if name in found and found[name][0] != value:
            faults.append(f"{origin}: {name} is given twice; keep one of the two")
        found[name] = (value, origin)
    return found


# Stands for a source that cannot be named.
_UNNAMED = "unnamed"


def _with_sources(name: str, value: Any, origin: str, faults: list[str]) -> Any:
    """Resolve the sources of `data` that have options of their own; other values stay as they are.

    Their keys are translated, and their faults told, as those of the run are.
    """
    items = [value] if isinstance(value, Mapping) else value
    if name != "data" or not isinstance(items, list | tuple):
        return value
    before = len(faults)
    sources = [
        _source(item, f"{origin}: source {number}", faults) if isinstance(item, Mapping) else item
        for number, item in enumerate(items, 1)
    ]
    # What is wrong was told; a second fault of the same value would only repeat it.
    return sources if len(faults) == before else _UNNAMED


def _source(given: Mapping[str, Any], origin: str, faults: list[str]) -> Any:
    if "path" not in given:
        faults.append(f"{origin}: no path; expected the file, folder or hub id; give one")
        return _UNNAMED
    values = {str(key).replace("-", "_"): value for key, value in given.items()}
    try:
        return resolve(DataSource, [Layer(origin, values)]).model_dump()
    except ConfigError as error:
        faults.extend(error.faults)
        return str(given["path"])


def field_names(config_class: type[Options]) -> dict[str, str]:
    """Return the field of every accepted key of a configuration, synonyms included."""
    names = {}
    for name in config_class.model_fields:
        names.update(dict.fromkeys([name, *declared(config_class, name).get("also", ())], name))
    return names


def did_you_mean(key: str, names: Mapping[str, str]) -> str:
    """Return the end of the line on an unknown key: the nearest known key, or where they stand."""
    near = difflib.get_close_matches(key, [*names, *SWITCHES], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; see `qlora-kit train --help` for the keys"


def _value_faults(error: ValidationError, origins: Mapping[str, str]) -> list[str]:
    faults: dict[str, str] = {}
    for problem in error.errors():
        name = str(problem["loc"][0])
        origin = origins.get(name, _as_flag(name))
        if problem["type"] == "missing":
            faults[name] = f"{origin}: missing; give one"
            continue
        message = problem["msg"].replace("Input should be", "expected").replace("Value error, ", "")
        if (kind := problem["type"].partition("_")[0]) in _EXPECTED:
            message = f"expected {_EXPECTED[kind]}"
        found = _as_yaml(problem["input"])
        faults[name] = f"{origin}: found {found}; {message[0].lower()}{message[1:]}"
    return list(faults.values())


# The kinds of pydantic's type errors; its own words for them are those of Python.
_EXPECTED = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text",
    "path": "a path", "tuple": "a list", "dict": "name=value pairs",
}  # fmt: skip
_MOST_SHOWN = 80


def _as_yaml(value: Any) -> str:
    """Return a value as YAML writes it, shortened."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, dict):
        return "keys with values"
    if isinstance(value, int) and abs(value) > 10**_MOST_SHOWN:
        return "a number of very many digits"  # Python refuses to write so long a number
    is_list = isinstance(value, list | tuple)
    text = f"[{', '.join(map(_as_yaml, value))}]" if is_list else str(value) or "''"
    text = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
    return text.encode("utf-8", "backslashreplace").decode()


def _as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")
