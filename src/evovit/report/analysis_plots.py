"""The plots of an analysis: maps over photographs, curves over the blocks, how alike the selections are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from evovit.analyse import BlockMeasures
from evovit.report.plots import outside_legend
from evovit.visualize import on_cells, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = 0.85  # of a patch without a value


def draw_maps(colours: Tensor, maps: Mapping[str, Tensor], titles: Sequence[str]) -> Figure:
    """Draw a row per image: the image, then each map over it, as bright as its own largest value.

    Args:
        colours: (B, 3, height, width) in [0, 1].
        maps: by name (B, rows, columns); NaN is grey.
        titles: one per image.
    """
    from matplotlib.figure import Figure

    height, width = colours.shape[2:]
    figure = Figure(figsize=(1.5 * (len(maps) + 1), 1.6 * len(colours)), layout="constrained")
    panels = figure.subplots(len(colours), len(maps) + 1, squeeze=False)
    for i, image in enumerate(colours):
        for place, panel in enumerate(panels[i]):
            panel.set_axis_off()
            if place == 0:
                panel.imshow(image.permute(1, 2, 0).numpy())
                panel.set_title(plain(titles[i]), fontsize=8)
                continue
            name, values = list(maps.items())[place - 1]
            absent = on_cells(values[i][None].isnan(), (height, width))[0]
            panel.imshow(image.where(~absent, GREY).permute(1, 2, 0).numpy())
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            if not values[i].isnan().all():  # NaN is transparent
                look: Any = {"cmap": "inferno", "alpha": 0.7, "interpolation": "nearest"}
                panel.imshow(values[i].numpy(), extent=extent, **look)
            if i == 0:
                panel.set_title(plain(name), fontsize=8)
    return figure


def draw_cka(blocks: Sequence[BlockMeasures]) -> Figure:
    """Draw the CKA of mean patch tokens with the final class token, block by block (figure 4a)."""
    lines = {
        "all patch tokens": [block.cka for block in blocks],
        "informative": [block.cka_informative for block in blocks],
        "placeholder": [block.cka_placeholder for block in blocks],
        "by chance": [block.cka_by_chance for block in blocks],
    }
    looks = {"all patch tokens": "k-o", "informative": "C0-o", "placeholder": "C1-o", "by chance": "k:"}
    figure, (axes,) = block_axes(blocks, 1)
    for name, values in lines.items():
        shown = [(block.number, value) for block, value in zip(blocks, values, strict=True)]
        points = [(number, value) for number, value in shown if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), looks[name], markersize=4, label=name)
    axes.set(ylabel="CKA with the final class token", ylim=(0, 1.02))
    outside_legend(figure, axes)
    return figure


def draw_correlation(blocks: Sequence[BlockMeasures]) -> Figure:
    """Draw mean and variance of the correlation of queries with the mean query (figure 4b)."""
    figure, (mean, variance) = block_axes(blocks, 2)
    numbers = [block.number for block in blocks]
    mean.plot(numbers, [block.correlation for block in blocks], "C0-o", markersize=4)
    mean.set(ylabel="mean correlation", ylim=(min(0.0, *(block.correlation for block in blocks)), 1.02))
    variance.plot(numbers, [block.variance for block in blocks], "C1-o", markersize=4)
    variance.set(ylabel="variance of the correlation", ylim=(0, None))
    return figure


def block_axes(blocks: Sequence[BlockMeasures], count: int) -> tuple[Figure, list[Any]]:
    """Return a figure of axes over the blocks."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6 if count == 1 else 8, 3), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(blocks[0].number - 0.4, blocks[-1].number + 0.4)
        axes.grid(alpha=0.3)
    return figure, panels


def draw_agreement(matrices: Mapping[str, Tensor], numbers: Sequence[int]) -> Figure:
    """Draw the Jaccard index of the selections of each two blocks, a square for each matrix.

    Args:
        matrices: by name (K, K), each in [0, 1].
        numbers: of the K blocks.
    """
    from matplotlib.figure import Figure

    side = max(2.4, 0.36 * len(numbers) + 0.8)
    figure = Figure(figsize=(side * len(matrices) + 0.6, side), layout="constrained")
    for axes, (name, matrix) in zip(
        figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items(), strict=True
    ):
        axes.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis")
        axes.set_xticks(range(len(numbers)), numbers, fontsize=7)
        axes.set_yticks(range(len(numbers)), numbers, fontsize=7)
        axes.set_title(plain(name), fontsize=8)
        axes.set(xlabel="block", ylabel="block")
        for row in range(len(numbers)):
            for column in range(len(numbers)):
                value = float(matrix[row, column])
                colour = "black" if value > 0.6 else "white"
                axes.text(
                    column, row, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=6, c=colour
                )
    return figure
