"""The memory of a run, in tables and pictures: by phase, and in one step over time.

Takes plain numbers: bytes by purpose, by phase or by moment. Measures and predicts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.report.plot import new_figure, save_figure
from qlora_kit.report.tables import Rows

ACCOUNT = "memory.json"
"""the predicted and the measured memory of a run, in its folder"""

Breakdown = Mapping[str, int]
_MB = 10**6
_GB = 10**9


def phase_rows(device: Mapping[str, int], host: Mapping[str, int]) -> Rows:
    """Return one row a phase: its peak on the device, and on the host."""
    return tuple(
        (phase, f"{size_text(peak):>8}   host {size_text(host[phase]):>8}")
        for phase, peak in device.items()
    )


def breakdown_rows(parts: Breakdown, order: Sequence[str]) -> Rows:
    """Return one row a purpose; purposes below a thousandth of the whole are left out."""
    least = sum(parts.values()) / 1000
    present = [name for name in order if parts.get(name, 0) > least]
    return tuple((name, f"{size_text(parts[name]):>8}") for name in present)


def size_text(size: int) -> str:
    """Return a size for people: "4.70 GB" or "37.4 MB", of 10⁹ and 10⁶ bytes."""
    return f"{size / _GB:.2f} GB" if size >= _GB / 10 else f"{size / _MB:.1f} MB"


def _unit(largest: int) -> tuple[int, str]:
    """Return the unit of a picture: its bytes and its name."""
    return (_GB, "GB (10⁹ bytes)") if largest >= _GB / 10 else (_MB, "MB (10⁶ bytes)")


def difference_text(measured: int, predicted: int) -> str:
    """Return the difference of a measured peak from the predicted one, such as "-1.2%"."""
    return f"{(measured - predicted) / predicted:+.1%}"


def draw_timeline(
    timeline: Sequence[Sequence[int]],
    order: Sequence[str],
    levels: Mapping[str, int],
    title: str,
    path: Path,
) -> None:
    """Draw the memory of one optimiser step over time.

    Args:
        timeline: bytes by purpose at each moment.
        order: the purposes, from the bottom of the picture.
        levels: bytes of horizontal lines, by the name of the line.
        title: the title of the picture.
        path: the file of the picture.
    """
    from matplotlib import color_sequences

    figure, axes = new_figure(9, 4.8)
    colors = color_sequences["tab20"]
    largest = max((sum(moment) for moment in timeline), default=0)
    unit, label = _unit(largest)
    heights = [[moment[index] / unit for moment in timeline] for index in range(len(order))]
    shown = [i for i, row in enumerate(heights) if max(row, default=0) * unit > largest / 1000]
    if timeline:
        axes.stackplot(
            range(len(timeline)),
            *(heights[i] for i in shown),
            labels=[order[i] for i in shown],
            colors=[colors[i % len(colors)] for i in shown],
        )
    for (name, level), style in zip(levels.items(), ("--", ":"), strict=False):
        axes.axhline(level / unit, color="black", linestyle=style, linewidth=1, label=name)
    axes.set_xlabel("moments of one optimiser step")
    axes.set_ylabel(label)
    axes.set_xlim(0, max(1, len(timeline) - 1))
    _finish(axes, title)
    axes.set_ylim(bottom=0)
    save_figure(figure, path)


def draw_memory(
    phases: Mapping[str, Breakdown], order: Sequence[str], title: str, path: Path
) -> None:
    """Draw one stacked bar a phase.

    Args:
        phases: bytes by purpose, by phase.
        order: the purposes, from the bottom of the picture.
        title: the title of the picture.
        path: the file of the picture.
    """
    from matplotlib import color_sequences

    figure, axes = new_figure(9, 4.8)
    colors = color_sequences["tab20"]
    names = list(phases)
    bottom = [0.0] * len(names)
    largest = max(sum(parts.values()) for parts in phases.values())
    unit, label = _unit(largest)
    for color, purpose in zip(colors, order, strict=False):
        heights = [phases[phase].get(purpose, 0) / unit for phase in names]
        if max(heights) * unit < largest / 1000:
            continue
        axes.bar(names, heights, bottom=bottom, color=color, label=purpose, width=0.7)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for index, top in enumerate(bottom):
        axes.text(index, top, f"{top:.2f}", ha="center", va="bottom", fontsize=9)
    axes.set_ylabel(f"{label} at the peak of the phase")
    _finish(axes, title)
    save_figure(figure, path)


def _finish(axes: Any, title: str) -> None:
    """Add the parts that both pictures have: a title, a grid, and a legend beside the picture."""
    axes.set_title(title)
    axes.margins(y=0.08)
    axes.grid(axis="y", alpha=0.25)
    # The legend has the order of the stack, from the top.
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))
