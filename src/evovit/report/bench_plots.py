"""The plots of a benchmark's page: times, speed-ups, where the time goes, throughput over the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evovit.bench.profile import PARTS
from evovit.bench.row import Record, name_of
from evovit.methods import DENSE
from evovit.report.page import Picture, drawn
from evovit.report.plots import outside_legend
from evovit.visualize import plain

COLOURS = {"eager": "#8da0b3", "compiled": "#2b6cb0", "graphs": "#c05621"}
PART_COLOURS = ("#2b6cb0", "#4fa3a5", "#e0a030", "#c05621", "#8a5fb0", "#8da0b3", "#c9ced6")


def plot_group(group: Sequence[Record]) -> list[Picture]:
    """Draw times, speed-ups against their ceiling, and where the time goes."""
    times = _Bars([name_of(r) for r in group], "Time", "ms per step: median, p95")
    ratios = [r for r in group if name_of(r) != DENSE and r["speedup"] is not None]
    speedups = _Bars([name_of(r) for r in ratios], "Speed-up", "over dense, same engine; red: ceiling")
    engines = list(dict.fromkeys(r["engine"] for r in group))
    half = 0.4 / len(engines)
    for r in group:
        times.bar(r, engines, r["median_ms"], [[0], [max(0.0, r["p95_ms"] - r["median_ms"])]])
    for r in ratios:
        y = speedups.bar(r, engines, r["speedup"], r["speedup"] * (r["noise"] or 0))
        speedups.axes.plot([r["mac_ratio"]] * 2, [y - half, y + half], color="#c53030", lw=2)
    speedups.axes.axvline(1, color="#1a202c", lw=1, ls="--")
    with_parts = [r for r in group if r.get("parts_ms") and r["is_best_engine"]]
    names = [f"{name_of(r)} [{r['engine']}]" for r in with_parts]
    where = _Bars(names, "Where the time goes", "ms in kernels, best engine, one step")
    starts = [0.0] * len(with_parts)
    for part, colour in zip(PARTS, PART_COLOURS, strict=True):
        widths = [r["parts_ms"].get(part, 0.0) for r in with_parts]
        where.axes.barh(range(len(widths)), widths, 0.7, left=starts, color=colour, label=part)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    return [bars.picture() for bars in (times, speedups, where) if bars.names]


class _Bars:
    """A figure of horizontal bars, a place for each name, from top to bottom."""

    def __init__(self, names: Sequence[str], title: str, xlabel: str) -> None:
        from matplotlib.figure import Figure  # slow to import, and only needed here

        self.names = list(dict.fromkeys(names))
        self.title = title
        self.figure = Figure(figsize=(5.4, 4), layout="constrained")
        self.axes = self.figure.subplots()
        self.axes.set(title=title, xlabel=xlabel)
        self.axes.use_sticky_edges = False

    def bar(self, r: Record, engines: Sequence[str], value: float, error: Any) -> float:
        """Draw a record's bar, side by side with those of the other engines; return where it is."""
        engine, height = r["engine"], 0.8 / len(engines)
        y = self.names.index(name_of(r)) + (engines.index(engine) - (len(engines) - 1) / 2) * height
        is_first = engine not in self.axes.get_legend_handles_labels()[1]
        label = engine if is_first else None
        self.axes.barh(y, value, height * 0.92, color=COLOURS.get(engine), label=label)
        self.axes.errorbar(value, y, xerr=error, color="#1a202c", capsize=2, lw=1)
        return y

    def picture(self) -> Picture:
        """Return the finished picture."""
        labels = [plain(name) for name in self.names]
        each = max(0.55, 0.1 + 0.15 * max(label.count("\n") + 1 for label in labels))  # inches
        self.figure.set_figheight(1.4 + each * len(labels))
        self.axes.set_yticks(range(len(labels)), labels, fontsize=9)
        self.axes.set(ylim=(len(self.names) - 0.45, -0.55), xlim=(0, None))
        outside_legend(self.figure, self.axes, loc="outside lower center", ncols=4)
        return drawn(self.figure, self.title)


def plot_batches(records: Sequence[Record]) -> list[Picture]:
    """Plot throughput over the batch size where a variant was measured at several."""
    from matplotlib.figure import Figure

    lines: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for r in (r for r in records if r["is_best_engine"]):
        where = (r["model"], f"{r['image_size']} px", r["device_name"], r["dtype"], r["task"])
        lines.setdefault(where, {}).setdefault(name_of(r), {})[r["batch"]] = r["images_per_second"]
    pictures = []
    for (model, *rest), variants in lines.items():
        batches = sorted({batch for points in variants.values() for batch in points})
        if max(len(points) for points in variants.values()) < 2:
            continue
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for name, points in variants.items():
            style: dict[str, Any] = {"color": "#1a202c", "ls": "--"} if name == DENSE else {}
            axes.plot(
                *zip(*sorted(points.items()), strict=True), marker="o", ms=4, label=plain(name), **style
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        title = plain(f"{model} at {', '.join(rest)}", line=60)
        axes.set(xlabel="batch", ylabel="images per second, best engine", title=title, ylim=(0, None))
        outside_legend(figure, axes)
        pictures.append(drawn(figure, f"images per second over batch, {model}"))
    return pictures
