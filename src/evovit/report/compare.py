"""What a comparison leaves behind: a table as Markdown, CSV and HTML, accuracy plots and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from evovit.bench.row import Row
from evovit.model import ReducedViT
from evovit.report.page import heading, html_page, paragraph, picture, table
from evovit.report.tables import as_csv, as_markdown, signed, spread
from evovit.runtime.files import write_figure, write_text
from evovit.study import Shown, Standing
from evovit.visualize import draw_side_by_side, kept_patches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("run", "method", "GMACs", "ceiling", "speed-up", "top-1 % before", "top-1 % after", "of dense")


def write_report(out: Path, found: Sequence[Standing], speeds: Sequence[Row], shown: Shown) -> str:
    """Write compare.md, .csv, .html and the pictures; return what to print.

    Args:
        found: the dense model first.
        speeds: one row for each.
    """
    rows = [cells(each, row, found[0]) for each, row in zip(found, speeds, strict=True)]
    markdown = as_markdown(rows, COLUMNS)
    pictures = {
        "accuracy.png": draw_accuracy(found, speeds),
        "kept.png": draw_kept_side_by_side(found, shown),
    }
    for name, figure in pictures.items():
        write_figure(out / name, figure)
    texts = {
        "compare.md": markdown,
        "compare.csv": as_csv(rows, COLUMNS),
        "compare.html": _page(out, speeds[0], len(found[0].after), rows),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    notes = "".join(f"note: {note}\n" for note in speeds[0].notes)
    return f"{markdown}\n{notes}{out / 'compare.html'} written"


def cells(each: Standing, row: Row, dense: Standing) -> list[str]:
    """Return the row of one contestant, one cell per `COLUMNS`; differences to dense are per seed."""
    differences = [a - b for a, b in zip(each.after, dense.after, strict=True)]
    return [
        each.name,
        each.method,
        f"{row.gmacs:.4f}",
        f"{row.mac_ratio:.2f}",
        f"{row.speedup:.2f}x ± {row.noise:.1%}" if row.noise is not None else "1",
        spread(each.before),
        spread(each.after),
        "" if each is dense else signed(differences),
    ]


def _page(out: Path, row: Row, seeds: int, rows: Sequence[Sequence[str]]) -> str:
    body = [
        paragraph(
            f"All are trained with equal budgets; {seeds} seed{'s' if seeds > 1 else ''}, mean ± standard "
            "deviation; 'of dense' is the difference to the dense model trained as long, seed by seed. "
            "'Before' is each model as it starts, untrained."
        ),
        table(COLUMNS, rows),
        paragraph(
            f"Speed: {row.device}, {row.types}, batch {row.batch}, {row.mode}, {row.threads} threads, "
            f"{row.rounds} rounds in turn; the ceiling is the ratio of multiply-accumulates."
        ),
        *(paragraph(f"Note: {note}.") for note in row.notes),
        picture(out / "accuracy.png", "accuracy against multiply-accumulates and against measured speed"),
        heading("What the last block sees"),
        paragraph(
            "Patches that take part in the last block are bright. Slots without a place are not shown."
        ),
        picture(out / "kept.png", "kept patches of the last block, a column per method"),
    ]
    return html_page("evovit compare", body)


def draw_accuracy(found: Sequence[Standing], speeds: Sequence[Row]) -> Figure:
    """Draw accuracy against GMACs and against images per second; bars are standard deviations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, label in zip(figure.subplots(1, 2), ("GMACs", "images per second"), strict=True):
        for number, (each, row) in enumerate(zip(found, speeds, strict=True)):
            x = row.gmacs if label == "GMACs" else row.images_per_second
            bar = stdev(each.after) if len(each.after) > 1 else None
            look = {"color": "black", "fmt": "s"} if number == 0 else {"color": f"C{number % 10}", "fmt": "o"}
            axes.errorbar(x, mean(each.after), yerr=bar, capsize=3, label=each.name, **look)
        axes.set(xlabel=label, ylabel="top-1, %")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_kept_side_by_side(found: Sequence[Standing], shown: Shown) -> Figure:
    """Draw a row per image, a column per reduced model: the patches in its last block."""
    reduced = [(each.name, each.model) for each in found if isinstance(each.model, ReducedViT)]
    device = next(found[0].model.parameters()).device
    kept = {name: kept_patches(model, shown.images.to(device))[:, -1] for name, model in reduced}
    return draw_side_by_side(shown.colours, kept, shown.titles)
