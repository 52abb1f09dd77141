"""Run every phase of training, and the merge, on fake tensors; return the peak of each.

Takes a base that need not exist on this machine, and a configuration; returns a `Prediction`. It
runs the code that trains: loading, the step, evaluation, saving, merging. This module only calls
that code, and computes nothing of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.config import ExportConfig, StepOptions, TrainConfig
from qlora_kit.export.merge import merged_tensors
from qlora_kit.layers.draws import Draws, drawn_from
from qlora_kit.layers.kernels import in_use, use
from qlora_kit.layers.projections import (
    by_lora_path,
    carriers,
    projected_weights,
    projections,
)
from qlora_kit.layers.purpose import EXPERTS
from qlora_kit.layers.quantize import Quantization, empty_4bit
from qlora_kit.layers.weight import FrozenWeight, Int8Weight
from qlora_kit.lora.attach import attach
from qlora_kit.lora.starts.check import OF_ROWS, OF_WEIGHTS, check_start
from qlora_kit.lora.starts.loading import FreshStart
from qlora_kit.lora.stored import StoredAdapter
from qlora_kit.lora.targets import targeted_paths
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.images import layer_count
from qlora_kit.model.load import (
    Base,
    BaseSpec,
    Placement,
    fill,
    freeze,
    head_quantization,
    is_tied,
    names_on_host,
    start_frozen,
)
from qlora_kit.model.start import Pair, Start
from qlora_kit.plan.attention import planned_attention
from qlora_kit.plan.duration import StepWork
from qlora_kit.plan.gathers import Gathers, PlannedShards
from qlora_kit.plan.ledger import Ledger, Peak, Work
from qlora_kit.plan.network import reduced_bytes
from qlora_kit.plan.subject import RowSizes, Subject, UsualRows
from qlora_kit.plan.temporaries import workspace_bytes
from qlora_kit.plan.watch import (
    claim_merged,
    claim_model,
    claim_trained,
    purpose_of_part,
    watched,
)
from qlora_kit.private_torch import FakeTensorMode
from qlora_kit.private_transformers import masks_as_in_a_run
from qlora_kit.step.settle import settle
from qlora_kit.tasks.task import Batch, Objective, drawn_rows
from qlora_kit.tasks.tokens import packing, weighted
from qlora_kit.train.first_rows import pairs_of_gradients, pairs_of_inputs
from qlora_kit.train.groups import parameter_groups
from qlora_kit.train.optimizer import build_optimizer, make_state, optimizer_tensors
from qlora_kit.train.windows import steps_an_epoch

Stream = Iterator[tuple[str, FrozenWeight | Tensor]]

_EVALUATED_LAYERS = 2
# In the order of a run; the simulation itself gives the optimiser its state first.
PHASES = ("load", "forward", "backward", "optimizer", "evaluation", "save", "merge")
_SHARD_BYTES: int = ExportConfig.model_fields["max_shard_size"].default


@dataclass(frozen=True)
class BatchShape:
    """The sizes that decide the memory of a batch.

    Attributes:
        rows: rows that go through the model at one time.
        tokens: tokens of the longest row; of its source, where rows have sources.
        weight: targets of the whole batch; if None, every token but the first of each row.
        answer_tokens: tokens of the longest target, where rows have sources.
    """

    rows: int
    tokens: int
    weight: int | None = None
    answer_tokens: int | None = None

    def stand_in(self, objective: Objective) -> Batch:
        """Return a batch without data of these sizes."""
        return objective.stand_in(self.rows, self.tokens, self.weight, self.answer_tokens)


@dataclass(frozen=True)
class Prediction:
    """The memory that a run will need, and the work of its steps.

    Attributes:
        device: the peak of each phase on the device, by phase.
        host: the peak of each phase on the host, without the process itself, by phase.
        evaluation_rows: rows of a batch in evaluation.
        step: the work of an optimiser step on rows of the mean length.
        trainable: number of trained parameters.
    """

    device: dict[str, Peak]
    host: dict[str, Peak]
    evaluation_rows: int
    step: StepWork
    trainable: int = 0

    @property
    def peak(self) -> Peak:
        """The largest peak of training on the device."""
        return _largest(self.device)

    @property
    def peak_phase(self) -> str:
        """The phase of training with the largest peak on the device."""
        return next(name for name, peak in self.device.items() if peak == self.peak)

    @property
    def host_peak(self) -> Peak:
        """The largest peak of training on the host."""
        return _largest(self.host)


def _largest(phases: dict[str, Peak]) -> Peak:
    # The merge does not count: it is another command, in a process of its own.
    return max((p for name, p in phases.items() if name != "merge"), key=lambda p: p.bytes)


class _Planned(Quantization):
    """A quantisation whose packed tensors have the right sizes and no values."""

    def freeze(self, weight: Tensor) -> FrozenWeight:
        """Return an empty weight of the size that quantising would leave."""
        if self.bits == 16:
            return super().freeze(weight)
        shape = (weight.shape[0], weight.shape[1])
        if self.bits == 8:
            wide = weight.to(torch.float16)
            codes = torch.empty(shape, dtype=torch.int8, device=wide.device)
            return Int8Weight(codes, torch.empty(shape[0], device=wide.device))
        return empty_4bit(shape, self, weight.device)


def predict(subject: Subject, config: TrainConfig) -> Prediction:
    """Predict the memory and the work of a run with exactly these settings.

    Args:
        subject: the run.
        config: the settings of the run: of its steps, optimiser and evaluation.
    """
    rows, architecture = subject.rows, subject.spec.architecture()
    supervised = rows.supervised_of(config.batch_size)
    largest = BatchShape(config.batch_size, rows.tokens, supervised, rows.answer_tokens)
    usual = _usual_batch(rows.usual, config) if rows.usual else largest
    with simulated_run(subject, config, subject.spec.skeleton()) as run:
        run.step(config, usual)
        work = run.work
        if usual != largest:
            run.step(config, largest)
        run.hold()
        run.save()
    evaluated = BatchShape(
        config.eval_batch_size,
        rows.evaluation_tokens or rows.tokens,
        answer_tokens=rows.evaluation_answer_tokens or rows.answer_tokens,
    )
    short = subject.spec.skeleton(_EVALUATED_LAYERS)
    with simulated_run(subject, config, short) as shorter:
        evaluation_rows = run.evaluate_within_step(config, evaluated, shorter)
    # The skeleton is built outside of the simulation: its placeholders take no memory.
    layers = layer_count(architecture)
    merged = min(layers, _layers_of_a_shard(subject.spec) + 1)
    skeleton = subject.spec.skeleton(merged)
    short = subject.shortened_to(skeleton)
    with _simulation(subject.hardware) as ledger:
        _simulate_merge(ledger, skeleton, short, run, layers / merged)
    device = {phase: run.device[phase] for phase in PHASES}
    return Prediction(
        device,
        {phase: run.host[phase] for phase in PHASES},
        evaluation_rows,
        replace(
            _step_work(rows, config, work, run.update_work),
            reduced_bytes=reduced_bytes(run.trainable, subject.devices),
        ),
        run.trainable,
    )


def _usual_batch(usual: UsualRows, config: TrainConfig) -> BatchShape:
    """Return the sizes of the mean micro-batch of a run."""
    rows = min(round(usual.at_once or config.batch_size), usual.rows)
    answer = None if usual.answer_width is None else max(1, round(usual.answer_width))
    supervised = max(1, round(rows * usual.supervised))
    return BatchShape(rows, max(2, round(usual.width)), supervised, answer)


def _step_work(rows: RowSizes, config: TrainConfig, one: Work, update: Work) -> StepWork:
    """Return the work of a mean optimiser step, from that of a mean micro-batch."""
    if rows.usual is None:
        asked = config.gradient_accumulation_steps
        tokens = rows.tokens + (rows.answer_tokens or 0)
        return StepWork(one, update, asked, config.batch_size * asked * tokens)
    steps = steps_an_epoch(rows.usual.rows, config)
    at_once = rows.usual.at_once or config.batch_size
    micro_batches = math.ceil(rows.usual.rows / at_once) / steps
    return StepWork(one, update, micro_batches, rows.usual.rows * rows.usual.tokens / steps)


@contextlib.contextmanager
def simulated_run(
    subject: Subject, config: TrainConfig, skeleton: PreTrainedModel
) -> Iterator[SimulatedRun]:
    """Load a base, attach an adapter and take its first optimiser step, all of it simulated.

    Args:
        subject: the run.
        config: the settings that the run starts with.
        skeleton: the skeleton of the base, or of the same base with fewer layers.
    """
    subject = subject.shortened_to(skeleton)
    _ = subject.stored_dtype  # opens files, which a simulation cannot
    with _simulation(subject.hardware) as ledger:
        run = SimulatedRun(ledger, subject, config, skeleton)
        run.load()
        run.attach()
        yield run


@contextlib.contextmanager
def _simulation(hardware: Hardware) -> Iterator[Ledger]:
    device = hardware.device.type
    ledger = Ledger(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(masks_as_in_a_run())
        stack.callback(use, in_use())
        if device == "meta":
            stack.enter_context(planned_attention(ledger))
        stack.enter_context(ledger)
        yield ledger


class SimulatedRun:
    """One simulated run: its phases in their order.

    Attributes:
        device: the peak of each phase so far, on the device.
        host: the peak of each phase so far, on the host.
        work: the work of the last micro-batch.
        update_work: the work of clipping and of the optimiser.
    """

    def __init__(
        self,
        ledger: Ledger,
        subject: Subject,
        config: TrainConfig,
        skeleton: PreTrainedModel,
    ) -> None:
        self.ledger, self.subject, self.config = ledger, subject, config
        self.hardware = subject.hardware
        self.model = skeleton
        self.device: dict[str, Peak] = {}
        self.host: dict[str, Peak] = {}
        self.work = Work()
        self.kept_gradients: list[Tensor] = []

    @contextlib.contextmanager
    def phase(self, name: str, ledger: Ledger | None = None) -> Iterator[None]:
        """Note the peaks of the block under this name."""
        ledger = ledger or self.ledger
        ledger.restart()
        yield
        self.device[name] = ledger.peak("device")
        self.host[name] = ledger.peak("host")

    # ------------------------------------------------------------ before training

    @torch.no_grad()
    def load(self) -> None:
        """Load the base as training does, from tensors without content."""
        placement = Placement.of(self.config).resolved(
            self.hardware.device, tied=is_tied(self.model)
        )
        start = self._start()
        spec = replace(self.subject.spec, start=start)
        quantization = _planned(spec.quantization)
        shards = PlannedShards(self.subject.sharing) if self.subject.sharing > 1 else None
        on_host = names_on_host(self.model, placement, shards)
        head = head_quantization(spec, placement)
        stream = _empty_tensors(
            self.model,
            self.subject.stored_dtype,
            quantization,
            self.hardware,
            on_host,
            are_drawn=spec.random,
            start=start,
        )
        planned_head = head and _planned(head)
        with self.phase("load"):
            fill(self.model, self._claimed(stream), self.hardware, planned_head, shards)
        # A layer that packs its merged weight packs it without values as well.
        spec = replace(spec, quantization=quantization)
        self.base = Base(self.model, spec, self.hardware, "", 0, 0.0, placement, shards=shards)
        self.gathers = Gathers(self.model, shards) if shards else None
        claim_model(self.ledger, self.model)
        workspace = workspace_bytes(self.hardware.device.type)
        self.workspace = torch.empty(workspace, dtype=torch.uint8, device=self.hardware.device)
        self.ledger.claim(self.workspace, "workspace")

    def _start(self) -> FreshStart | None:
        """Return the start that is computed of the weights as they are loaded, if there is one."""
        lora, bits = self.subject.lora, self.subject.spec.quantization.bits
        check_start(lora, self.subject.spec, self.model)
        if lora.variant.init not in OF_WEIGHTS and not lora.variant.changes_base:
            return None
        paths = targeted_paths(self.model, lora)
        given = self._of_gradients(paths) if lora.variant.init in OF_ROWS else None
        return FreshStart(lora, paths, bits=bits, seed=self.config.seed, given=given)

    def _of_gradients(self, paths: Sequence[str]) -> dict[str, Pair]:
        """Return A and B without content, as a start of gradients has them in host memory."""
        found, rank_of = projections(self.model), self.subject.lora.rank_of
        return {
            path: (
                torch.empty(rank_of(path), found[path].in_features, device="cpu"),
                torch.empty(found[path].out_features, rank_of(path), device="cpu"),
            )
            for path in paths
        }

    def _claimed(self, stream: Stream) -> Stream:
        """Tell the ledger the purpose of each tensor as soon as it is there."""
        found = projections(self.model).values()
        experts = {each.weight_name for each in found if each.is_expert}
        for name, value in stream:
            for part, tensor in _stored_parts(value):
                purpose = EXPERTS if name in experts else purpose_of_part(part)
                self.ledger.claim(tensor, purpose)
            yield name, value

    def attach(self) -> None:
        """Attach the adapter and let the optimiser make the state that every later step finds."""
        lora = self.subject.lora
        if lora.variant.init in OF_ROWS:
            self._ask_first_rows()
        adapter = attach(self.base, lora, self.config.seed)
        claim_merged(self.ledger, self.model)
        self.parameters = adapter.parameters()
        self.optimizer = build_optimizer(parameter_groups(adapter, self.config), self.config)
        self._give_gradients()
        with self.phase("optimizer"), watched(self.ledger, self.optimizer):
            limit = self.config.max_grad_norm or 1.0
            with self.ledger.purpose("optimizer"):
                make_state(self.optimizer)
            with self.ledger.counted() as self.update_work:
                with self.ledger.purpose("optimizer"):
                    torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit)
                self.optimizer.step()
                adapter.renew()
        self.optimizer.zero_grad(set_to_none=True)

    def _ask_first_rows(self) -> None:
        """Run what a start asks of the first rows; its peak counts as one of loading."""
        config, rows = self.config, self.subject.rows
        objective = self._objective(config)
        supervised = rows.supervised_of(config.batch_size)
        batch = BatchShape(config.batch_size, rows.tokens, supervised, rows.answer_tokens)
        shown, lora = batch.stand_in(objective), self.subject.lora
        base = replace(self.base, spec=replace(self.subject.spec, start=None))
        before = self.device["load"], self.host["load"]
        with self.phase("load"), self.ledger.purpose("LoRA"):
            if lora.variant.changes_base:
                pairs_of_gradients(base, lora, objective, [shown], config, config.seed)
            else:
                pairs_of_inputs(base, lora, objective, iter([shown]), config.seed)
        self.device["load"] = max(before[0], self.device["load"], key=lambda peak: peak.bytes)
        self.host["load"] = max(before[1], self.host["load"], key=lambda peak: peak.bytes)

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def _give_gradients(self) -> None:
        made = self.kept_gradients or [torch.empty_like(p) for p in self.parameters.values()]
        if self.subject.devices > 1:
            # One tensor, in which the gradients of all processes are summed, is there at all times.
            self.kept_gradients = made
        for parameter, gradient in zip(self.parameters.values(), made, strict=True):
            parameter.grad = gradient
        claim_trained(self.ledger, self.optimizer)

    # ------------------------------------------------------------ training

    def step(self, options: StepOptions, shape: BatchShape) -> None:
        """Run a micro-batch forward and backward.

        With accumulation it is a later micro-batch of its step, which finds the gradients of the
        earlier ones. It always finds the optimiser's state, as every step of a run but the first
        does.

        Args:
            options: how the step is computed.
            shape: the sizes of the micro-batch.
        """
        settle(self.model, options, self.hardware)
        self.model.train()
        if options.gradient_accumulation_steps > 1 or self.subject.devices > 1:
            self._give_gradients()
        objective = self._objective(options)
        if options.packing:
            objective = packing(objective)
        batch = shape.stand_in(objective)
        if self.gathers is not None:
            self.gathers.begin()
        with (
            self.ledger.counted() as self.work,
            watched(self.ledger, self.optimizer),
            drawn_from(
                Draws(
                    self.config.seed,
                    0,
                    drawn_rows(batch, batch.rows),
                    self.base.batch_width(batch.longest),
                    batch.lengths if options.packing else None,
                )
            ),
        ):
            with self.phase("forward"):
                loss = objective.loss_sum(batch)
            with self.phase("backward"):
                torch.autograd.backward(loss)
                if self.gathers is not None:
                    self.work.received_bytes = self.gathers.end_of_backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _objective(self, options: StepOptions) -> Objective:
        objective = self.subject.task.objective(self.base, 0, options.loss_chunk_tokens, None)
        return weighted(objective) if self.subject.rows.is_weighted else objective

    # ------------------------------------------------------------ after training

    def evaluate(self, config: TrainConfig, shape: BatchShape) -> None:
        """Evaluate a batch of validation rows."""
        self.model.eval()
        objective = self._objective(config)
        batch = shape.stand_in(objective)
        with self.phase("evaluation"), watched(self.ledger, self.optimizer):
            objective.measured(batch)

    def hold(self) -> None:
        """Note the memory that is held between two steps."""
        with self.phase("held"):
            pass

    def evaluate_within_step(
        self, config: TrainConfig, shape: BatchShape, short: SimulatedRun
    ) -> int:
        """Evaluate with the rows that were asked for; unless set, with no more memory than a step.

        The rows are halved until the evaluation takes no more memory than the step did. In
        evaluation no layer keeps anything: besides its weights, a model of a few layers takes as
        much as the whole model does besides its own.

        Args:
            config: the settings of the run.
            shape: the sizes of a batch with as many rows as were asked for.
            short: a run of a model with few layers, already loaded.

        Returns:
            The number of rows of a batch.
        """
        is_asked = "eval_batch_size" in config.model_fields_set
        allowed = max(self.device[phase].bytes for phase in ("forward", "backward"))
        settle(short.model, config, self.hardware)
        short.hold()
        while True:
            short.evaluate(config, shape)
            for mine, its in ((self.device, short.device), (self.host, short.host)):
                mine["evaluation"] = mine["held"].and_more(its["held"], its["evaluation"])
            if is_asked or shape.rows == 1 or self.device["evaluation"].bytes <= allowed:
                return shape.rows
            shape = replace(shape, rows=shape.rows // 2)

    def save(self) -> None:
        """Save a checkpoint."""
        with self.phase("save"), self.ledger.purpose("copies to save"):
            kept = [parameter.detach().cpu().clone() for parameter in self.parameters.values()]
            tensors, _ = optimizer_tensors(self.optimizer, self.parameters)
            del kept, tensors


@torch.no_grad()
def _simulate_merge(
    ledger: Ledger,
    skeleton: PreTrainedModel,
    subject: Subject,
    run: SimulatedRun,
    adapters: float,
) -> None:
    """Merge as `export` does, until the first shard is full; every other shard takes as much.

    Args:
        ledger: the ledger of the simulation.
        skeleton: a skeleton with enough layers to fill a shard.
        subject: the base and the adapter; the whole adapter is in memory.
        run: receives the phase.
        adapters: size of the whole adapter, relative to the adapter of these layers.
    """
    lora = subject.lora
    layers = by_lora_path(carriers(skeleton))
    targets = targeted_paths(skeleton, lora)
    with ledger.purpose("LoRA"):
        tensors = {
            each.path: (
                torch.empty(lora.rank_of(path), each.in_features, device="cpu"),
                torch.empty(each.out_features, lora.rank_of(path), device="cpu"),
            )
            for path in targets
            for each in layers[path]
        }
        size = sum(tensor.nbytes for pair in tensors.values() for tensor in pair)
        others = torch.empty(round(size * (adapters - 1)), dtype=torch.uint8, device="cpu")
    stacked = {path: len(layers[path]) for path in targets if layers[path][0].is_expert}
    stored = StoredAdapter(Path(), lora, tensors, None, None, stacked=stacked)
    quantization = _planned(subject.spec.quantization)
    stream = _empty_tensors(skeleton, subject.stored_dtype, quantization, subject.hardware)
    with run.phase("merge", ledger):
        pending: list[Tensor] = []
        for _, tensor in merged_tensors(stream, stored, torch.float16):
            if sum(each.nbytes for each in pending) + tensor.nbytes > _SHARD_BYTES:
                pending = []
            ledger.claim(tensor, "copies to save")
            pending.append(tensor)
    del others


def _layers_of_a_shard(spec: BaseSpec) -> int:
    """Return the number of decoder layers that fill a file of merged weights."""
    one = projections(spec.skeleton(1)).values()
    numbers = sum(layer.in_features * layer.out_features for layer in one)
    return math.ceil(_SHARD_BYTES / (numbers * torch.float16.itemsize))


def _planned(quantization: Quantization) -> _Planned:
    return _Planned(quantization.bits, quantization.quant_type, quantization.double_quant)


def _stored_parts(value: FrozenWeight | Tensor) -> list[tuple[str, Tensor]]:
    return [("", value)] if isinstance(value, Tensor) else list(value.stored())


def _empty_tensors(
    skeleton: PreTrainedModel,
    dtype: torch.dtype,
    quantization: Quantization,
    hardware: Hardware,
    on_host: frozenset[str] = frozenset(),
    *,
    are_drawn: bool = False,
    start: Start | None = None,
) -> Stream:
    """Yield every parameter as loading would, without content.

    Args:
        skeleton: has the names and shapes of the parameters.
        dtype: the dtype that they are stored in.
        quantization: how the weights of linear layers are quantised.
        hardware: the device that the parameters go to.
        on_host: names of the parameters that stay in host memory.
        are_drawn: whether the weights are random; random weights are made on the device.
        start: what is computed of the weights as they are loaded.
    """
    linear = projected_weights(skeleton)
    tied = skeleton.all_tied_weights_keys or {}
    for name, shaped in list(skeleton.state_dict(keep_vars=True).items()):
        if name not in tied:
            # A read tensor is booked on the host, though a mapped file takes no memory there.
            made = hardware.device if are_drawn else torch.device("cpu")
            stored = torch.empty(shaped.shape, dtype=dtype, device=made)
            where = torch.device("cpu") if name in on_host else hardware.device
            if start is not None and start.covers(name):
                yield name, start_frozen(start, name, stored, quantization, where)
                continue
            yield name, freeze(name, stored, name in linear, quantization, where, is_own=are_drawn)
