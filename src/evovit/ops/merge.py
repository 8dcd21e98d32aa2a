"""Which tokens are alike, and what they become together (bipartite soft matching, ToMe section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from evovit.ops.select import rows_where, split_top, take


class Match(NamedTuple):
    """R of N tokens that merge, each into one of another half; all int64 rows."""

    sources: Tensor  # (B, R), ascending, among the N
    targets: Tensor  # (B, R), among the N; several sources may share one
    rows: Tensor  # (B, N - R), among the N, of the tokens that are left, in their new order
    moved: Tensor  # (B, N), the new row of every old one


def match_tokens(metric: Tensor, removed: int, first: int) -> Match:
    """Split the tokens in turn into two sets and match the most similar pairs between them, without gradient.

    Each token of set A proposes its most similar one of set B (cosine, float32); the `removed` best proposals
    merge. Equal similarities: the lower row wins. The new order is what is left of A, then B.

    Args:
        metric: (B, N, D).
        removed: 1 <= removed <= N // 2.
        first: 0 or 1, first row of set A; every second row from there belongs to it.
    """
    metric = F.normalize(metric.detach().float(), dim=-1, eps=1e-6)
    num, other = metric.shape[1], 1 - first
    kind = "cpu" if metric.is_meta else metric.device.type  # autocast knows no meta device
    with torch.autocast(kind, enabled=False):
        similarity = metric[:, first::2] @ metric[:, other::2].transpose(-2, -1)  # (B, A, N - A)
    best, partner = similarity.max(-1)  # (B, A); the first of equal ones
    count = best.shape[1] - removed
    split = split_top(best, removed)
    stay = rows_where(~split.kept, count)
    places = torch.arange(num, device=metric.device)
    second = places[other::2].expand(metric.shape[0], -1)
    moved_first = torch.where(split.kept, count + partner, (~split.kept).cumsum(-1) - 1)
    moved_second = (count + places[: num - best.shape[1]]).expand_as(second)
    both = torch.cat((moved_first, moved_second), dim=1)  # of A, then of B
    home = torch.where(places % 2 == first, places // 2, best.shape[1] + places // 2)
    return Match(
        sources=split.rows * 2 + first,
        targets=partner.gather(1, split.rows) * 2 + other,
        rows=torch.cat((stay * 2 + first, second), dim=1),
        moved=both.index_select(1, home),
    )


def merge_sizes(size: Tensor, match: Match) -> Tensor:
    """Return how many patches each token left stands for, (B, N - R), from `size` (B, N)."""
    return size.new_zeros(match.rows.shape).scatter_add(1, match.moved, size)


def merge_tokens(x: Tensor, size: Tensor, match: Match) -> Tensor:
    """Return the tokens left, (B, N - R, C): a target becomes the size-weighted mean of all that join it.

    Written as one small matrix product, so that it gives the same bits on every run.
    """
    share = (size / merge_sizes(size, match).gather(1, match.moved)).to(x.dtype)  # (B, N)
    new_target = match.moved.gather(1, match.targets)  # (B, R)
    left = take(x * share.unsqueeze(-1), match.rows)
    places = torch.arange(match.rows.shape[1], device=x.device)[:, None]
    joins = (new_target.unsqueeze(1) == places).to(x.dtype) * share.gather(1, match.sources).unsqueeze(1)
    return left + joins @ take(x, match.sources)
