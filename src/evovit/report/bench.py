"""What a benchmark says: its rows on the terminal, and one HTML page, tables and plots in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from evovit.bench.profile import PARTS
from evovit.bench.row import Record, Row, is_whole, name_of
from evovit.bench.setting import Setting
from evovit.errors import EvoViTError, printable, shown
from evovit.methods import DENSE
from evovit.report.bench_plots import plot_batches, plot_group
from evovit.report.page import Heading, Note, Paragraph, Part, Quiet, page
from evovit.report.tables import Table, as_printed, cell, speedup_text, table
from evovit.runtime.files import write_text

GROUP = ("model", "image_size", "device_name", "dtype", "types", "batch", "task", "threads", "torch")
IDENTITY = (*GROUP, "method", "options", "engine")
INTRODUCTION = (
    "Each group was measured in one process, the dense model and the reduced ones in turn. Speed-up is the "
    "dense model's time divided by the variant's with the same engine, median over the rounds; the ceiling "
    "is the ratio of multiply-accumulates; conversion is speed-up / ceiling. CPU ms is the CPU time of the "
    "process over all threads. 'Over eager' is the speed-up over the dense model in PyTorch's eager mode and "
    "float32. A variant's best engine is bold."
)
CELLS: dict[str, Callable[[Record], str]] = {
    "variant": name_of,
    "engine": lambda r: str(r["engine"]),
    "ms": lambda r: cell(r["median_ms"], 3),
    "p95 ms": lambda r: cell(r["p95_ms"], 3),
    "CPU ms": lambda r: cell(r.get("cpu_ms"), 3),
    "images/s": lambda r: cell(r["images_per_second"], 0),
    "peak MB": lambda r: cell(r["peak_memory_mb"], 0),
    "GMACs": lambda r: cell(r["gmacs"], 3),
    "speed-up": lambda r: speedup_text(r["speedup"], r["noise"]),
    "ceiling": lambda r: cell(r["mac_ratio"], 2),
    "conversion": lambda r: cell(r["conversion"], 2),
    "kernels": lambda r: cell(r["kernels"], 0),
    "over best dense": lambda r: cell(r["speedup_over_best_dense"], 3),
    "breaks": lambda r: cell(r["graph_breaks"], 0),
    "recompiles": lambda r: cell(r["recompiles"], 0),
    "over eager": lambda r: cell(r.get("speedup_over_eager"), 2),
    "verdict": lambda r: f"skipped: {r['skipped']}" if r["skipped"] else str(r["verdict"]),
}
PRINTED = (*tuple(CELLS)[:12], "over eager")  # on the terminal, where sentences say the rest


def table_of(records: Sequence[Record], columns: Sequence[str] = tuple(CELLS)) -> Table:
    """Return the table of one comparison; a variant's best engine is bold."""
    rows = [[CELLS[name](record) for name in columns] for record in records]
    return table(columns, rows, [record["is_best_engine"] for record in records])


def print_rows(console: Console, setting: Setting, rows: Sequence[Row]) -> None:
    """Print the table of one comparison, its notes, and what each variant comes to."""
    cells = table_of([asdict(row) for row in rows], PRINTED)
    console.print(as_printed(cells, f"{setting}: {rows[0].types}"))
    for note in rows[0].notes:
        console.print(f"note: {printable(note)}", style="yellow", markup=False)
    for row in rows:
        for text in sentences(row):
            console.print(printable(text), markup=False, highlight=False)


def print_parts(console: Console, rows: Sequence[Row]) -> None:
    """Print where the time of one step goes."""
    timed = [(row, row.parts_ms) for row in rows if row.parts_ms]
    found = [[row.name, row.engine, *(f"{parts[name]:.2f}" for name in PARTS)] for row, parts in timed]
    title = "ms in kernels, by part of the model"
    console.print(as_printed(table(("variant", "engine", *PARTS), found), title))


def sentences(row: Row) -> list[str]:
    """Say in words what a row shows."""
    name, found = f"{row.name} [{row.engine}]", []
    if row.skipped:
        return [f"{name}: skipped, {row.skipped}"]
    if row.verdict:
        found.append(f"{name}: {row.verdict}")
    if row.is_best_engine and row.name != DENSE and row.best_dense_engine not in (None, row.engine):
        found[-1] += (
            f"; its best engine, but against dense [{row.best_dense_engine}]: {row.verdict_over_best_dense}"
        )
    if row.graph_breaks or row.recompiles:
        found.append(f"{name}: {row.graph_breaks} graph breaks, {row.recompiles} recompiles")
    return found


def write_report(folder: Path, records: Sequence[Record]) -> Path:
    """Write `report.html`: the newest record of each variant, engine and setting, by setting."""
    odd = next((record for record in records if not is_whole(record)), None)
    if odd is not None:
        raise EvoViTError(
            f"{shown(folder / 'rows.jsonl')} has {shown(odd)}, not a row of evovit bench; move it away."
        )
    newest = {json.dumps([record.get(key) for key in IDENTITY]): record for record in records}
    groups: dict[str, list[Record]] = {}
    for record in newest.values():
        groups.setdefault(json.dumps([record.get(key) for key in GROUP]), []).append(record)
    parts: list[Part] = [Paragraph(INTRODUCTION), *plot_batches(list(newest.values()))]
    for group in reversed(groups.values()):
        parts += _section(group)
    path = folder / "report.html"
    write_text(path, page("evovit bench", parts))
    return path


def _section(group: Sequence[Record]) -> list[Part]:
    first = group[0]
    title = f"{first['model']} at {first['image_size']} px: {first['task']}, "
    device = f"{first['device_name']}" + (f", {first['threads']} threads" if first["device"] == "cpu" else "")
    driver = f", driver {first['driver']}, CUDA {first['cuda']}" if first["driver"] else ""
    facts = (
        f"{device}{driver}; torch {first['torch']}, timm {first['timm']}, evovit {first['evovit']}; "
        f"{first['types']}; {first['rounds']} rounds; {first['time']}"
    )
    notes = sorted({note for record in group for note in record["notes"]})
    timed = [record for record in group if record["median_ms"] is not None]
    return [
        Heading(f"{title}{first['dtype']}, batch {first['batch']}"),
        Quiet(facts),
        *map(Note, notes),
        *(plot_group(timed) if timed else []),
        table_of(group),
    ]
