"""`evovit bench`: a timm model and reduced versions of it, timed in turn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import tyro


def bench(
    models: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    method: tuple[str, ...] = ("evo_vit",),
    options: tuple[str, ...] = (),
    keep_ratio: tuple[float, ...] = (),
    budgets: tuple[float, ...] = (),
    engine: tuple[str, ...] = (),
    precision: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--dtype"])] = ("fp32",),
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
    """Time a model and reduced versions of it; dense and reduced models are always timed in turn.

    $ evovit bench deit_small_patch16_224 --keep-ratio 0.3 0.5 0.7
    $ evovit bench deit_small_patch16_224 --method evo_vit "evit:blocks=[3,6,9],keep_ratio=0.7"
    $ evovit bench deit_base_patch16_224 --method all --precision bf16 --batch 1 64 --engine compiled
    $ evovit bench deit_small_patch16_224 --engine onnxruntime openvino --precision fp32 int8 --threads 1

    Args:
        models: timm names; random weights unless --pretrained.
        method: methods, each NAME or NAME:option=value,option=value; "all" is every method. evovit methods
            NAME lists the options of one. dense:last_block=prefix is the host without computing what its
            head does not read; with last_block=all a reduced model computes that too.
        options: option=value for every method given.
        keep_ratio: short for the option keep_ratio; several values give a row each.
        budgets: shares of patch tokens kept, one row each; works for every method, whatever its option for
            it is called.
        engine: eager, compiled, graphs (a CUDA graph of the compiled step), frozen (packed weights), aoti,
            onnxruntime, openvino; default: eager, compiled and, on CUDA, graphs.
        precision: fp32, tf32 (CUDA), bf16, fp16, int8 (onnxruntime, openvino).
        batch: images per step; "max" is the largest power of two that fits on the GPU.
        train: time forward and backward, without optimiser, instead of inference.
        device: cuda or cpu; default: cuda if available.
        threads: CPU threads; default: as PyTorch chooses.
        rounds: how often each model is timed.
        size: image side in pixels; default: the model's own.
        pretrained: load the published weights.
        out: folder that gets rows.jsonl (appended) and report.html.
        parts: also print where the time goes.
        trace: file for a Chrome trace with one step of each model, for ui.perfetto.dev; only for a single
            model, precision, batch and engine.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before PyTorch's import adds to it
    import sys
    import time
    from dataclasses import replace

    from rich.console import Console

    from evovit.bench.row import append_rows
    from evovit.bench.setting import ALL, parse_settings, parse_variants, usable
    from evovit.bench.timing import Extras, largest_batch, measure
    from evovit.errors import EvoViTError, printable, shown
    from evovit.options import read_named
    from evovit.report.bench import print_parts, print_rows, write_report
    from evovit.runtime.environment import environment
    from evovit.runtime.files import as_path, make_folder

    start, console = time.perf_counter(), Console() if sys.stdout.isatty() else Console(width=150)

    def log(line: str, style: str = "dim") -> None:
        console.print(printable(line), style=style, markup=False, highlight=False)

    variants = parse_variants(method, options, keep_ratio, budgets)
    settings = parse_settings(
        models,
        precision,
        batch,
        engine,
        device,
        train=train,
        threads=threads,
        rounds=rounds,
        size=size,
        pretrained=pretrained,
        load=load,
    )
    if trace is not None and len(settings) > 1:
        raise EvoViTError(f"--trace writes one comparison, but these are {len(settings)}; give one.")
    make_folder(out)
    if trace is not None:
        make_folder(as_path(trace, "trace").parent)
        if trace.is_dir():
            raise EvoViTError(f"trace is {shown(trace)}, a folder; give a file.")
    around = environment(settings[0][0].device) | {"load_average": load}
    log(f"{around['device_name']}, torch {around['torch']}, timm {around['timm']}", "none")
    for setting, as_large_as_fits in settings:
        if as_large_as_fits:
            setting = replace(setting, batch=largest_batch(setting))
            log(f"the largest batch that fits is {setting.batch}", "none")
        chosen = variants
        if ALL in (read_named(text)[0] for text in method):
            chosen, left_out = usable(setting, variants)
            for sentence in left_out:
                log(sentence, "yellow")
        rows = measure(setting, chosen, Extras(trace=trace), log)
        report = write_report(out, append_rows(out, rows, around))
        print_rows(console, setting, rows)
        if parts:
            print_parts(console, rows)
    log(f"{out / 'rows.jsonl'} and {report} written after {time.perf_counter() - start:.0f} s", "none")
