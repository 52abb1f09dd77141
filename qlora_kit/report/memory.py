"""The memory of a run, as tables and as a picture of stacked bars.

Takes plain numbers: bytes by purpose, by phase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_kit.report.plot import save_figure

Breakdown = Mapping[str, int]
_MB = 10**6
_GB = 10**9


def phase_rows(device: Mapping[str, int], host: Mapping[str, int]) -> tuple[tuple[str, str], ...]:
    """Return one row a phase: its peak on the device, and on the host."""
    return tuple(
        (phase, f"{peak / _GB:6.2f} GB   host {host[phase] / _GB:5.2f} GB")
        for phase, peak in device.items()
    )


def breakdown_rows(parts: Breakdown, order: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return one row a purpose, those below a megabyte left out."""
    present = [name for name in order if parts.get(name, 0) >= _MB]
    return tuple((name, f"{parts[name] / _GB:6.3f} GB") for name in present)


def draw_memory(
    phases: Mapping[str, Breakdown], order: Sequence[str], title: str, path: Path
) -> None:
    """Draw one stacked bar a phase.

    Args:
        phases: bytes by purpose, by phase.
        order: of the purposes, from the bottom.
        title: over the picture.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.8), layout="constrained")
    colors = pyplot.get_cmap("tab20").colors
    names = list(phases)
    bottom = [0.0] * len(names)
    for color, purpose in zip(colors, order, strict=False):
        heights = [phases[phase].get(purpose, 0) / _GB for phase in names]
        if max(heights) * _GB < _MB:
            continue
        axes.bar(names, heights, bottom=bottom, color=color, label=purpose, width=0.7)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for index, top in enumerate(bottom):
        axes.text(index, top, f"{top:.2f}", ha="center", va="bottom", fontsize=9)
    axes.set_ylabel("GB (10⁹ bytes) at the peak of the phase")
    axes.set_title(title)
    axes.margins(y=0.08)
    axes.grid(axis="y", alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)
