"""`evovit tune`: searches and measures the schedule that reaches a speed-up with the least damage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def tune(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    /,
    target: str = "",
    latency_ms: float | None = None,
    images: Path | None = None,
    samples: int = 128,
    methods: tuple[str, ...] = (),
    engine: str = "eager",
    precision: str = "fp32",
    batch: int = 1,
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = 20,
    weights: str = "",
    pretrained: bool = False,
    out: Path | None = None,
) -> None:
    """Find the schedule that reaches a speed-up with the least damage to the outputs; nothing is trained.

    $ evovit tune deit_small_patch16_224 --pretrained --target 1.5x --images photos
    $ evovit tune runs/dense/seed0 --target 1.4x --batch 8 --engine compiled
    $ evovit tune deit_small_patch16_224 --latency-ms 40 --engine openvino

    The same command with the same --out continues where it stopped and uses the tables it has.

    Args:
        model: a timm name, or the folder of a dense run of evovit train.
        target: speed-up over the dense model on the same engine, such as 1.5x.
        latency_ms: milliseconds per batch, instead of --target.
        images: folder of photographs without labels; default: the test images of a run, else random ones.
        samples: largest number of images on which damage is measured.
        methods: each NAME or NAME:option=value; default: evo_vit, evit, tome and evenly spaced tokens.
        engine: eager, compiled, frozen, graphs, aoti, onnxruntime or openvino.
        precision: fp32, bf16, fp16, tf32 or int8, as evovit bench has them.
        batch: images per call.
        device: cpu or cuda.
        threads: CPU threads; default: as PyTorch chooses.
        rounds: how often each finalist is timed.
        weights: for a timm name: a .pth or .safetensors file; for a run: last (default), best or ema.
        pretrained: for a timm name: download the published weights.
        out: folder for the model (evovit.load_reduced loads it), finetune.toml, report.html,
            tuned.json (evovit app shows it) and tables.json; default: tuned/MODEL.
    """
    import sys
    import time

    from rich.console import Console

    from evovit.errors import EvoViTError, check_count, printable
    from evovit.report.tables import as_printed
    from evovit.report.tune import RANDOM, candidates_table, write_report
    from evovit.runtime.files import hold_folder, make_folder
    from evovit.tuning.job import open_job, save_found, top1_lines
    from evovit.tuning.record import write_tuned
    from evovit.tuning.tune import expect_wish
    from evovit.tuning.tune import tune as search

    start, console = time.perf_counter(), Console() if sys.stdout.isatty() else Console(width=150)
    number = target.strip().removesuffix("x")
    try:
        wish = float(number) if target else None
    except ValueError:
        raise EvoViTError(f"--target is {target!r}; give a speed-up, such as 1.5x.") from None
    expect_wish(wish, latency_ms)
    check_count("samples", samples, 1, 100_000)
    folder = out or Path("tuned") / "_".join(Path(model).parts[-2:])
    job = open_job(model, weights, pretrained, images, samples)
    make_folder(folder)

    def log(line: str) -> None:
        console.print(printable(line), style="dim", markup=False, highlight=False)

    for line in job.notes:
        log(line)
    with hold_folder(folder):
        found = search(
            job.model,
            job.images,
            speedup=wish,
            latency_ms=latency_ms,
            methods=methods,
            engine=engine,
            precision=precision,
            batch=batch,
            device=device,
            threads=threads,
            rounds=rounds,
            tables=folder,
            log=log,
        )
        lines = top1_lines(job, found)
        save_found(job, found, folder)
        write_tuned(folder, found)
        report = write_report(folder, found, lines)
    console.print(
        as_printed(
            candidates_table(found, 12, predicted=False),
            "fastest first; damage on the images, before training",
        )
    )
    for line in [*lines, *([RANDOM] if job.images is None else []), found.sentence]:
        console.print(printable(line), markup=False, highlight=False)
    if found.model is not None:
        log(f"evovit.load_reduced({str(folder)!r}) loads it")
        log(f"evovit train {folder / 'finetune.toml'} trains it on")
    log(f"{report} written after {time.perf_counter() - start:.0f} s")
