"""Models side by side: their rows, what they say, and a report in one HTML file that fetches nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from evovit.bench.row import Ratio, Row
from evovit.data.digits import Scenes, colours
from evovit.data.images import TEST_BATCH
from evovit.model import ReducedViT
from evovit.models.small_vit import IMAGE_SIZE, NAME
from evovit.recipe.tables import Recipe
from evovit.report.page import heading, html_page, paragraph, picture, table
from evovit.runtime.environment import device_name
from evovit.runtime.files import write_figure, write_text
from evovit.study import Standing
from evovit.train.records import EPOCHS, read_lines
from evovit.visualize import OnBox, draw_kept, kept_on_box, kept_patches, patches_on_box

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = 10  # test scenes shown
COLUMNS = ("method", "keep ratio", "top-1 %", "GMACs", "images/s", "training s", "parameters")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model's numbers: a row of results.json."""

    model: str
    method: str
    keep_ratio: float
    top1: float  # percent of the test scenes
    gmacs: float  # 1e9 multiply-accumulates of one image
    images_per_second: float  # median, inference
    train_seconds: float
    parameters: int
    device: str
    dtype: str
    batch_size: int  # of the speed measurement

    def cells(self) -> list[str]:
        """Return the row as text, one cell per `COLUMNS`."""
        return [
            self.method,
            f"{self.keep_ratio:g}",
            f"{self.top1:.2f}",
            f"{self.gmacs:.4f}",
            f"{self.images_per_second:.0f}",
            f"{self.train_seconds:.0f}",
            f"{self.parameters}",
        ]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The dense model and Evo-ViT, in this order, with what was seen beside their rows."""

    results: tuple[Result, ...]
    speed_up: Ratio
    on_box: tuple[OnBox, ...]  # one per block of Evo-ViT
    test_scenes: int

    def findings(self) -> list[str]:
        """Say what was measured, a sentence each."""
        dense, evo = self.results
        found = [
            f"Evo-ViT at keep ratio {evo.keep_ratio:g}: top-1 {evo.top1 - dense.top1:+.2f} points, "
            f"{evo.gmacs / dense.gmacs:.2f} of the multiply-accumulates, speed {self.speed_up.verdict}."
        ]
        reducing = [share for share in self.on_box if share.kept < 1]
        if reducing:
            covered, kept, on_box, box = (sum(c) / len(reducing) for c in zip(*reducing, strict=True))
            found.append(
                f"Of the patches on the digit {covered:.0%} are kept (by chance {kept:.0%}); of the kept "
                f"patches {on_box:.0%} lie on the digit (by chance {box:.0%})."
            )
        return found


def write_report(
    out: Path,
    recipe: Recipe,
    found: Sequence[Standing],
    rows: Sequence[Row],
    scenes: Scenes,
    console: Console,
) -> None:
    """Write results.json, report.html and the pictures, and print the table.

    Args:
        recipe: of Evo-ViT.
        found: the dense model and Evo-ViT, and `rows` their speeds.
        scenes: of the test.
    """
    evo, place = found[1].model, next(found[1].model.parameters()).device
    assert isinstance(evo, ReducedViT)
    batches = torch.split(scenes.images, TEST_BATCH)
    kept = torch.cat([kept_patches(evo, images.to(place)).cpu() for images in batches])
    on_box = patches_on_box(scenes.boxes, (kept.shape[2], kept.shape[3]), (IMAGE_SIZE, IMAGE_SIZE))
    ratios = (1.0, recipe.method.options["keep_ratio"])
    epochs = [read_lines(out / each.name / EPOCHS) for each in found]
    comparison = Comparison(
        results=tuple(
            Result(
                model=NAME,
                method=each.name,
                keep_ratio=ratio,
                top1=lines[-1]["top1"],
                gmacs=row.gmacs,
                images_per_second=row.images_per_second or 0.0,
                train_seconds=sum(line["train_seconds"] for line in lines),
                parameters=sum(weight.numel() for weight in each.model.parameters()),
                device=device_name(row.device) + (f", {row.threads} threads" if row.device == "cpu" else ""),
                dtype="float32",
                batch_size=row.batch,
            )
            for each, ratio, row, lines in zip(found, ratios, rows, epochs, strict=True)
        ),
        speed_up=Ratio(rows[1].speedup or 1.0, rows[1].noise or 0.0),
        on_box=tuple(kept_on_box(kept, on_box)),
        test_scenes=scenes.images.shape[0],
    )
    shown, titles = slice(PICTURES), [f"digit {label}" for label in scenes.labels[:PICTURES].tolist()]
    write_figure(out / "accuracy_speed.png", draw_accuracy_speed(comparison.results))
    figure = draw_kept(colours(scenes.images[shown]), kept[shown], scenes.boxes[shown], titles)
    write_figure(out / "kept_patches.png", figure)
    results = json.dumps([asdict(result) for result in comparison.results], indent=2)
    write_text(out / "results.json", f"{results}\n")
    write_text(out / "report.html", page(comparison, out / "accuracy_speed.png", out / "kept_patches.png"))
    table = Table(*COLUMNS)
    for result in comparison.results:
        table.add_row(*result.cells())
    console.print(table)
    for sentence in comparison.findings():
        console.print(sentence)
    console.print(f"Report: {(out / 'report.html').resolve()}", soft_wrap=True)


def draw_accuracy_speed(results: Sequence[Result]) -> Figure:
    """Draw accuracy against speed, one point per model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for result in results:
        axes.plot(result.images_per_second, result.top1, "o", markersize=10)
        axes.annotate(
            f"{result.method}, keep {result.keep_ratio:g}",
            (result.images_per_second, result.top1),
            textcoords="offset points",
            xytext=(0, 10),
            ha="center",
        )
    axes.set(xlabel="images per second", ylabel="top-1, %")
    axes.margins(0.35)
    axes.grid(alpha=0.3)
    return figure


def page(comparison: Comparison, accuracy_speed: Path, kept: Path) -> str:
    """Return the report as one HTML document.

    Args:
        accuracy_speed: PNG of `draw_accuracy_speed`.
        kept: PNG of the patches that each block keeps.
    """
    first = comparison.results[0]
    blocks = [[str(i), *(f"{share:.1%}" for share in shares)] for i, shares in enumerate(comparison.on_box)]
    parts = [
        paragraph(
            "A small vision transformer and the same one as Evo-ViT, trained from scratch by one recipe: "
            "same first weights, same scenes, same order. A scene holds one real handwritten digit among "
            "fragments of others; the accuracy is that on scenes of digits never seen in training."
        ),
        *map(paragraph, comparison.findings()),
        table(COLUMNS, [result.cells() for result in comparison.results]),
        paragraph(
            f"{first.model} on {first.device}, {first.dtype}, {comparison.test_scenes} test scenes; speed at "
            f"batch {first.batch_size}, the models timed in turn, medians."
        ),
        picture(accuracy_speed, "accuracy against speed"),
        heading("What each block keeps"),
        paragraph(
            "Bright patches take part in the block; the darkened ones are placeholders and wait. The red box "
            "is the digit's; no model ever sees it."
        ),
        picture(kept, "kept patches of each block over test scenes"),
        heading("Kept patches and the digit's box"),
        paragraph("A patch lies on the digit if its centre lies in the box; means over all test scenes."),
        table(("block", "digit patches kept", "chance", "kept patches on digit", "chance"), blocks),
    ]
    return html_page("evovit quickstart", parts)
