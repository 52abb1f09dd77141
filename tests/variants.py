"""All variants of LoRA, as options of a run on the demo, for tests that hold for each of them."""

from __future__ import annotations

from collections.abc import Mapping

# What every run of a variant is given: few steps, with a checkpoint in the middle.
STEPS = ("--model", "demo", "--max-steps", "4", "--save-steps", "2", "--eval-steps", "4")

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "rslora": ("--rslora",),
}
