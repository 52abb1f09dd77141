"""A training step on many GPUs, computed: the plan of one GPU, and the time of what they send.

The work, the memory and the time of one GPU are those of `qlora_kit.plan`, counted on fake tensors.
Added to them are the collectives: gathers of a sharded base, and the sum of the LoRA gradients.
Nothing here has been measured on more than one GPU.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from qlora_kit.model.ceilings import Ceilings
from qlora_kit.plan.duration import StepWork, seconds_of, step_seconds
from qlora_kit.plan.ledger import Work

# Each GPU has the whole base, or a part of every layer: over all GPUs, or over those of its node.
REPLICATED, SHARDED, TWO_DIMENSIONS = "replicated", "sharded", "2-D"
FORMS = (REPLICATED, SHARDED, TWO_DIMENSIONS)
# Every decoder layer takes as much as the next, but for the first, whose input needs no gradient.
_DEPTHS = (3, 4)
# Of a sharded base, the layer that computes is whole, and the next one, which is under way.
_WHOLE_LAYERS = 2
# A forward pass gathers each layer, and so does a backward pass, which computes it again. The head
# is gathered once, for the loss.
_PASSES = ("forward", "backward")
# Llama shapes that `configs/` does not have, as changes of one that it has.
_DERIVED: dict[str, tuple[str, dict[str, int]]] = {
    "llama-2-13b": (
        "llama-2-7b",
        {
            "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
            "num_attention_heads": 40, "num_key_value_heads": 40,
        },
    ),
    "llama-3.1-405b": (
        "llama-3.1-70b",
        {
            "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
            "num_attention_heads": 128,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """The links of a cluster, at the rates that collectives reach.

    Attributes:
        gpus_per_node: GPUs of a node.
        inside: bytes a second that a GPU receives from its neighbour in the node.
        between: bytes a second that a node receives from another node, for all its GPUs.
        hop_inside: seconds from one GPU to the next in a node.
        hop_between: seconds from one node to the next.
    """

    gpus_per_node: int
    inside: float
    between: float
    hop_inside: float
    hop_between: float

    def gather_seconds(self, size: float, gpus: int) -> float:
        """Return the time to gather a tensor, of which each GPU has an equal part, in a ring.

        Rings that run at the same time enter each node by different adapters; together they bring
        the node the tensor once, whatever the number of its GPUs.

        Args:
            size: bytes of the whole tensor.
            gpus: GPUs of the ring, which fill whole nodes or a part of one.
        """
        nodes = math.ceil(gpus / self.gpus_per_node)
        rate = self.inside if nodes == 1 else min(self.inside, self.between)
        hops = (gpus - nodes) * self.hop_inside + (nodes - 1) * self.hop_between
        return sent_bytes(size, gpus) / rate + hops

    def sum_seconds(self, size: float, gpus: int) -> float:
        """Return the time to sum a tensor of `size` bytes over GPUs: its parts, and a gather."""
        return 2 * self.gather_seconds(size, gpus)


def sent_bytes(size: float, gpus: int) -> float:
    """Return the bytes that a GPU sends in a ring that gathers a tensor of `size` bytes."""
    return size * (gpus - 1) / gpus


@dataclass(frozen=True)
class Amounts:
    """What one GPU with the whole base does and holds.

    Attributes:
        layers: decoder layers.
        micro_batch: work of a micro-batch.
        update: work of clipping and of the optimiser.
        passes: work of one decoder layer, by pass.
        peak_bytes: peak of a step.
        layer_bytes: bytes of the packed weights of one decoder layer, with their constants.
        head_bytes: bytes of the head, where it is not the embedding as well.
        trained_bytes: bytes of the LoRA matrices, which are those of their gradients.
    """

    layers: int
    micro_batch: Work
    update: Work
    passes: dict[str, Work]
    peak_bytes: int
    layer_bytes: int
    head_bytes: int
    trained_bytes: int


@dataclass(frozen=True)
class Step:
    """An optimiser step of all GPUs.

    Attributes:
        micro_batches: micro-batches of a GPU.
        rows: rows of a micro-batch.
        compute_seconds: time that a GPU computes, with its own copies to the host.
        gather_seconds: time that it waits for parts of the base.
        sum_seconds: time of the sum of the gradients.
        sent_bytes: bytes that a GPU sends to others; it receives as many.
        peak_bytes: bytes that a GPU allocates at most.
    """

    micro_batches: int
    rows: int
    compute_seconds: float
    gather_seconds: float
    sum_seconds: float
    sent_bytes: float
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """The time of the step."""
        return self.compute_seconds + self.gather_seconds + self.sum_seconds


@dataclass(frozen=True)
class Run:
    """A run whose steps are computed: its model, and the rows of a step, whatever the GPUs.

    Attributes:
        model: name of a model in `configs/`, or one that is derived here.
        rows: rows of an optimiser step, on all GPUs together.
        micro_batch: rows of a micro-batch at most.
        tokens: tokens of a row.
    """

    model: str
    rows: int
    micro_batch: int
    tokens: int

    def share(self, gpus: int) -> tuple[int, int]:
        """Return the micro-batches of the busiest GPU, and the rows of each.

        The rows of a step stay the same. So more GPUs take fewer micro-batches each, then smaller
        ones; GPUs beyond the rows of a step have none.
        """
        most = math.ceil(self.rows / gpus)
        rows = min(self.micro_batch, most)
        return math.ceil(most / rows), rows

    def amounts(self, gpus: int) -> Amounts:
        """Return the amounts of the busiest GPU.

        Several GPUs keep their gradients at all times, end to end in one tensor that is summed.
        """
        micro_batches, rows = self.share(gpus)
        keeps_gradients = micro_batches > 1 or gpus > 1
        return _counted(self.model, rows, self.tokens, keeps_gradients=keeps_gradients)

    def step(self, form: str, gpus: int, cluster: Cluster, ceilings: Ceilings) -> Step:
        """Return an optimiser step in one of the `FORMS`."""
        one = self.amounts(gpus)
        micro_batches, rows = self.share(gpus)
        work = StepWork(one.micro_batch, one.update, micro_batches, rows * self.tokens)
        parts = {REPLICATED: 1, SHARDED: gpus, TWO_DIMENSIONS: min(gpus, cluster.gpus_per_node)}
        waits = gathered = 0.0
        if (over := parts[form]) > 1:
            waits = _gather_waits(one, cluster.gather_seconds(one.layer_bytes, over), ceilings)
            waits += cluster.gather_seconds(one.head_bytes, over)
            packed = len(_PASSES) * one.layers * one.layer_bytes
            gathered = sent_bytes(packed + one.head_bytes, over)
        return Step(
            micro_batches,
            rows,
            step_seconds(work, ceilings).all,
            micro_batches * waits,
            cluster.sum_seconds(one.trained_bytes, gpus),
            micro_batches * gathered + 2 * sent_bytes(one.trained_bytes, gpus),
            _peak_bytes(one, over),
        )


def _gather_waits(one: Amounts, gather: float, ceilings: Ceilings) -> float:
    """Return the time that a micro-batch waits for layers.

    Each layer is gathered while the one before it computes. Nothing hides the first of a pass.

    Args:
        one: the amounts of a GPU.
        gather: the time to gather one layer.
        ceilings: the rates of the GPU.
    """
    seconds = (seconds_of(one.passes[name], ceilings).all for name in _PASSES)
    return sum(gather + (one.layers - 1) * max(0.0, gather - layer) for layer in seconds)


def _peak_bytes(one: Amounts, over: int) -> int:
    """Return the peak of a GPU that holds one of `over` parts of the base."""
    if over == 1:
        return one.peak_bytes
    base = one.layers * one.layer_bytes
    held = math.ceil(base / over) + _WHOLE_LAYERS * one.layer_bytes
    return one.peak_bytes - base + min(base, held)


# ---------------------------------------------------------------- counted by the plan


def source_of(name: str) -> Any:
    """Return the `ModelSource` of a model of `configs/`, or of a shape that is derived here."""
    from qlora_kit.model.names import find_model

    if name not in _DERIVED:
        return find_model(name)
    base, changes = _DERIVED[name]
    architecture = {**(find_model(base).architecture or {}), **changes}
    return dataclasses.replace(
        find_model(base), name=name, hub_id=None, architecture=architecture, parameters=None
    )


def config_of(model: str, rows: int, tokens: int, micro_batches: int) -> Any:
    """Return the options of a run on one GPU; what is not named has the kit's default."""
    from qlora_kit.config import TrainConfig

    return TrainConfig(
        model=model, device="cuda", batch_size=rows, gradient_accumulation_steps=micro_batches,
        eval_batch_size=1, max_length=tokens,
    )  # fmt: skip


def subject_of(config: Any) -> Any:
    """Return the `Subject` of such a run, as `qlora-kit plan` makes it."""
    from qlora_kit.layers.quantize import Quantization
    from qlora_kit.lora.spec import LoraSpec
    from qlora_kit.model.load import BaseSpec
    from qlora_kit.plan.subject import RowSizes, Subject, planned_hardware

    spec = BaseSpec(source_of(config.model), None, Quantization(config.bits), random=True)
    rows = RowSizes(config.max_length)
    return Subject(spec, LoraSpec.of(config), planned_hardware(config), rows)


@functools.cache
def _counted(model: str, rows: int, tokens: int, *, keeps_gradients: bool) -> Amounts:
    """Count a micro-batch of models of two depths; all other layers are as their difference."""
    config = config_of(model, rows, tokens, 2 if keeps_gradients else 1)
    subject = subject_of(config)
    layers: int = subject.spec.architecture().get_text_config().num_hidden_layers
    short, longer = (_of_depth(subject, config, depth) for depth in _DEPTHS)
    more = layers - short.layers
    return Amounts(
        layers,
        _sum(short.micro_batch, _difference(longer.micro_batch, short.micro_batch), more),
        _sum(short.update, _difference(longer.update, short.update), more),
        {name: _difference(longer.passes[name], short.passes[name]) for name in _PASSES},
        short.peak_bytes + more * (longer.peak_bytes - short.peak_bytes),
        short.layer_bytes,
        short.head_bytes,
        short.trained_bytes + more * (longer.trained_bytes - short.trained_bytes),
    )


def _of_depth(subject: Any, config: Any, depth: int) -> Amounts:
    """Count a micro-batch of a model with this number of layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    from qlora_kit.plan.simulate import BatchShape, simulated_run
    from qlora_kit.step.unpacked import packed_weights

    with simulated_run(subject, config, subject.spec.skeleton(depth)) as run:
        with _by_pass(run) as passes:
            run.step(config, BatchShape(config.batch_size, config.max_length))
        layer = next(m for m in run.model.modules() if isinstance(m, GradientCheckpointingLayer))
        return Amounts(
            depth,
            run.work,
            run.update_work,
            passes,
            max(run.device[phase].bytes for phase in (*_PASSES, "optimizer")),
            sum(weight.stored_bytes for weight in packed_weights(layer)),
            run.device["backward"].by_purpose.get("head", 0),
            sum(parameter.nbytes for parameter in run.parameters.values()),
        )


@contextlib.contextmanager
def _by_pass(run: Any) -> Iterator[dict[str, Work]]:
    """Note the work of each pass of a step of the block."""
    found: dict[str, Work] = {}
    whole = run.phase

    @contextlib.contextmanager
    def noted(name: str) -> Iterator[None]:
        before = copy.deepcopy(run.ledger.work)
        with whole(name):
            yield
        found[name] = _difference(run.ledger.work, before)

    with mock.patch.object(run, "phase", noted):
        yield found


def _difference(more: Work, less: Work) -> Work:
    operations = more.operations.copy()
    operations.subtract(less.operations)
    return Work(
        more.flop - less.flop,
        more.unpacked_bytes - less.unpacked_bytes,
        more.crossing_bytes - less.crossing_bytes,
        operations=operations,
    )


def _sum(first: Work, layer: Work, count: int) -> Work:
    """Return some work with that of `count` more layers."""
    operations = first.operations.copy()
    for operation, each in layer.operations.items():
        operations[operation] += count * each
    return Work(
        first.flop + count * layer.flop,
        first.unpacked_bytes + count * layer.unpacked_bytes,
        first.crossing_bytes + count * layer.crossing_bytes,
        operations=operations,
    )
