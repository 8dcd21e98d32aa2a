"""Adaptive sampling: which tokens the inverse of the scores' cumulative sum picks (ATS, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


class Cumulated(NamedTuple):
    """Scores of one sampling, added up from the lowest to the highest."""

    rank: Tensor  # (B, N) int64, of each token by ascending score, absent ones first; equal: the lower row
    share: Tensor  # (B, N) float32, F of the paper by rank, 0 to 1


def value_score(weight: Tensor, values: Tensor, num_prefix: int) -> Tensor:
    """Return the attention that each patch token receives times the length of its value (eq. 4).

    Args:
        weight: (B, N) float32, on patch tokens.
        values: (B, H, P + N, D).

    Returns:
        (B, N) float32, sum 1.
    """
    length = values[:, :, num_prefix:].float().square().sum((1, 3)).sqrt()
    score = weight * length
    return score / score.sum(-1, keepdim=True).clamp_min(TINY)


def cumulate(score: Tensor, present: Tensor, padded: Tensor) -> Cumulated:
    """Add the scores up, from 0 at the lowest to 1 at the highest.

    Ranks are counted, not sorted, so that every engine ranks equal scores alike.

    Args:
        score: (B, N) float32, 0 where absent.
        present: (B, N) bool; at least one of each image.
        padded: (B,) bool; 0 is then below the lowest token, which so can be picked.
    """
    place = torch.arange(score.shape[1], device=score.device)
    keyed = score.masked_fill(~present, -1.0)
    other, own = keyed[:, None, :], keyed[:, :, None]
    rank = ((other < own) | ((other == own) & (place < place[:, None]))).sum(-1)
    total = torch.zeros_like(score).scatter(1, rank, score).cumsum(-1)
    absent = (~present).sum(-1, keepdim=True)  # so many ranks are theirs
    lowest = total.gather(1, absent).masked_fill(padded.unsqueeze(-1), 0.0)
    share = (total - lowest) / (total[:, -1:] - lowest).clamp_min(TINY)
    share = share.masked_fill(place < absent, 0.0)
    return Cumulated(rank, share.masked_fill(place == score.shape[1] - 1, 1.0))


def points_of(share: Tensor, count: int) -> Tensor:
    """Return where to sample, (B, count): evenly from the lowest share above 0 to 1; a single one at 1.

    Args:
        share: (B, N), of `cumulate`.
    """
    first = share.masked_fill(share <= 0, 2.0).amin(-1, keepdim=True)
    steps = (
        torch.arange(count, device=share.device) / (count - 1) if count > 1 else torch.ones_like(first[:1, 0])
    )
    return first + steps * (1 - first)


def nearest_ranks(share: Tensor, points: Tensor) -> Tensor:
    """Return the rank whose share is nearest to each point, (B, count) int64; equally near: the lower."""
    return (points.unsqueeze(-1) - share.unsqueeze(1)).abs().min(-1).indices


def sample(score: Tensor, present: Tensor, padded: Tensor, count: int) -> Tensor:
    """Return which tokens are picked at `count` points, (B, N) bool: at least one, at most `count`.

    Args:
        score, present, padded: as of `cumulate`; without gradient.
    """
    ranked = cumulate(score.detach(), present, padded)
    picked = nearest_ranks(ranked.share, points_of(ranked.share, count))
    by_rank = torch.zeros_like(score).scatter(1, picked, 1.0)  # a rank picked twice counts once
    return by_rank.gather(1, ranked.rank) > 0
