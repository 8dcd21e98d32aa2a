"""What several plots share: accuracy beside cost, and axes and legends that neither mislead nor hide."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from evovit.visualize import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = "oD^v<>PX"  # ten colours, then the next mark


class Point(NamedTuple):
    """One model: what it costs and how accurate it is."""

    name: str
    gmacs: float
    images_per_second: float
    top1: Sequence[float]  # percent, for each seed


def draw_accuracy(points: Sequence[Point]) -> Figure:
    """Draw accuracy against GMACs and against images per second; bars are standard deviations.

    Args:
        points: the dense model's first.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    ends: list[float] = []
    for number, point in enumerate(points):
        look: dict[str, Any] = {"color": "black", "fmt": "s"}
        if number:
            look = {"color": f"C{(number - 1) % 10}", "fmt": MARKS[(number - 1) // 10 % len(MARKS)]}
        height, spread = mean(point.top1), stdev(point.top1) if len(point.top1) > 1 else 0.0
        low, high = max(0.0, height - spread), min(100.0, height + spread)
        ends += [low, high]
        bar = [[height - low], [high - height]] if spread else None
        for axes, x in zip(panels, (point.gmacs, point.images_per_second), strict=True):
            axes.errorbar(x, height, bar, capsize=3, label=plain(point.name), clip_on=False, **look)
    for axes, xlabel in zip(panels, ("GMACs", "images per second"), strict=True):
        axes.set(xlabel=xlabel, xlim=(0, 1.03 * axes.get_xlim()[1]))
        accuracy_axis(axes, ends)
        axes.grid(alpha=0.3)
    outside_legend(figure, panels[0])
    return figure


def accuracy_axis(axes: Any, values: Sequence[float]) -> None:
    """Let the y axis, of percents, end at 100 at most and show 10 points or more.

    So no small difference looks like a cliff.
    """
    low, high = min(values, default=0.0), max(values, default=100.0)
    top = min(100, 5 * ceil((high + 1) / 5))
    axes.set(ylabel="top-1, %", ylim=(max(0, min(5 * floor((low - 1) / 5), top - 10)), top))


def epoch_axis(axes: Any) -> None:
    """Let the x axis show whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    if high - low < 1:  # of one epoch
        axes.set_xlim(low - 0.5, high + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def outside_legend(figure: Figure, axes: Any, **place: Any) -> None:
    """Put the legend of an axes beside all others, to the right, where it covers nothing; it makes room."""
    handles, names = axes.get_legend_handles_labels()
    if names:
        height = sum(0.22 + 0.15 * name.count("\n") for name in names) + 0.3  # inches
        if not place:
            figure.set_figheight(max(figure.get_figheight(), height))
        place = {"loc": "outside right upper", "fontsize": "small"} | place
        figure.legend(handles, names, **place)
