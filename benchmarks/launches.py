"""Count the kernels and the bytes of a training step by part, for a full-size model.

    python benchmarks/launches.py --model deepseek-7b

Needs no GPU. Runs a micro-batch forward and backward on fake tensors, as `qlora-kit plan` does, and
looks at every operation: a view or an empty tensor launches nothing, everything else is one kernel.
Its bytes are those of the tensors that it reads and of those that it writes. A kernel is estimated
to take the time of its bytes or of its operations, whichever is longer, at rates assumed of an
H100; the host is taken for fast enough. Steps of two and of three layers give the figures of one.

The sides are the fused kernels, the plain code, and the plain code with every layer alone, so that
queries, keys and values share nothing.

Not counted: the optimiser, and the kernels that a library's operation launches besides its first.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from measure import print_table, save_results

import torch  # isort: skip
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from qlora_kit.private_torch import TorchDispatchMode, is_in_backward, tree_leaves

PARTS = (
    "base products", "LoRA", "unpacking", "attention", "norms", "RoPE", "MLP beside products",
    "head and loss", "copies to and from the host", "everything else",
)  # fmt: skip
_COPIES = "copies to and from the host"
PHASES = ("forward", "recomputation", "backward")
SIDES = ("auto", "plain", "plain, alone")
# Assumed rates: of the memory in bytes a second, and of bf16 products in operations a second.
_MEMORY_RATE, _FLOP_RATE = 2.65e12, 650e12
# Of the flash kernel: backward sums, multiplies and converts.
_ATTENTION_LAUNCHES = {"forward": 1, "recomputation": 1, "backward": 3}
_NO_KERNEL = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view",
    "device", "promote_types", "_local_scalar_dense", "lift_fresh", "set_",
}  # fmt: skip
# The part of an operation is told by the innermost function around it that is known here: by its
# file and its name, or by its file alone.
_FUNCTIONS = (
    ("layers/weight.py", "dequantize", "unpacking"),
    ("kernels/nf4.py", "", "unpacking"),
    ("layers/low_rank.py", "", "LoRA"),
    ("kernels/split.py", "", "LoRA"),
    ("layers/lora.py", "", "LoRA"),
    ("layers/weight.py", "", "base products"),
    ("kernels/norm.py", "", "norms"),
    ("kernels/rotary.py", "", "RoPE"),
    ("layers/mlp.py", "", "MLP beside products"),
    ("kernels/gate.py", "", "MLP beside products"),
    ("plan/attention.py", "", "attention"),
    ("step/offload.py", "", "copies to and from the host"),
    ("", "apply_rotary_pos_emb", "RoPE"),
    ("", "rotate_half", "RoPE"),
)
_KINDS_OF_MODULES = (("norm", "norms"), ("rotary", "RoPE"))
_HEAD = ("layers/loss.py", "layers/head.py")
_RECOMPUTED = "torch/utils/checkpoint.py"


@dataclass(frozen=True)
class Cost:
    """What kernels cost.

    Attributes:
        launches: the number of kernels, or of copies to and from the host.
        read: bytes that they read.
        written: bytes that they write.
        flop: operations of matrix products and attention.
        seconds: estimated seconds.
    """

    launches: int = 0
    read: int = 0
    written: int = 0
    flop: int = 0
    seconds: float = 0.0

    def plus(self, other: Cost, times: int = 1) -> Cost:
        """Return the sum of this and `times` the other."""
        return Cost(
            self.launches + times * other.launches,
            self.read + times * other.read,
            self.written + times * other.written,
            self.flop + times * other.flop,
            self.seconds + times * other.seconds,
        )


Costs = dict[tuple[str, str], Cost]
"""By part and phase."""


class Counted(TorchDispatchMode):
    """Counts the kernels of the code in its block, see the top of this file.

    Attributes:
        costs: what was counted so far.
        masks: bytes of the masks with as many columns as rows, which attention may be given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.costs: Costs = {}
        self.masks = 0
        # The part of the node of the graph that runs now, where a module of the model made it.
        self.part_of_node: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute an operation and count it."""
        result = func(*args, **(kwargs or {}))
        if _launches(func):
            reads, writes = _bytes(func, args, kwargs or {}, result)
            self.add(reads, writes, _flop(func, args, kwargs or {}, result))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.dtype == torch.bool and each.ndim >= 2:
                rows, columns = each.shape[-2:]
                self.masks += each.nbytes if rows == columns > 1 else 0
        return result

    def add(self, read: int, written: int, flop: int, launches: int = 1) -> None:
        """Count a kernel."""
        part, phase = _place(self.part_of_node)
        # A copy to or from the host runs beside the kernels.
        seconds = (
            0.0 if part == _COPIES else max((read + written) / _MEMORY_RATE, flop / _FLOP_RATE)
        )
        cost = Cost(launches, read, written, flop, seconds)
        self.costs[part, phase] = self.costs.get((part, phase), Cost()).plus(cost)


def _launches(func: Any) -> bool:
    if func.overloadpacket.__name__ in _NO_KERNEL:
        return False
    aliases = [each.alias_info for each in func._schema.returns]
    return not any(alias is not None and not alias.is_write for alias in aliases)


def _bytes(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[int, int]:
    """Return the bytes that an operation reads and those that it writes."""
    read = written = 0
    only_written = func.overloadpacket.__name__ in ("copy_", "fill_", "zero_")
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        size = sum(_size(each) for each in tree_leaves(value) if isinstance(each, Tensor))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        written += size if is_written else 0
        if not argument.is_out and not (is_written and only_written):
            read += size
    if not any(each.alias_info for each in func._schema.returns):
        written += sum(_size(each) for each in tree_leaves(result) if isinstance(each, Tensor))
    return read, written


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor; of an expanded one, those that are there."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1
    for size, stride in sizes:
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def _flop(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    if (count := flop_registry.get(func.overloadpacket)) is None:
        return 0
    sized = (each for each in args if not isinstance(each, torch.dtype))
    named = {name: value for name, value in kwargs.items() if name != "out"}
    return int(count(*sized, **named, out_val=result))


def _place(part_of_node: str | None) -> tuple[str, str]:
    """Return the part and the phase that the code runs in which calls this."""
    part, in_head, phase = None, False, "backward" if is_in_backward() else "forward"
    frame: Any = sys._getframe(2)
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if part is None:
            part = _part_of_frame(file, name, frame)
        in_head = in_head or file.endswith(_HEAD)
        if phase == "backward" and file.endswith(_RECOMPUTED):
            phase = "recomputation"
        frame = frame.f_back
    if in_head:
        return "head and loss", phase
    return part or part_of_node or "everything else", phase


def _part_of_frame(file: str, name: str, frame: Any) -> str | None:
    for end, function, part in _FUNCTIONS:
        if file.endswith(end) and (not function or function == name):
            return part
    if name == "forward" and isinstance(module := frame.f_locals.get("self"), nn.Module):
        return _part_of_module(module)
    return None


def _part_of_module(module: nn.Module) -> str | None:
    kind = type(module).__name__.lower()
    return next((part for word, part in _KINDS_OF_MODULES if word in kind), None)


# ---------------------------------------------------------------- parts of backward


@contextlib.contextmanager
def _nodes_told(model: nn.Module, counted: Counted) -> Iterator[None]:
    """Tell `counted` the part of each node of the graph that a norm or a rotation made."""

    def tell(part: str, inputs: Any, outputs: Any) -> None:
        known = {each.grad_fn for each in _with_graph(inputs)}
        waiting = [each.grad_fn for each in _with_graph(outputs)]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in known:
                known.add(node)
                node.register_prehook(lambda *_: setattr(counted, "part_of_node", part))
                node.register_hook(lambda *_: setattr(counted, "part_of_node", None))
                waiting += [after for after, _ in node.next_functions]

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if part := _part_of_module(module):
                hook = module.register_forward_hook(
                    lambda module, inputs, outputs, part=part: tell(part, inputs, outputs)
                )
                stack.callback(hook.remove)
            home: Any = sys.modules[type(module).__module__]
            rotate = getattr(home, "apply_rotary_pos_emb", None)
            if callable(rotate) and not hasattr(rotate, "is_told"):
                told = _telling(rotate, tell)
                stack.enter_context(mock.patch.object(home, "apply_rotary_pos_emb", told))
        yield


def _telling(rotate: Callable[..., Any], tell: Callable[..., None]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(*inputs: Any, **named: Any) -> Any:
        outputs = rotate(*inputs, **named)
        tell("RoPE", inputs, outputs)
        return outputs

    apply_rotary_pos_emb.is_told = True  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def _with_graph(values: Any) -> list[Tensor]:
    leaves = tree_leaves(values)
    return [each for each in leaves if isinstance(each, Tensor) and each.grad_fn is not None]


# ---------------------------------------------------------------- a step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="deepseek-7b")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    found = {}
    for side in SIDES:
        found[side] = figures(arguments.model, side, arguments.rows, arguments.tokens)
        print(f"{arguments.model}, {arguments.rows} x {arguments.tokens}, --kernels {side}")
        print_table(found[side]["rows"], [*found[side]["rows"][0]])
    lora, *others = (found[side]["parts"]["LoRA"]["layer_bytes"] for side in SIDES)
    for side, other in zip(SIDES[1:], others, strict=True):
        print(f"LoRA's bytes with kernels are {lora / other:.2f} of those of: {side}")
    content = {
        "model": arguments.model,
        "rows": arguments.rows,
        "tokens": arguments.tokens,
        **found,
    }
    print("saved", save_results(f"launches_{arguments.model}", content))


def figures(model: str, side: str, rows: int, tokens: int) -> dict[str, Any]:
    """Return the figures of a step by part, in full and as the rows of a table."""
    import qlora_kit as qk

    spec = qk.BaseSpec(qk.find_model(model), None, qk.Quantization(4), random=True)
    layers = spec.architecture().get_text_config().num_hidden_layers
    layer, rest, masks = step_costs(model, side, rows, tokens)
    parts = {part: _part(part, layer, rest, layers) for part in PARTS}
    total = dict(sum(map(Counter, parts.values()), Counter()))
    by_phase = {phase: _kernels(layer, phase) for phase in PHASES}
    kernels = sum(by_phase.values())
    shown = [_shown(name, part) for name, part in {**parts, "sum": total}.items()]
    return {
        "layers": layers, "kernels_of_a_layer": kernels, "kernels_of_a_layer_by_phase": by_phase,
        "mask_bytes": masks, "parts": parts, "sum": total, "rows": shown,
    }  # fmt: skip


def _kernels(layer: Costs, phase: str) -> int:
    return sum(
        cost.launches for (part, at), cost in layer.items() if at == phase and part != _COPIES
    )


def _part(part: str, layer: Costs, rest: Costs, layers: int) -> dict[str, Any]:
    of_layer, of_rest = (
        _sum(cost for (name, _), cost in costs.items() if name == part) for costs in (layer, rest)
    )
    step = of_rest.plus(of_layer, layers)
    return {
        "layer_launches": of_layer.launches,
        "layer_bytes": of_layer.read + of_layer.written,
        "step_launches": step.launches,
        "step_bytes": step.read + step.written,
        "step_flop": step.flop,
        "step_seconds": step.seconds,
    }


def _sum(costs: Iterable[Cost]) -> Cost:
    total = Cost()
    for cost in costs:
        total = total.plus(cost)
    return total


def _shown(name: str, part: dict[str, Any]) -> dict[str, Any]:
    return {
        "part": name,
        "a layer: launches": part.get("layer_launches", 0),
        "MB": round(part.get("layer_bytes", 0) / 1e6),
        "the step: launches": part.get("step_launches", 0),
        "GB": round(part.get("step_bytes", 0) / 1e9, 1),
        "ms, estimated": round(1000 * part.get("step_seconds", 0), 1),
    }


def step_costs(model: str, side: str, rows: int, tokens: int) -> tuple[Costs, Costs, int]:
    """Count a micro-batch of a model of three layers and of two.

    Returns:
        What one layer costs, what everything besides the layers costs, and the bytes of the masks
        of a step with three layers.
    """
    two, three = (_counted(model, side, rows, tokens, layers) for layers in (2, 3))
    names = {*two.costs, *three.costs}
    nothing = Cost()
    layer = {
        name: three.costs.get(name, nothing).plus(two.costs.get(name, nothing), -1)
        for name in names
    }
    rest = {name: two.costs.get(name, nothing).plus(layer[name], -2) for name in names}
    return layer, rest, three.masks


def _counted(model: str, side: str, rows: int, tokens: int, layers: int) -> Counted:
    import qlora_kit as qk
    from qlora_kit.model.hardware import Hardware
    from qlora_kit.plan import attention
    from qlora_kit.plan.simulate import BatchShape, simulated_run
    from qlora_kit.plan.subject import RowSizes, Subject
    from qlora_kit.step import settle

    kernels, *alone = side.split(", ")
    # The first micro-batch of a step: no gradient is added to an earlier one.
    config = qk.TrainConfig(
        model=model,
        kernels=kernels,
        max_length=tokens,
        batch_size=rows,
        gradient_accumulation_steps=1,
    )
    hardware = Hardware(torch.device("meta"), torch.bfloat16, "planned")
    spec = qk.BaseSpec(qk.find_model(model), None, qk.Quantization(config.bits), random=True)
    subject = Subject(spec, qk.LoraSpec.of(config), hardware, RowSizes(tokens))
    counted = Counted()

    def count_attention(_: Any, flop: int, *__: Any) -> None:
        _, phase = _place(None)
        counted.add(0, 0, flop, _ATTENTION_LAUNCHES[phase])

    with (
        simulated_run(subject, config, spec.skeleton(layers)) as run,
        mock.patch.object(attention, "_count", count_attention),
        _nodes_told(run.model, counted),
        mock.patch.object(settle, "set_groups") if alone else contextlib.nullcontext(),
        counted,
    ):
        run.step(config, BatchShape(rows, tokens))
    return counted


if __name__ == "__main__":
    main()
