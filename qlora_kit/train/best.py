"""The figure by which the best checkpoint of a run is chosen, `--best-metric`.

Takes the name of a figure and what was measured; returns a comparison. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qlora_kit.errors import ConfigError

LOSS = "loss"
# All other metrics are better the higher they are.
_LOWER_IS_BETTER = (LOSS, "rmse", "mae")
_OF_A_SOURCE = "loss_"


def loss_of_source(name: str) -> str:
    """Return the name of the figure that is the validation loss of one of several sources."""
    return f"{_OF_A_SOURCE}{name}"


def falls(metric: str) -> bool:
    """Whether a metric falls where a model gets better."""
    return metric in _LOWER_IS_BETTER or metric.startswith(_OF_A_SOURCE)


def check_measured(name: str, metrics: Iterable[str]) -> None:
    """Check that a run measures the figure that it is asked to go by.

    Args:
        name: value of `--best-metric`.
        metrics: what is measured beside the loss.

    Raises:
        ConfigError: it does not.
    """
    known = (LOSS, *sorted(metrics))
    if name not in known:
        raise ConfigError(
            f"--best-metric {name}: is not measured here; expected {', '.join(known)}; correct it"
        )


def is_better(name: str, metrics: Mapping[str, float], best: float | None) -> bool:
    """Compare a metric with its best value so far; the first value is the best so far.

    Raises:
        ConfigError: it was not measured.
    """
    check_measured(name, metrics)
    if best is None:
        return True
    return metrics[name] < best if falls(name) else metrics[name] > best
