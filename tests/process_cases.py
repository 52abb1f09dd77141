"""Small runs that one process and several take; as a script, it takes all of them in a launcher.

Each process writes what it found to `FOLDER/rank-N.pt`. The folders of the models are in FOLDER.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import MIXTURES, save_model, tiny_numbers
from training import make_adapter, make_pairs, make_rows, options, weights_of
from transformers import AutoConfig, AutoModel

import qlora_kit as qk
from qlora_kit.data.batch import NamedSources, TokenRows
from qlora_kit.errors import ConfigError, QloraKitError
from qlora_kit.events import Evaluated, Event, MicroBatchHalved, StepFinished, StepSkipped
from qlora_kit.infer.evaluate import Evaluation, evaluate_parts
from qlora_kit.launched import place
from qlora_kit.model.class_head import ClassHead
from qlora_kit.parallel.one import processes_of_this_run
from qlora_kit.recipe.agreement import check_alike
from qlora_kit.signals import Stopped
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.tasks.classify import classify
from qlora_kit.tasks.preference import LOGPROBS, preference, referring
from qlora_kit.tasks.task import Task

LLAMA, BERT, MIXTURE = "llama", "bert", "mixture"
STEPS = 20
_BERT = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "vocab_size": 96, "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2,
    "pad_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip
_BAD_TOKEN = 95
_OF_PAIRS = {"batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}


def save_models(folder: Path) -> Path:
    """Save the models of the cases into a folder, and return it."""
    save_model(folder / LLAMA, tiny_numbers("tinyllama"))
    save_model(folder / MIXTURE, MIXTURES["qwen3-moe"])
    torch.manual_seed(0)
    bert = AutoModel.from_config(AutoConfig.for_model(**_BERT), dtype=torch.float32)
    bert.save_pretrained(folder / BERT)
    return folder


@dataclass(frozen=True)
class Found:
    """What a process found in a run.

    Attributes:
        losses: the loss of each step.
        weights: the trained weights at the end.
        process_tokens: tokens that each process computed.
        reason: why the run ended.
        others: what else the case looks at.
    """

    losses: list[float]
    weights: dict[str, torch.Tensor]
    process_tokens: tuple[int, ...]
    reason: str
    others: Any = None


def _run(
    adapter: qk.Adapter,
    rows: Sequence[dict[str, Any]] | TokenRows,
    task: Task = CAUSAL,
    options_of_run: dict[str, Any] | None = None,
    **more: Any,
) -> tuple[Found, list[Event]]:
    """Train; every process hears its own events, also those that do not write."""
    events: list[Event] = []
    heard = more.pop("stop_when", lambda event: False)

    def listen(event: Event) -> bool:
        events.append(event)
        return bool(heard(event))

    config = options(max_steps=STEPS, lora_dropout=0.0, **(options_of_run or {}))
    rows = rows if isinstance(rows, TokenRows) else list(rows)
    result = qk.train_adapter(adapter, rows, config, task=task, stop_when=listen, **more)
    losses = [event.loss for event in events if isinstance(event, StepFinished)]
    found = Found(losses, weights_of(adapter), result.process_tokens, result.reason)
    return found, events


def _plain(folder: Path, rows: int, dropout: float = 0.0, **changes: Any) -> Found:
    adapter = make_adapter(folder / LLAMA, dropout=dropout)
    return _run(adapter, make_rows(rows), options_of_run=changes)[0]


def uneven(folder: Path) -> Found:
    """Windows of six rows, the last of each epoch of five."""
    return _plain(folder, 23, batch_size=2, gradient_accumulation_steps=3, packing=False)


def dropout(folder: Path) -> Found:
    """Windows of four rows, the last of one: the other processes then have none."""
    return _plain(folder, 9, dropout=0.3, batch_size=4, packing=False)


def experts(folder: Path) -> Found:
    """Windows of four short rows: in a process, experts that no token chooses."""
    adapter = make_adapter(folder / MIXTURE, targets="experts")
    rows = [{**row, "input_ids": row["input_ids"][:3], "labels": row["input_ids"][:3]}
            for row in make_rows(9)]  # fmt: skip
    return _run(adapter, rows, options_of_run={"batch_size": 4, "packing": False})[0]


def packed(folder: Path) -> Found:
    return _plain(folder, 23, 0.2, batch_size=3, gradient_accumulation_steps=2, packing=True)


def weighted(folder: Path) -> Found:
    rows = [
        {**row, "loss_weights": [float(1 + row["row"] % 3)] * len(row["input_ids"])}
        for row in make_rows(10)
    ]
    adapter = make_adapter(folder / LLAMA)
    return _run(adapter, rows, options_of_run={"batch_size": 4, "packing": False})[0]


def sources(folder: Path) -> Found:
    """Rows of two sources, whose losses are told apart."""
    rows = TokenRows(make_rows(23), sources=NamedSources(("a", "b"), (9, 23)))
    changes = {"batch_size": 2, "gradient_accumulation_steps": 2, "packing": True}
    found, events = _run(make_adapter(folder / LLAMA), rows, options_of_run=changes)
    told = [event.sources for event in events if isinstance(event, StepFinished)]
    return replace(found, others=told)


def classes(folder: Path) -> Found:
    """A classifier whose labels do not count alike."""
    head = ClassHead("single", ("bad", "so-so", "good"), 0)
    where = folder / BERT
    source = qk.find_model(str(where))
    spec = qk.BaseSpec(
        source, where, qk.Quantization(4), loads="AutoModelForSequenceClassification", classes=head
    )
    base = qk.load_base(spec, qk.choose_hardware("cpu"))
    lora = qk.LoraSpec(
        rank=4, targets=("all-linear",), whole=spec.trained_whole(), task_type="SEQ_CLS"
    )
    rows = [{**row, "labels": [row["row"] % 3]} for row in make_rows(11)]
    task = classify(head, _no_samples, (3.0, 1.0, 0.5))
    changes = {"batch_size": 4, "learning_rate": 1e-3}
    return _run(qk.attach(base, lora, seed=1), rows, task, changes)[0]


def _no_samples(*_: Any) -> Any:
    raise AssertionError("the rows are made already")


def preferring(folder: Path) -> Found:
    """Pairs of answers, and a reference that the processes ask together."""
    adapter, pairs = make_adapter(folder / LLAMA, dropout=0.2), make_pairs(7)
    task = preference("dpo", 0.3)
    with adapter.disabled():
        found, _ = evaluate_parts(
            adapter.base, pairs, {}, batch_size=2, task=referring(task),
            processes=processes_of_this_run(),
        )  # fmt: skip
    both = found.details[LOGPROBS].tolist()
    rows = [{**pair, "reference": own} for pair, own in zip(pairs, both, strict=True)]
    return replace(_run(adapter, rows, task, _OF_PAIRS)[0], others=both)


def learning_text(folder: Path) -> Found:
    """Pairs whose loss is a mean over tokens and one over pairs, both of the whole step."""
    adapter = make_adapter(folder / LLAMA, dropout=0.2)
    return _run(adapter, make_pairs(7), preference("orpo", 0.3), _OF_PAIRS)[0]


def early_stop(folder: Path) -> Found:
    """The rows of the evaluation are divided; it gets worse, and all processes stop."""
    adapter, held_out = make_adapter(folder / LLAMA), make_rows(11, seed=1)
    measured: list[Evaluation] = []

    def evaluate() -> dict[str, float]:
        found, parts = evaluate_parts(
            adapter.base, held_out, {"some": [0, 3, 10]}, batch_size=2,
            processes=processes_of_this_run(),
        )  # fmt: skip
        measured.extend((found, parts["some"]))
        return {"loss": found.loss, **found.metrics}

    changes = {
        "batch_size": 4, "eval_steps": 2, "early_stopping_patience": 1,
    }  # fmt: skip
    found, events = _run(adapter, make_rows(12), options_of_run=changes, evaluate=evaluate)
    losses = [event.loss for event in events if isinstance(event, Evaluated)]
    return replace(found, others=(losses, [(e.loss, e.metrics, e.weight) for e in measured]))


def stopped_by_rule(folder: Path) -> Found:
    """Only the last process wants to stop."""

    def rule(event: Event) -> bool:
        here = place()
        is_last = here.rank == here.count - 1
        return is_last and isinstance(event, StepFinished) and event.optimizer_step == 3

    adapter = make_adapter(folder / LLAMA)
    return _run(adapter, make_rows(12), options_of_run={"batch_size": 4}, stop_when=rule)[0]


def _spoiling(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss * torch.nan if bool((targets == _BAD_TOKEN).any()) else loss


def not_finite(folder: Path) -> Found:
    """One row of each epoch gives no number: its step is skipped, and it is named."""
    rows = make_rows(16)
    for row in rows:
        row["input_ids"] = [min(token, _BAD_TOKEN - 1) for token in row["input_ids"]]
        row["labels"] = [min(token, _BAD_TOKEN - 1) for token in row["labels"]]
    rows[9]["labels"] = rows[9]["input_ids"] = [5, 6, _BAD_TOKEN]
    skipped: list[tuple[int, ...]] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepSkipped):
            skipped.append(event.rows)

    changes = {"batch_size": 1, "gradient_accumulation_steps": 4, "packing": False}
    adapter = make_adapter(folder / LLAMA)
    found, _ = _run(
        adapter, rows, options_of_run=changes, loss=_spoiling, announce=listen
    )  # fmt: skip
    return replace(found, others=skipped)


class _ShortInLast:
    """A loss for which memory runs out once, in the last process, in the midst of a step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 2 and place().rank == place().count - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return F.cross_entropy(logits, targets, reduction="sum")


def halved(folder: Path) -> Found:
    """Memory runs out in one process: all of them take the step again, in smaller parts."""
    sizes: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, MicroBatchHalved):
            sizes.append(event.rows_now)

    changes = {"batch_size": 2, "gradient_accumulation_steps": 4, "packing": False}
    adapter = make_adapter(folder / LLAMA, dropout=0.2)
    found, _ = _run(
        adapter, make_rows(16), options_of_run=changes, loss=_ShortInLast(), announce=listen
    )
    return replace(found, others=sizes)


def together(folder: Path) -> Found:
    """Every forward needs all processes, as with a base in parts: those without rows compute too.

    Nine rows make a last window of one row, and nine rows of evaluation a batch that one process
    has more.
    """
    processes = processes_of_this_run()
    adapter = make_adapter(folder / LLAMA, dropout=0.3)
    forwards: list[int] = []
    adapter.base.model.model.register_forward_hook(lambda *_: forwards.append(1))

    def evaluate() -> float:
        held_out = make_rows(9, seed=1)
        return evaluate_parts(adapter.base, held_out, {}, batch_size=2, processes=processes)[0].loss

    kind: Any = type(processes)
    kind.computes_together = True
    try:
        changes = {"batch_size": 4, "packing": False, "eval_steps": 5}
        found, _ = _run(adapter, make_rows(9), options_of_run=changes, evaluate=evaluate)
    finally:
        kind.computes_together = False
    return replace(found, others=len(forwards))


CASES: dict[str, Callable[[Path], Found]] = {
    case.__name__: case
    for case in (
        uneven, dropout, packed, weighted, sources, classes, preferring, learning_text,
        early_stop, stopped_by_rule, not_finite, halved, together, experts,
    )
}  # fmt: skip


def meetings() -> dict[str, Any]:
    """Try what the processes tell each other; return what this one saw."""
    processes = processes_of_this_run()
    rank, count = processes.rank, processes.count
    seen: dict[str, Any] = {
        "totals": processes.totals(1.0, float(rank)),
        "most": processes.most(float(rank), -float(rank)),
        "each": processes.each(lambda: f"of {rank}"),
        "from_writer": processes.from_writer(lambda: rank),
        "in_writer": processes.in_writer(lambda: rank),
    }
    seen["writer_first"] = processes.writer_first(lambda: rank)

    def fault_of(work: Callable[[], Any]) -> Any:
        try:
            work()
        except (QloraKitError, Stopped) as fault:
            return type(fault).__name__, getattr(fault, "faults", None), fault.exit_code
        return None

    def refuse() -> None:
        raise ConfigError("one", "two")

    def stop() -> None:
        if rank == count - 1:
            raise Stopped(15)

    seen["refused"] = fault_of(lambda: processes.from_writer(refuse))
    seen["stopped"] = fault_of(lambda: processes.each(stop))
    seen["unlike"] = fault_of(lambda: check_alike(lambda: {"data": rank}, processes))
    check_alike(lambda: {"data": 1}, processes)
    parameters = [torch.nn.Parameter(torch.zeros(3, 5)), torch.nn.Parameter(torch.zeros(7))]
    processes.hold_gradients(parameters)
    torch.autograd.backward((parameters[0] * (rank + 1)).sum())
    parameters[1].grad = torch.full((7,), float(rank))
    processes.sum_gradients(parameters)
    seen["gradients"] = [each.grad.clone() for each in parameters if each.grad is not None]
    seen["speaks"] = [processes.speaks(), processes.speaks()]
    # The last ends by a fault of its own: the others learn it at once, not after a timeout.
    if rank < count - 1:
        began = time.monotonic()
        seen["alone"] = fault_of(lambda: processes.most(0.0))
        seen["seconds"] = time.monotonic() - began
    processes.leave()
    return seen


def main() -> None:
    """Take all cases in this process of a launcher."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    names = sys.argv[2].split(",") if len(sys.argv) > 2 else list(CASES)
    found: dict[str, Any] = {name: vars(CASES[name](folder)) for name in names}
    found["meetings"] = meetings()
    torch.save(found, folder / f"rank-{place().rank}.pt")


if __name__ == "__main__":
    main()
