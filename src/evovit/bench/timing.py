"""How fast is a reduced model beside the dense one, here? Both run in one process, round by round in turn."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evovit.bench.exported import EXPORTED
from evovit.bench.profile import named_loops, profile, write_trace
from evovit.bench.row import Measured, Row, rows_of
from evovit.bench.setting import (
    Setting,
    Variant,
    build_host,
    build_models,
    image_size_of,
    place,
    random_batches,
)
from evovit.bench.step import DTYPES, Batch, Step, TimedStep, float32_precision, in_short, prepare, warm_up
from evovit.errors import EvoViTError
from evovit.macs import gmacs
from evovit.methods import DENSE

SAMPLE_MS = 20.0  # a timed sample has as many steps as fill this, at most `MOST_STEPS`
MOST_STEPS = 200
LARGEST_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What is looked at besides time."""

    kernels: bool = True  # count them, and their time by part
    trace: Path | None = None  # write a Chrome trace of one step of each there


def measure(
    setting: Setting,
    variants: Sequence[Variant],
    extras: Extras = Extras(),
    log: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measure the dense model and its variants with every engine, interleaved; the dense rows come first.

    A batch that does not fit is halved until it does, and the rows say so.

    Args:
        log: gets a line for each thing done.
    """
    notes: list[str] = []
    while True:
        try:
            with float32_precision(setting.dtype, setting.device), threads(setting.threads):
                return _measure(setting, variants, extras, notes, log)
        except torch.OutOfMemoryError:
            if setting.batch == 1:
                raise EvoViTError(f"{setting.model} does not fit on the device even at batch 1.") from None
        notes.append(f"batch {setting.batch} ran out of memory and was halved")
        log(f"{setting}: {notes[-1]}")
        setting = replace(setting, batch=setting.batch // 2)
        _free()


def _measure(
    setting: Setting,
    variants: Sequence[Variant],
    extras: Extras,
    notes: Sequence[str],
    log: Callable[[str], None],
) -> list[Row]:
    _free()
    host = build_host(setting)
    size = image_size_of(setting, host)
    image_shape = (getattr(host, "in_chans", 3), size, size)
    models = build_models(host, variants, setting.train)
    macs = [gmacs(model, image_shape) for model in models]
    models = [place(setting, model) for model in models]
    batches, measured = random_batches(setting, host), list[Measured]()
    for i, (variant, model) in enumerate(zip([Variant(DENSE), *variants], models, strict=True)):
        start = time.perf_counter()
        with named_loops(setting.device):
            ready = prepare(model, setting.engines, setting.dtype, batches, setting.train, f"variant_{i}")
        measured += [Measured(variant, step, macs[i]) for step in ready]
        log(f"{setting}: {variant} ready after {time.perf_counter() - start:.0f} s")
    works = [m for m in measured if m.timed_step.step]
    eager = eager_of(setting, host, measured)
    interleave([*works, eager] if eager and eager not in works else works, setting)
    if extras.kernels:
        notes = [*notes, *profile_each(measured, setting.device, log)]
    if extras.trace is not None:
        try:
            steps = {f"{m.variant} [{m.timed_step.engine}]": m.timed_step.run for m in works}
            write_trace(steps, setting.device, extras.trace)
            log(f"trace written to {extras.trace}")
        except Exception as error:  # the times are taken
            notes = [*notes, f"no trace: {in_short(error)}"]
            log(notes[-1])
    return rows_of(setting, size, measured, notes, eager)


def eager_of(setting: Setting, host: nn.Module, measured: Sequence[Measured]) -> Measured | None:
    """Return the dense host in eager float32, what people run today; None for training and on CUDA."""
    if setting.train or setting.device != "cpu":
        return None
    if setting.dtype == "fp32" and "eager" in setting.engines:
        return next(
            (m for m in measured if m.is_dense and m.timed_step.engine == "eager" and m.timed_step.step), None
        )
    plain = replace(setting, dtype="fp32")
    host = place(plain, copy.deepcopy(host))
    (step,) = prepare(host, ("eager",), "fp32", random_batches(plain, host), False, "")
    return Measured(Variant(DENSE), step, 0.0) if step.step else None


def profile_each(measured: Sequence[Measured], device: str, log: Callable[[str], None]) -> list[str]:
    """Add a profile to each; return what failed, which takes no row its times.

    A graph replays the kernels of the compiled step and gets its profile, if that was measured: a profiler on
    CUDA 13.0 does not see a graph's kernels reliably.
    """
    failed: list[str] = []
    for one in (m for m in measured if m.timed_step.step and m.timed_step.engine not in EXPORTED):
        if one.timed_step.engine == "graphs":
            same = (m for m in measured if m.variant is one.variant and m.timed_step.engine == "compiled")
            one.profile = next((m.profile for m in same), None)
            continue
        try:
            one.profile = profile(one.timed_step.run, device)
        except Exception as error:  # also out of memory: the times are taken
            failed.append(f"no profile of {one.variant} [{one.timed_step.engine}]: {in_short(error)}")
            log(failed[-1])
    return failed


def interleave(measured: Sequence[Measured], setting: Setting) -> None:
    """Time each once per round; each round begins with the next one, so that no place is favoured."""
    on_cuda = setting.device == "cuda"
    for one in measured:
        estimate_ms = min(timed(one.timed_step.run, 0, 1, on_cuda) for _ in range(3))
        one.steps_per_round = min(MOST_STEPS, max(1, round(SAMPLE_MS / estimate_ms)))
    for turn in range(setting.rounds):
        for i in range(len(measured)):
            one = measured[(turn + i) % len(measured)]
            before, steps = time.process_time(), one.steps_per_round
            one.times_ms.append(timed(one.timed_step.run, turn, steps, on_cuda))
            one.cpu_ms.append((time.process_time() - before) * 1e3 / (steps + 1))


class Outside(NamedTuple):
    """A model that is no module, such as a file that another engine runs."""

    run: Callable[[Tensor], object]  # takes the images
    gmacs: float  # of one image


def in_turn(
    models: Mapping[str, nn.Module],
    images: Tensor,
    engine: str = "eager",
    rounds: int = 30,
    outside: Mapping[str, Outside] = {},
) -> list[Row]:
    """Time models in hand on the same images, in turn, where and as they are; return a row for each.

    Args:
        models: by name, the dense one first; in evaluation mode after.
        images: (B, channels, height, width) on the models' device.
        outside: further ones by name, timed in the same rounds; their rows come last, and name `engine` too.
    """
    kind = next(parameter.dtype for parameter in next(iter(models.values())).parameters())
    dtype = next((name for name, other in DTYPES.items() if other == kind), None)
    if dtype is None:
        raise EvoViTError(f"Weights of {kind} cannot be timed; use float32, bfloat16 or float16.")
    device = images.device.type
    setting = Setting(
        model=next(iter(models)),
        device=device,
        dtype=dtype,
        batch=len(images),
        engines=(engine,),
        rounds=rounds,
    )
    batches = [Batch(images.to(kind), torch.zeros(len(images), dtype=torch.int64, device=images.device))]
    if engine != "eager":
        torch.compiler.reset()
    measured = []
    for number, (name, model) in enumerate(models.items()):
        (step,) = prepare(model, (engine,), dtype, batches, False, f"variant_{number}")
        if step.step is None:
            raise EvoViTError(f"{name} cannot be timed with engine {engine}: {step.skipped}.")
        work = gmacs(model, images.shape[1:])
        measured.append(Measured(Variant(name if number else DENSE), step, work))
    for name, other in outside.items():
        step = TimedStep(engine, partial(_run_on, other.run, batches[0].images))
        warm_up(step.run, 1)
        measured.append(Measured(Variant(name), step, other.gmacs))
    interleave(measured, setting)
    return rows_of(setting, images.shape[-1], measured)


def _run_on(run: Callable[[Tensor], object], images: Tensor, number: int) -> object:
    return run(images)


def timed(step: Step, first: int, count: int, on_cuda: bool) -> float:
    """Return milliseconds per step, back to back, after one step that is not timed.

    Args:
        first: the input that the first step takes.
        count: steps that are timed.
    """
    step(first)
    if on_cuda:
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        for i in range(count):
            step(first + 1 + i)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / count
    start = time.perf_counter()
    for i in range(count):
        step(first + 1 + i)
    return (time.perf_counter() - start) * 1e3 / count


def largest_batch(setting: Setting) -> int:
    """Return the largest power of two, at most `LARGEST_BATCH`, at which an eager dense step fits."""
    if setting.device != "cuda":
        raise EvoViTError("batch 'max' is for CUDA devices; give a number on the CPU.")
    host, batch = place(setting, build_host(setting)), 1
    while batch < LARGEST_BATCH:
        trial = replace(setting, batch=2 * batch)
        try:
            batches = random_batches(trial, host)
            (eager,) = prepare(host, ("eager",), trial.dtype, batches, trial.train, "")
        except torch.OutOfMemoryError:
            break
        if eager.step is None:
            break
        batch *= 2
    host.zero_grad(set_to_none=True)
    _free()
    return batch


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with `count` CPU threads; restore the number after."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _free() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
