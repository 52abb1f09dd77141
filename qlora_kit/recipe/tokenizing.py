"""Whether data that are read first are tokenised before training as well, or beside it.

Takes samples that are all read, and the options; returns the same samples, or the first of them,
which know that the others wait in memory to be tokenised. Refuses by name what needs all tokens
before the first step.
"""

from __future__ import annotations

from qlora_kit.config import TrainConfig
from qlora_kit.data.held_samples import HeldSamples
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import Shape, ShapeOfAll
from qlora_kit.data.sources import record_options
from qlora_kit.data.streamed_sources import StreamedSources
from qlora_kit.errors import ConfigError
from qlora_kit.recipe.streaming import has_positions, starts_soon

SOON_BYTES = 1_000_000
"""text that is tokenised before training: that takes about one and a half seconds of a core"""


def tokenized_later(samples: Samples, config: TrainConfig, *, chooses: bool) -> Samples:
    """Return the first samples of data that are tokenised beside the training, else all samples.

    Only sizes and options decide, so that a run has the same order of rows wherever it runs and
    whatever a cache holds.

    Args:
        samples: the training data, all of them.
        config: the options of the run.
        chooses: whether it is chosen where the user leaves it open.

    Raises:
        ConfigError: the user asks for it, and the task needs all rows before the first step.
    """
    if config.tokenize_first is False:
        _check(samples, config)
        return _held(samples, config).head()
    if config.tokenize_first or not chooses or samples.text_bytes < SOON_BYTES:
        return samples
    held = _held(samples, config)
    first = held.head()
    if len(first.items) == len(samples.items) or not _does_as_well(samples, config):
        return samples
    held.why = "--tokenize-first makes all tokens before the first step"
    return first


def _held(samples: Samples, config: TrainConfig) -> HeldSamples | StreamedSources:
    if samples.parts:
        return StreamedSources.held(samples, config)
    return HeldSamples(samples, record_options(config))


def _check(samples: Samples, config: TrainConfig) -> None:
    if config.task == "preference":
        raise ConfigError(
            "--no-tokenize-first: --task preference asks the reference of every pair before the "
            "first step, which needs its tokens; leave it out"
        )
    if Shape.IMAGE in _shapes(samples):
        raise ConfigError(
            f"--no-tokenize-first: {samples.source} has images, which have no tokens to be made; "
            "leave it out"
        )


def _does_as_well(samples: Samples, config: TrainConfig) -> bool:
    """Return whether a run can begin without all tokens, and learns from the same rows."""
    shapes = _shapes(samples)
    return (
        config.task != "preference"
        and Shape.IMAGE not in shapes
        and starts_soon(config, shapes)
        and has_positions(config)
    )


def _shapes(samples: Samples) -> list[ShapeOfAll]:
    return [part.shape for part in (samples.parts or (samples,))]
