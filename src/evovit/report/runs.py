"""`evovit report`: run folders to one table, a row per recipe, as Markdown, CSV and HTML with curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from evovit.errors import EvoViTError, check_count, printable, shown
from evovit.macs import gmacs
from evovit.methods import DENSE
from evovit.model import backbone_of
from evovit.options import MOST
from evovit.recipe.reading import read_recipe
from evovit.recipe.tables import Recipe
from evovit.report.page import Heading, Paragraph, Part, drawn, page
from evovit.report.plots import accuracy_axis, epoch_axis, outside_legend
from evovit.report.tables import as_csv, as_markdown, spread, table
from evovit.runtime.files import as_path, read_json, write_bytes, write_text
from evovit.train.build import build_model
from evovit.train.records import EPOCHS, read_lines
from evovit.visualize import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("run", "method", "seeds", "epochs", "top-1 %", "best %", "EMA %", "GMACs", "epoch s", "of dense")
MOST_GMACS = 1e9  # of one image
CLASSES = 10  # for the GMACs where neither run nor recipe says how many


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ in the seed alone."""

    name: str
    recipe: Recipe
    gmacs: float  # 1e9 multiply-accumulates of one image
    runs: list[list[dict[str, Any]]]  # per seed, its epochs

    def last(self, key: str) -> list[float]:
        """Return a number of the last epoch that has it, for each run."""
        found = ([epoch[key] for epoch in run if key in epoch] for run in self.runs)
        return [values[-1] for values in found if values]

    @property
    def epoch_seconds(self) -> float:
        """Median training time of an epoch; each run's first is left out, as it warms up."""
        return float(median(epoch["train_seconds"] for run in self.runs for epoch in (run[1:] or run)))

    def cells(self, dense_seconds: float | None) -> list[str]:
        """Return the row, one cell per `COLUMNS`; spreads are standard deviations over the seeds."""
        tests = [[epoch["top1"] for epoch in run if "top1" in epoch] for run in self.runs]
        seconds = self.epoch_seconds
        return [
            self.name,
            self.recipe.method.name,
            str(len(self.runs)),
            "/".join(sorted({str(len(run)) for run in self.runs})) + f" of {self.recipe.run.epochs}",
            spread(self.last("top1")),
            spread([max(values) for values in tests if values]),
            spread(self.last("ema_top1")),
            f"{self.gmacs:.4g}",
            f"{seconds:.3g}",
            f"{seconds / dense_seconds:.2f}" if dense_seconds else "",
        ]


def write_report(places: Sequence[Path], out: Path) -> str:
    """Write report.md, .csv, .html and the curves of runs at or below places; return what to print."""
    groups = read_groups(places)
    dense = [group.epoch_seconds for group in groups if group.recipe.method.name == DENSE]
    rows = table(COLUMNS, [group.cells(dense[0] if len(dense) == 1 else None) for group in groups])
    curves = drawn(draw_curves(groups), "training loss and top-1 by epoch, a line per run")
    parts: list[Part] = [
        rows,
        Paragraph("Mean ± standard deviation over seeds, of the last and the best test; epoch s: median."),
        Heading("Curves"),
        curves,
    ]
    markdown = as_markdown(rows)
    write_bytes(out / "curves.png", curves.data)
    write_text(out / "report.md", markdown)
    write_text(out / "report.csv", as_csv(rows))
    write_text(out / "report.html", page("evovit report", parts))
    return f"{markdown}\n{out / 'report.html'} written"


def read_groups(places: Sequence[Path]) -> list[Group]:
    """Find the run folders at or below the places and join the seeds of each recipe."""
    found = {
        place: [path.parent for path in as_path(place, "RUN").glob("**/recipe.toml")] for place in places
    }
    for place, below in found.items():
        if not below:
            raise EvoViTError(
                f"No run is at or below {shown(place)}; give folders written by `evovit train`."
            )
    folders = sorted({folder for below in found.values() for folder in below})
    groups: dict[str, Group] = {}
    for folder in folders:
        epochs = read_lines(folder / EPOCHS)
        if not epochs:
            continue
        odd = next((epoch for epoch in epochs if not is_epoch(epoch)), None)
        if odd is not None:
            raise EvoViTError(
                f"{shown(folder / EPOCHS)} has {shown(odd)}, not an epoch of a training; move it away."
            )
        recipe = read_recipe(folder / "recipe.toml")
        key = replace(recipe, run=replace(recipe.run, seed=0)).to_toml()
        if key not in groups:
            name = folder.parent.name if folder.name.startswith("seed") else folder.name
            groups[key] = Group(printable(name), recipe, read_gmacs(folder, recipe), [])
        groups[key].runs.append(epochs)
    if not groups:
        raise EvoViTError(
            f"No finished epoch of a run is at or below {', '.join(map(str, places)) or 'nothing'}; give "
            "folders written by `evovit train`."
        )
    return list(groups.values())


def is_epoch(record: dict[str, Any]) -> bool:
    """Tell whether a record has the numbers that a report shows of an epoch."""
    number = (int, float)
    loss: Any = record.get("loss")
    epoch: Any = record.get("epoch")
    seconds: Any = record.get("train_seconds")
    shares = [record[key] for key in ("top1", "ema_top1") if key in record]
    return (
        type(epoch) is int
        and 0 < epoch <= MOST
        and (type(loss) in number or loss in ("nan", "inf", "-inf"))
        and type(seconds) in number
        and 0 <= seconds < math.inf
        and all(type(share) in number and 0 <= share <= 100 for share in shares)
    )


def read_gmacs(folder: Path, recipe: Recipe) -> float:
    """Return the GMACs that a run wrote down; those of the former version did not: the model is built."""
    path = folder / "environment.json"
    written = read_json(path, "evovit train") if path.exists() else {}
    if "gmacs" in written:
        found = written["gmacs"]
        if type(found) not in (int, float) or not 0 <= found < MOST_GMACS:
            raise EvoViTError(f"gmacs in {shown(path)} is {shown(found)}, not such a number; move it away.")
        return float(found)
    classes = recipe.model.num_classes or check_count(
        "num_classes", written.get("num_classes", CLASSES), 1, MOST
    )
    with torch.device("meta"):
        model = build_model(recipe, classes, weights=False)
    return gmacs(model, backbone_of(model).image_shape)


def draw_curves(groups: Sequence[Group]) -> Figure:
    """Draw loss and top-1 against the epoch; seeds of a recipe share a colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, top1 = figure.subplots(1, 2)
    for axes, key in ((loss, "loss"), (top1, "top1")):
        for colour, group in enumerate(groups):
            for seed, run in enumerate(group.runs):
                tested = [epoch for epoch in run if key in epoch]
                axes.plot(
                    [epoch["epoch"] for epoch in tested],
                    [float(epoch[key]) for epoch in tested],  # one that is not finite is written as text
                    color=f"C{colour % 10}",
                    label=plain(group.name) if seed == 0 else None,
                    alpha=0.8,
                    marker="o",
                    markersize=3,
                    clip_on=False,
                )
        epoch_axis(axes)
        axes.grid(alpha=0.3)
    loss.set_ylabel("training loss")
    accuracy_axis(
        top1, [epoch["top1"] for group in groups for run in group.runs for epoch in run if "top1" in epoch]
    )
    outside_legend(figure, loss)
    return figure
