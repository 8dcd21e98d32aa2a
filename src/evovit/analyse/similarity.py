"""How alike are representations, queries, and sets of patches? Pure tensor functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Correlation(NamedTuple):
    """How the queries of each image correlate with their mean."""

    mean: Tensor  # (B,), over the tokens of an image, -1 to 1
    variance: Tensor  # (B,), over the same, divided by their number


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear centred kernel alignment of two representations of the same n images, 0 to 1.

    |Y'X|^2 / (|X'X| |Y'Y|) with centred columns and Frobenius norms (Kornblith et al., ICML 2019, section
    3). It ignores rotations and one common scale. Of few images it is high by chance, with n = 2 always 1.

    Args:
        x: (n, C).
        y: (n, D).

    Returns:
        0 where one of them does not vary.
    """
    x, y = (values.double() - values.double().mean(0) for values in (x, y))
    both, own = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float(both / own) if own > 0 else 0.0


def correlation_with_mean(queries: Tensor, present: Tensor) -> Correlation:
    """Return the Pearson correlation, over channels, of each token's query with the mean query of its image.

    Evo-ViT, figure 4b and supplement ("the similarity of each query token and the average query token").

    Args:
        queries: (B, N, C), all heads side by side.
        present: (B, N) bool, which tokens count; at least one of each image.
    """
    queries, weight = queries.double(), present.double()
    count = weight.sum(1, keepdim=True)
    mean = (queries * weight[..., None]).sum(1, keepdim=True) / count[..., None]  # (B, 1, C)
    centred, middle = (values - values.mean(-1, keepdim=True) for values in (queries, mean))
    norms = centred.norm(dim=-1) * middle.norm(dim=-1)
    each = (centred * middle).sum(-1) / norms.clamp_min(torch.finfo(norms.dtype).tiny)  # (B, N)
    average = (each * weight).sum(1, keepdim=True) / count
    variance = ((each - average).square() * weight).sum(1) / count[:, 0]
    return Correlation(average[:, 0], variance)


def jaccard(masks: Tensor, others: Tensor) -> Tensor:
    """Return |A and B| / |A or B| of every set with every other, mean over images, (K, L).

    Args:
        masks: (B, K, cells) bool, K sets of each image.
        others: (B, L, cells) bool.

    Returns:
        1 for two empty sets.
    """
    a, b = masks.double(), others.double()
    both = a @ b.transpose(1, 2)  # (B, K, L)
    either = a.sum(-1)[:, :, None] + b.sum(-1)[:, None] - both
    return torch.where(either > 0, both / either.clamp_min(1), 1.0).mean(0)


def jaccard_by_chance(share: float, other: float) -> float:
    """Return about what two random sets with these shares of the cells have, each in (0, 1]."""
    return share * other / (share + other - share * other)
