"""A classifier under the faults of every other row: its head must be lost as little as LoRA.

Its encoder has dropout of its own, so that a resume also has to bring back torch's random state.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .children import spread
from .corruption import corruption
from .disk import disk_errors, full_disks
from .kills import kills
from .loops import make_rows
from .memory import REAL_ROWS, REAL_TOKENS, Trained, in_a_merge, in_a_save, short_of_memory
from .resumes import resumes
from .runs import Sample, copy_run, demo_tokenizer, done_once, kit, write_lines
from .table import Row, row_of

_PROMISE = (
    "a classifier under kills, a failing disk, no memory and damage; a damaged head is refused"
)
_NAMES = ("amount", "count", "date", "time")
_WEIGHTS, _CONFIG, _RECORD = "adapter_model.safetensors", "adapter_config.json", "qlora_kit.json"
_REFUSED = (2, 3)


def classifier(
    sample: Sample,
    *,
    at_random: int = 20,
    in_shell: int = 4,
    stride: int = 4,
    steps: Sequence[int] = range(1, 30, 4),
    kinds: Sequence[tuple[int, int]] = ((16, 1), (8, 1), (4, 3)),
    damaged: int = 100,
    damages: int | None = None,
    errors: int = 20,
    disks: int = 6,
    shortages: int = 3,
    seed: int = 0,
) -> Row:
    """Break a small classifier in every way that a language model is broken in.

    Args:
        sample: whose folder and options are taken.
        at_random: number of kills at random times, or more.
        in_shell: number of kills that hit a process of its own.
        stride: distance between the calls of a save at which the run is killed.
        steps: at which a run is resumed.
        kinds: bits, and micro-batches a step, of the runs that are resumed.
        damaged: number of damaged checkpoints.
        damages: number of kinds of damage to a finished adapter; all if None.
        errors: number of failing calls to the disk.
        disks: number of disks that become full.
        shortages: number each of real shortages of memory, of faked ones in a save and in a merge.
        seed: of the damage.
    """
    own = _make(Sample(sample.folder / "classifier", (*_OPTIONS, *sample.options)))
    saves = ("replacing save",) if stride > 100 else ("save", "replacing save", "last save")
    parts = {
        "kills": kills(own, 5 * at_random, seed, in_shell=in_shell, stride=stride, saves=saves),
        "resumes": resumes(own, steps, kinds),
        "damaged checkpoints": corruption(own, damaged, seed),
        "damaged adapters": _damaged_adapters(own, damages),
        "errors of a disk": disk_errors(own, errors),
        "full disks": full_disks(own, disks),
        "shortages of memory": _shortages(own, shortages),
    }
    broken = [part.detail for part in parts.values() if not part.is_kept]
    detail = ", ".join(f"{part.tried} {name}" for name, part in parts.items())
    tried, held = (sum(counts) for counts in zip(*map(_counts, parts.values()), strict=True))
    return Row(_PROMISE, tried, held, "; ".join([detail, *broken]))


def _counts(row: Row) -> tuple[int, int]:
    return row.tried, row.held


# ---------------------------------------------------------------- the classifier

_OPTIONS = ("--task", "classify", "--learning-rate", "1e-2")


def _make(sample: Sample) -> Sample:
    measures = "qlora_kit.tasks.classify:ClassifyObjective.measured"
    own = Sample(sample.folder, sample.options, measures=measures)
    return done_once(own, _save_encoder, _write_labelled)


def _save_encoder(folder: Path) -> None:
    from transformers import AutoConfig, AutoModel

    tokenizer = demo_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.2,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModel.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_labelled(sample: Sample) -> None:
    """Label the built-in prompts by what their answer is."""
    from qlora_kit.data.samples import BUILT_IN

    lines = []
    for line in BUILT_IN["train"].read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        lines.append(json.dumps({"text": row["prompt"], "label": _label(row["completion"])}))
    write_lines(sample, lines)


def _label(answer: str) -> str:
    if re.search(r"\d{4}-\d\d-\d\d", answer):
        return "date"
    if ":" in answer:
        return "time"
    return "count" if " x " in answer else "amount"


# ---------------------------------------------------------------- damaged adapters

Damage = Callable[[Path], None]
_COMMANDS = ("evaluate", "generate", "export")


def _damaged_adapters(sample: Sample, count: int | None) -> Row:
    """Damage the files of a finished adapter, and let each command read it."""
    cases = [(name, asks) for name in [*_DAMAGES][:count] for asks in _COMMANDS]
    results = spread(partial(_with_damage, sample), cases, sample.folder / "adapters")
    return row_of("a damaged adapter is refused", results, "")


def _with_damage(sample: Sample, case: tuple[str, str]) -> list[str]:
    name, asks = case
    folder = sample.folder / "adapters" / f"{name}-{asks}".replace(" ", "-")
    adapter = copy_run(sample.unbroken, folder / "run")
    _DAMAGES[name](adapter)
    merged = folder / "merged"
    more = {
        "evaluate": ("--adapter", adapter, "--data", sample.validation, "--device", "cpu"),
        "generate": ("--adapter", adapter, "--prompt", "two dollars", "--device", "cpu"),
        "export": (adapter, "--to", merged, "--device", "cpu"),
    }[asks]
    ended = kit([asks, *map(str, more)], folder.with_suffix(".streams"))
    lines = [line for line in ended.errors.splitlines() if line.startswith(("error", "Traceback"))]
    wrong = []
    if ended.code not in _REFUSED or len(lines) != 1:
        wrong.append(f"{name}, {asks}: exit {ended.code}, said {lines}")
    if merged.exists():
        wrong.append(f"{name}, {asks}: left a merged model")
    shutil.rmtree(folder)
    return wrong


def _truncated(name: str) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def _changed(name: str, **values: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **values}))

    return damage


def _in_head(leaf: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    """Change a tensor of the head, or leave it out where `change` returns None."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / _WEIGHTS)
        (key,) = (key for key in tensors if key.endswith(f"classifier.{leaf}"))
        changed = change(tensors.pop(key))
        if changed is not None:
            tensors[key] = changed.contiguous()
        save_file(tensors, folder / _WEIGHTS)

    return damage


# Those that were once accepted come first: the smallest size of the table has them.
_DAMAGES: dict[str, Damage] = {
    "no head": _in_head("weight", lambda weight: None),
    "no bias of the head": _in_head("bias", lambda bias: None),
    "no labels": _changed(_RECORD, labels=None),
    "a label twice": _changed(_RECORD, labels=["amount", "date", "date", "time"]),
    "another task": _changed(_CONFIG, task_type="CAUSAL_LM"),
    "weights cut off": _truncated(_WEIGHTS),
    "a head of fewer labels": _in_head("weight", lambda weight: weight[:-1]),
    "a head of another width": _in_head("weight", lambda weight: weight[:, 1:]),
    "NaN in the head": _in_head("weight", lambda weight: weight * torch.nan),
    "infinity in the bias": _in_head("bias", lambda bias: bias / 0),
    "whole numbers in the head": _in_head("weight", lambda weight: weight.long()),
    "a record cut off": _truncated(_RECORD),
    "a label too few": _changed(_RECORD, labels=list(_NAMES[:-1])),
    "a label too many": _changed(_RECORD, labels=[*_NAMES, "other"]),
    "labels that are numbers": _changed(_RECORD, labels=[1, 2, 3, 4]),
    "an unknown kind of label": _changed(_RECORD, label_kind="several"),
    "a number of four outputs": _changed(_RECORD, label_kind="regression"),
    "another base": _changed(_RECORD, digest="0" * 64),
    "a configuration cut off": _truncated(_CONFIG),
    "a head that is not saved": _changed(_CONFIG, modules_to_save=None),
    "a head that is nowhere": _changed(_CONFIG, modules_to_save=["classifier", "reward"]),
}


# ---------------------------------------------------------------- shortages


def _shortages(sample: Sample, count: int) -> Row:
    """Let memory run out: for real while training, faked in saves and merges."""
    makers: tuple[Callable[[Sample, int], list[str]], ...] = (_for_real, in_a_save, in_a_merge)
    tasks = [partial(make, sample, number) for make in makers for number in range(count)]
    results = spread(lambda task: task(), tasks, sample.folder / "memory")
    return row_of("memory that runs out", results, "")


def _for_real(sample: Sample, number: int) -> list[str]:
    streams = sample.folder / "memory" / f"real-{number}"
    return short_of_memory(partial(_to_train, sample), number, streams)


def _to_train(sample: Sample) -> Trained:
    import qlora_kit as qk
    from qlora_kit.data.labels import Labels
    from qlora_kit.layers.quantize import Quantization
    from qlora_kit.lora.attach import attach
    from qlora_kit.lora.spec import LoraSpec
    from qlora_kit.model.hardware import Hardware
    from qlora_kit.model.load import BaseSpec, load_base
    from qlora_kit.opening.tasks import classifier as task_of

    task = task_of(Labels("single", _NAMES), 0)
    spec = BaseSpec(
        qk.find_model(str(sample.model)), sample.model, Quantization(16), False, task.loads,
        task.classes,
    )  # fmt: skip
    base = load_base(spec, Hardware(torch.device("cpu"), torch.float32, "CPU"))
    lora = LoraSpec(
        rank=4, targets=("all-linear",), task_type=task.peft_type, whole=spec.trained_whole()
    )
    rows = make_rows(REAL_ROWS, REAL_TOKENS)
    labelled = [{**row, "labels": [row["row"] % len(_NAMES)]} for row in rows]
    return attach(base, lora, seed=1), labelled, task
