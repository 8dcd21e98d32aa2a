"""The command `evovit bench`: a timm model and reduced versions of it, timed in turn."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from evovit.backbones import adapt
from evovit.bench.profile import PARTS
from evovit.bench.row import Row, append_rows
from evovit.bench.setting import Setting, Variant
from evovit.bench.timing import Extras, largest_batch, measure
from evovit.errors import EvoViTError
from evovit.hosts import check_name, create_host
from evovit.methods import DENSE, build_config, find_method, list_methods
from evovit.options import read_assignment, read_named
from evovit.report.bench import write_report
from evovit.report.tables import cell, speedup_text
from evovit.runtime.environment import environment


def bench(
    models: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    method: tuple[str, ...] = ("evo_vit",),
    options: tuple[str, ...] = (),
    keep_ratio: tuple[float, ...] = (),
    mode: tuple[str, ...] = (),
    dtype: tuple[str, ...] = ("fp32",),
    batch: tuple[str, ...] = ("1",),
    train: bool = False,
    device: str = "",
    threads: int | None = None,
    rounds: int = 30,
    size: int | None = None,
    pretrained: bool = False,
    out: Path = Path("runs/bench"),
    parts: bool = False,
    trace: Path | None = None,
) -> None:
    """Time a model and reduced versions of it: the dense one is always measured beside them, in turn.

    Args:
        models: timm names, such as deit_small_patch16_224; random weights unless --pretrained.
        method: methods, each NAME or NAME:option=value,option=value; "all" is every method with its defaults.
        options: option=value for every method given.
        keep_ratio: short for the option keep_ratio; several give a row each.
        mode: eager, compiled, graphs (a CUDA graph of the compiled step); default: all the device has.
        dtype: fp32, tf32 (CUDA), bf16, fp16.
        batch: images per step; "max" is the largest power of two that fits on the GPU.
        train: time forward and backward, without optimiser, instead of inference.
        device: cuda or cpu; default: cuda if there is one.
        threads: CPU threads; default: as PyTorch chooses.
        rounds: times each is measured.
        size: image side in pixels; default: the model's own.
        pretrained: load the published weights.
        out: folder that gets rows.jsonl (appended) and report.html.
        parts: also print where the time goes.
        trace: file for a Chrome trace with one step of each, for ui.perfetto.dev; needs one comparison.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    console = Console() if sys.stdout.isatty() else Console(width=150)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    variants = parse_variants(method, options, keep_ratio)
    modes = mode or (("eager", "compiled", "graphs") if device == "cuda" else ("eager", "compiled"))
    if not models:
        raise EvoViTError("No model is given; give a timm name, for example deit_small_patch16_224.")
    shared: dict[str, Any] = {"device": device, "train": train, "modes": modes, "rounds": rounds}
    shared |= {"threads": threads, "size": size, "pretrained": pretrained, "load": load}
    settings = [
        (Setting(model=check_name(m), dtype=d, batch=parse_batch(b), **shared), b == "max")
        for m in models
        for d in dtype
        for b in batch
    ]
    if trace is not None and len(settings) > 1:
        raise EvoViTError(f"--trace writes one comparison, and {len(settings)} are asked for; give one.")
    around, start = environment(device) | {"load_average": load}, time.perf_counter()
    console.print(f"{around['device_name']}, torch {around['torch']}, timm {around['timm']}", highlight=False)
    for setting, as_large_as_fits in settings:
        if as_large_as_fits:
            setting = replace(setting, batch=largest_batch(setting))
            console.print(f"the largest batch that fits is {setting.batch}")
        chosen = usable(setting.model, variants, console) if "all" in method else variants
        rows = measure(
            setting, chosen, Extras(trace=trace), lambda line: console.print(line, style="dim", markup=False)
        )
        records = append_rows(out, rows, around)
        report = write_report(out, records)
        print_rows(console, setting, rows)
        if parts:
            print_parts(console, rows)
    console.print(f"{out / 'rows.jsonl'} and {report} written after {time.perf_counter() - start:.0f} s")


def parse_batch(text: str) -> int:
    """Return a batch size; 1 stands for "max" until the size is found."""
    if text == "max":
        return 1
    try:
        return int(text)
    except ValueError:
        raise EvoViTError(f"batch is {text!r}; allowed is a number of images or 'max'.") from None


def parse_variants(
    methods: Sequence[str], options: Sequence[str], keep_ratios: Sequence[float] = ()
) -> list[Variant]:
    """Return the variants asked for; checks methods and options before anything runs."""
    shared = dict(read_assignment(text, "keep_ratio=0.5") for text in options)
    variants: list[Variant] = []
    for name, own in (read_named(text) for text in methods):
        for each in [n for n in list_methods() if n != DENSE] if name == "all" else [name]:
            known = {f.name for f in fields(find_method(each).Config)}
            asked = {k: v for k, v in (shared | own).items() if name != "all" or k in known}
            ratios = keep_ratios if name != "all" or "keep_ratio" in known else ()
            for more in [{"keep_ratio": ratio} for ratio in ratios] or [{}]:
                build_config(find_method(each), more | asked)
                variants.append(Variant(each, more | asked))
    return [variant for variant in variants if variant.method != DENSE]


def usable(model: str, variants: Sequence[Variant], console: Console) -> list[Variant]:
    """Return the variants that this host takes; says why of each other one."""
    with torch.device("meta"):
        backbone, chosen = adapt(create_host(model)), []
    for variant in variants:
        cls = find_method(variant.method)
        try:
            cls(build_config(cls, variant.options), backbone.spec)
            chosen.append(variant)
        except EvoViTError as error:
            console.print(f"{variant} is left out: {error}", style="yellow", markup=False)
    return chosen


def print_rows(console: Console, setting: Setting, rows: Sequence[Row]) -> None:
    """Print the table of one comparison, its notes, and what each variant comes to."""
    table = Table(title=f"{setting}: {rows[0].types}", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("variant", "mode"):
        table.add_column(name, overflow="fold")
    names = ("ms", "p95", "images/s", "peak MB", "GMACs", "x dense", "ceiling", "conversion", "kernels")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        table.add_row(
            *(r.name, r.mode, cell(r.median_ms, 2), cell(r.p95_ms, 2), cell(r.images_per_second, 0)),
            *(cell(r.peak_memory_mb, 0), cell(r.gmacs, 2), speedup_text(r.speedup, r.noise)),
            *(cell(r.mac_ratio, 2), cell(r.conversion, 2), cell(r.kernels, 0)),
            style="bold" if r.is_best_mode else None,
        )
    console.print(table)
    for note in rows[0].notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    for r in rows:
        for text in sentences(r):
            console.print(text, markup=False, highlight=False)


def sentences(row: Row) -> list[str]:
    """Say in words what a row shows."""
    name, found = f"{row.name} [{row.mode}]", []
    if row.skipped:
        return [f"{name}: skipped, {row.skipped}"]
    if row.verdict:
        found.append(f"{name}: {row.verdict}")
    if row.is_best_mode and row.method != DENSE and row.best_dense_mode not in (None, row.mode):
        found[-1] += (
            f"; its best mode, but against dense [{row.best_dense_mode}]: {row.verdict_over_best_dense}"
        )
    if row.graph_breaks or row.recompiles:
        found.append(f"{name}: {row.graph_breaks} graph breaks, {row.recompiles} recompiles")
    return found


def print_parts(console: Console, rows: Sequence[Row]) -> None:
    """Print where the time of one step goes."""
    table = Table(title="ms in kernels, by part of the model", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("variant", "mode", *PARTS):
        table.add_column(name, justify="left" if name in ("variant", "mode") else "right", overflow="fold")
    for r in rows:
        if r.parts_ms is not None:
            table.add_row(r.name, r.mode, *(f"{r.parts_ms[part]:.2f}" for part in PARTS))
    console.print(table)
