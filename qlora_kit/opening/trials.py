"""The trials of a sweep: which values each has, its folder, its options, and its command line.

Takes the options of a sweep; returns its trials, or raises every fault at once. Imports no torch:
all that can be checked of a trial's options is checked here, before any trial begins.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.config import (
    SWITCHES,
    DataSource,
    Layer,
    SweepConfig,
    TrainConfig,
    declared,
    did_you_mean,
    field_names,
)
from qlora_kit.config.values import kinds_of
from qlora_kit.errors import ConfigError
from qlora_kit.opening.options import configure

MOST_TRIALS = 1000
# A range whose ends are further apart is searched by factors, not by differences.
_BY_FACTORS_FROM = 10
# Draws of a trial that may fall on one that was drawn before.
_MOST_DRAWS = 200
_RANGE = re.compile(r"\s*([^\s.]\S*?)\.\.([^\s.]\S*)\s*")
_UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]+")
_MOST_NAME = 100
# Options that are of the whole sweep, each with the reason.
_OWNED: Mapping[str, str] = {
    "output": "the sweep names the folder of each trial",
    "overwrite": "it is for the whole sweep",
    "resume": "it is for the whole sweep",
    "allow_change": "a sweep goes on as it was begun",
    "devices": "a sweep trains in one process",
    "shard_base": "a sweep trains in one process",
    "deterministic": "it holds for the whole process; pass it for the whole sweep",
    "best_metric": "the trials are ranked by it; pass it for the whole sweep",
}
# Those of them that a run of a sweep has of its own.
_OF_A_RUN = ("output", "overwrite", "resume")


@dataclass(frozen=True)
class Trial:
    """A trial of a sweep.

    Attributes:
        number: its number, from 1.
        values: the values of the options that the sweep varies, as they were written.
        name: the name of its folder.
    """

    number: int
    values: Mapping[str, Any]
    name: str

    def described(self) -> str:
        """Return its values in words: "rank=8, learning_rate=1e-4"."""
        return ", ".join(f"{key}={value}" for key, value in self.shown_values().items())

    def shown_values(self) -> dict[str, str]:
        """Return its values as texts."""
        return {key: _text(value) for key, value in self.values.items()}


@dataclass(frozen=True)
class _Range:
    """A range that an option is drawn from."""

    low: float
    high: float
    is_whole: bool

    @property
    def by_factors(self) -> bool:
        return self.low > 0 and self.high / self.low >= _BY_FACTORS_FROM

    def drawn(self, draws: random.Random) -> str:
        """Draw a value, written with three digits, so that what is written is what is used."""
        if self.by_factors:
            value = math.exp(draws.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = draws.uniform(self.low, self.high)
        if self.is_whole:
            return str(min(max(round(value), math.ceil(self.low)), math.floor(self.high)))
        return f"{min(max(float(f'{value:.3g}'), self.low), self.high):g}"

    def described(self) -> str:
        how = "by factors" if self.by_factors else "evenly"
        return f"{self.low:g} to {self.high:g}, drawn {how}"


# ---------------------------------------------------------------- which trials there are


def trials_of(config: SweepConfig) -> tuple[Trial, ...]:
    """Return the trials of a sweep, in their order, each with options that can be used.

    Raises:
        ConfigError: a key is no option, or not one that a sweep can vary; a value cannot be used,
            or stands twice; or there are no trials, or too many. The error has a line for each.
        ModelError: a model that is varied does not exist.
    """
    varied = _varied(config)
    made = _grid(config, varied) if config.search == "grid" else _drawn(config, varied)
    digits = max(2, len(str(len(made))))
    trials = []
    for number, values in enumerate(made, 1):
        told = "_".join(f"{key}={_text(value, '+')}" for key, value in values.items())
        name = f"trial-{number:0{digits}}-{_UNSAFE.sub('-', told)[:_MOST_NAME]}"
        trials.append(Trial(number, values, name))
    return tuple(trials)


def described_values(config: SweepConfig) -> dict[str, str]:
    """Return the values of each option that is varied, in words."""
    return {
        key: found.described() if isinstance(found, _Range) else "; ".join(map(_text, found))
        for key, found in _varied(config).items()
    }


def _varied(config: SweepConfig) -> dict[str, tuple[Any, ...] | _Range]:
    """Return the values of each option that is varied, or its range; by the name of its field."""
    if not config.over:
        raise ConfigError(
            "--over: missing; expected an option and its values, such as "
            "--over learning_rate=1e-4,3e-4; give one"
        )
    names, faults = field_names(TrainConfig), list[str]()
    found: dict[str, tuple[Any, ...] | _Range] = {}
    for over in config.over:
        name = names.get(over.key)
        if name is None:
            faults.append(f"--over {over.key}: {_unknown(over.key, names)}")
        elif name in _OWNED:
            faults.append(f"--over {over.key}: cannot be varied: {_OWNED[name]}; leave it out")
        elif name in found:
            faults.append(f"--over {over.key}: {name} is given twice; write all values in one")
        elif name in config.model_fields_set:
            faults.append(
                f"--over {over.key}: {name} is given for the whole sweep too; keep one of the two"
            )
        else:
            found[name] = _range(name, over.values) or over.values
            faults += _faults(config, name, found[name])
    if faults:
        raise ConfigError(*faults)
    return found


def _unknown(key: str, names: Mapping[str, str]) -> str:
    if key in SWITCHES:
        meanings = dict.fromkeys(SWITCHES[key].values())
        meant = " or ".join(f"{name}={value}" for name, value in meanings)
        return f"is a switch; expected what it stands for; write {meant}"
    return f"unknown key{did_you_mean(key, names)}"


def _range(name: str, values: Sequence[Any]) -> _Range | None:
    """Return the range that a numeric option's only value is; None where it is a value."""
    kinds = kinds_of(TrainConfig.model_fields[name].annotation)
    if len(values) != 1 or not isinstance(values[0], str) or not kinds & {int, float}:
        return None
    parts = _RANGE.fullmatch(values[0])
    try:
        return _Range(float(parts[1]), float(parts[2]), float not in kinds) if parts else None
    except ValueError:
        return None


def _faults(config: SweepConfig, name: str, found: tuple[Any, ...] | _Range) -> Iterator[str]:
    """Yield what is wrong with the values of an option."""
    if isinstance(found, _Range):
        text = f"{found.low:g}..{found.high:g}"
        if config.search == "grid":
            yield (
                f"--over {name}: {text} is a range, which has no combinations; expected values; "
                "write them between commas, or pass --search random --trials N"
            )
            return
        if not found.low < found.high < math.inf:
            yield f"--over {name}: found {text}; expected the smaller number first; correct it"
            return
        ends = [math.ceil(found.low), math.floor(found.high)]
        found = tuple(map(str, ends if found.is_whole else [found.low, found.high]))
    seen: dict[str, Any] = {}
    for value in found:
        try:
            understood = getattr(_settings(config, {name: value}), name)
        except ConfigError as error:
            yield from (fault.replace("--over: ", "--over ", 1) for fault in error.faults)
            continue
        if (key := repr(understood)) in seen:
            yield (
                f"--over {name}: {_text(seen[key])} and {_text(value)} are the same; expected each "
                "value once; leave one out"
            )
        seen[key] = value


def _grid(
    config: SweepConfig, varied: Mapping[str, tuple[Any, ...] | _Range]
) -> list[dict[str, Any]]:
    lists = {key: found for key, found in varied.items() if isinstance(found, tuple)}
    count = math.prod(map(len, lists.values()))
    if config.trials is not None:
        raise ConfigError(
            f"--trials: a grid has all of its {count:,} combinations; expected a random search; "
            "leave --trials out, or pass --search random"
        )
    if count > MOST_TRIALS:
        raise ConfigError(
            f"--over: the grid has {count:,} combinations; expected at most {MOST_TRIALS:,}; leave "
            "values out, or pass --search random --trials N"
        )
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _drawn(
    config: SweepConfig, varied: Mapping[str, tuple[Any, ...] | _Range]
) -> list[dict[str, Any]]:
    """Draw trials by the seed, none of them twice."""
    wanted = config.trials
    if wanted is None:
        raise ConfigError(
            "--trials: missing; expected the number of trials that --search random draws; give one"
        )
    count = _combinations(varied)
    if wanted > count:
        raise ConfigError(
            f"--trials {wanted}: there are {count:,} combinations; expected no more trials than "
            "these; pass fewer, or --search grid for all"
        )
    draws, found = random.Random(config.seed), dict[str, dict[str, Any]]()
    for _ in range(_MOST_DRAWS * wanted):
        values = {
            key: each.drawn(draws) if isinstance(each, _Range) else draws.choice(each)
            for key, each in varied.items()
        }
        found.setdefault(repr(values), values)
        if len(found) == wanted:
            return [*found.values()]
    raise ConfigError(
        f"--trials {wanted}: the ranges gave {len(found)} different trials in "
        f"{_MOST_DRAWS * wanted:,} draws; expected as many; pass fewer, or wider ranges"
    )


def _combinations(varied: Mapping[str, tuple[Any, ...] | _Range]) -> float:
    """Return the number of combinations; infinite where an option may be any number of a range."""
    counts = []
    for found in varied.values():
        if isinstance(found, tuple):
            counts.append(len(found))
        elif found.is_whole:
            counts.append(math.floor(found.high) - math.ceil(found.low) + 1)
        else:
            return math.inf
    return math.prod(counts)


# ---------------------------------------------------------------- the options of a trial


def settings_of(
    config: SweepConfig, trial: Trial, output: Path | None = None, *, resume: bool = False
) -> TrainConfig:
    """Return the options of a trial's run, which are those of `qlora-kit train` with its values.

    Args:
        config: the options of the sweep.
        trial: the trial.
        output: the folder of its run.
        resume: whether the run goes on from what is in the folder.

    Raises:
        ConfigError: a value cannot be used.
        ModelError: there is no such model.
    """
    own = {"output": output, "resume": "latest" if resume else None}
    return _settings(config, trial.values, {k: v for k, v in own.items() if v is not None})


def _settings(
    config: SweepConfig, values: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> TrainConfig:
    given = {
        name: getattr(config, name)
        for name in TrainConfig.model_fields
        if name in config.model_fields_set and name not in _OF_A_RUN
    }
    return configure(TrainConfig, [Layer("", given), Layer("--over", values)], **(own or {}))


def resolved_sweep(config: SweepConfig) -> dict[str, Any]:
    """Return what a sweep was given, and the command line of each of its runs by name.

    A run that a command line cannot say has its values instead.

    Raises:
        ConfigError: see `trials_of`.
    """
    folder = config.output or Path("sweeps")
    given = config.model_dump(mode="json", exclude_unset=True)
    runs = {
        trial.name: dict(trial.values)
        if only_in_files(settings_of(config, trial))
        else command_of(config, trial, folder / trial.name)
        for trial in trials_of(config)
    }
    return {**given, "runs": runs}


def command_of(config: SweepConfig, trial: Trial, output: Path) -> str:
    """Return the command line that trains alone what a trial trains.

    Args:
        config: the options of the sweep.
        trial: the trial.
        output: the folder of the new run.
    """
    # What else the model's file in configs/ changes, the command takes from there as well.
    given = (config.model_fields_set | trial.values.keys()) - set(_OF_A_RUN)
    settings = settings_of(config, trial)
    names = [name for name in TrainConfig.model_fields if name in given]
    flags = [flag for name in names for flag in _flags(name, getattr(settings, name))]
    return shlex.join(["qlora-kit", "train", *flags, "--output", str(output)])


def _flags(name: str, value: Any) -> Iterator[str]:
    flag = "--" + name.replace("_", "-")
    if value is None:
        return
    if isinstance(value, bool):
        yield flag if value else f"--no-{flag[2:]}"
    elif declared(TrainConfig, name)["repeats"] and isinstance(value, tuple):
        for each in value:
            yield from (flag, each.path if isinstance(each, DataSource) else str(each))
    elif isinstance(value, tuple | Mapping) and not value:
        return
    else:
        yield from (flag, _text(value))


def _text(value: Any, between: str = ",") -> str:
    """Return a value as a flag has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return between.join(f"{key}={_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return between.join(map(_text, value))
    return str(value).replace(",", between) if isinstance(value, str) else str(value)


def only_in_files(config: TrainConfig) -> bool:
    """Whether a command line cannot say the options: sources of data have options of their own."""
    return any(isinstance(each.model_dump(), dict) for each in config.sources)
