"""Models side by side: their rows, what they say, and a report in one HTML file that fetches nothing."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from evovit.run.row import Ratio
from evovit.visualize import OnBox

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("method", "keep ratio", "top-1 %", "GMACs", "images/s", "training s", "parameters")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; }
"""


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

    results: tuple[Result, Result]
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


def html_page(title: str, parts: Sequence[str]) -> str:
    """Return one HTML document of parts, which fetches nothing."""
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    """Return a heading."""
    return f"<h2>{escape(text)}</h2>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; every row has one cell per column."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line("th", columns) + "".join(line("td", row) for row in rows) + "</table>"


def picture(path: Path, what: str) -> str:
    """Return a PNG file as part of the page.

    Args:
        path: the PNG file.
        what: what it shows, for who cannot see it.
    """
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{data}">'
