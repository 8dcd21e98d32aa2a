"""What a quickstart leaves behind: both models' rows, what they say, pictures, and one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from evovit.bench.row import Row
from evovit.data.digits import Scenes, colours
from evovit.data.images import TEST_BATCH
from evovit.model import ReducedViT
from evovit.models.small_vit import IMAGE_SIZE, NAME
from evovit.recipe.tables import Recipe
from evovit.report.page import Heading, Paragraph, Picture, Quiet, drawn, page
from evovit.report.plots import Point, draw_accuracy
from evovit.report.tables import Table, as_printed, table
from evovit.runtime.environment import device_name
from evovit.runtime.files import write_bytes, write_text
from evovit.study import Standing
from evovit.train.records import EPOCHS, read_lines
from evovit.visualize import OnBox, draw_kept, kept_on_box, kept_patches, patches_on_box, several_classes

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
    shares = kept_on_box(kept, on_box)
    results = results_of(out, recipe, found, rows)
    sentences = findings(results, rows[1], shares)
    points = [
        Point(f"{each.method}, keep {each.keep_ratio:g}", each.gmacs, each.images_per_second, [each.top1])
        for each in results
    ]
    accuracy = drawn(draw_accuracy(points), "accuracy against multiply-accumulates and against speed")
    chosen = several_classes(scenes.labels, PICTURES)
    titles = [f"digit {label}" for label in scenes.labels[chosen].tolist()]
    figure = draw_kept(colours(scenes.images[chosen]), kept[chosen], scenes.boxes[chosen], titles)
    pictures = drawn(figure, "kept patches of each block over test scenes")
    cells = table(COLUMNS, [result.cells() for result in results])
    speed = (
        f"{NAME} on {results[0].device}, {results[0].dtype}, {len(scenes.labels)} test scenes; speed at "
        f"batch {results[0].batch_size}, the models timed in turn, medians."
    )
    write_bytes(out / "accuracy_speed.png", accuracy.png)
    write_bytes(out / "kept_patches.png", pictures.png)
    write_text(out / "results.json", json.dumps([asdict(result) for result in results], indent=2) + "\n")
    write_text(out / "report.html", _page(sentences, cells, speed, accuracy, pictures, shares))
    console.print(as_printed(cells))
    for sentence in sentences:
        console.print(sentence)
    console.print(f"Report: {(out / 'report.html').resolve()}", soft_wrap=True)


def results_of(out: Path, recipe: Recipe, found: Sequence[Standing], rows: Sequence[Row]) -> list[Result]:
    """Return the numbers of the dense model and of Evo-ViT, whose runs are in `out`."""
    results = []
    for each, row, ratio in zip(found, rows, (1.0, recipe.method.options["keep_ratio"]), strict=True):
        epochs = read_lines(out / each.name / EPOCHS)
        result = Result(
            model=NAME,
            method=each.name,
            keep_ratio=ratio,
            top1=epochs[-1]["top1"],
            gmacs=row.gmacs,
            images_per_second=row.images_per_second or 0.0,
            train_seconds=sum(epoch["train_seconds"] for epoch in epochs),
            parameters=sum(weight.numel() for weight in each.model.parameters()),
            device=device_name(row.device) + (f", {row.threads} threads" if row.device == "cpu" else ""),
            dtype="float32",
            batch_size=row.batch,
        )
        results.append(result)
    return results


def findings(results: Sequence[Result], speed: Row, shares: Sequence[OnBox]) -> list[str]:
    """Say what was measured, a sentence each.

    Args:
        results: of the dense model and of Evo-ViT, whose speed beside it is `speed`.
        shares: one per block of Evo-ViT.
    """
    dense, evo = results
    found = [
        f"Evo-ViT at keep ratio {evo.keep_ratio:g}: top-1 {evo.top1 - dense.top1:+.2f} points, "
        f"{evo.gmacs / dense.gmacs:.2f} of the multiply-accumulates, speed {speed.verdict}."
    ]
    reducing = [share for share in shares if share.kept < 1]
    if reducing:
        covered, kept, on_box, box = (sum(c) / len(reducing) for c in zip(*reducing, strict=True))
        found.append(
            f"Of the patches on the digit {covered:.0%} are kept (by chance {kept:.0%}); of the kept "
            f"patches {on_box:.0%} lie on the digit (by chance {box:.0%})."
        )
    return found


def _page(
    sentences: Sequence[str],
    results: Table,
    speed: str,
    accuracy: Picture,
    kept: Picture,
    shares: Sequence[OnBox],
) -> str:
    blocks = [[str(i), *(f"{share:.1%}" for share in block)] for i, block in enumerate(shares)]
    return page(
        "evovit quickstart",
        [
            Paragraph(
                "A small vision transformer and the same one as Evo-ViT, trained from scratch by one recipe: "
                "same first weights, same scenes, same order. A scene holds one real handwritten digit among "
                "fragments of others; the accuracy is that on scenes of digits never seen in training."
            ),
            *map(Paragraph, sentences),
            results,
            Quiet(speed),
            accuracy,
            Heading("What each block keeps"),
            Paragraph(
                "Bright patches take part in the block; the darkened ones are placeholders and wait. The red "
                "box is the digit's; no model ever sees it."
            ),
            kept,
            Heading("Kept patches and the digit's box"),
            Paragraph("A patch lies on the digit if its centre lies in the box; means over all test scenes."),
            table(("block", "digit patches kept", "chance", "kept patches on digit", "chance"), blocks),
        ],
    )
