"""`evovit report`: run folders to one table, a row per recipe, as Markdown, CSV and HTML with curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from evovit.errors import EvoViTError
from evovit.macs import gmacs
from evovit.methods import DENSE
from evovit.recipe.reading import read_recipe
from evovit.recipe.tables import Recipe
from evovit.report.page import heading, html_page, paragraph, picture, table
from evovit.report.tables import as_csv, as_markdown, spread
from evovit.runtime.files import write_figure, write_text
from evovit.train.build import build_model, image_side
from evovit.train.records import EPOCHS, read_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("run", "method", "seeds", "epochs", "top-1 %", "best %", "EMA %", "GMACs", "epoch s", "of dense")
CLASSES = 10  # for the GMACs where no run says how many


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ in the seed alone."""

    name: str
    recipe: Recipe
    runs: list[list[dict[str, Any]]]  # per seed, its epochs

    def last(self, key: str) -> list[float]:
        """Return a number of the last epoch that has it, for each run."""
        found = ([epoch[key] for epoch in run if key in epoch] for run in self.runs)
        return [values[-1] for values in found if values]

    @property
    def epoch_seconds(self) -> float:
        """Median training time of an epoch; each run's first is left out, as it warms up."""
        return float(median(epoch["train_seconds"] for run in self.runs for epoch in (run[1:] or run)))

    @property
    def gmacs(self) -> float:
        """1e9 multiply-accumulates of one image."""
        with torch.device("meta"):
            model = build_model(self.recipe, self.recipe.model.num_classes or CLASSES, weights=False)
        side = image_side(model)
        return gmacs(model.eval(), (3, side, side))

    def cells(self, dense_seconds: float | None) -> list[str]:
        """Return the row, one cell per `COLUMNS`; spreads are standard deviations over the seeds."""
        best = [max(epoch.get("top1", 0.0) for epoch in run) for run in self.runs]
        seconds = self.epoch_seconds
        return [
            self.name,
            self.recipe.method.name,
            str(len(self.runs)),
            "/".join(sorted({str(len(run)) for run in self.runs})) + f" of {self.recipe.run.epochs}",
            spread(self.last("top1")),
            spread(best),
            spread(self.last("ema_top1")),
            f"{self.gmacs:.4g}",
            f"{seconds:.3g}",
            f"{seconds / dense_seconds:.2f}" if dense_seconds else "",
        ]


def write_report(places: Sequence[Path], out: Path) -> str:
    """Write report.md, .csv, .html and the curves of runs at or below places; return what to print."""
    groups = read_groups(places)
    dense = [group.epoch_seconds for group in groups if group.recipe.method.name == DENSE]
    rows = [group.cells(dense[0] if len(dense) == 1 else None) for group in groups]
    markdown = as_markdown(rows, COLUMNS)
    write_figure(out / "curves.png", draw_curves(groups))
    write_text(out / "report.md", markdown)
    write_text(out / "report.csv", as_csv(rows, COLUMNS))
    write_text(out / "report.html", as_html(rows, out / "curves.png"))
    return f"{markdown}\n{out / 'report.html'} written"


def read_groups(places: Sequence[Path]) -> list[Group]:
    """Find the run folders at or below the places and join the seeds of each recipe."""
    folders = sorted({path.parent for place in places for path in place.glob("**/recipe.toml")})
    groups: dict[str, Group] = {}
    for folder in folders:
        epochs = read_lines(folder / EPOCHS)
        if not epochs:
            continue
        recipe = read_recipe(folder / "recipe.toml")
        key = replace(recipe, run=replace(recipe.run, seed=0)).to_toml()
        name = folder.parent.name if folder.name.startswith("seed") else folder.name
        groups.setdefault(key, Group(name, recipe, [])).runs.append(epochs)
    if not groups:
        raise EvoViTError(
            f"No finished epoch of a run is at or below {', '.join(map(str, places)) or 'nothing'}; give "
            "folders written by `evovit train`."
        )
    return list(groups.values())


def as_html(rows: Sequence[Sequence[str]], curves: Path) -> str:
    """Return one HTML document that fetches nothing."""
    parts = [
        table(COLUMNS, rows),
        paragraph("Mean ± standard deviation over seeds, of the last and of the best test; epoch s: median."),
        heading("Curves"),
        picture(curves, "training loss and top-1 by epoch, a line per run"),
    ]
    return html_page("evovit report", parts)


def draw_curves(groups: Sequence[Group]) -> Figure:
    """Draw loss and top-1 against the epoch; seeds of a recipe share a colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2), ("loss", "top1"), ("training loss", "top-1, %"), strict=True
    ):
        for colour, group in enumerate(groups):
            for seed, run in enumerate(group.runs):
                points = [(epoch["epoch"], epoch[key]) for epoch in run if key in epoch]
                name = group.name if seed == 0 else "_"
                axes.plot(*zip(*points, strict=True), color=f"C{colour % 10}", label=name, alpha=0.8)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
