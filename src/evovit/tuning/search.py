"""All schedules of a few reduction points, by predicted time and damage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evovit.tuning.latency import LatencyTable
from evovit.tuning.sensitivity import SensitivityTable

MOST_POINTS = 4


class Found(NamedTuple):
    """A schedule with what is predicted of it."""

    damage: float
    ms: float
    counts: tuple[int, ...]  # one per block


@dataclass(frozen=True)
class Costs:
    """What the search knows of one method."""

    latency: LatencyTable
    sensitivity: SensitivityTable
    parks: bool  # it selects before a block, else between attention and FFN
    extra: int  # rows of a reduced block beside prefix and kept tokens: a fused or representative one
    overhead_ms: float = 0.0  # of one reduction point, beside the blocks' times
    merges: bool = False  # a block removes half of its tokens at most


def search(costs: Costs, counts: Sequence[int], num_prefix: int, wanted_ms: float, most: int) -> list[Found]:
    """Return the schedules of least predicted damage that take `wanted_ms` at most, best first.

    Where none does, the fastest ones.

    Args:
        counts: patch tokens that a block may keep, falling, all of them first.
    """
    best: list[Found] = []
    fastest: list[Found] = []
    depth = costs.latency.depth
    rows = np.array([n + num_prefix + (costs.extra if n < counts[0] else 0) for n in counts])
    damage = costs.sensitivity.whole(depth, counts)  # (depth, counts)
    attention, ffn = (costs.latency.at(part, rows) for part in ("attention", "ffn"))
    last = costs.latency.at("last", rows)
    for points in range(1, MOST_POINTS + 1):
        levels = np.array(list(combinations(range(1, len(counts)), points)))  # (M, points), rising = fewer
        if not len(levels):
            break
        levels = levels[_allowed(costs, counts, levels)]
        before = np.concatenate([np.zeros((len(levels), 1), dtype=int), levels[:, :-1]], axis=1)
        for blocks in positions(depth, points):
            ms = np.full(len(levels), costs.latency.rest_ms + points * costs.overhead_ms)
            hurt = np.zeros(len(levels))
            for number in range(depth):
                past = sum(block <= number for block in blocks)  # reductions up to this block
                now = levels[:, past - 1] if past else np.zeros(len(levels), dtype=int)
                seen = before[:, past - 1] if number in blocks and not costs.parks else now
                ms += last[seen] if number == depth - 1 else attention[seen] + ffn[now]
                if number in blocks:
                    place = blocks.index(number)
                    hurt += np.maximum(0, damage[number, levels[:, place]] - damage[number, before[:, place]])
            fits = np.flatnonzero(ms <= wanted_ms)
            here = partial(_found, ms, hurt, levels, blocks, counts, depth)
            best += [here(i) for i in fits[np.argsort(hurt[fits], kind="stable")[:most]]]
            fastest += [here(i) for i in np.argsort(ms, kind="stable")[:1]]
        best = sorted(best)[:most]
        fastest = sorted(fastest, key=lambda one: (one.ms, one.damage))[:most]
    return best or fastest


def positions(depth: int, points: int) -> Iterator[tuple[int, ...]]:
    """Yield the blocks of the reduction points; of a deep model every second or third block may be one."""
    step = max(1, round(depth / 12))
    yield from combinations(range(1, depth, step), points)


def _allowed(costs: Costs, counts: Sequence[int], levels: NDArray[np.int64]) -> NDArray[np.bool_]:
    if not costs.merges:
        return np.ones(len(levels), dtype=bool)
    kept = np.array(counts)[np.concatenate([np.zeros((len(levels), 1), dtype=int), levels], axis=1)]
    return np.asarray(((kept[:, :-1] - kept[:, 1:]) <= kept[:, :-1] // 2).all(axis=1))


def _found(
    ms: NDArray[np.float64],
    hurt: NDArray[np.float64],
    levels: NDArray[np.int64],
    blocks: Sequence[int],
    counts: Sequence[int],
    depth: int,
    i: int,
) -> Found:
    """Return the i-th schedule of those that reduce at these blocks."""
    kept = [counts[0], *(counts[level] for level in levels[i])]
    per_block = tuple(kept[sum(block <= number for block in blocks)] for number in range(depth))
    return Found(float(hurt[i]), float(ms[i]), per_block)
