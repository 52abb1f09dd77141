"""All variants of LoRA, as options of a run on the demo, for tests that hold for each of them."""

from __future__ import annotations

from collections.abc import Mapping

# What every run of a variant is given: few steps, with a checkpoint in the middle.
STEPS = ("--model", "demo", "--max-steps", "4", "--save-steps", "2", "--eval-steps", "4")

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "rslora": ("--rslora",),
    "head and embedding": ("--targets", "q_proj,lm_head,embed_tokens", "--lora-dropout", "0.1"),
    "modules-to-save": ("--modules-to-save", "embed_tokens,lm_head,norm"),
    "new-tokens": ("--new-tokens", "dollars,<think>"),
    "dora": ("--dora", "--targets", "all-linear", "--lora-dropout", "0.1"),
    "learned-scale": ("--learned-scale",),
    "freeze-a": ("--freeze-a", "--targets", "all-linear"),
    "vblora": ("--vblora",),
    "pissa": ("--init", "pissa", "--rslora"),
    "olora": ("--init", "olora", "--rank-pattern", "q_proj=24"),
    "loftq": ("--init", "loftq"),
    "eva": ("--init", "eva"),
    "lora-ga": ("--init", "lora-ga"),
    "loraplus": ("--loraplus-ratio", "16"),
    "some layers": ("--layers-to-transform", "1,2", "--exclude-modules", "k_proj"),
    "rank budget": ("--targets", "all-linear", "--rank-budget", "200"),
    "galore": ("--galore", "down_proj", "--bits", "16"),
    "merge-aware": ("--merge-aware", "--targets", "all-linear"),
    "merge-aware from eva": ("--merge-aware", "--init", "eva", "--targets", "all-linear"),
}
