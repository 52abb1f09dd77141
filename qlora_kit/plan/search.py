"""Choose the settings of a step that fit a budget and take the least time.

Takes the options of `train` and a `Budget`; returns ranked choices. Every option that the user
set stays as it is, except the micro-batch: there only the effective batch stays the same.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlora_kit.config import TrainConfig
from qlora_kit.plan.budget import Budget
from qlora_kit.plan.duration import SHARE_OF_COPIES_SEEN
from qlora_kit.plan.extrapolation import Extrapolation, Needs, Setting, extrapolate
from qlora_kit.plan.ledger import Work
from qlora_kit.plan.network import BYTES_PER_SECOND
from qlora_kit.plan.subject import Subject
from qlora_kit.report.memory import size_text
from qlora_kit.step.reducers import MLP_TILE_TOKENS

# Rates that turn work into one number where those of the device are not known, as a card of 24 GB
# reaches them in practice. They rank choices; no time is predicted from them.
_FLOP_RATE = 60e12
_MEMORY_RATE = 0.7e12
_LINK_RATE = 12e9
# An unpacked weight is written once and read once; before, its packed form is read, a quarter as
# large.
_PASSES_OVER_UNPACKED = 2.25
# More rows at a time than this gain too little to be searched for.
_MOST_ROWS = 64


@dataclass(frozen=True)
class SettingChoice:
    """A setting, and the memory and work that it would take.

    Attributes:
        setting: the setting.
        needs: needs of one micro-batch and of an evaluation, extrapolated over the layers.
        micro_batches: micro-batches of an optimiser step.
        eval_rows: rows of a batch in evaluation: as many as were asked for, or as fit.
        cost: predicted time of an optimiser step; where no rates of the device are known its work
            as one number, of which only ratios have a meaning.
    """

    setting: Setting
    needs: Needs
    micro_batches: int
    eval_rows: int
    cost: float

    def applied(self, config: TrainConfig) -> TrainConfig:
        """Return the configuration with this choice."""
        return self.setting.applied(config).model_copy(update={"eval_batch_size": self.eval_rows})

    def describe(self, layers: int) -> str:
        """Return the setting in words.

        An example: "2 × 8 rows, 12 of 30 layers keep activations, checkpoints on the host".
        """
        setting = self.setting
        parts = [f"{setting.rows} × {self.micro_batches} rows"]
        if setting.keep_layers < layers:
            parts.append(f"{setting.keep_layers} of {layers} layers keep activations")
            if setting.offload:
                parts.append("checkpoints on the host")
        else:
            parts.append("no recompute")
        if setting.unpacked_layers:
            parts.append(f"{setting.unpacked_layers} of {layers} layers stay unpacked")
        if setting.tile_tokens:
            parts.append("MLP in tiles")
        if setting.embedding_on_cpu:
            parts.append("embedding on the host")
        return ", ".join(parts)


@dataclass(frozen=True)
class SearchResult:
    """The choices that a search found.

    Attributes:
        layers: decoder layers of the model.
        fitting: the choices that fit, the choice with the least time or work first.
        least: the choice that goes least over the budget, or the first that fits.
        asked: the settings as they were asked for.
        considered: number of all choices.
    """

    layers: int
    fitting: tuple[SettingChoice, ...]
    least: SettingChoice
    asked: SettingChoice
    considered: int

    @property
    def ranked(self) -> tuple[SettingChoice, ...]:
        """The best choice of each kind; choices of one kind differ only in what layers keep."""
        best: dict[Setting, SettingChoice] = {}
        for choice in self.fitting:
            kind = replace(choice.setting, keep_layers=0, unpacked_layers=0)
            best.setdefault(kind, choice)
        return tuple(best.values())

    @property
    def ranked_by(self) -> str:
        """What the choices are ranked by: "time" or "work"."""
        return "time" if self.asked.needs.seconds else "work"

    @property
    def why(self) -> str:
        """The reason for the first choice, in words."""
        chosen, asked = self.fitting[0], self.asked
        ratio = chosen.cost / asked.cost
        return (
            f"the least {self.ranked_by} of {len(self.fitting):,} choices that fit, of "
            f"{self.considered:,}: {ratio:.2f} times that of the settings as they were, which "
            f"would need {size_text(asked.needs.peak_bytes)}"
        )

    def as_json(self, most: int) -> list[dict[str, Any]]:
        """Return the first choices for programs, at most `most`."""
        return [
            {
                **asdict(choice.setting),
                "micro_batches": choice.micro_batches,
                "eval_batch_size": choice.eval_rows,
                "peak_bytes": choice.needs.peak_bytes,
                "host_peak_bytes": choice.needs.host_peak_bytes,
                "flop": choice.micro_batches * choice.needs.work.flop,
                "crossing_bytes": choice.micro_batches * choice.needs.work.crossing_bytes,
                "received_bytes": choice.micro_batches * choice.needs.work.received_bytes,
                "ranked_by": self.ranked_by,
                "relative_cost": choice.cost / self.fitting[0].cost,
            }
            for choice in self.ranked[:most]
        ]


def search(
    subject: Subject, config: TrainConfig, budget: Budget, rows: Sequence[int] | None = None
) -> SearchResult:
    """Find the settings that fit a budget.

    Args:
        subject: the run.
        config: the configuration as it was asked for.
        budget: the memory that the run may take.
        rows: micro-batches to choose from; if None, divisors of the effective batch.
    """
    rows, tiles = rows or _micro_batches(config), _tiles(config)
    extrapolation = extrapolate(subject, config, rows, tiles)
    kinds = list(itertools.product(rows, tiles))
    on_gpu = subject.hardware.device.type != "cpu"

    def choice(setting: Setting) -> SettingChoice:
        micro_batches = _effective_batch(config) // setting.rows
        needs = extrapolation.needs(setting)
        cost = micro_batches * (needs.seconds.all if needs.seconds else _cost(needs.work))
        eval_rows = _eval_rows(extrapolation, setting, budget)
        peak = max(needs.peak_bytes, extrapolation.evaluation_bytes(eval_rows, setting))
        return SettingChoice(
            setting, replace(needs, peak_bytes=peak), micro_batches, eval_rows, cost
        )

    def over(choice: SettingChoice) -> int:
        return budget.over_bytes(choice.needs.peak_bytes, choice.needs.host_peak_bytes)

    choices = [choice(setting) for setting in _all_settings(config, extrapolation, kinds, on_gpu)]
    if subject.sharing == 1 and "unpacked_layers" not in config.model_fields_set:
        choices += [choice(setting) for setting in _unpacked(choices, extrapolation, budget)]
    fitting = [each for each in choices if not over(each)]
    return SearchResult(
        layers=extrapolation.layers,
        fitting=tuple(sorted(fitting, key=_rank)),
        least=min(choices, key=lambda each: (over(each), _rank(each))),
        asked=choice(_asked(config, extrapolation, kinds, on_gpu)),
        considered=len(choices),
    )


def _eval_rows(extrapolation: Extrapolation, setting: Setting, budget: Budget) -> int:
    fitting = [
        rows
        for rows in extrapolation.evaluations
        if not budget.over_bytes(extrapolation.evaluation_bytes(rows, setting), 0)
    ]
    return max(fitting, default=1)


def _rank(choice: SettingChoice) -> tuple[float, int, int]:
    return choice.cost, choice.micro_batches, choice.needs.peak_bytes


def _cost(work: Work) -> float:
    computing = work.flop / _FLOP_RATE
    computing += _PASSES_OVER_UNPACKED * work.unpacked_bytes / _MEMORY_RATE
    copying = work.crossing_bytes / _LINK_RATE
    receiving = work.received_bytes / BYTES_PER_SECOND
    return max(computing, copying, receiving) + SHARE_OF_COPIES_SEEN * copying


# ---------------------------------------------------------------- the settings to choose from


def _effective_batch(config: TrainConfig) -> int:
    return config.batch_size * config.gradient_accumulation_steps


def _micro_batches(config: TrainConfig) -> list[int]:
    effective = _effective_batch(config)
    rows = [rows for rows in range(1, min(effective, _MOST_ROWS) + 1) if effective % rows == 0]
    # Where the effective batch has many divisors, only those about a factor of two apart are kept.
    kept = [rows[0]]
    for each in rows[1:]:
        if each >= 2 * kept[-1] or each == config.batch_size:
            kept.append(each)
    return kept


def _tiles(config: TrainConfig) -> list[int]:
    return [0, MLP_TILE_TOKENS] if config.mlp_tile_tokens is None else [config.mlp_tile_tokens]


def _all_settings(
    config: TrainConfig, extrapolation: Extrapolation, kinds: list[tuple[int, int]], on_gpu: bool
) -> Iterator[Setting]:
    offloads = _either(config.offload_checkpoints, on_gpu)
    on_cpu = _either(config.embedding_on_cpu, extrapolation.has_embedding_on_cpu)
    for rows, tile in kinds:
        for keep_layers in _keep_choices(config, extrapolation.layers):
            for offload in offloads if keep_layers < extrapolation.layers else [False]:
                for embedding_on_cpu in on_cpu:
                    yield Setting(
                        rows, tile, offload, embedding_on_cpu, keep_layers,
                        min(config.unpacked_layers, extrapolation.layers),
                    )  # fmt: skip


def _unpacked(
    choices: Sequence[SettingChoice], extrapolation: Extrapolation, budget: Budget
) -> Iterator[Setting]:
    """Yield each setting that fits with as many layers unpacked as fit beside it.

    More of them never take longer, so fewer need not be looked at.
    """
    if not extrapolation.unpacked_layer_bytes:
        return
    counts = range(extrapolation.layers + 1)
    for choice in choices:
        needs = choice.needs

        def is_over(count: int, needs: Needs = needs) -> bool:
            peak = needs.peak_bytes + count * extrapolation.unpacked_layer_bytes
            return budget.over_bytes(peak, needs.host_peak_bytes) > 0

        most = bisect.bisect_left(counts, True, key=is_over) - 1
        if most > 0:
            yield replace(choice.setting, unpacked_layers=most)


def _either(asked: bool | None, possible: bool) -> list[bool]:
    if not possible:
        return [False]
    return [True, False] if asked is None else [asked]


def _keep_choices(config: TrainConfig, layers: int) -> list[int]:
    if not config.recompute:
        return [layers]
    if "keep_layers" in config.model_fields_set:
        return [min(config.keep_layers, layers)]
    return list(range(layers + 1))


def _asked(
    config: TrainConfig, extrapolation: Extrapolation, kinds: list[tuple[int, int]], on_gpu: bool
) -> Setting:
    """Return the setting that the options alone would give; its rows are among those of `kinds`."""
    rows = max(rows for rows, _ in kinds if rows <= max(config.batch_size, kinds[0][0]))
    tile = config.mlp_tile_tokens
    if tile is None:
        tile = MLP_TILE_TOKENS if config.recompute else 0
    keep_layers = (
        min(config.keep_layers, extrapolation.layers) if config.recompute else extrapolation.layers
    )
    offload = (
        on_gpu and keep_layers < extrapolation.layers and config.offload_checkpoints is not False
    )
    return Setting(
        rows, tile, offload, extrapolation.has_embedding_on_cpu, keep_layers,
        min(config.unpacked_layers, extrapolation.layers),
    )  # fmt: skip
