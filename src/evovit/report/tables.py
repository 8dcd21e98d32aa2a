"""Tables as Markdown, CSV and terminal text, and numbers as their cells show them.

Cells hold names that strangers chose: no cell becomes markup, a formula or a control sequence.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from rich import box
from rich.table import Table as Printed
from rich.text import Text

from evovit.bench.row import Ratio
from evovit.errors import printable
from evovit.options import Options, describe

_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?%?( ± [\d.]+%?)?")


class Table(NamedTuple):
    """Cells of text; `table` builds it."""

    columns: list[str]
    rows: list[list[str]]
    bold: list[bool]  # for each row

    @property
    def sides(self) -> list[str]:
        """For each column left, or right where all its cells begin as numbers do; the first one is left."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        numbers = [all(re.match(r"$|[-+]?\.?\d|about 1", cell) for cell in cells) for cells in columns]
        return ["right" if i and right else "left" for i, right in enumerate(numbers)]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], bold: Sequence[bool] = ()) -> Table:
    """Return a table; a column whose every cell is empty is left out.

    Args:
        rows: each of one cell per column.
        bold: for each row; empty: none is.
    """
    filled = [i for i in range(len(columns)) if not rows or any(row[i] for row in rows)]
    cells = [[row[i] for i in filled] for row in rows]
    return Table([columns[i] for i in filled], cells, list(bold) or [False] * len(rows))


def as_markdown(table: Table) -> str:
    """Return a Markdown table; pipes, line breaks and HTML in cells are text."""
    rules = ["--:" if side == "right" else "---" for side in table.sides]
    lines = [[_markdown(cell) for cell in line] for line in (table.columns, *table.rows)]
    lines.insert(1, rules)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(table: Table) -> str:
    """Return a table as CSV; a cell that a spreadsheet would compute begins with an apostrophe."""
    text = io.StringIO()
    lines = [[_harmless(cell) for cell in line] for line in (table.columns, *table.rows)]
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def as_printed(table: Table, title: str = "") -> Printed:
    """Return a table for rich's console."""
    printed = Printed(title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD)
    for name, side in zip(table.columns, table.sides, strict=True):
        is_text = side == "left"
        printed.add_column(
            Text(name),
            justify="left" if is_text else "right",
            overflow="fold",
            no_wrap=not is_text,
        )
    for row, bold in zip(table.rows, table.bold, strict=True):
        printed.add_row(*(Text(printable(cell)) for cell in row), style="bold" if bold else None)
    return printed


def _markdown(cell: str) -> str:
    return re.sub(r"[\\|]", r"\\\g<0>", html.escape(printable(cell), quote=False))


def _harmless(cell: str) -> str:
    risky = cell.startswith(("\t", "\r", "\n")) or cell.lstrip().startswith(("=", "+", "-", "@"))
    return f"'{cell}" if risky and not _NUMBER.fullmatch(cell) else cell


def cell(value: float | None, digits: int) -> str:
    """Return a number as a table shows it; None is an empty cell."""
    return "" if value is None else f"{value:,.{digits}f}"


def speedup_text(speedup: float | None, noise: float | None) -> str:
    """Return a speed-up as a table shows it: one within its noise is no number, the dense model's is 1."""
    if speedup is None or noise is None:
        return "" if speedup is None else f"{speedup:g}"
    return f"{'about 1' if Ratio(speedup, noise).is_noise else cell(speedup, 2)} ± {noise:.1%}"


def spread(values: Sequence[float], sign: str = "") -> str:
    """Return the mean, and the standard deviation where there are several; a `sign` of "+" is shown."""
    if not values:
        return ""
    return f"{mean(values):{sign}.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def option_lines(kind: type[Options]) -> list[str]:
    """Return the options of a class as text: name, default, range and meaning, two lines each at most."""
    lines = []
    for each in describe(kind):
        default = f" = {each.default}" if each.default else "  (has to be given)"
        lines += [f"  {each.name}{default}", f"      {each.meaning}  [{each.allowed}]"]
    return lines
