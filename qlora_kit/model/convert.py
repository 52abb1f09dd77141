"""Assigns the tensors of a checkpoint to the parameters of the model.

Takes the names in a checkpoint; returns `Assembly` records: a parameter, the tensors it is made
of, and the operation that makes it. The renamings and merges are transformers' own. The parts of a
weight that bitsandbytes already quantised are kept together. A weight that is stored transposed is
turned, one that is stored stacked is taken apart, and that of a convolution is laid flat;
`as_stored` undoes all of it. Opens no file itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora_kit.layers.experts import Stack
from qlora_kit.layers.projections import convolutions, stacks, transposed_weights
from qlora_kit.layers.windows import Window
from qlora_kit.model.class_head import may_be_fresh
from qlora_kit.private_transformers import left_out_of_checkpoints

# The parts that bitsandbytes stores beside a packed weight. Its `weight_format` only says "row",
# and is ignored.
_QUANTIZED_PARTS = re.compile(
    r"\.(SCB|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+))$"
)
_IGNORED = re.compile(r"\.(rotary_emb\.inv_freq|weight_format)$")


@dataclass
class Assembly:
    """A parameter, and the stored tensors that it is made of.

    Attributes:
        target: name of the parameter; with a converter, name of the first parameter it makes.
        sources: names in the checkpoint, by the name that transformers gives them.
        converter: transformers' operation, where tensors are merged or split.
        pattern_of: the pattern of the converter that each name in the checkpoint matched.
        is_transposed: whether the target is stored as (D, K), unless it is packed.
        stack: the path and the layers that the target is taken apart into, where it is stacked.
        window: the window of the target, where it is the weight of a convolution.
    """

    target: str
    sources: dict[str, str] = field(default_factory=dict)
    converter: WeightConverter | None = None
    pattern_of: dict[str, str] = field(default_factory=dict)
    is_transposed: bool = False
    stack: tuple[str, Stack] | None = None
    window: Window | None = None

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters that it makes, as far as they are known unread."""
        if self.stack is None:
            return [self.target]
        path, stack = self.stack
        leaf = "weight" if self.target == path else "bias"
        return [f"{path}.{number}.{leaf}" for number in range(len(stack))]

    @property
    def is_quantized(self) -> bool:
        """Whether the sources are the parts of a weight that bitsandbytes packed."""
        return any(_QUANTIZED_PARTS.search(name) for name in self.sources)

    def parts(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Read the parts of a packed weight, by the end of their name ("weight", "SCB")."""
        owner = self.target.removesuffix("weight")
        return {name.removeprefix(owner): read(stored) for name, stored in self.sources.items()}

    def tensors(self, read: Callable[[str], Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Read the sources, and return the parameters made of them by name."""
        made = self._assembled(read, model)
        if self.stack is None:
            return made
        path, stack = self.stack
        return stack.apart(path, self.target, made[self.target])

    def _assembled(
        self, read: Callable[[str], Tensor], model: PreTrainedModel
    ) -> dict[str, Tensor]:
        if self.converter is None:
            (stored,) = self.sources.values()
            tensor = read(stored)
            # A kernel of another shape stays as it is, and is refused by its shape.
            if self.window is not None and tensor.shape[1:] == self.window.kernel:
                tensor = tensor.flatten(1)
            return {self.target: tensor.T if self.is_transposed else tensor}
        converter = copy.copy(self.converter)
        converter.collected_tensors = {}
        for stored, pattern in self.pattern_of.items():
            converter.collected_tensors.setdefault(pattern, []).append(read(stored))  # type: ignore[arg-type]
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def assemble(names: Sequence[str], skeleton: PreTrainedModel) -> list[Assembly]:
    """Group the names of a checkpoint by the parameter they make up, in the order of the names."""
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    stacked = {
        name: (path, stack)
        for path, stack in stacks(skeleton).items()
        for name in (path, f"{path}_bias")
    }
    state = dict.fromkeys(stacked, True) | skeleton.state_dict()
    transposed, windows = transposed_weights(skeleton), convolutions(skeleton)
    assemblies: dict[str, Assembly] = {}
    for stored in names:
        name, pattern = rename_source_key(
            stored, renamings, converters, skeleton.base_model_prefix, state
        )
        target = _QUANTIZED_PARTS.sub(".weight", name)
        if target not in state and _is_of_other_head(target, skeleton):
            continue
        if name not in state and _is_ignored(name, skeleton):
            continue
        fresh = Assembly(
            target, is_transposed=target in transposed, stack=stacked.get(target),
            window=windows.get(target),
        )  # fmt: skip
        assembly = assemblies.setdefault(target, fresh)
        assembly.sources[name if pattern is None else stored] = stored
        if pattern is not None:
            assembly.converter = by_pattern[pattern]
            assembly.pattern_of[stored] = pattern
    return list(assemblies.values())


def as_stored(
    tensors: Iterable[tuple[str, Tensor]], skeleton: PreTrainedModel
) -> Iterator[tuple[str, Tensor]]:
    """Yield unpacked parameters as transformers' own model holds them.

    They are turned back, stacked, and in kernels.

    Args:
        tensors: every parameter by the name that it has in the skeleton.
        skeleton: the architecture.
    """
    transposed = transposed_weights(skeleton)
    stack_of = {
        f"{path}.{number}.{leaf}": (path if leaf == "weight" else f"{path}_bias", stack)
        for path, stack in stacks(skeleton).items()
        for number in range(len(stack))
        for leaf in ("weight", "bias")
    }
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in with_kernels(tensors, skeleton):
        if name not in stack_of:
            yield name, tensor.T.contiguous() if name in transposed else tensor
            continue
        whole, stack = stack_of[name]
        parts = waiting.setdefault(whole, {})
        parts[name] = tensor
        if len(parts) == len(stack):
            in_order = [parts[each] for each, (of, _) in stack_of.items() if of == whole]
            yield whole, stack.together(in_order).contiguous()
            del waiting[whole]


def with_kernels(
    tensors: Iterable[tuple[str, Tensor]], skeleton: PreTrainedModel
) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters with the weights of convolutions in their kernels again, (K, C, k, k)."""
    windows = convolutions(skeleton)
    for name, tensor in tensors:
        window = windows.get(name)
        yield name, tensor if window is None else tensor.view(len(tensor), *window.kernel)


def _is_of_other_head(name: str, skeleton: PreTrainedModel) -> bool:
    """Whether a tensor is of a head that a classifier does not have, as a language model's."""
    if skeleton.get_output_embeddings() is not None or not may_be_fresh(skeleton, name):
        return False
    try:
        skeleton.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return True
    return False


def _is_ignored(name: str, skeleton: PreTrainedModel) -> bool:
    patterns = left_out_of_checkpoints(skeleton)
    return bool(_IGNORED.search(name)) or any(re.search(p, name) for p in patterns)
