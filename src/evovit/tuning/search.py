"""All schedules of a few reduction points, by predicted time and damage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    scale: float = 1.0  # measured over predicted time
    merges: bool = False  # a block removes half of its tokens at most


def search(costs: Costs, counts: Sequence[int], num_prefix: int, wanted_ms: float, most: int) -> list[Found]:
    """Return the schedules of least predicted damage that take `wanted_ms` at most, best first.

    Args:
        counts: patch tokens that a block may keep, falling, all of them first.
    """
    best: list[Found] = []
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
            ms = np.full(len(levels), costs.latency.rest_ms)
            hurt = np.zeros(len(levels))
            for number in range(depth):
                past = sum(block <= number for block in blocks)  # reductions up to this block
                now = levels[:, past - 1] if past else np.zeros(len(levels), dtype=int)
                seen = before[:, past - 1] if number in blocks and not costs.parks else now
                ms += last[seen] if number == depth - 1 else attention[seen] + ffn[now]
                if number in blocks:
                    place = blocks.index(number)
                    hurt += np.maximum(0, damage[number, levels[:, place]] - damage[number, before[:, place]])
            ms = ms * costs.scale
            fits = np.flatnonzero(ms <= wanted_ms)
            for i in fits[np.argsort(hurt[fits], kind="stable")[:most]]:
                kept = _per_block(depth, blocks, [counts[level] for level in levels[i]], counts[0])
                best.append(Found(float(hurt[i]), float(ms[i]), kept))
        best = sorted(best)[:most]
    return best


def positions(depth: int, points: int) -> Iterator[tuple[int, ...]]:
    """Yield the blocks of the reduction points; of a deep model every second or third block may be one."""
    step = max(1, round(depth / 12))
    yield from combinations(range(1, depth, step), points)


def _allowed(costs: Costs, counts: Sequence[int], levels: NDArray[np.int64]) -> NDArray[np.bool_]:
    if not costs.merges:
        return np.ones(len(levels), dtype=bool)
    kept = np.array(counts)[np.concatenate([np.zeros((len(levels), 1), dtype=int), levels], axis=1)]
    return np.asarray(((kept[:, :-1] - kept[:, 1:]) <= kept[:, :-1] // 2).all(axis=1))


def _per_block(depth: int, blocks: Sequence[int], kept: Sequence[int], whole: int) -> tuple[int, ...]:
    return tuple(([whole, *kept])[sum(block <= number for block in blocks)] for number in range(depth))
