"""Memory, work and time of a step with any setting, extrapolated from a model of a few layers.

Takes the options of `train`; returns an `Extrapolation` that answers for any setting without
another simulation. Every decoder layer takes as much as the next. So the share of one layer is the
difference between two depths, and between keeping its activations and recomputing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.config import TrainConfig
from qlora_kit.layers.weight import GatheredWeight
from qlora_kit.plan.duration import Seconds, seconds_of
from qlora_kit.plan.ledger import Work
from qlora_kit.plan.network import BYTES_PER_SECOND
from qlora_kit.plan.simulate import BatchShape, SimulatedRun, simulated_run
from qlora_kit.plan.subject import Subject
from qlora_kit.step.offload import pinned_bytes
from qlora_kit.step.unpacked import packed_weights, unpacked_bytes

# Layers of the shortened model. At most two of them keep their activations, and the first never
# does. It would keep less than the others: its input, the embedding's output, takes no gradient.
_DEPTH = 3


@dataclass(frozen=True)
class Setting:
    """The settings of a step that a search can choose.

    Attributes:
        rows: rows of a micro-batch.
        tile_tokens: tokens that an MLP works on at a time; 0: all.
        offload: whether the inputs of recomputed layers are in host memory.
        embedding_on_cpu: whether the embedding is in host memory.
        keep_layers: number of decoder layers that keep their activations.
        unpacked_layers: number of decoder layers whose weights stay unpacked.
    """

    rows: int
    tile_tokens: int
    offload: bool
    embedding_on_cpu: bool
    keep_layers: int
    unpacked_layers: int = 0

    def applied(self, config: TrainConfig) -> TrainConfig:
        """Return the configuration with this setting; its effective batch stays the same."""
        effective = config.batch_size * config.gradient_accumulation_steps
        return config.model_copy(
            update={
                "batch_size": self.rows,
                "gradient_accumulation_steps": effective // self.rows,
                "mlp_tile_tokens": self.tile_tokens,
                "offload_checkpoints": self.offload,
                "embedding_on_cpu": self.embedding_on_cpu,
                "keep_layers": self.keep_layers,
                "unpacked_layers": self.unpacked_layers,
            }
        )


@dataclass(frozen=True)
class Needs:
    """The memory, the work and the time that a step takes.

    Attributes:
        peak_bytes: peak on the device.
        host_peak_bytes: peak on the host, without the process itself.
        work: work of one micro-batch.
        seconds: time of one micro-batch; None where the rates of the device are not known.
    """

    peak_bytes: int
    host_peak_bytes: int
    work: Work
    seconds: Seconds | None = None


class _StepTaken(NamedTuple):
    """The peaks, in bytes, the work and the time of one step of the shortened model.

    The seconds, of the device and of the host that calls it, and those of unpacking among them, are
    0 where no rates are known.
    """

    forward: float
    backward: float
    flop: float
    unpacked_bytes: float
    device_seconds: float
    host_seconds: float
    unpacking_seconds: float
    unpacking_host_seconds: float


class _Kind(NamedTuple):
    """Steps of one micro-batch size and tile, with none, one and two layers keeping activations."""

    none_kept: _StepTaken
    one_kept: _StepTaken
    two_kept: _StepTaken


def _between(low: _StepTaken, high: _StepTaken, share: float) -> _StepTaken:
    return _StepTaken(*(a + share * (b - a) for a, b in zip(low, high, strict=True)))


@dataclass(frozen=True)
class Extrapolation:
    """The needs of every setting.

    Attributes:
        layers: decoder layers of the model.
        layer_bytes: bytes of one layer on the device: its weights and everything trained of it.
        unpacked_layer_bytes: bytes of the weights of one layer that stay unpacked.
        checkpoint_bytes: bytes of the input of a layer, for one row.
        embedding_bytes: bytes of the input embedding.
        host_load_bytes: bytes on the host while the base is loaded.
        host_bytes: bytes on the host at all times.
        layer_copy_bytes: bytes on the host for each layer while a checkpoint of the run is saved.
        received_bytes: bytes received from other devices in a micro-batch, of any number of rows.
        head_part_bytes: bytes of the head that are copied to the device for a micro-batch.
        head_work: work of a step outside of the layers, for one row.
        head_seconds: its time, on the device and on the host that calls it.
        head_unpacking_seconds: the time of unpacking outside of the layers, likewise, of all rows.
        link_bytes_per_second: rate of copies between host and device; None where there are none, or
            no rates are known.
        is_offloaded: whether the measured steps held checkpoints on the host.
        has_embedding_on_cpu: whether the measured steps had the embedding on the host.
        kinds: the measured steps, by tile and rows.
        evaluations: peak bytes of an evaluation, by rows.
    """

    layers: int
    layer_bytes: int
    unpacked_layer_bytes: int
    checkpoint_bytes: int
    embedding_bytes: int
    host_load_bytes: int
    host_bytes: int
    layer_copy_bytes: int
    received_bytes: int
    head_part_bytes: int
    head_work: Work
    head_seconds: tuple[float, float]
    head_unpacking_seconds: tuple[float, float]
    link_bytes_per_second: float | None
    is_offloaded: bool
    has_embedding_on_cpu: bool
    kinds: dict[int, dict[int, _Kind]]
    evaluations: dict[int, int]

    def needs(self, setting: Setting) -> Needs:
        """Return the memory and work that a step with this setting takes."""
        none, one, two = self._kind(setting)
        keep, recomputed = setting.keep_layers, self.layers - setting.keep_layers
        held = self._held(recomputed, setting.offload) * setting.rows
        held_with_one = self._held(_DEPTH - 1, self.is_offloaded) * setting.rows
        held_with_two = self._held(_DEPTH - 2, self.is_offloaded) * setting.rows
        activations = (two.forward - held_with_two) - (one.forward - held_with_one)
        # The peak is one of three moments. At the end of forward, and in the backward of the last
        # layer, all kept activations are there. In the backward of the first layer, one layer's
        # activations and every checkpoint are there.
        peaks = [
            one.forward - held_with_one + (keep - 1) * activations,
            two.backward - held_with_two + (keep - 2) * activations,
        ]
        if recomputed:
            peaks.append(none.backward - self._held(_DEPTH, self.is_offloaded) * setting.rows)
        moved = self._moved(setting)
        deeper = (self.layers - _DEPTH) * self.layer_bytes
        checkpoints = pinned_bytes(self.checkpoint_bytes * setting.rows) if setting.offload else 0
        beside = max(recomputed * checkpoints, self.layers * self.layer_copy_bytes)
        host = max(self.host_load_bytes, self.host_bytes + beside) - moved
        work = self._work(setting)
        peak = round(max(peaks)) + held + deeper + moved + self.unpacked_bytes(setting)
        return Needs(peak, host, work, self._seconds(setting, work))

    def _kind(self, setting: Setting) -> _Kind:
        """Return the steps measured with the setting's rows, or a point on the line through two."""
        measured = self.kinds[setting.tile_tokens]
        if setting.rows in measured:
            return measured[setting.rows]
        low, high = sorted(measured)[-2:]
        share = (setting.rows - low) / (high - low)
        samples = zip(measured[low], measured[high], strict=True)
        return _Kind(*(_between(a, b, share) for a, b in samples))

    def evaluation_bytes(self, rows: int, setting: Setting) -> int:
        """Return the peak, in bytes, of an evaluation of this number of rows at a time."""
        deeper = (self.layers - _DEPTH) * self.layer_bytes
        return self.evaluations[rows] + deeper + self._moved(setting) + self.unpacked_bytes(setting)

    def unpacked_bytes(self, setting: Setting) -> int:
        """Return the bytes of the weights that stay unpacked."""
        return setting.unpacked_layers * self.unpacked_layer_bytes

    def _moved(self, setting: Setting) -> int:
        return self.embedding_bytes * (self.has_embedding_on_cpu - setting.embedding_on_cpu)

    def _held(self, recomputed: int, offload: bool) -> int:
        """Return the bytes of checkpoints on the device, for one row.

        Of checkpoints in host memory, one is on the device at a time.
        """
        return self.checkpoint_bytes * (min(recomputed, 1) if offload else recomputed)

    def _work(self, setting: Setting) -> Work:
        _, one, two = self._kind(setting)
        recomputed = self.layers - setting.keep_layers
        flop = self._whole(setting, one.flop, two.flop, self.head_work.flop * setting.rows)
        unpacked = self._whole(
            setting, one.unpacked_bytes, two.unpacked_bytes, self.head_work.unpacked_bytes
        )
        unpacked -= self._needless(setting, "unpacked_bytes", self.head_work.unpacked_bytes)
        copies = 2 * recomputed * setting.offload + setting.embedding_on_cpu
        crossing = copies * self.checkpoint_bytes * setting.rows + self.head_part_bytes
        return Work(round(flop), round(unpacked), crossing, self.received_bytes)

    def _seconds(self, setting: Setting, work: Work) -> Seconds | None:
        _, one, two = self._kind(setting)
        if not one.device_seconds:
            return None
        outside, link = self.head_seconds[0] * setting.rows, self.link_bytes_per_second
        device = self._whole(setting, one.device_seconds, two.device_seconds, outside)
        host = self._host_seconds(setting, one.host_seconds, two.host_seconds)
        on_device, on_host = self.head_unpacking_seconds
        return Seconds(
            device - self._needless(setting, "unpacking_seconds", on_device),
            host - self._needless(setting, "unpacking_host_seconds", on_host),
            work.crossing_bytes / link if link else 0.0,
            work.received_bytes / BYTES_PER_SECOND if link else 0.0,
        )

    def _host_seconds(self, setting: Setting, one: float, two: float) -> float:
        """Return the host's time; the calls of a layer are as many for any number of rows."""
        measured = self.kinds[setting.tile_tokens]
        rows = min(measured)
        _, first, second = measured[rows]
        inside = 2 * first.host_seconds - second.host_seconds - self.head_seconds[1] * rows
        layer = inside / _DEPTH
        return one + (self.layers - _DEPTH) * layer - (setting.keep_layers - 1) * (one - two)

    def _whole(self, setting: Setting, one: float, two: float, outside: float) -> float:
        """Return an amount of the whole model, from those of one and of two layers kept.

        Args:
            setting: says how many layers keep their activations.
            one: the amount of the shortened model with one of them.
            two: that with two of them.
            outside: the amount outside of the layers.
        """
        saved, layer = self._of_a_layer(one, two, outside)
        return outside + self.layers * layer - setting.keep_layers * saved

    def _needless(self, setting: Setting, name: str, outside: float) -> float:
        """Return the unpacking that layers which stay unpacked do not need.

        It is the same for any number of rows, so it is that of the fewest rows. With two tiles
        layers unpack more often than that, and it is too low.

        Args:
            setting: says how many layers stay unpacked.
            name: the amount of a step, by its name in `_StepTaken`.
            outside: the amount outside of the layers.
        """
        measured = self.kinds[setting.tile_tokens]
        _, one, two = (getattr(step, name) for step in measured[min(measured)])
        saved, layer = self._of_a_layer(one, two, outside)
        # Both are counted from the last layer.
        both = min(setting.unpacked_layers, setting.keep_layers)
        return setting.unpacked_layers * layer - both * saved

    @staticmethod
    def _of_a_layer(one: float, two: float, outside: float) -> tuple[float, float]:
        """Return what a layer saves by keeping its activations, and what it takes without."""
        saved = one - two
        return saved, (one + saved - outside) / _DEPTH


def extrapolate(
    subject: Subject, config: TrainConfig, rows: Sequence[int], tiles: Sequence[int]
) -> Extrapolation:
    """Simulate steps and evaluations of a shortened model, all with the longest row of both.

    Args:
        subject: the run.
        config: every option that a setting does not have.
        rows: the rows of a micro-batch that settings may have, in order.
        tiles: the tiles that settings may have.
    """
    architecture, hardware = subject.spec.architecture(), subject.hardware
    tokens = max(subject.rows.tokens, subject.rows.evaluation_tokens or 0)
    text = architecture.get_text_config()
    on_gpu = hardware.device.type != "cpu"
    measured = rows[:2]

    def run_of(depth: int) -> AbstractContextManager[SimulatedRun]:
        return simulated_run(subject, config, subject.spec.skeleton(depth))

    with run_of(_DEPTH + 1) as run:
        deeper = _sample(run, config, BatchShape(rows[0], tokens), tiles[0], keep_layers=1)
        more_received = run.work.received_bytes
    with run_of(_DEPTH) as run:
        kinds = {
            tile: {each: _kind(run, config, BatchShape(each, tokens), tile) for each in measured}
            for tile in tiles
        }
        evaluations = _evaluation_peaks(run, config, tokens)
        run.save()
    received = run.work.received_bytes
    host = {phase: run.host[phase].bytes for phase in ("load", "optimizer", "save")}
    first = kinds[tiles[0]][rows[0]]
    checkpoint = run.base.batch_width(tokens) * text.hidden_size * hardware.dtype.itemsize
    layer = round(deeper.forward - first.one_kept.forward)
    outside, ceilings = _outside(first, deeper), subject.ceilings
    return Extrapolation(
        layers=text.num_hidden_layers,
        layer_bytes=layer - (0 if on_gpu else checkpoint * rows[0]),
        unpacked_layer_bytes=_unpacked_layer_bytes(run.model, hardware.dtype),
        checkpoint_bytes=checkpoint,
        embedding_bytes=run.model.get_input_embeddings().weight.nbytes,
        host_load_bytes=host["load"],
        host_bytes=host["optimizer"],
        layer_copy_bytes=(host["save"] - host["optimizer"]) // _DEPTH,
        received_bytes=received + (text.num_hidden_layers - _DEPTH) * (more_received - received),
        head_part_bytes=_head_part_bytes(run.model),
        head_work=Work(round(outside.flop / rows[0]), round(outside.unpacked_bytes)),
        head_seconds=(outside.device_seconds / rows[0], outside.host_seconds / rows[0]),
        head_unpacking_seconds=(outside.unpacking_seconds, outside.unpacking_host_seconds),
        link_bytes_per_second=(
            None if isinstance(ceilings, str) else ceilings.link_bytes_per_second
        ),
        is_offloaded=on_gpu,
        has_embedding_on_cpu=run.base.placement.embedding_on_cpu is True,
        kinds=kinds,
        evaluations=evaluations,
    )


def _kind(run: SimulatedRun, config: TrainConfig, batch: BatchShape, tile_tokens: int) -> _Kind:
    one, two = (_sample(run, config, batch, tile_tokens, keep) for keep in (1, 2))
    # Without tiles a recomputed layer holds in backward as much as a layer that keeps activations.
    none = _sample(run, config, batch, tile_tokens, 0) if tile_tokens else one
    return _Kind(none, one, two)


def _sample(
    run: SimulatedRun, config: TrainConfig, batch: BatchShape, tile_tokens: int, keep_layers: int
) -> _StepTaken:
    setting = Setting(batch.rows, tile_tokens, True, True, keep_layers)
    # Without recompute every layer would keep its activations, and there would be no difference.
    recomputing = config.model_copy(update={"recompute": True})
    run.step(setting.applied(recomputing), batch)
    forward, backward = run.device["forward"].bytes, run.device["backward"].bytes
    ceilings = run.subject.ceilings
    taken = unpacking = Seconds(0.0)
    if not isinstance(ceilings, str):
        taken, unpacking = (seconds_of(work, ceilings) for work in (run.work, run.work.unpacking))
    return _StepTaken(
        forward, backward, run.work.flop, run.work.unpacked_bytes, taken.device, taken.host,
        unpacking.device, unpacking.host,
    )  # fmt: skip


def _unpacked_layer_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Return the bytes of the packed weights of one layer in the dtype of the products."""
    layer = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    return unpacked_bytes(packed_weights(layer), dtype)


def _head_part_bytes(model: PreTrainedModel) -> int:
    """Return the bytes in host memory of a head that devices hold together; 0 of any other."""
    weights = (each for each in model.modules() if isinstance(each, GatheredWeight))
    return sum(weight.stored_bytes for weight in weights)


def _outside(first: _Kind, deeper: _StepTaken) -> _StepTaken:
    """Return the amounts outside of the layers, from steps of two depths; peaks have no meaning."""
    steps = zip(first.one_kept, first.two_kept, deeper, strict=True)
    return _StepTaken(*(one + (one - two) - _DEPTH * (more - one) for one, two, more in steps))


def _evaluation_peaks(run: SimulatedRun, config: TrainConfig, tokens: int) -> dict[int, int]:
    """Return the peaks of evaluations, by rows: as many as asked for, half as many, down to one.

    The peaks lie on a line over the rows, so two of them give all.
    """

    def peak(rows: int) -> int:
        run.evaluate(config, BatchShape(rows, tokens))
        return run.device["evaluation"].bytes

    most = config.eval_batch_size
    largest, smallest = peak(most), peak(1)
    each = (largest - smallest) // max(1, most - 1)
    halved = [most >> halvings for halvings in range(most.bit_length())]
    return {rows: smallest + (rows - 1) * each for rows in halved}
