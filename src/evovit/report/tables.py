"""Tables as text: Markdown, CSV, and numbers as their cells show them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from statistics import mean, stdev

from evovit.bench.row import Ratio
from evovit.options import Options, describe


def cell(value: float | None, digits: int) -> str:
    """Return a number as a table shows it."""
    return "-" if value is None else f"{value:,.{digits}f}"


def speedup_text(speedup: float | None, noise: float | None) -> str:
    """Return a speed-up as a table shows it: one within its noise is no number."""
    if speedup is None or noise is None:
        return cell(speedup, 2)
    return f"{'about 1' if Ratio(speedup, noise).is_noise else cell(speedup, 2)} ± {noise:.1%}"


def spread(values: Sequence[float]) -> str:
    """Return the mean, and the standard deviation where there are several."""
    if not values:
        return ""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def as_markdown(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def as_csv(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    """Return the table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def signed(values: Sequence[float]) -> str:
    """Return the mean with its sign, and the standard deviation where there are several."""
    return f"{mean(values):+.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def option_lines(kind: type[Options]) -> list[str]:
    """Return the options of a class as text: name, default, range and meaning, two lines each at most."""
    lines = []
    for each in describe(kind):
        default = f" = {each.default}" if each.default else "  (has to be given)"
        lines += [f"  {each.name}{default}", f"      {each.meaning}  [{each.allowed}]"]
    return lines
