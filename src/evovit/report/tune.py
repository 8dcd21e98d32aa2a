"""What a search for a schedule says: the answer, damage against measured speed-up, both tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evovit.report.page import Heading, Note, Paragraph, Part, Quiet, drawn, page
from evovit.report.plots import MARKS, outside_legend
from evovit.report.tables import Table, speedup_text, table
from evovit.runtime.files import write_text
from evovit.tuning.tune import Tuned
from evovit.visualize import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANDOM = (
    "No images were given, so damage was measured on random ones, which says little about photographs. Give "
    "--images with a few hundred photographs like those the model will see."
)


def candidates_table(found: Tuned, most: int = 30, predicted: bool = True) -> Table:
    """Return what was measured, fastest first; the winner is bold.

    Args:
        predicted: also show what had been predicted.
    """
    ordered = sorted(found.candidates, key=lambda one: one.ms)[:most]
    columns = ["ms", "speed-up", "GMACs", "damage", *(["predicted ms", "predicted"] if predicted else [])]
    rows = []
    for one in ordered:
        hoped = "" if one.predicted_damage is None else f"{one.predicted_damage:.3g}"
        numbers = [f"{one.ms:.2f}", speedup_text(one.speedup, one.noise), f"{one.gmacs:.3g}"]
        numbers += [f"{one.damage:.3g}", *([f"{one.predicted_ms:.2f}", hoped] if predicted else [])]
        rows.append([*numbers, str(one.plan)])
    bold = [found.best is not None and one.plan == found.best.plan for one in ordered]
    return table([*columns, "plan"], rows, bold)


def draw_pareto(found: Tuned, size: tuple[float, float] = (9, 4.5)) -> Figure:
    """Draw damage against speed-up, measured in turn with dense: schedules filled, own knobs hollow.

    Args:
        size: (width, height) in inches; of a narrow figure the legend stands below.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    methods = sorted({one.plan.method for one in found.candidates})
    for number, method in enumerate(methods):
        for own in (False, True):
            some = [
                one
                for one in found.candidates
                if one.plan.method == method and ("keep_per_block" not in one.plan.options) == own
            ]
            if some:
                axes.plot(
                    [one.speedup for one in some],
                    [one.damage for one in some],
                    MARKS[number % len(MARKS)],
                    color=f"C{number % 10}",
                    fillstyle="none" if own else "full",
                    label=plain(f"{method}, {'its own option' if own else 'searched schedule'}"),
                )
    if found.best is not None:
        axes.plot(
            found.best.speedup, found.best.damage, "*", color="black", markersize=15, label="chosen", zorder=3
        )
    axes.axvline(1, color="grey", linestyle="-", label="dense")
    axes.axvline(found.target, color="grey", linestyle="--", label="target")
    axes.set(xlabel="speed-up over dense, measured in turn", ylabel=plain(found.conditions["measure"]))
    if min((one.damage for one in found.candidates), default=0) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    outside_legend(figure, axes, **({} if size[0] > 6 else {"loc": "outside lower center"}))
    return figure


def latency_table(found: Tuned) -> Table:
    """Return the latency table."""
    latency = found.latency
    rows = [
        [str(count), *(f"{latency.ms[part][i]:.3f} ± {latency.noise[part][i]:.1%}" for part in latency.ms)]
        for i, count in enumerate(latency.rows)
    ]
    return table(("rows", *(f"{part}, ms" for part in latency.ms)), rows)


def answer_of(found: Tuned, top1: Sequence[str] = ()) -> list[Part]:
    """Return the answer in words, with what makes it doubtful."""
    conditions = found.conditions
    target = f"Target {found.target:.2f}x. {conditions['clock']}; {conditions['images']} images."
    doubt = [Note(RANDOM)] if conditions["random_images"] else []
    return [Paragraph(found.sentence), *map(Paragraph, top1), *doubt, Quiet(target)]


def parts_of(found: Tuned, top1: Sequence[str] = ()) -> list[Part]:
    """Return the page's parts."""
    latency = found.latency
    parts = [
        *answer_of(found, top1),
        Heading("Damage against speed-up"),
        drawn(draw_pareto(found), "damage against measured speed-up of all plans"),
        candidates_table(found),
        Heading("Latency table"),
        Paragraph(
            "Time of the two halves of a block, and of the last block, by number of tokens (rows). The dense "
            f"model takes {latency.dense_ms:.3f} ms, of which {latency.rest_ms:.3f} ms are outside blocks. "
            "Noise is the median absolute deviation."
        ),
        latency_table(found),
    ]
    for name, sensitivity in found.sensitivity.items():
        parts += [
            Heading(f"Sensitivity of {name}"),
            Paragraph("Damage if this block (row), and all after it, keep this many patch tokens (column)."),
            table(
                ("block", *map(str, sensitivity.counts)),
                [
                    [str(block), *(f"{value:.3g}" for value in row)]
                    for block, row in zip(sensitivity.blocks, sensitivity.values, strict=True)
                ],
            ),
        ]
    return parts


def write_report(folder: Path, found: Tuned, top1: Sequence[str] = ()) -> Path:
    """Write `report.html`."""
    path = folder / "report.html"
    write_text(path, page("evovit tune", parts_of(found, top1)))
    return path
