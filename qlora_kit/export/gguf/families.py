"""What llama.cpp calls an architecture, and what it computes otherwise than transformers.

One table, `FAMILIES`: the name of the architecture, the rows of q and k that lie in another order,
norms that are stored with their 1, windows, softcaps, and which tensors may have biases. A model
with a feature that llama.cpp is not known to compute alike is refused by that feature's name.

Source: the converters and the graphs of llama.cpp (MIT), `conversion/` and `src/models/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_kit.errors import ModelError

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj"})
_ALL_LINEAR = _ATTENTION | {"o_proj", "gate_proj", "up_proj", "down_proj"}
_GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp.

    Attributes:
        architecture: llama.cpp's name for it.
        activation: the activation of the MLP that its graph computes.
        turns_pairs: whether its rotary positions turn neighbouring rows, (0, 1), (2, 3), …, where
            transformers turns the two halves of a head: then rows of q and k change places.
        biases: the linear layers of a block that may have a bias.
        norm_offset: what is added to the weight of a norm, since transformers multiplies by
            1 + weight there.
        tied_only: whether the head is always the embedding.
        window_period: of windowed attention, one block of so many attends to everything; None where
            llama.cpp's graph has no window, so the model is right up to the window only.
    """

    architecture: str
    activation: str = "silu"
    turns_pairs: bool = False
    biases: frozenset[str] = frozenset()
    norm_offset: float = 0.0
    tied_only: bool = False
    window_period: int | None = None


_LLAMA = Family("llama", turns_pairs=True, biases=_ALL_LINEAR)
_GELU = "gelu_pytorch_tanh"
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2", biases=_ATTENTION),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", _GELU, norm_offset=1.0, tied_only=True, window_period=2),
    "gemma3_text": Family("gemma3", _GELU, norm_offset=1.0, window_period=6),
    "phi3": Family("phi3"),
}
_NAMES = "Llama, Mistral, Qwen2, Qwen3, Gemma-2, Gemma-3 (text), Phi-3 and Phi-4"


@dataclass(frozen=True)
class Architecture:
    """A model as llama.cpp knows it: its family, and its own numbers.

    Attributes:
        name: the user's name for the model.
        family: its family.
        config: its configuration in transformers.
        parameters: the shape of every parameter, by name; copies of tied ones are not in it.
    """

    name: str
    family: Family
    config: PreTrainedConfig
    parameters: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, name: str, skeleton: PreTrainedModel, *, is_tied: bool = True) -> Architecture:
        """Return the architecture of a model.

        Args:
            name: the user's name for the model.
            skeleton: the model without weights.
            is_tied: whether parameters that are tied still are, once an adapter is merged.

        Raises:
            ModelError: it is no causal language model of a family in the table, or has a feature
                that llama.cpp does not compute.
        """
        config = skeleton.config
        family = FAMILIES.get(config.model_type)
        head = skeleton.get_output_embeddings()
        if family is None or head is None or not type(skeleton).__name__.endswith("ForCausalLM"):
            raise ModelError(
                f"{name}: is a {type(skeleton).__name__} ({config.model_type}), which is not known "
                f"to be right as GGUF; expected a causal language model of {_NAMES}; leave --form "
                "out"
            )
        tied = (skeleton.all_tied_weights_keys or {}) if is_tied else {}
        shapes = {n: tuple(t.shape) for n, t in skeleton.state_dict().items() if n not in tied}
        found = cls(name, family, config, shapes)
        for fault in _faults(found):
            raise ModelError(
                f"{name}: {fault}, which llama.cpp is not known to compute as transformers does; "
                "leave --form out"
            )
        found.names()
        return found

    # ------------------------------------------------------------ numbers

    @property
    def rows(self) -> int:
        """Tokens that the embedding has a row for."""
        return self.parameters["model.embed_tokens.weight"][0]

    @property
    def head_dim(self) -> int:
        """Rows of q that belong to one head."""
        config = self.config
        own = getattr(config, "head_dim", None)
        return int(own or config.hidden_size // config.num_attention_heads)

    @property
    def rotated(self) -> int:
        """Numbers of a head that rotary positions turn."""
        return int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0))

    @property
    def rope(self) -> Mapping[str, Any]:
        """The parameters of the rotary positions, of blocks that attend to everything."""
        found: Mapping[str, Any] = self.config.rope_parameters
        whole: Mapping[str, Any] = found.get("full_attention", found)
        return whole

    @property
    def rope_type(self) -> str:
        """How rotary positions are scaled, in transformers' words."""
        return str(self.rope.get("rope_type", "default"))

    @property
    def context(self) -> int:
        """Tokens up to which llama.cpp computes what transformers does."""
        longest = int(self.config.max_position_embeddings)
        if self.family.window_period is None and (window := _window(self.config)) is not None:
            return min(longest, window)
        return longest

    @property
    def usual_context(self) -> int:
        """Tokens up to which the positions are those of short texts, whatever the context."""
        original = self._original_context if self.rope_type == "longrope" else None
        return min(self.context, original or self.context)

    @property
    def _original_context(self) -> int | None:
        own = getattr(self.config, "original_max_position_embeddings", None)
        found: int | None = self.rope.get("original_max_position_embeddings", own)
        return found

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Write the numbers of the architecture."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.rotated)
        writer.add_vocab_size(self.rows)
        self._describe_positions(writer)
        if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
            writer.add_attn_logit_softcapping(cap)
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            writer.add_final_logit_softcapping(cap)
        if self.family.window_period is not None:
            writer.add_sliding_window(config.sliding_window)
        elif self.family.architecture == "phi3":
            # Without the key llama.cpp's older releases take the window of the first Phi-3.
            writer.add_sliding_window(_window(config) or 0)

    def _describe_positions(self, writer: gguf.GGUFWriter) -> None:
        rope, own = self.rope, self.config.rope_parameters
        writer.add_rope_freq_base(rope["rope_theta"])
        if "sliding_attention" in own:
            writer.add_rope_freq_base_swa(own["sliding_attention"]["rope_theta"])
        if self.rope_type in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(self.rope_type))
            writer.add_rope_scaling_factor(rope["factor"])
        if self.rope_type == "longrope":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
            _, factor = ROPE_INIT_FUNCTIONS["longrope"](self.config, torch.device("cpu"))
            writer.add_rope_scaling_attn_factors(factor)
        if self.rope_type in ("yarn", "longrope") and self._original_context is not None:
            writer.add_rope_scaling_orig_ctx_len(self._original_context)

    # ------------------------------------------------------------ tensors

    def names(self) -> dict[str, str]:
        """Return llama.cpp's name of every parameter.

        Raises:
            ModelError: it has none for a parameter.
        """
        number = gguf.MODEL_ARCH[self.family.architecture.upper()]
        known = gguf.get_tensor_name_map(number, self.config.num_hidden_layers)
        found = {name: known.get_name(name, (".weight", ".bias")) for name in self.parameters}
        if lost := [name for name, own in found.items() if own is None]:
            raise ModelError(
                f"{self.name}: llama.cpp has no tensor for {lost[0]} ({len(lost)} such); expected "
                f"the parameters of {_NAMES}; leave --form out"
            )
        return {name: str(own) for name, own in found.items()}

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that llama.cpp wants beside the parameters: factors of positions."""
        if self.rope_type == "llama3":
            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
            exponents = torch.arange(0, self.rotated, 2, dtype=torch.float32) / self.rotated
            return {"rope_freqs.weight": 1.0 / (self.rope["rope_theta"] ** exponents) / scaled}
        if self.rope_type == "longrope":
            return {
                f"rope_factors_{each}.weight": torch.tensor(self.rope[f"{each}_factor"])
                for each in ("long", "short")
            }
        return {}

    def to_file(self, name: str, tensor: Tensor) -> Tensor:
        """Return a parameter as llama.cpp has it, fp32."""
        if tensor.dim() == 1 and name.endswith("norm.weight"):
            return tensor.float() + self.family.norm_offset
        heads = self._turned_heads(name)
        return tensor.float() if heads is None else _swapped(tensor.float(), heads, 2)

    def from_file(self, name: str, tensor: Tensor) -> Tensor:
        """Return a parameter as transformers has it: the inverse of `to_file`."""
        if tensor.dim() == 1 and name.endswith("norm.weight"):
            return tensor - self.family.norm_offset
        heads = self._turned_heads(name)
        half = self.head_dim // 2
        return tensor if heads is None else _swapped(tensor, heads, half)

    def _turned_heads(self, name: str) -> int | None:
        """Return the heads of a parameter of q or k whose rows lie in another order, or None."""
        if not self.family.turns_pairs:
            return None
        if name.rpartition(".")[0].endswith(".q_proj"):
            return int(self.config.num_attention_heads)
        if name.rpartition(".")[0].endswith(".k_proj"):
            return int(self.config.num_key_value_heads)
        return None


def _swapped(tensor: Tensor, heads: int, groups: int) -> Tensor:
    """Return rows (heads · groups · n) with n and groups exchanged within each head."""
    size = tensor.shape[0] // heads // groups
    parts = tensor.reshape(heads, groups, size, *tensor.shape[1:])
    return parts.transpose(1, 2).reshape(tensor.shape).contiguous()


# ---------------------------------------------------------------- what is refused


def _window(config: PreTrainedConfig) -> int | None:
    """Return the tokens that windowed attention sees; None if all blocks attend to everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return int(window) if window and getattr(config, "use_sliding_window", True) else None


def _faults(architecture: Architecture) -> list[str]:
    """Return the features of a model that llama.cpp does not compute, in words."""
    checks: tuple[Callable[[Architecture], str | None], ...] = (
        _activation, _biases, _positions, _windows, _attention_scale, _softcap, _head,
    )  # fmt: skip
    return [fault for check in checks if (fault := check(architecture)) is not None]


def _activation(architecture: Architecture) -> str | None:
    config = architecture.config
    found = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if found == architecture.family.activation:
        return None
    return f"its MLP computes {found}, not {architecture.family.activation}"


def _biases(architecture: Architecture) -> str | None:
    for name in architecture.parameters:
        layer = name.removesuffix(".bias").rpartition(".")[2]
        if name.endswith(".bias") and layer not in architecture.family.biases:
            return f"{name} is a bias"
    return None


def _positions(architecture: Architecture) -> str | None:
    rope = architecture.rope
    kinds = {"default", "linear", "yarn"}
    if architecture.family.architecture == "llama":
        kinds.add("llama3")
    if architecture.family.architecture == "phi3":
        kinds.add("longrope")
    if architecture.rope_type not in kinds:
        return f"its positions are scaled by {architecture.rope_type}"
    own = rope.keys() & {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    if architecture.rope_type == "yarn" and any(rope[key] is not None for key in own):
        return f"its positions set {sorted(own)[0]} of yarn"
    if architecture.rotated != architecture.head_dim and architecture.family.turns_pairs:
        return "its positions turn a part of each head"
    sliding = architecture.config.rope_parameters.get("sliding_attention", {})
    if sliding.get("rope_type", "default") != "default":
        return "its windowed blocks have scaled positions"
    return None


def _windows(architecture: Architecture) -> str | None:
    period = architecture.family.window_period
    if period is None:
        return None
    kinds = architecture.config.layer_types
    wanted = [
        "full_attention" if number % period == period - 1 else "sliding_attention"
        for number in range(len(kinds))
    ]
    return None if kinds == wanted else f"not just every {period}th block attends to everything"


def _attention_scale(architecture: Architecture) -> str | None:
    config = architecture.config
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is None:
        return None
    is_27b = config.num_hidden_layers == _GEMMA_27B[config.model_type]
    used = config.hidden_size // config.num_attention_heads if is_27b else architecture.head_dim
    if math.isclose(scalar, used):
        return None
    return f"its query_pre_attn_scalar is {scalar}, not {used}"


def _softcap(architecture: Architecture) -> str | None:
    config = architecture.config
    cap = getattr(config, "attn_logit_softcapping", None)
    if config.model_type == "gemma2" and cap is None:
        return "its attention has no softcap"
    if config.model_type != "gemma2" and cap is not None:
        return "its attention has a softcap"
    return None


def _head(architecture: Architecture) -> str | None:
    if architecture.family.tied_only and "lm_head.weight" in architecture.parameters:
        return "its head differs from its embedding"
    return None
