"""Does `evovit tune` keep its word? Targets, batches and repeated searches on a trained model.

    python benchmarks/tune_targets.py RUN OUT [--targets 1.2 1.4] [--batches 1 8] [--repeats 3] [--threads N]

RUN is the folder of a dense `evovit train`. Each search begins with fresh tables. What it found, and every
method's own knob (keep_ratio or r at default places) that was as fast as wished, less 3 %, is timed once more
in turn with dense, 40 rounds, and tested on all test images of the run; nothing is trained. A row goes to
OUT/rows.jsonl as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from evovit.bench.row import compare
from evovit.bench.setting import Setting
from evovit.runtime.world import join_world
from evovit.train.evaluate import evaluate
from evovit.tuning.clock import EngineClock
from evovit.tuning.job import Job, open_job
from evovit.tuning.latency import blank
from evovit.tuning.plans import Plan
from evovit.tuning.tune import MARGIN, Tuned, tune

ROUNDS = 40


def top1(job: Job, plan: Plan, known: dict[str, float]) -> float:
    """Return the top-1 (%) of a plan, untrained, on the run's test images."""
    assert job.tested is not None
    if plan.key not in known:
        with join_world("cpu") as world:
            tested = job.tested
            known[plan.key] = evaluate(
                plan.build(job.model), tested.images, tested.recipe, world, tested.places
            ).top1
    return known[plan.key]


def rivals(found: Tuned) -> list[Plan]:
    """Return the own knobs that are about as fast as wished, by the times of the search."""
    least = found.target * (1 - MARGIN)
    knobs = [one for one in found.candidates if "keep_per_block" not in one.plan.options]
    return [one.plan for one in knobs if one.speedup >= least]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--targets", type=float, nargs="+", default=(1.2, 1.4, 1.6, 2.0))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    job = open_job(str(given.run), "", False, None, 128)
    known: dict[str, float] = {}
    given.out.mkdir(parents=True, exist_ok=True)
    for batch in given.batches:
        setting = Setting(
            model=job.name, batch=batch, engines=("eager",), threads=given.threads, rounds=ROUNDS
        )
        clock = EngineClock(setting)
        for repeat in range(given.repeats):
            for target in given.targets:
                found = tune(
                    job.model,
                    job.images,
                    speedup=target,
                    batch=batch,
                    threads=given.threads,
                    tables=given.out / f"batch{batch}" / f"repeat{repeat}",
                )
                row: dict[str, object] = {"batch": batch, "target": target, "repeat": repeat}
                row["sentence"] = found.sentence
                if found.best is not None:
                    plans = {"found": found.best.plan} | {str(plan): plan for plan in rivals(found)}
                    models = {"dense": job.model} | {
                        name: plan.build(job.model) for name, plan in plans.items()
                    }
                    times = clock.times(models, dict.fromkeys(models, blank(job.model, batch)), ROUNDS)
                    row["met"] = found.met
                    row["plan"] = str(found.best.plan)
                    for name, plan in plans.items():
                        ratio = compare(times["dense"], times[name])
                        row[name] = {
                            "speedup": ratio.value,
                            "noise": ratio.noise,
                            "top1": top1(job, plan, known),
                        }
                with (given.out / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
