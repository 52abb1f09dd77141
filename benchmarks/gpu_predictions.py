"""Predictions for the parts of `gpu_report.py`, under the names of their figures.

Peaks are those of `qlora-kit plan`. The time of a step is a guess, written down so that it can
turn out wrong: the work of the step is counted on fake tensors, and divided by rates assumed of an
H100, with nothing overlapped.
"""

from __future__ import annotations

import copy
from typing import Any

import our_stack

# Assumed rates: of bf16 products as cuBLAS reaches them, and of the memory.
_FLOP_RATE = 650e12
_MEMORY_RATE = 2.65e12
# An unpacked weight is written once and read once.
_PASSES_OVER_UNPACKED = 2

Tree = dict[str, Any]


def predict(settings: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Tree]:
    """Return a tree of predictions; each has the same names as the figure it predicts.

    Args:
        settings: the settings of each run, by part and run.
    """
    found: dict[str, Tree] = {}
    for name, run in settings.get("peaks", {}).items():
        found.setdefault("peaks", {})[name] = _peaks(run)
    for name, run in settings.get("speed", {}).items():
        if run["side"] == "ours":
            shapes = {
                f"{rows} x {tokens}": _step(run, rows, tokens) for rows, tokens in run["shapes"]
            }
            found.setdefault("speed", {})[name] = shapes
    return found


def compared(predicted: Any, measured: Any, path: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return each predicted number with the measured one of the same name, and the difference."""
    if isinstance(predicted, dict):
        rows = []
        for name, value in predicted.items():
            if isinstance(measured, dict) and name in measured:
                rows += compared(value, measured[name], (*path, name))
        return rows
    if not isinstance(measured, int | float) or not measured:
        return []
    return [
        {
            "what": ", ".join(path),
            "predicted": predicted,
            "measured": measured,
            "difference": measured / predicted - 1,
        }
    ]


def _peaks(run: dict[str, Any]) -> Tree:
    from qlora_kit.plan.budget import CONTEXT_BYTES

    found: Tree = {} if run["scaled"] else {"context_bytes": CONTEXT_BYTES}
    for length in run["lengths"]:
        of_length = {**copy.deepcopy(run), "length": length}
        phases = our_stack.phase_peaks(of_length)
        found["load"] = {"allocated_bytes": phases["load"]}
        found[f"{length} tokens"] = {
            phase: {"allocated_bytes": phases[phase]}
            for phase in ("forward", "backward", "optimizer", "evaluation")
        }
    return found


def _step(run: dict[str, Any], rows: int, tokens: int) -> Tree:
    work = our_stack.step_work({**run, "batch_size": rows, "length": tokens})
    unpacking = _PASSES_OVER_UNPACKED * work.unpacked_bytes / _MEMORY_RATE
    return {"step_seconds": work.flop / _FLOP_RATE + unpacking}
