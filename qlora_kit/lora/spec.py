"""The specification of the trained part: which layers, how large, and which variant of LoRA.

`LoraSpec` is made of the options of a run, or of the file of a stored adapter. It knows no model;
`lora.targets` says which layers of a model it means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, TypeVar

from qlora_kit.config import VariantOptions
from qlora_kit.errors import ConfigError
from qlora_kit.lora.combinations import check_forms

if TYPE_CHECKING:
    from qlora_kit.lora.whole import TokenRows

# PEFT's word for causal language modelling.
TASK_TYPE = "CAUSAL_LM"
Number = TypeVar("Number", int, float)

_DEFAULTS = VariantOptions()
IS_PATTERN = re.compile(r"[\\*+?()\[\]|^$]")


@dataclass(frozen=True)
class Variant:
    """What is done otherwise than in plain LoRA; the defaults are plain LoRA.

    Attributes:
        init: what A and B start from, see `--init`.
        dora: whether the lengths of the outputs' weights are trained apart from their directions.
        learned_scale: whether the scaling of each layer is trained.
        freeze_a: whether B alone is trained.
        rank_budget: sum of the ranks of all layers, divided among them; None: each has its own.
        vblora: whether A and B are composed of a few vectors that all layers share.
        galore: names of unquantised layers that are trained whole, by gradients of low rank.
        merge_aware: whether the forward multiplies by the merged weight, packed again.
    """

    init: str = _DEFAULTS.init
    dora: bool = _DEFAULTS.dora
    learned_scale: bool = _DEFAULTS.learned_scale
    freeze_a: bool = _DEFAULTS.freeze_a
    rank_budget: int | None = _DEFAULTS.rank_budget
    vblora: bool = _DEFAULTS.vblora
    galore: tuple[str, ...] = _DEFAULTS.galore
    merge_aware: bool = _DEFAULTS.merge_aware

    @classmethod
    def of(cls, options: VariantOptions) -> Variant:
        """Return the variant that the options ask for."""
        return cls(**{each.name: getattr(options, each.name) for each in fields(cls)})

    @property
    def is_its_file(self) -> bool:
        """Whether the file of the adapter holds what is trained, bit for bit.

        Where it does not, a checkpoint holds the trained tensors besides.
        """
        return not (self.learned_scale or self.vblora)

    @property
    def changes_base(self) -> bool:
        """Whether the base in training is less what A and B start from, see `lora.starts`."""
        return self.init in ("pissa", "olora", "lora-ga")


@dataclass(frozen=True)
class LoraSpec:
    """The layers to train, and how.

    Attributes:
        rank: R of the layers that `rank_pattern` does not name.
        alpha: numerator of the scaling, for the layers that `alpha_pattern` does not name.
        dropout: probability that an input of A is zeroed in training.
        targets: groups, names or regular expressions, see `resolve_targets`.
        rslora: whether scaling is alpha / √rank instead of alpha / rank.
        rank_pattern: rank by the end of a path or by a regular expression, as in PEFT.
        alpha_pattern: alpha by the end of a path or by a regular expression, as in PEFT.
        whole: paths of linear layers that are trained whole; they get no LoRA, targeted or not.
        task_type: PEFT's name for the task that they are trained for.
        layers_to_transform: numbers of the blocks that get LoRA; none: all blocks do.
        exclude_modules: names or regular expressions of layers that get none, targeted or not.
        modules_to_save: names of modules that are trained whole.
        new_tokens: tokens that are added, of which embedding and head train only the rows.
        token_rows: the rows of embedding and head that are trained, such as those of new tokens.
        variant: what is done otherwise than in plain LoRA.
    """

    rank: int = _DEFAULTS.rank
    alpha: float = _DEFAULTS.alpha
    dropout: float = _DEFAULTS.lora_dropout
    targets: tuple[str, ...] = _DEFAULTS.targets
    rslora: bool = _DEFAULTS.rslora
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    task_type: str = TASK_TYPE
    layers_to_transform: tuple[int, ...] = ()
    exclude_modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    new_tokens: tuple[str, ...] = ()
    variant: Variant = field(default_factory=Variant)
    token_rows: TokenRows | None = None

    @classmethod
    def of(
        cls,
        options: VariantOptions,
        task_type: str = TASK_TYPE,
        whole: tuple[str, ...] = (),
        token_rows: TokenRows | None = None,
    ) -> LoraSpec:
        """Return the spec that the options ask for, for a task that PEFT calls `task_type`.

        Raises:
            ConfigError: variants contradict each other.
        """
        check_forms(options)
        return cls(
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.lora_dropout,
            targets=options.targets,
            rslora=options.rslora,
            rank_pattern=options.rank_pattern,
            alpha_pattern=options.alpha_pattern,
            whole=whole,
            task_type=task_type,
            layers_to_transform=options.layers_to_transform,
            exclude_modules=options.exclude_modules,
            modules_to_save=options.modules_to_save,
            new_tokens=options.new_tokens,
            variant=Variant.of(options),
            token_rows=token_rows,
        )

    def rank_of(self, path: str) -> int:
        """Return the rank of the layer at `path`."""
        return _by_pattern(self.rank_pattern, path, self.rank)

    def scaling_of(self, path: str) -> float:
        """Return the scaling of the layer at `path`."""
        rank = self.rank_of(path)
        alpha = _by_pattern(self.alpha_pattern, path, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(patterns: Mapping[str, Number], path: str, default: Number) -> Number:
    for pattern, value in patterns.items():
        if names_path(pattern, path):
            return value
    return default


def names_path(pattern: str, path: str) -> bool:
    """Whether a key of a rank or alpha pattern names a path, as in PEFT."""
    if not IS_PATTERN.search(pattern):
        return path == pattern or path.endswith(f".{pattern}")
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None
    except re.error as error:
        raise ConfigError(f"pattern '{pattern}' is no regular expression ({error})") from error
