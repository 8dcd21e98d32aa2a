"""What a benchmark leaves behind: rows as JSON lines, and one HTML page, tables and plots in it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evovit.bench.profile import PARTS
from evovit.bench.row import Record
from evovit.bench.setting import Variant
from evovit.methods import DENSE
from evovit.report.page import _image
from evovit.report.tables import cell, speedup_text
from evovit.runtime.files import write_text

GROUP = ("model", "image_size", "device_name", "dtype", "types", "batch", "task", "threads")
IDENTITY = (*GROUP, "method", "options", "mode", "torch")
COLOURS = {"eager": "#8da0b3", "compiled": "#2b6cb0", "graphs": "#c05621"}
PART_COLOURS = ("#2b6cb0", "#4fa3a5", "#e0a030", "#c05621", "#8a5fb0", "#8da0b3", "#c9ced6")
INTRODUCTION = (
    "Each group was measured in one process, the dense model and the reduced ones in turn. Speed-up is dense "
    "time / time in the same mode, median over the rounds; the ceiling is the ratio of multiply-accumulates; "
    "conversion is speed-up / ceiling. Bold: a variant's best mode."
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #cbd5e0; } img { max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: 13px; } .scroll { overflow-x: auto; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e2e8f0; white-space: nowrap; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
tr.best { font-weight: 600; } .note { color: #9c4221; } .quiet { color: #4a5568; }
"""


def write_report(folder: Path, records: Sequence[Record]) -> Path:
    """Write `report.html`: the newest record of each variant, mode and setting, by setting."""
    newest = {json.dumps([record.get(key) for key in IDENTITY]): record for record in records}
    groups: dict[str, list[Record]] = {}
    for record in newest.values():
        groups.setdefault(json.dumps([record.get(key) for key in GROUP]), []).append(record)
    sections = "\n".join(_section(group) for group in reversed(groups.values()))
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>evovit bench</title><style>{STYLE}</style>"
        f"<h1>evovit bench</h1><p>{INTRODUCTION}</p>"
        f"{_by_batch(list(newest.values()))}{sections}</html>"
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def name_of(record: Record) -> str:
    """Return the variant in words."""
    return str(Variant(record["method"], record["options"]))


def _section(group: Sequence[Record]) -> str:
    first = group[0]
    title = f"{first['model']} at {first['image_size']} px: {first['task']}, "
    title += f"{first['dtype']}, batch {first['batch']}"
    device = f"{first['device_name']}" + (f", {first['threads']} threads" if first["device"] == "cpu" else "")
    driver = f", driver {first['driver']}, CUDA {first['cuda']}" if first["driver"] else ""
    facts = (
        f"{device}{driver}; torch {first['torch']}, timm {first['timm']}, evovit {first['evovit']}; "
        f"{first['types']}; {first['rounds']} rounds; {first['time']}"
    )
    notes = sorted({note for record in group for note in record["notes"]})
    timed = [record for record in group if record["median_ms"] is not None]
    plots = _plot_group(timed) if timed else ""
    return (
        f"<h2>{html.escape(title)}</h2><p class=quiet>{html.escape(facts)}</p>"
        + "".join(f"<p class=note>{html.escape(note)}</p>" for note in notes)
        + f"{plots}<div class=scroll>{_table(group)}</div>"
    )


def _table(group: Sequence[Record]) -> str:
    columns = (
        *("variant", "mode", "median ms", "p95 ms", "images / s", "peak MB", "GMACs", "ceiling"),
        *("speed-up", "conversion", "over best dense", "kernels", "breaks", "recompiles", "verdict"),
    )
    body = []
    for r in group:
        cells = (
            *(name_of(r), r["mode"], cell(r["median_ms"], 3), cell(r["p95_ms"], 3)),
            *(cell(r["images_per_second"], 0), cell(r["peak_memory_mb"], 0), cell(r["gmacs"], 3)),
            *(cell(r["mac_ratio"], 2), speedup_text(r["speedup"], r["noise"])),
            *(cell(r["conversion"], 2), cell(r["speedup_over_best_dense"], 3), cell(r["kernels"], 0)),
            *(cell(r["graph_breaks"], 0), cell(r["recompiles"], 0)),
            f"skipped: {r['skipped']}" if r["skipped"] else r["verdict"],
        )
        kind = " class=best" if r["is_best_mode"] else ""
        body.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(text)}</td>" for text in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _plot_group(group: Sequence[Record]) -> str:
    """Plot latency, speed-up against its ceiling, and where the time goes."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    with_parts = [r for r in group if r.get("parts_ms") and r["is_best_mode"]]
    names = list(dict.fromkeys(name_of(r) for r in group))
    modes = list(dict.fromkeys(r["mode"] for r in group))
    count = 3 if with_parts else 2
    figure = Figure(
        figsize=(5.4 * count, 1.3 + 0.42 * len(names) * max(1, len(modes)) ** 0.6), layout="constrained"
    )
    axes = figure.subplots(1, count, sharey=False)
    height = 0.8 / len(modes)
    for k, mode in enumerate(modes):
        for r in (r for r in group if r["mode"] == mode):
            y, colour = names.index(name_of(r)) + (k - (len(modes) - 1) / 2) * height, COLOURS.get(mode)
            first = name_of(r) == names[0]
            tail = max(0.0, r["p95_ms"] - r["median_ms"])
            axes[0].barh(y, r["median_ms"], height * 0.92, color=colour, label=mode if first else None)
            axes[0].errorbar(r["median_ms"], y, xerr=[[0], [tail]], color="#1a202c", capsize=2, lw=1)
            if r["method"] != DENSE and r["speedup"] is not None:
                noise = r["speedup"] * (r["noise"] or 0)
                axes[1].barh(y, r["speedup"], height * 0.92, color=colour)
                axes[1].errorbar(r["speedup"], y, xerr=noise, color="#1a202c", capsize=2, lw=1)
                axes[1].plot([r["mac_ratio"]] * 2, [y - height / 2, y + height / 2], color="#c53030", lw=2)
    axes[0].set(xlabel="ms per step: median, p95", title="Time", xlim=(0, None))
    axes[0].legend(fontsize=8)
    axes[1].axvline(1, color="#1a202c", lw=1, ls="--")
    axes[1].set(xlabel="dense / this, same mode (red: ceiling by MACs)", title="Speed-up", xlim=(0, None))
    for axis in axes[:2]:
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names), fontsize=8)
        axis.set_ylim(len(names) - 0.45, -0.55)
    if with_parts:
        _plot_parts(axes[2], with_parts, names)
    return _image(figure, "time, speed-up and parts")


def _plot_parts(axis: Any, group: Sequence[Record], names: Sequence[str]) -> None:
    starts = [0.0] * len(group)
    rows = [names.index(name_of(r)) for r in group]
    for part, colour in zip(PARTS, PART_COLOURS, strict=True):
        widths = [r["parts_ms"].get(part, 0.0) for r in group]
        axis.barh(rows, widths, 0.7, left=starts, color=colour, label=part)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axis.set_yticks(rows, [r["mode"] for r in group], fontsize=8)
    axis.set_ylim(len(names) - 0.45, -0.55)
    axis.set(xlabel="ms in kernels, best mode, one step", title="Where the time goes")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _by_batch(records: Sequence[Record]) -> str:
    """Plot throughput over the batch size where a variant was measured at several."""
    from matplotlib.figure import Figure

    lines: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for r in (r for r in records if r["is_best_mode"]):
        where = (r["model"], f"{r['image_size']} px", r["device_name"], r["dtype"], r["task"])
        lines.setdefault(where, {}).setdefault(name_of(r), {})[r["batch"]] = r["images_per_second"]
    images = []
    for title, variants in lines.items():
        if max(len(points) for points in variants.values()) < 2:
            continue
        figure = Figure(figsize=(7.5, 3.6), layout="constrained")
        axis = figure.subplots()
        for name, points in variants.items():
            batches = sorted(points)
            style: dict[str, Any] = {"color": "#1a202c", "ls": "--"} if name == DENSE else {}
            axis.plot(batches, [points[b] for b in batches], marker="o", ms=4, label=name, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(
            batches := sorted({b for p in variants.values() for b in p}), [str(b) for b in batches]
        )
        axis.set(
            xlabel="batch",
            ylabel="images per second, best mode",
            title=f"{title[0]} at {', '.join(title[1:])}",
            ylim=(0, None),
        )
        axis.legend(fontsize=8)
        images.append(_image(figure, "images per second over batch"))
    return "".join(images)
