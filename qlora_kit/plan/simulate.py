"""Run every phase of training, and the merge, on fake tensors; return the peak of each.

Takes a base that need not exist on this machine and a configuration; returns a
`Prediction`. The code that runs is the code that trains: loading, the step, evaluation,
saving, merging. What stands here is only how they are called and what each storage is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.config import ExportConfig, TrainConfig
from qlora_kit.data.batch import Batch
from qlora_kit.export.merge import merged_tensors
from qlora_kit.lora.adapter import StoredAdapter
from qlora_kit.lora.attach import LoraSpec, attach, frozen_layers, resolve_targets
from qlora_kit.model.architecture import build_skeleton, linear_layers
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.head import head_of
from qlora_kit.model.load import (
    Base,
    BaseSpec,
    Placement,
    fill,
    freeze,
    head_quantization,
    is_tied,
    names_on_host,
)
from qlora_kit.model.quantize import FourBitWeight, FrozenWeight, Int8Weight, Quantization
from qlora_kit.plan.attention import planned_attention
from qlora_kit.plan.ledger import Ledger, Peak
from qlora_kit.plan.temporaries import workspace_bytes
from qlora_kit.step import forward as step
from qlora_kit.step.loss import cross_entropy_sum
from qlora_kit.step.reducers import apply, resolve
from qlora_kit.train.optimizer import build_optimizer, optimizer_tensors

Stream = Iterator[tuple[str, FrozenWeight | Tensor]]

PHASES = ("load", "forward", "backward", "optimizer", "evaluation", "save", "merge")
_SHARD_BYTES: int = ExportConfig.model_fields["max_shard_size"].default
_CONSTANTS = "quantisation constants"
# Names of purposes, in the order in which a picture stacks them.
PURPOSES = (
    "base weights", _CONSTANTS, "norms and biases", "embeddings", "head", "LoRA",
    "gradients", "optimiser", "layer checkpoints", "activations", "loss chunk",
    "dequantised weight", "workspace", "copies to save",
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """The memory a run will need.

    Attributes:
        device: the peak of each phase on the device, by phase.
        host: on the host, beside what the process itself takes.
    """

    device: dict[str, Peak]
    host: dict[str, Peak]

    @property
    def peak(self) -> Peak:
        """The largest of the phases of training on the device."""
        return _largest(self.device)

    @property
    def host_peak(self) -> Peak:
        """The largest of the phases of training on the host."""
        return _largest(self.host)


def _largest(phases: dict[str, Peak]) -> Peak:
    # The merge is a command and a process of its own.
    return max((p for name, p in phases.items() if name != "merge"), key=lambda p: p.bytes)


class _Planned(Quantization):
    """A quantisation whose packed tensors have their sizes and no values."""

    def freeze(self, weight: Tensor) -> FrozenWeight:
        """Return an empty weight of the size that quantising leaves."""
        if self.bits == 16:
            return super().freeze(weight)
        shape = (weight.shape[0], weight.shape[1])
        if self.bits == 8:
            wide = weight.to(torch.float16)
            codes = torch.empty(shape, dtype=torch.int8, device=wide.device)
            return Int8Weight(codes, torch.empty(shape[0], device=wide.device))
        return FourBitWeight.empty(shape, self, weight.device)


def predict(
    spec: BaseSpec,
    lora: LoraSpec,
    config: TrainConfig,
    hardware: Hardware,
    tokens: int,
) -> Prediction:
    """Predict the memory of a run.

    Args:
        spec: the base; of its folder only the config.json is read.
        lora: the trained part.
        config: how a step is computed, and by which optimiser.
        hardware: `meta` stands in for a GPU and is told apart from the host.
        tokens: of each row, all of them supervised.
    """
    skeleton = build_skeleton(spec.architecture())
    with _simulation(hardware) as ledger:
        run = _Run(ledger, spec, config, hardware, skeleton)
        run.load()
        run.attach(lora)
        run.train(tokens)
        run.evaluate(tokens)
        run.save()
    # Built outside: the placeholders of a skeleton are no memory.
    skeleton = build_skeleton(spec.architecture())
    with _simulation(hardware) as ledger:
        _merge(ledger, skeleton, spec, lora, hardware, run)
    return Prediction(run.device, run.host)


@contextlib.contextmanager
def _simulation(hardware: Hardware) -> Iterator[Ledger]:
    device = hardware.device.type
    ledger = Ledger(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # transformers builds masks for tracers, which fake tensors look like, and for no run.
        stack.enter_context(mock.patch("transformers.masking_utils.is_tracing", return_value=False))
        if device == "meta":
            stack.enter_context(planned_attention())
        stack.enter_context(ledger)
        yield ledger


class _Run:
    """One simulated run: its phases in their order."""

    def __init__(
        self,
        ledger: Ledger,
        spec: BaseSpec,
        config: TrainConfig,
        hardware: Hardware,
        skeleton: PreTrainedModel,
    ) -> None:
        self.ledger, self.spec, self.config, self.hardware = ledger, spec, config, hardware
        self.model = skeleton
        self.device: dict[str, Peak] = {}
        self.host: dict[str, Peak] = {}

    @contextlib.contextmanager
    def phase(self, name: str, ledger: Ledger | None = None) -> Iterator[None]:
        ledger = ledger or self.ledger
        ledger.restart()
        yield
        self.device[name] = ledger.peak("device")
        self.host[name] = ledger.peak("host")

    # ------------------------------------------------------------ before training

    @torch.no_grad()
    def load(self) -> None:
        placement = Placement.of(self.config).resolved(
            self.hardware.device, tied=is_tied(self.model)
        )
        quantization = _planned(self.spec.quantization)
        on_host = names_on_host(self.model, placement)
        head = head_quantization(self.spec, placement)
        stream = _empty_tensors(self.model, quantization, self.hardware, on_host)
        with self.phase("load"):
            fill(self.model, self._claimed(stream), self.hardware, head and _planned(head))
        self.base = Base(self.model, self.spec, self.hardware, "", 0, 0.0, placement)
        self.head = head_of(self.model)
        self._claim_weights()
        workspace = workspace_bytes(self.hardware.device.type)
        self.workspace = torch.empty(workspace, dtype=torch.uint8, device=self.hardware.device)
        self.ledger.claim(self.workspace, "workspace")

    def _claimed(self, stream: Stream) -> Stream:
        """Say of each tensor what it is for, as soon as it is there."""
        for name, value in stream:
            for part, tensor in _parts(value):
                is_packed = part in ("", "codes", "values")
                self.ledger.claim(tensor, "base weights" if is_packed else _CONSTANTS)
            yield name, value

    def _claim_weights(self) -> None:
        claim = self.ledger.claim
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            claim(tensor, "norms and biases")
        for layer in frozen_layers(self.model).values():
            for name, tensor in layer.weight.named_buffers():
                is_packed = name in ("codes", "values")
                claim(tensor, "base weights" if is_packed else _CONSTANTS)
        for tensor in self.head.linear.weight.buffers():
            claim(tensor, "head")
        claim(self.model.get_input_embeddings().weight, "embeddings")  # last: it may be the head

    def attach(self, lora: LoraSpec) -> None:
        with self.ledger.purpose("LoRA"):
            self.adapter = attach(self.base, lora, self.config.seed)
        self.parameters = self.adapter.parameters()
        for parameter in self.parameters.values():
            hooked: Any = parameter
            hooked.register_post_accumulate_grad_hook(
                lambda p: self.ledger.claim(p.grad, "gradients")
            )

    # ------------------------------------------------------------ training

    def train(self, tokens: int) -> None:
        apply(self.model, resolve(self.config, self.hardware), self.hardware)
        self.model.train()
        self._claim_checkpoints()
        self._take_first_step()
        if self.config.gradient_accumulation_steps == 1:
            self.optimizer.zero_grad(set_to_none=True)
        batch = _batch(self.config.batch_size, tokens, self.hardware.device)
        with self.phase("forward"), _loss_purposes(self.ledger):
            loss: Any = step.loss_sum(
                self.model, batch, self.head, chunk_tokens=self.config.loss_chunk_tokens
            )
        with self.phase("backward"), _dequantised(self.ledger):
            loss.backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _claim_checkpoints(self) -> None:
        def claim(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = inputs[0] if inputs else named["hidden_states"]
            self.ledger.claim(hidden, "layer checkpoints")

        if self.config.recompute:
            for layer in self.model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.register_forward_pre_hook(claim, with_kwargs=True)

    def _take_first_step(self) -> None:
        """Let the optimiser make its state, as every later micro-batch finds it."""
        for parameter in self.parameters.values():
            parameter.grad = torch.empty_like(parameter)
            self.ledger.claim(parameter.grad, "gradients")
        with self.phase("optimizer"), self.ledger.purpose("optimiser"):
            self.optimizer = build_optimizer(self.parameters.values(), self.config)
            limit = self.config.max_grad_norm or 1.0
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit)
            self.optimizer.step()

    # ------------------------------------------------------------ after training

    def evaluate(self, tokens: int) -> None:
        self.model.eval()
        batch = _batch(self.config.eval_batch_size, tokens, self.hardware.device)
        with self.phase("evaluation"), _dequantised(self.ledger):
            step.scores(self.model, batch, self.head, self.config.loss_chunk_tokens)

    def save(self) -> None:
        with self.phase("save"), self.ledger.purpose("copies to save"):
            kept = [parameter.detach().cpu().clone() for parameter in self.parameters.values()]
            tensors, _ = optimizer_tensors(self.optimizer, self.parameters)
            del kept, tensors


@torch.no_grad()
def _merge(
    ledger: Ledger,
    skeleton: PreTrainedModel,
    spec: BaseSpec,
    lora: LoraSpec,
    hardware: Hardware,
    run: _Run,
) -> None:
    """Merge as `export` does."""
    layers = linear_layers(skeleton)
    targets = resolve_targets(list(layers), lora.targets)
    with ledger.purpose("LoRA"):
        tensors = {
            path: (
                torch.empty(lora.rank_of(path), layers[path].in_features, device="cpu"),
                torch.empty(layers[path].out_features, lora.rank_of(path), device="cpu"),
            )
            for path in targets
        }
    stored = StoredAdapter(Path(), lora, tensors, None, None)
    stream = _empty_tensors(skeleton, _planned(spec.quantization), hardware)
    with run.phase("merge", ledger):
        pending: list[Tensor] = []
        for _, tensor in merged_tensors(stream, stored, torch.float16):
            if sum(each.nbytes for each in pending) + tensor.nbytes > _SHARD_BYTES:
                pending = []
            ledger.claim(tensor, "copies to save")
            pending.append(tensor)


def _planned(quantization: Quantization) -> _Planned:
    return _Planned(quantization.bits, quantization.quant_type, quantization.double_quant)


def _parts(value: FrozenWeight | Tensor) -> list[tuple[str, Tensor]]:
    return [("", value)] if isinstance(value, Tensor) else list(value.named_buffers())


def _empty_tensors(
    skeleton: PreTrainedModel,
    quantization: Quantization,
    hardware: Hardware,
    on_host: frozenset[str] = frozenset(),
) -> Stream:
    """Yield every parameter as a load would, made of nothing."""
    linear = {f"{path}.weight" for path in linear_layers(skeleton)}
    tied = skeleton.all_tied_weights_keys or {}
    for name, shaped in list(skeleton.state_dict(keep_vars=True).items()):
        if name not in tied:
            # A mapped file is not memory of the process: the meta device holds no bytes.
            stored = torch.empty(shaped.shape, dtype=_stored_dtype(skeleton), device="cpu")
            where = torch.device("cpu") if name in on_host else hardware.device
            yield name, freeze(name, stored, name in linear, quantization, where)


def _stored_dtype(skeleton: PreTrainedModel) -> torch.dtype:
    dtype = getattr(skeleton.config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _batch(rows: int, tokens: int, device: torch.device) -> Batch:
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device="cpu")
    positions = torch.zeros(rows * (tokens - 1), dtype=torch.int64, device="cpu")
    return Batch(ids, ids, None, tuple(range(rows)), positions).to(device)


@contextlib.contextmanager
def _loss_purposes(ledger: Ledger) -> Iterator[None]:
    def booked(*arguments: Any) -> Tensor:
        with ledger.purpose("loss chunk"):
            return cross_entropy_sum(*arguments)

    with _dequantised(ledger), mock.patch.object(step, "cross_entropy_sum", booked):
        yield


@contextlib.contextmanager
def _dequantised(ledger: Ledger) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kind in (FourBitWeight, Int8Weight):
            stack.enter_context(mock.patch.object(kind, "dequantize", _booked(kind, ledger)))
        yield


def _booked(kind: type[FrozenWeight], ledger: Ledger) -> Any:
    real = kind.dequantize

    def dequantize(self: FrozenWeight, dtype: torch.dtype) -> Tensor:
        with ledger.purpose("dequantised weight"):
            return real(self, dtype)

    return dequantize
