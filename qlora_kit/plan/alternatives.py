"""The alternatives that would fit, for a user whose run does not: one line.

Takes a run and its budget; tries shorter rows, fewer bits and a head in fewer bits, each with
the settings that take the least memory. Returns an error, and changes nothing.
"""

from __future__ import annotations

import bisect
from dataclasses import replace
from typing import Any

from qlora_kit.config import Bits, TrainConfig
from qlora_kit.errors import ConfigError
from qlora_kit.plan.budget import Budget
from qlora_kit.plan.search import SettingChoice, search
from qlora_kit.plan.subject import RowSizes, Subject
from qlora_kit.report.memory import size_text
from qlora_kit.step.reducers import MLP_TILE_TOKENS

_SHORTEST = 128


def nothing_fits(
    config: TrainConfig, subject: Subject, budget: Budget, least: SettingChoice
) -> ConfigError:
    """Return the error that names the least memory the run needs, and what would fit instead.

    Args:
        config: the configuration as it was asked for.
        subject: the run.
        budget: the memory it may take.
        least: the choice that goes least over the budget.
    """
    taken = budget.taken_of_card(least.needs.peak_bytes)
    flag = "--vram"
    if budget.card_bytes is None or taken <= budget.card_bytes:
        flag = "--ram"
        taken = budget.taken_of_host(least.needs.host_peak_bytes, least.needs.peak_bytes)
    would = _what_would_fit(config, subject, budget)
    remedy = f"would fit: {', or '.join(would)}" if would else "choose a smaller model"
    return ConfigError(
        f"{flag}: {config.model} with {config.bits} bits and rows of {subject.rows.tokens:,} "
        f"tokens takes {size_text(taken)} at the least; expected to fit {budget.describe()}; "
        f"{remedy}"
    )


def _frugal(config: TrainConfig) -> TrainConfig:
    """Return the configuration with its open settings chosen to take the least memory."""
    changes: dict[str, Any] = {"eval_batch_size": 1}
    if config.recompute and "keep_layers" not in config.model_fields_set:
        changes["keep_layers"] = 0
    if "unpacked_layers" not in config.model_fields_set:
        changes["unpacked_layers"] = 0
    if config.recompute and config.mlp_tile_tokens is None:
        changes["mlp_tile_tokens"] = MLP_TILE_TOKENS
    return config.model_copy(update=changes)


def _what_would_fit(config: TrainConfig, subject: Subject, budget: Budget) -> list[str]:
    """Return the flags of alternatives that fit; those that keep the loss exact come first."""

    def fits(bits: Bits, head_bits: Bits, tokens: int) -> bool:
        quantization = replace(subject.spec.quantization, bits=bits)
        spec = replace(subject.spec, quantization=quantization)
        rows = subject.rows if tokens == subject.rows.tokens else RowSizes(tokens)
        changed = _frugal(config).model_copy(update={"bits": bits, "head_bits": head_bits})
        tried = replace(subject, spec=spec, rows=rows)
        return bool(search(tried, changed, budget, rows=[1]).fitting)

    tokens, bits, head_bits = subject.rows.tokens, config.bits, config.head_bits
    lengths = [tokens >> halvings for halvings in range(16) if tokens >> halvings >= _SHORTEST]
    would = []
    if bits > 4 and fits(4, head_bits, tokens):
        would.append("--bits 4")
    for fewer in sorted({head_bits, 4}, reverse=True):
        said = " --head-bits 4 (approximate)" if fewer < head_bits else ""
        # The lengths fall, so the lengths that fit come last.
        first = bisect.bisect_left(lengths, True, key=lambda length: fits(bits, fewer, length))
        if first < len(lengths):
            shorter = f"--max-length {lengths[first]}" if lengths[first] < tokens else ""
            would.append(f"{shorter}{said}".strip())
            break
    return would
