"""`evovit report`: finished runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")],
    /,
    out: Path = Path("runs/report"),
) -> None:
    """Compare runs of `evovit train`: a row per recipe, with mean and spread over its seeds.

    $ evovit report runs/dense runs/table3_5_stage

    Args:
        runs: run folders, or folders of them.
        out: folder for report.md, report.csv and report.html.
    """
    from evovit.report.runs import write_report

    print(write_report(runs, out))
