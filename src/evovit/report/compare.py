"""What a comparison writes: a table as Markdown, CSV and HTML, accuracy plots and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evovit.bench.row import Row
from evovit.model import ReducedViT
from evovit.report.page import Heading, Note, Paragraph, Picture, Quiet, drawn, page
from evovit.report.plots import Point, draw_accuracy
from evovit.report.tables import Table, as_csv, as_markdown, speedup_text, spread, table
from evovit.runtime.files import write_bytes, write_text
from evovit.study import Shown, Standing
from evovit.train.evaluate import paired_over_runs
from evovit.visualize import draw_side_by_side, kept_patches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    *("run", "method", "GMACs", "ceiling", "speed-up", "top-1 % before", "top-1 % after"),
    *("of dense", "paired error"),
)


def write_report(out: Path, found: Sequence[Standing], speeds: Sequence[Row], shown: Shown) -> str:
    """Write compare.md, .csv, .html and the pictures; return what to print.

    Args:
        found: the dense model first.
        speeds: one row for each.
    """
    pairs = list(zip(found, speeds, strict=True))
    rows = table(COLUMNS, [cells(each, row, found[0]) for each, row in pairs])
    points = [Point(each.name, row.gmacs, row.images_per_second or 0.0, each.after) for each, row in pairs]
    what = "accuracy against multiply-accumulates and against measured speed"
    accuracy = drawn(draw_accuracy(points), what)
    kept = drawn(draw_kept_side_by_side(found, shown), "kept patches of the last block, a column per method")
    markdown = as_markdown(rows)
    write_bytes(out / "accuracy.png", accuracy.data)
    write_bytes(out / "kept.png", kept.data)
    write_text(out / "compare.md", markdown)
    write_text(out / "compare.csv", as_csv(rows))
    write_text(out / "compare.html", _page(rows, speeds[0], len(found[0].after), accuracy, kept))
    notes = "".join(f"note: {note}\n" for note in speeds[0].notes)
    return f"{markdown}\n{notes}{out / 'compare.html'} written"


def cells(each: Standing, row: Row, dense: Standing) -> list[str]:
    """Return the row of one contestant, one cell per `COLUMNS`; differences to dense are per seed."""
    differences = [a - b for a, b in zip(each.after, dense.after, strict=True)]
    return [
        each.name,
        each.method,
        f"{row.gmacs:.4g}",
        f"{row.mac_ratio:.2f}",
        speedup_text(row.speedup, row.noise),
        spread(each.before),
        spread(each.after),
        "" if each is dense else spread(differences, "+"),
        "" if each is dense else f"{paired_over_runs(each.right, dense.right)[1]:.2f}",
    ]


def _page(rows: Table, row: Row, seeds: int, accuracy: Picture, kept: Picture) -> str:
    return page(
        "evovit compare",
        [
            Paragraph(
                f"All models are trained with equal budgets; {seeds} seed{'s' if seeds > 1 else ''}, mean ± "
                "standard deviation. 'Of dense' is the difference to the dense model trained equally long, "
                "seed by seed; 'paired error' is its standard error over the test images, compared image by "
                "image. 'Before' is each model before this training."
            ),
            rows,
            Quiet(
                f"Speed: {row.device}, {row.types}, batch {row.batch}, {row.engine}, {row.threads} threads, "
                f"{row.rounds} rounds in turn. The ceiling is the ratio of multiply-accumulates."
            ),
            *(Note(f"Note: {note}.") for note in row.notes),
            accuracy,
            Heading("What the last block sees"),
            Paragraph(
                "Patches that take part in the last block are bright. Tokens without a place are not shown."
            ),
            kept,
        ],
    )


def draw_kept_side_by_side(found: Sequence[Standing], shown: Shown) -> Figure:
    """Draw a row per image, a column per reduced model: the patches in its last block."""
    reduced = [(each.name, each.model) for each in found if isinstance(each.model, ReducedViT)]
    device = next(found[0].model.parameters()).device
    kept = {name: kept_patches(model, shown.images.to(device))[:, -1] for name, model in reduced}
    return draw_side_by_side(shown.colours, kept, shown.titles)
