"""A small run to break: its model, its data, and the results that no fault may change.

It has 30 optimiser steps of three micro-batches, in two epochs over rows of unequal length, with
dropout, validation rows, and a checkpoint every other step, and takes some two seconds. The
learning rate is so high that the lowest validation loss comes in the middle, and the best
checkpoint must be kept.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .children import Ended, finish

TOTAL_STEPS = 30
SAVE_STEPS = 2
_ROWS = 45
_VALIDATION_ROWS = 6


@dataclass(frozen=True)
class Sample:
    """A tiny model with data, and a folder for all runs with them.

    Attributes:
        folder: the folder of model, data and runs.
        options: more options of every run.
        seconds: duration of the unbroken run.
        measures: the function that measures a batch, as `moments.at_call` names it.
    """

    folder: Path
    options: tuple[str, ...] = ()
    seconds: float = 0.0
    measures: str = "qlora_kit.tasks.causal:scores"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def validation(self) -> Path:
        return self.folder / "validation.jsonl"

    @property
    def unbroken(self) -> Path:
        """The folder of the unbroken run."""
        return self.folder / "unbroken"

    def arguments(self, output: Path, *more: object) -> list[str]:
        """Return the command line of the run; later options win over earlier ones."""
        given: dict[str, object] = {
            "--model": self.model, "--data": self.data, "--validation": self.validation,
            "--output": output, "--epochs": 2, "--gradient-accumulation-steps": 3,
            "--targets": "all-linear", "--rank": 4, "--lora-dropout": 0.2,
            "--learning-rate": 2e-2, "--scheduler": "constant", "--save-steps": SAVE_STEPS,
            "--save-total-limit": 2, "--eval-steps": 5, "--eval-batch-size": 3,
            "--samples": 1, "--device": "cpu",
        }  # fmt: skip
        if "--data" in more:
            del given["--data"]  # given twice it would name two sources
        options = [str(word) for pair in given.items() for word in pair]
        return ["train", *options, *self.options, *map(str, more)]


def make_sample(folder: Path, options: tuple[str, ...] = ()) -> Sample:
    """Make a language model and its data, and do the run once, without a fault."""
    return done_once(Sample(folder, options), save_model, _write_rows)


def done_once(
    sample: Sample, save_model: Callable[[Path], None], write_rows: Callable[[Sample], None]
) -> Sample:
    """Make the model and the data of a sample, and do its run once, without a fault.

    Args:
        sample: its folder and options.
        save_model: writes the model and its tokenizer into a folder.
        write_rows: writes the files of training and validation data.
    """
    sample.folder.mkdir(parents=True, exist_ok=True)
    save_model(sample.model)
    write_rows(sample)
    start = time.perf_counter()
    ended = kit(sample.arguments(sample.unbroken), sample.folder / "unbroken-streams")
    if ended.code:
        raise RuntimeError(f"the run without a fault failed:\n{ended.errors}")
    return replace(sample, seconds=time.perf_counter() - start)


def demo_tokenizer() -> Any:
    """Return the tokenizer that the tiny models share."""
    from transformers import AutoTokenizer

    from qlora_kit.model.names import find_model

    return AutoTokenizer.from_pretrained(find_model("demo").folder)


def save_model(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = demo_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer),
        max_position_embeddings=128, initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_rows(sample: Sample) -> None:
    from qlora_kit.data.samples import BUILT_IN

    write_lines(sample, BUILT_IN["train"].read_text(encoding="utf-8").splitlines())


def write_lines(sample: Sample, lines: Sequence[str]) -> None:
    """Write the first lines as training data, and the next as validation data."""
    held_out = lines[_ROWS : _ROWS + _VALIDATION_ROWS]
    for file, chosen in ((sample.data, lines[:_ROWS]), (sample.validation, held_out)):
        file.write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")


# ---------------------------------------------------------------- doing it


def command(arguments: Sequence[str]) -> None:
    """Do a command as a shell would; it ends in `SystemExit`."""
    # Imported here, because a child may have replaced parts of the kit.
    from qlora_kit.cli import main

    main(list(arguments))


def kit(arguments: Sequence[str], streams: Path) -> Ended:
    """Do a command in a child and wait for its end."""
    return finish(lambda: command(arguments), streams)


def copy_run(source: Path, target: Path) -> Path:
    """Copy a run folder."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


# ---------------------------------------------------------------- looking at it


def log_rows(output: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log."""
    from qlora_kit.report.log import NAME, read_log

    path = output / NAME
    return read_log(path) if path.is_file() else []


def logged_losses(output: Path) -> list[tuple[str, int, float]]:
    """Return each logged number with its kind and step, in the order of the log."""
    return [
        (kind, row["optimizer_step"], row[kind])
        for row in log_rows(output)
        for kind in ("loss", "eval_loss")
        if kind in row
    ]


def last_logged_step(output: Path) -> int:
    """Return the last step that a run said it had finished; 0 if none."""
    return max((step for kind, step, _ in logged_losses(output) if kind == "loss"), default=0)


def highest_whole(output: Path) -> tuple[int, list[str]]:
    """Return the highest step of a whole checkpoint (0 if there is none), and all faults.

    A folder with its final name must be whole at every moment.
    """
    from qlora_kit.errors import StorageError
    from qlora_kit.train.checkpoint import checkpoints, read_state, step_of

    steps, wrong = [0], []
    for folder in checkpoints(output) if output.is_dir() else ():
        try:
            read_state(folder)
            steps.append(step_of(folder))
        except StorageError as error:
            wrong.append(f"partial checkpoint: {error}")
    return max(steps), wrong


def after_a_crash(output: Path, at_least: int = 0) -> list[str]:
    """Return the faults of a run folder whose process was killed at any moment.

    Args:
        output: run folder.
        at_least: a step that is known to be saved.
    """
    from qlora_kit.storage import clean_up
    from qlora_kit.train.checkpoint import find_checkpoint

    if not output.is_dir():
        return [] if not at_least else ["the run folder is gone"]
    _, wrong = highest_whole(output)
    # Every start of a run does this first: a folder caught between two renames gets its name.
    clean_up(output)
    highest, more = highest_whole(output)
    wrong += more
    known = max(at_least, _known_saved(output))
    if highest < known:
        wrong.append(f"checkpoint lost: step {known} had been saved, {highest} is the newest")
    if not wrong:
        found = find_checkpoint(output, "latest").folder
        name = f"checkpoint-{highest}" if highest else None
        if (found.name if found else None) != name:
            wrong.append(f"resume would take {found}; expected {name}")
    return wrong


def _known_saved(output: Path) -> int:
    """Return the last step whose checkpoint must exist, because a later step was logged."""
    last = last_logged_step(output)
    return max((step for step in range(SAVE_STEPS, last, SAVE_STEPS)), default=0)


def differences(output: Path, unbroken: Path, logged_after: int = 0) -> list[str]:
    """Return how the end of a run differs from the end of the unbroken run; no bit may differ.

    Args:
        output: run folder.
        unbroken: folder of the unbroken run.
        logged_after: the step after which the log began; the run's best checkpoint may then be in
            another folder.
    """
    wrong = []
    for name in ("adapter_model.safetensors", "last", *(() if logged_after else ("best",))):
        if _bytes(output / name) != _bytes(unbroken / name):
            wrong.append(f"{name} differs")
    last = f"checkpoint-{TOTAL_STEPS}"
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "random.safetensors"):
        if _bytes(output / last / name) != _bytes(unbroken / last / name):
            wrong.append(f"{last}/{name} differs")
    if _progress(output / last) != _progress(unbroken / last):
        wrong.append(f"{last}/state.json: its progress differs")
    expected = [entry for entry in logged_losses(unbroken) if entry[1] > logged_after]
    if logged_losses(output) != expected:
        wrong.append("the logged losses differ")
    if left := sorted(path.name for path in output.glob(".*")):
        wrong.append(f"left behind: {left}")
    best = (output / "best").read_text().strip() if (output / "best").is_file() else None
    if best is not None and not logged_after and not (output / best).is_dir():
        wrong.append(f"best names {best}, which is not there")
    return wrong


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _progress(checkpoint: Path) -> Any:
    path = checkpoint / "state.json"
    return json.loads(path.read_text())["progress"] if path.is_file() else None


def resumed(sample: Sample, output: Path, streams: Path, *more: object) -> list[str]:
    """Resume a run to its end; return the differences from the unbroken run."""
    ended = kit(sample.arguments(output, "--resume", *more), streams)
    if ended.code:
        last = ended.errors.strip().splitlines()[-1:]
        return [f"resume ended with {ended.code}: {' '.join(last)}"]
    return differences(output, sample.unbroken)


def prepare(folder: Path) -> None:
    """Set this process up to fork children that train: torch loaded, one thread, no network."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_DATASETS_CACHE=str(folder / "datasets"),
        MPLBACKEND="agg",
    )
    import torch

    import qlora_kit

    # All modules are imported now: otherwise every child would spend time on importing them.
    for module in pkgutil.walk_packages(qlora_kit.__path__, "qlora_kit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("datasets", "transformers", "matplotlib.pyplot"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    transformers_logging = importlib.import_module("transformers.utils.logging")
    transformers_logging.disable_progress_bar()
    # The kit collects garbage after each load: that need not look at the modules, nor copy their
    # pages into the child.
    gc.collect()
    gc.freeze()
