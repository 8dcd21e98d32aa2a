"""Serving by deadline: one model with several budgets answers as well as the time left allows.

    python examples/serve_by_deadline.py

Requests come faster and faster. Each batch runs at the largest budget that neither it nor the requests
waiting behind it would regret: the time of every budget comes from a table measured at the start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import timm
import torch

import evovit

MOST = 8  # images of a batch


@dataclass
class Request:
    """One image, or whatever stands for it."""

    arrival: float  # seconds
    deadline: float  # seconds
    budget: float | None = None  # at which it was answered
    start: float = 0.0
    done: float | None = None

    @property
    def missed(self) -> bool:
        return self.done is None or self.done > self.deadline


@dataclass
class Planner:
    """Picks a budget per batch.

    Args:
        seconds: of a batch, by budget and then by images, 1 to `MOST`.
    """

    seconds: Mapping[float, Sequence[float]]
    log: list[float] = field(default_factory=list)

    @property
    def lowest(self) -> float:
        return min(self.seconds)

    def lost(self, waiting: Sequence[Request], now: float, first: float) -> int:
        """Count deadlines lost if the next batch runs at `first` and all later ones at the lowest."""
        lost, budget = 0, first
        for place in range(0, len(waiting), MOST):
            batch = waiting[place : place + MOST]
            now += self.seconds[budget][len(batch) - 1]
            lost += sum(request.deadline < now for request in batch)
            budget = self.lowest
        return lost

    def pick(self, waiting: Sequence[Request], now: float) -> float:
        """Return the largest budget that loses no deadline which the lowest would keep."""
        least = self.lost(waiting, now, self.lowest)
        fits = [budget for budget in self.seconds if self.lost(waiting, now, budget) <= least]
        self.log.append(max(fits))
        return max(fits)


def serve(
    requests: Sequence[Request], planner: Planner, run: Callable[[float, int], float], start: float = 0.0
) -> None:
    """Answer requests in the order of their deadlines.

    Args:
        run: runs a batch at a budget; returns the seconds it took, of whatever clock the requests are on.
    """
    now, coming, waiting = start, sorted(requests, key=lambda one: one.arrival), list[Request]()
    while coming or waiting:
        if not waiting:
            now = max(now, coming[0].arrival)
        while coming and coming[0].arrival <= now:
            waiting.append(coming.pop(0))
        waiting.sort(key=lambda one: one.deadline)
        budget = planner.pick(waiting, now)
        batch, waiting = waiting[:MOST], waiting[MOST:]
        took = run(budget, len(batch))
        for request in batch:
            request.budget, request.start, request.done = budget, now, now + took
        now += took


def rising_load(seconds: float, first: float, last: float, patience: float) -> list[Request]:
    """Return requests whose rate rises from `first` to `last` per second; each waits `patience` seconds."""
    requests, now = [], 0.0
    while now < seconds:
        requests.append(Request(now, now + patience))
        now += 1 / (first + (last - first) * now / seconds)
    return requests


def table(model: evovit.ReducedViT, repeats: int = 3) -> dict[float, list[float]]:
    """Measure the seconds of every budget and batch size on this machine: the slowest of some runs."""
    found: dict[float, list[float]] = {}
    with torch.inference_mode():
        for budget in model.budgets:
            model.budget, found[budget] = budget, []
            for size in range(1, MOST + 1):
                images, times = torch.randn(size, *IMAGE), []
                for _ in range(repeats + 1):
                    begin = time.perf_counter()
                    model(images)
                    times.append(time.perf_counter() - begin)
                found[budget].append(max(times[1:]))
    return found


IMAGE = (3, 64, 64)


def main() -> None:
    torch.manual_seed(0)
    host = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, num_classes=10).eval()
    model = evovit.reduce_tokens(host, "evo_vit", start_block=2, budgets=(1.0, 0.7, 0.5, 0.3))
    seconds = table(model)
    for budget, times in seconds.items():
        print(f"budget {budget:g}: {times[0] * 1e3:.1f} ms for 1 image, {times[-1] * 1e3:.1f} ms for {MOST}")

    def run(budget: float, size: int) -> float:
        model.budget = budget
        begin = time.perf_counter()
        with torch.inference_mode():
            model(torch.randn(size, *IMAGE))
        return time.perf_counter() - begin

    most = MOST / seconds[1.0][-1]  # images per second of the dense model
    requests = rising_load(4.0, 0.3 * most, 1.4 * most, patience=4 * seconds[1.0][-1])
    planner = Planner(seconds)
    serve(requests, planner, run)
    quarter = max(1, len(requests) // 4)
    for part in range(4):
        some = requests[part * quarter : (part + 1) * quarter]
        mean = sum(request.budget or 0 for request in some) / len(some)
        late = sum(request.missed for request in some)
        print(f"quarter {part + 1}: {len(some)} requests, mean budget {mean:.2f}, {late} late")


if __name__ == "__main__":
    main()
