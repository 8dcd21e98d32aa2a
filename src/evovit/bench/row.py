"""One row of a benchmark: from the times of its rounds to ratios, their noise, and a plain sentence.

A speed-up is the median over the rounds of dense time / reduced time, with the same engine, type and batch.
Its noise is half the 95 % bootstrap interval of that median, at least `NOISE_FLOOR`; within it there is no
gain. A bootstrap of fewer than `FEW_ROUNDS` says too little: there the noise is half the range of the ratios.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter

from evovit.bench.profile import Profile
from evovit.bench.setting import Setting, Variant
from evovit.bench.step import TimedStep
from evovit.errors import EvoViTError, in_one_line, shown
from evovit.methods import DENSE
from evovit.runtime.files import as_path, hold_folder, told, write_text

NOISE_FLOOR = 0.005  # of a ratio: what the place of things in memory can do alone
BUSY_SPREAD = 0.03  # median absolute deviation over median; above it times are called unsteady
ENOUGH_ROUNDS = 30
FEW_ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant with one engine. Times are per step; None where something was not measured."""

    model: str
    method: str
    options: dict[str, Any]
    engine: str
    dtype: str
    types: str  # what `dtype` means in this task
    batch: int
    image_size: int
    task: str
    device: str
    threads: int
    rounds: int
    steps_per_round: int
    gmacs: float  # of one image's forward
    mac_ratio: float  # dense / this: the most that saved arithmetic can give
    median_ms: float | None = None
    p95_ms: float | None = None
    cpu_ms: float | None = None  # of the process, all threads together
    images_per_second: float | None = None
    peak_memory_mb: float | None = None  # 1e6 bytes; with weights and one input; CUDA only
    memory_ratio: float | None = None  # this / dense with the same engine
    speedup: float | None = None  # over dense with the same engine
    noise: float | None = None  # of `speedup`, relative
    conversion: float | None = None  # speedup / mac_ratio
    speedup_over_eager: float | None = None  # over the dense host, eager, float32; CPU inference
    speedup_over_best_dense: float | None = None  # over dense with `best_dense_engine`
    verdict_over_best_dense: str = ""
    best_dense_engine: str | None = None
    is_best_engine: bool = False  # of this variant
    kernels: int | None = None  # per step: CUDA kernels, copies and fills; on the CPU operators that do work
    parts_ms: dict[str, float] | None = None
    graph_breaks: int | None = None
    recompiles: int | None = None  # after the first step
    verdict: str = ""
    skipped: str = ""  # why nothing was measured
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The variant in words."""
        return str(Variant(self.method, self.options))


@dataclass
class Measured:
    """A variant with one engine, and its times, one per round."""

    variant: Variant
    timed_step: TimedStep
    gmacs: float
    steps_per_round: int = 0
    times_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    profile: Profile | None = None

    @property
    def is_dense(self) -> bool:
        return self.variant == Variant(DENSE)

    @property
    def median_ms(self) -> float:
        return _quantile(self.times_ms, 0.5)

    @property
    def spread(self) -> float:
        """Median absolute deviation over the median."""
        return _quantile([abs(t - self.median_ms) for t in self.times_ms], 0.5) / self.median_ms


class Ratio(NamedTuple):
    """A speed-up and its noise, relative to it."""

    value: float
    noise: float

    @property
    def is_noise(self) -> bool:
        """Tell whether 1 lies within the noise."""
        return abs(self.value - 1) <= self.noise * self.value

    @property
    def verdict(self) -> str:
        """Say what the ratio shows, and no more."""
        spread = f"± {self.noise:.1%}"
        if self.is_noise:
            return f"no difference beyond noise ({spread})"
        if self.value < 1:
            return f"dense is faster here: {self.value:.2f}x {spread}"
        return f"{self.value:.2f}x {spread}"


def compare(dense_ms: Sequence[float], other_ms: Sequence[float]) -> Ratio:
    """Return dense / other from times of the same rounds; the bootstrap is seeded."""
    ratios = torch.tensor(dense_ms, dtype=torch.float64) / torch.tensor(other_ms, dtype=torch.float64)
    value = ratios.quantile(0.5).item()
    if len(ratios) < FEW_ROUNDS:
        return Ratio(value, max(NOISE_FLOOR, (ratios.max() - ratios.min()).item() / 2 / value))
    draws = torch.randint(len(ratios), (1000, len(ratios)), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = ratios[draws].quantile(0.5, dim=1).quantile(ends).tolist()
    return Ratio(value, max(NOISE_FLOOR, (high - low) / 2 / value))


def rows_of(
    setting: Setting,
    image_size: int,
    measured: Sequence[Measured],
    notes: Sequence[str] = (),
    eager: Measured | None = None,
) -> list[Row]:
    """Return one row per variant and engine, in the order given.

    Args:
        eager: the dense host in eager float32, timed in the same rounds.
    """
    notes = (*notes, *busy_notes(setting, measured))
    rows = [_row(setting, image_size, one, measured, tuple(notes)) for one in measured]
    if eager is None or not eager.times_ms:
        return rows
    return [
        replace(row, speedup_over_eager=compare(eager.times_ms, one.times_ms).value) if one.times_ms else row
        for row, one in zip(rows, measured, strict=True)
    ]


def _row(
    setting: Setting, image_size: int, one: Measured, measured: Sequence[Measured], notes: tuple[str, ...]
) -> Row:
    dense_gmacs = next(m.gmacs for m in measured if m.is_dense)
    row = Row(
        model=setting.model,
        method=one.variant.method,
        options=one.variant.options,
        engine=one.timed_step.engine,
        dtype=setting.dtype,
        types=setting.types,
        batch=setting.batch,
        image_size=image_size,
        task=setting.task,
        device=setting.device,
        threads=setting.threads or torch.get_num_threads(),
        rounds=setting.rounds,
        steps_per_round=one.steps_per_round,
        gmacs=one.gmacs,
        mac_ratio=dense_gmacs / one.gmacs,
        graph_breaks=one.timed_step.graph_breaks,
        recompiles=one.timed_step.recompiles,
        skipped=one.timed_step.skipped,
        notes=notes,
    )
    if not one.times_ms:
        return row
    own = [m for m in measured if m.variant is one.variant and m.times_ms]
    row = replace(
        row,
        median_ms=one.median_ms,
        p95_ms=_quantile(one.times_ms, 0.95),
        cpu_ms=_quantile(one.cpu_ms, 0.5) if one.cpu_ms else None,
        images_per_second=setting.batch / one.median_ms * 1e3,
        peak_memory_mb=one.timed_step.peak_memory_mb,
        is_best_engine=one is min(own, key=lambda m: m.median_ms),
        kernels=one.profile and one.profile.kernels,
        parts_ms=one.profile and one.profile.parts_ms,
    )
    return _beside_dense(row, one, [m for m in measured if m.is_dense and m.times_ms])


def _beside_dense(row: Row, one: Measured, dense: Sequence[Measured]) -> Row:
    """Add what compares the row with the dense model."""
    if not dense:
        return replace(row, verdict="the dense model was not measured")
    best = min(dense, key=lambda m: m.median_ms)
    over_best = compare(best.times_ms, one.times_ms)
    row = replace(row, best_dense_engine=best.timed_step.engine, speedup_over_best_dense=over_best.value)
    row = replace(row, verdict_over_best_dense="" if one.is_dense else over_best.verdict)
    beside = next((m for m in dense if m.timed_step.engine == row.engine), None)
    if beside is None:
        return replace(row, verdict=f"the dense model was not measured with engine {row.engine}")
    peak, dense_peak = row.peak_memory_mb, beside.timed_step.peak_memory_mb
    row = replace(row, memory_ratio=peak / dense_peak if peak and dense_peak else None)
    if one.is_dense:
        return replace(
            row, speedup=1.0, verdict="the best dense engine" if one is best and len(dense) > 1 else ""
        )
    ratio = compare(beside.times_ms, one.times_ms)
    verdict = ratio.verdict
    if ratio.value > 1 and over_best.value < 1 and not over_best.is_noise:
        verdict += f"; dense {best.timed_step.engine} is faster still"
    return replace(
        row,
        speedup=ratio.value,
        noise=ratio.noise,
        conversion=ratio.value / row.mac_ratio,
        verdict=verdict,
    )


def busy_notes(setting: Setting, measured: Sequence[Measured]) -> list[str]:
    """Say what makes the times doubtful: another process at work, a wide spread, few rounds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    notes: list[str] = []
    threads = setting.threads or torch.get_num_threads()
    if setting.device == "cpu" and setting.load is not None and setting.load + threads > cores + 0.5:
        notes.append(
            f"busy machine: load average {setting.load:.1f} on {cores} cores before this began; "
            f"it uses {threads} itself, so times are doubtful"
        )
    spread = max((m.spread for m in measured if m.times_ms), default=0.0)
    if spread > BUSY_SPREAD:
        notes.append(f"unsteady: times spread by {spread:.0%} of their median (another process at work?)")
    if setting.rounds < ENOUGH_ROUNDS:
        notes.append(f"only {setting.rounds} rounds; a result needs {ENOUGH_ROUNDS} or more")
    return notes


def _quantile(values: Sequence[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


Record = Mapping[str, Any]  # a row as in the file: the fields of `Row`, and of `environment`
FORMER: dict[str, str] = {
    "mode": "engine",
    "best_dense_mode": "best_dense_engine",
    "is_best_mode": "is_best_engine",
}


AROUND = ("device_name", "driver", "cuda", "torch", "timm", "evovit", "time")  # texts beside a row's own


def append_rows(folder: Path, rows: Sequence[Row], around: Record) -> list[Record]:
    """Add rows to `rows.jsonl` of a folder, whole or not at all, and return all it now holds."""
    path = folder / "rows.jsonl"
    with hold_folder(folder, wait=True), told(folder):  # another bench may add rows too
        new = [{**around, **asdict(row)} for row in rows]
        try:
            old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            lines = [line for line in old if line.strip()]
            records = [read_record(line) for line in lines]
        except (ValueError, TypeError, RecursionError) as error:
            raise EvoViTError(
                f"{str(path)!r} has a line that is not a JSON row ({in_one_line(error)}); move it away."
            ) from error
        lines += [json.dumps(each) for each in new]
        write_text(path, "".join(line + "\n" for line in lines))
    return records + [json.loads(json.dumps(each)) for each in new]


def read_rows(folder: Path) -> list[Record]:
    """Return the rows of a folder's `rows.jsonl` that were measured; lines that are no row are left out."""
    path, found = as_path(folder, "the folder of rows") / "rows.jsonl", list[Record]()
    if not path.is_file():
        raise EvoViTError(f"There is no {shown(path)}; give a folder that evovit bench wrote.")
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(read_record(line))
        except (ValueError, TypeError, RecursionError):
            continue
    return [record for record in found if is_whole(record) and record.get("median_ms") is not None]


def name_of(record: Record) -> str:
    """Return the variant in words."""
    return str(Variant(record["method"], record["options"]))


def read_record(line: str) -> Record:
    """Return the row of a line; a name of the former version becomes the one it has now."""
    found: dict[str, Any] = dict(json.loads(line))
    return {FORMER.get(name, name): value for name, value in found.items()}


def is_whole(record: Record) -> bool:
    """Tell whether a record has what a report shows: a row, finite and of its types, and its surroundings."""
    own = {name: value for name, value in record.items() if name in Row.__dataclass_fields__}
    try:
        TypeAdapter(Row).validate_json(json.dumps(own, allow_nan=False), strict=True)
    except ValueError:
        return False
    return all(isinstance(record.get(name, 0), str | None) for name in AROUND)
