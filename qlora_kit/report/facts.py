"""The facts of a run: model, data and settings, and how the run went.

Takes the records that the stages return; returns rows of name and value, which the terminal, the
model card and the page of the run all show. Writes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qlora_kit.config import GROUPS, TrainConfig, that_decide
from qlora_kit.data.samples import is_hub_id
from qlora_kit.data.source_figures import described_sources, source_figures
from qlora_kit.report.tables import Rows

if TYPE_CHECKING:
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.lora.attach import Adapter
    from qlora_kit.step.kernels import Kernels

# Not listed as settings: these are told elsewhere, or are paths of this machine.
_NOT_TOLD = (
    "model", "data", "data_weights", "validation", "device", "threads", "chat_template",
)  # fmt: skip
_DECIDING = tuple(
    name for name in that_decide(TrainConfig, "shape", "length", *GROUPS) if name not in _NOT_TOLD
)


def speed(log_rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Return the tokens per second of a run's logged steps; evaluations do not count."""
    steps = [row for row in log_rows if "step_seconds" in row]
    seconds = sum(row["step_seconds"] for row in steps)
    if not seconds:
        return ()
    return (("speed", f"{sum(row['tokens'] for row in steps) / seconds:,.0f} tokens/s"),)


@dataclass(frozen=True)
class RunSummary:
    """The summary of a finished run.

    Attributes:
        base: hub id, known name, or folder of the base.
        facts: the facts that were known before training, see `header`.
        results: figures that were measured at the end.
        settings: every option and its value.
        changed: the settings that are not at their default.
        deciding: the settings that decide the weights.
        versions: versions of the libraries that computed the weights.
        commands: commands to type next.
        labels: names of a classifier's labels; none of other models.
        task: the task of the run.
        pad_token_id: the token that fills short rows.
        of_images: whether the model reads images.
        datasets: ids of the hub's data sets that were learnt.
        metrics: what was measured of the validation rows at the best step, by name.
    """

    base: str
    facts: Rows
    results: Rows
    settings: Rows
    changed: Rows
    deciding: Rows
    versions: Rows
    commands: tuple[str, ...]
    labels: tuple[str, ...] = ()
    task: str = "causal"
    pad_token_id: int | None = None
    of_images: bool = False
    datasets: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def base_name(self) -> str:
        """The short name of the base."""
        return base_name(self.base)

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        base: str,
        facts: Rows,
        results: Rows,
        versions: Mapping[str, str],
        commands: tuple[str, ...],
    ) -> RunSummary:
        """Sum up a run that was trained with `config`."""
        names = TrainConfig.model_fields
        deciding = [name for name in _DECIDING if getattr(config, name) not in (None, {})]
        changed = [name for name in names if getattr(config, name) != names[name].default]
        return cls(
            base=base,
            facts=facts,
            results=results,
            settings=_setting_rows(config, names),
            changed=_setting_rows(config, changed),
            deciding=_setting_rows(config, deciding),
            versions=tuple(versions.items()),
            commands=commands,
            task=config.task,
            datasets=_hub_datasets(config),
        )


def _hub_datasets(config: TrainConfig) -> tuple[str, ...]:
    """Return the ids of the data sets that came from the hub; names of files stay private."""
    named = [source.path for source in config.sources]
    on_hub = [name for name in named if is_hub_id(name) and not os.path.exists(name)]
    return tuple(name.partition(":")[0] for name in on_hub)


def base_name(base: str) -> str:
    """Return the short name of a base; a folder is called by the last part of its path."""
    return Path(base).name if Path(base).is_absolute() else base


def _setting_rows(config: TrainConfig, names: Iterable[str]) -> Rows:
    values = config.model_dump(mode="json")
    return tuple((name, setting_text(values[name])) for name in names)


def setting_text(value: Any) -> str:
    """Return the value of an option for people."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(map(setting_text, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={item}" for name, item in value.items()) or "none"
    return str(value)


class Data(Protocol):
    """The data of a run, in words: what it is, and how a stream of it is read."""

    @property
    def described(self) -> str:
        """What the data is."""
        ...

    @property
    def stream(self) -> str | None:
        """How a stream is read; None for rows that are all at hand."""
        ...


def _parts(adapter: Adapter) -> str:
    """Say how many processes hold the base together."""
    shards = adapter.base.shards
    return "" if shards is None else f"; {shards.count} hold the base together"


def _layers(adapter: Adapter) -> str:
    stacks = f"{len(adapter.stacks)} stacks of experts" if adapter.stacks else ""
    count = len(adapter.layers) + len(adapter.embeddings)
    layers = f"{count} layers" if count or not stacks else ""
    return " and ".join(part for part in (layers, stacks) if part)


def _start(adapter: Adapter) -> Rows:
    """Return what A and B started from, and what quantising loses with it and without."""
    start, init = adapter.base.spec.start, adapter.spec.variant.init
    if init == "kaiming":
        return ()
    errors = None if start is None else start.errors
    if errors is None:
        return (("start", init),)
    text = (
        f"{init}: quantising loses {errors.start:.2%} of the norm of the trained weights instead "
        f"of {errors.plain:.2%}"
    )
    if errors.peft:
        text += f"; as a rank-2R adapter on the base as it is stored it is {errors.peft:.2%} away"
    return (("start", text),)


def _experts(adapter: Adapter) -> Rows:
    """Say of a mixture whether its experts are trained, and what it would take."""
    counts = adapter.expert_counts
    if not counts:
        return ()
    frozen = len(counts) - len(adapter.stacks)
    said = f"{len(counts)} stacks of {max(counts.values())}, {frozen or 'none'} of them frozen"
    if frozen:
        said += f" (--targets experts would train {adapter.untrained_experts:,} parameters more)"
    return (("experts", f"{said}; routers are frozen"),)


def header(
    adapter: Adapter,
    learnt: Data,
    rows: Tokenized,
    held_out: Tokenized | None,
    config: TrainConfig,
    kernels: Kernels,
    packing: str,
    processes: int = 1,
) -> Rows:
    """Return the facts that are known before training: model, data, device and batch.

    Args:
        adapter: the adapter, attached to the loaded base.
        learnt: what is learnt from.
        rows: the training rows, or those of the first samples of a stream.
        held_out: the validation rows, if there are any.
        config: the options of the run.
        kernels: the kernels that serve the loaded base.
        packing: whether the samples of a step are packed, in words.
        processes: number of processes that divide the rows of a step.
    """
    base = adapter.base
    share = adapter.trainable / base.parameters
    batch = config.batch_size * config.gradient_accumulation_steps
    on_gpu = base.hardware.device.type != "cpu"
    return (
        ("model", f"{base.spec.source.identity}, {base.parameters:,} parameters"),
        ("bits", f"{base.quantization.describe()}; {base.unquantized_share:.2%} of the weights "
                 "outside embeddings and head stay unquantised"),
        ("trainable", f"{adapter.trainable:,} parameters ({share:.2%}) in {_layers(adapter)}"),
        *_experts(adapter),
        *_start(adapter),
        ("device", base.hardware.device_name),
        *((("processes", f"{processes}, which divide the rows of each step{_parts(adapter)}"),)
          if processes > 1 else ()),
        ("dtype", f"{base.hardware.dtype_name} ({base.hardware.reason})"),
        *((("kernels", kernels.described()),) if on_gpu else ()),
        ("data", learnt.described),
        *((("stream", learnt.stream),) if learnt.stream else ()),
        *described_sources(source_figures(rows, held_out)),
        ("validation", f"{len(held_out.rows):,} rows" if held_out else "none"),
        ("batch", f"{batch} rows an optimiser step ({config.batch_size} × "
                  f"{config.gradient_accumulation_steps})"),
        ("packing", packing),
    )  # fmt: skip
