"""A frozen base that several processes hold together, on torch's FSDP2.

Each process holds a part of every weight of the layers. FSDP2 gathers the weights of a layer before
the layer computes, those of the next layer meanwhile, and frees them afterwards, in forward and in
backward. What it gathers are the packed tensors, so their bits are those of one process. LoRA is
left out: every process holds all of it.

Takes a base that was loaded in parts; changes it in place. Never sends a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.errors import EnvironmentFault, ModelError
from qlora_kit.events import Announce, silent
from qlora_kit.launched import place
from qlora_kit.layers.shards import Shards
from qlora_kit.layers.weight import FrozenWeight
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.load import Base, BaseSpec, Placement, load_base
from qlora_kit.parallel.data_parallel import STEP_SECONDS, DataParallel
from qlora_kit.parallel.launch import check_sharing
from qlora_kit.parallel.one import processes_of_this_run
from qlora_kit.private_torch import own_buffers


@dataclass(frozen=True, eq=False)
class Sharding:
    """The processes that share a base, as torch knows them.

    Attributes:
        shards: the processes that hold one copy of the base together: those of one machine.
        mesh: the same as a mesh of devices.
    """

    shards: Shards
    mesh: DeviceMesh

    @classmethod
    def of_this_run(cls, device: torch.device) -> Sharding:
        """Return the processes of this machine, which share a base; other machines have copies.

        Weights are gathered for every layer of a micro-batch, so they do not leave the machine.
        torch's processes must have met. All processes of the run call it together.

        Args:
            device: the device of this process.

        Raises:
            EnvironmentFault: the machines run different numbers of processes.
        """
        here = place()
        if here.count % here.on_machine or here.rank % here.on_machine != here.local_rank:
            raise EnvironmentFault(
                f"--shard-base: process {here.rank} of {here.count} is number {here.local_rank} of "
                f"{here.on_machine} on its machine; expected as many on every machine, in order; "
                "start as many everywhere"
            )
        # Every process makes the groups of all machines, as torch requires.
        first = range(0, here.count, here.on_machine)
        machines = [list(range(each, each + here.on_machine)) for each in first]
        patience = timedelta(seconds=STEP_SECONDS)
        groups = [torch.distributed.new_group(ranks, timeout=patience) for ranks in machines]
        group = groups[here.rank // here.on_machine]
        mesh = DeviceMesh.from_group(group, device.type)
        return cls(Shards(here.on_machine, here.local_rank, group), mesh)


def load_shared_base(
    spec: BaseSpec,
    hardware: Hardware,
    announce: Announce = silent,
    placement: Placement | None = None,
) -> Base:
    """Load a base of which each process of this machine holds a part; see `load_base`.

    All processes of the run call it together, and from then on make the same forwards together.

    Args:
        spec: the base to load.
        hardware: the device of this process, and the dtype that it computes in.
        announce: receives notices and the progress.
        placement: the place of the embedding, and the bits of the head; None: as suits the device.

    Raises:
        ConfigError: there is no other process on this machine.
        ModelError: the model has no layers that can be gathered; or see `load_base`.
    """
    processes, here = processes_of_this_run(), place()
    check_sharing(here.count, here.on_machine)
    assert isinstance(processes, DataParallel)
    sharding = Sharding.of_this_run(hardware.device)
    if not stacks_of(spec.skeleton()):
        raise ModelError(
            f"--shard-base: {spec.source.name} has no layers that are computed one after another; "
            "expected a transformer; pass --no-shard-base"
        )
    base = load_base(spec, hardware, announce, placement, sharding.shards)
    shard_layers(base.model, sharding)
    processes.share_base(sharding.shards.group)
    return base


def shard_layers(model: nn.Module, sharding: Sharding) -> None:
    """Let a model whose weights were cut gather them for the layer that computes.

    Args:
        model: a model that was loaded in parts, without adapters; changed in place.
        sharding: the processes that hold the parts.
    """
    for stack, layers in stacks_of(model).items():
        for layer in layers:
            _divide(layer, sharding)
        _order(stack, sharding.mesh)


def stacks_of(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Return the layers whose weights are gathered together, by the module that calls them."""
    found: dict[nn.Module, list[nn.Module]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, GradientCheckpointingLayer):
            found.setdefault(_owner(model, path), []).append(layer)
    return found


def gather_once(model: nn.Module) -> None:
    """Gather every layer and free it again: the first time, FSDP2 makes tensors that it keeps.

    All processes that share the model call it together; of any other model nothing is gathered.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def _divide(layer: nn.Module, sharding: Sharding) -> None:
    """Give the weights of a layer to FSDP2, which is told their sizes and then given the parts.

    So no process ever needs a whole weight for it.
    """
    weights = [m for m in layer.modules() if isinstance(m, FrozenWeight) and m.rows]
    parts = [_with_placeholders(weight) for weight in weights]
    managed = {parameter for weight in weights for parameter in weight.parameters()}
    ignored = {each for each in layer.parameters() if each not in managed}
    fully_shard(
        layer, mesh=sharding.mesh, reshard_after_forward=True, ignored_params=ignored
    )  # fmt: skip
    for weight, held in zip(weights, parts, strict=True):
        state = {
            name: _divided(part, weight.rows[name], sharding.mesh) for name, part in held.items()
        }
        weight.load_state_dict(state, strict=False, assign=True)


def _with_placeholders(weight: FrozenWeight) -> dict[str, Tensor]:
    """Take the parts out of a weight; in their places are parameters of the whole sizes."""
    parts = {name: weight.get_buffer(name) for name in weight.rows}
    for name, part in parts.items():
        delattr(weight, name)
        whole = torch.empty(weight.rows[name], *part.shape[1:], dtype=part.dtype, device="meta")
        weight.register_parameter(name, nn.Parameter(whole, requires_grad=False))
    return parts


def _divided(part: Tensor, rows: int, mesh: DeviceMesh) -> DTensor:
    shape = torch.Size((rows, *part.shape[1:]))
    stride = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _owner(model: nn.Module, path: str) -> nn.Module:
    """Return the module that calls the layer at a path: the one that has the list of layers."""
    parent = path.rpartition(".")[0]
    while isinstance(model.get_submodule(parent), nn.ModuleList | nn.ModuleDict):
        parent = parent.rpartition(".")[0]
    return model.get_submodule(parent)


def _order(stack: Any, mesh: DeviceMesh) -> None:
    """Let the layers of a stack be gathered one ahead of the other.

    FSDP2 manages no parameter of the stack itself. It would move all buffers to the device; those
    in host memory shall stay there.
    """
    device = mesh.device_type
    aside: list[tuple[nn.Module, str, Tensor]] = []
    for module in stack.modules():
        for name, buffer in list(own_buffers(module).items()):
            if buffer is not None and buffer.device.type != device:
                aside.append((module, name, buffer))
                own_buffers(module)[name] = None
    fully_shard(
        stack, mesh=mesh, reshard_after_forward=True, ignored_params=set(stack.parameters())
    )  # fmt: skip
    for module, name, buffer in aside:
        own_buffers(module)[name] = buffer
