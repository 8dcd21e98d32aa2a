"""Print the targets table of the project on one GPU; meant to take under 8 minutes with 16 cores.

    python benchmarks/gpu_table.py OUT.jsonl [--only PATTERN] [--rounds 30] [--budget 440] [--no-warm]

Compiling takes longest by far, so first every group compiles in a process of its own, all at once, and leaves
its code in Inductor's cache on disk. Then each group measures the dense model beside the reduced ones, in
turn, all in this process. Rows are printed and appended to OUT.jsonl as soon as a group is done, so a killed
run loses one group at most. No group begins after the budget (seconds from the start). The exit status is 1
if a group or a row is missing. PATTERN is a regular expression on the group's name: batch-1, DeiT-S, others,
train, 384, DeiT-B.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from evovit.bench.row import Row
from evovit.bench.setting import Setting, Variant
from evovit.bench.timing import Extras, measure

WARM_LIMIT = 240.0  # seconds
SMALL, BASE = "deit_small_patch16_224", "deit_base_patch16_224"
EVO = {
    (mode, fast): Variant("evo_vit", {"mode": mode, "fast_update": fast})
    for mode in ("stage", "layer")
    for fast in (False, True)
}
STAGE, STAGE_FAST, LAYER, LAYER_FAST = EVO.values()
# the wrapper alone; target: at most 2 % slower
NOTHING = Variant("evo_vit", {"keep_ratio": 1.0, "last_block": "all"})
EVIT, TOME = Variant("evit", {"keep_ratio": 0.7}), Variant("tome", {"r": 13})


class Group(NamedTuple):
    """One comparison."""

    name: str
    setting: dict[str, Any]
    variants: tuple[Variant, ...]


GROUPS = (  # launch-bound batch 1 first: what a profiler leaves behind could slow launches
    Group("batch-1", {"model": SMALL, "batch": 1, "engines": ("compiled", "graphs")}, (STAGE, LAYER_FAST)),
    Group(
        "DeiT-S", {"model": SMALL, "batch": 256, "engines": ("eager", "compiled")}, (*EVO.values(), NOTHING)
    ),
    Group("others", {"model": SMALL, "batch": 256, "engines": ("compiled",)}, (EVIT, TOME)),
    Group(
        "train",
        {"model": SMALL, "batch": 256, "engines": ("compiled",), "train": True},
        (STAGE_FAST, LAYER_FAST),
    ),
    Group("384", {"model": SMALL, "batch": 256, "engines": ("compiled",), "size": 384}, (STAGE, STAGE_FAST)),
    Group("DeiT-B", {"model": BASE, "batch": 256, "engines": ("compiled",)}, tuple(EVO.values())),
)


def target(group: Group, row: Row) -> tuple[float, str] | None:
    """Return the least speed-up asked for (measurements.md, section 3) and whether it is met."""
    layer = row.options.get("mode") == "layer"
    if row.method == "dense" or (row.engine == "eager") or row.speedup is None:
        return None
    if row.options.get("keep_ratio") == 1.0:
        least = 1 / 1.02
    elif group.name == "batch-1":
        least = 1.0
        if row.engine != "graphs":
            return None
    elif group.name == "others":
        least = 1.50 if row.method == "tome" else 1.40
    else:
        least = {"train": 1.40, "384": 1.50}.get(group.name, 1.36 if layer else 1.45)
    noise = row.speedup * (row.noise or 0)
    if row.speedup - noise < least <= row.speedup + noise:
        return least, "undecided by the noise"
    return least, "met" if row.speedup > least else "MISSED"


def compile_group(group: Group, setting: Setting) -> bool:
    """Compile a group for the cache on disk; return whether all of it worked, say on stderr what did not."""
    once = replace(setting, engines=("compiled",), rounds=1)
    # A kernel's launch sizes, chosen by timing while other processes compute, are not for keeping.
    with inductor_config.patch(autotune_local_cache=False):
        rows = measure(once, group.variants, Extras(kernels=False))
    wrong = [f"{row.name}: {row.skipped}" for row in rows if row.skipped]
    if rows[0].batch != once.batch:
        wrong.append(f"batch {once.batch} did not fit beside the other groups")
    for text in wrong:
        print(f"{group.name}: {text}", file=sys.stderr, flush=True)
    return not wrong


def warm(groups: Sequence[Group], arguments: Sequence[str], limit: float = WARM_LIMIT) -> None:
    """Run `compile_group` on each group in a process of its own, all at once; end what takes too long."""
    start = time.perf_counter()
    each = [[sys.executable, __file__, *arguments, f"--only=^{re.escape(g.name)}$", "--warm"] for g in groups]
    children = [subprocess.Popen(command) for command in each]
    try:
        for group, child in zip(groups, children, strict=True):
            try:
                status = child.wait(max(0.0, start + limit - time.perf_counter()))
                told = f"status {status}" if status else ""
            except subprocess.TimeoutExpired:
                told = f"not done after {limit:g} s"
            if told:
                print(f"  compiling {group.name} ahead: {told}", flush=True)
    finally:
        for child in children:
            child.terminate()
            child.wait()
    print(f"compiled {len(groups)} groups ahead in {time.perf_counter() - start:.0f} s", flush=True)


def line(group: Group, row: Row) -> str:
    """Return the row as printed."""
    head = f"{group.name:8} {row.engine:9} {row.name:40}"
    if row.median_ms is None:
        return f"{head} skipped: {row.skipped}"
    memory = f"{row.peak_memory_mb or 0:7.0f} MB ({row.memory_ratio or 1:.2f})"
    text = (
        f"{head} {row.median_ms:8.3f} ms  p95 {row.p95_ms:8.3f}  {row.images_per_second:8.0f} im/s {memory}"
    )
    kernels = "-" if row.kernels is None else row.kernels
    text += f"  {kernels:>4} kernels  breaks {row.graph_breaks} recompiles {row.recompiles}"
    if row.method != "dense" and row.speedup is not None and row.conversion is not None:
        text += f"  | {row.speedup:.3f}x ± {row.noise:.1%}, ceiling {row.mac_ratio:.2f}, "
        text += f"conversion {row.conversion:.2f}, over best dense {row.speedup_over_best_dense:.3f}x"
        asked = target(group, row)
        text += f"  | target {asked[0]:.2f}: {asked[1]}" if asked else ""
    return text


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("out", type=Path)
    found.add_argument("--only", default="", help="regular expression on a group's name")
    found.add_argument("--rounds", type=int, default=30)
    found.add_argument("--budget", type=float, default=440, help="seconds after which no group begins")
    found.add_argument("--parts", action="store_true", help="also print where the time goes")
    found.add_argument("--device", default="cuda")
    found.add_argument("--batch", type=int, help="instead of the groups' own; for a trial run")
    found.add_argument("--no-warm", action="store_true", help="do not compile the groups ahead")
    found.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)  # compile only: see `warm`
    return found


def main() -> None:
    """Run the groups."""
    options = parser().parse_args()
    start, where = time.perf_counter(), options.device
    shared: dict[str, Any] = {"device": where, "dtype": "bf16", "rounds": options.rounds}
    shared |= {"batch": options.batch} if options.batch else {}
    chosen = [
        (group, Setting(**group.setting | shared)) for group in GROUPS if re.search(options.only, group.name)
    ]
    if not chosen:
        parser().error(f"no group matches {options.only!r}; there are {', '.join(g.name for g in GROUPS)}")
    if options.warm:
        done = [compile_group(*each) for each in chosen]
        sys.exit(not all(done))
    device = torch.cuda.get_device_name() if where == "cuda" else where
    environment = {"device_name": device, "torch": torch.__version__, "timm": timm.__version__}
    print(json.dumps(environment), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if len(chosen) > 1 and not options.no_warm:
        warm([group for group, _ in chosen], sys.argv[1:])
    failed = False
    for group, setting in chosen:
        if time.perf_counter() - start > options.budget:
            print(f"{group.name}: not run, the budget of {options.budget:g} s is used up", flush=True)
            failed = True
            continue
        try:
            rows = measure(setting, group.variants, Extras(), lambda text: print(f"  {text}", flush=True))
        except Exception:  # the other groups still have their say
            traceback.print_exc()
            failed = True
            continue
        with options.out.open("a") as file:
            for row in rows:
                file.write(json.dumps({"group": group.name, **asdict(row), **environment}) + "\n")
        failed |= any(row.median_ms is None for row in rows)
        for row in rows:
            print(line(group, row), flush=True)
            if options.parts and row.parts_ms:
                print("    " + ", ".join(f"{part} {ms:.3f}" for part, ms in row.parts_ms.items()), flush=True)
        graphs = counters["inductor"]  # Inductor puts a new one there at times
        found = (
            f"{graphs['fxgraph_cache_hit']} graphs from the cache, {graphs['fxgraph_cache_miss']} compiled"
        )
        notes = "; ".join(rows[0].notes)
        print(f"  {notes} [{found}, {time.perf_counter() - start:.0f} s so far]\n", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
