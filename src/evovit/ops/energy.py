"""How many others is a token like? Its energy, and matches in the order of it (PiToMe, section 3)."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from evovit.ops.merge import Match, join, propose
from evovit.ops.select import take


def energy(similarity: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """Return how many others each token is like, (B, N): mean of ELU(similarity - margin), itself included.

    Args:
        similarity: (B, N, N) cosines, float32.
    """
    return F.elu(similarity - margin, alpha).mean(-1)


def gaussian_energy(similarity: Tensor, margin: float) -> Tensor:
    """Return the energy of the text variant: mean of a Gaussian of 1 - similarity, of width 1 - margin."""
    width = max(1 - margin, 1e-6)  # a margin of 1 tells nothing but equals
    return (-0.5 * ((1 - similarity) / width).square()).exp().mean(-1) / (width * math.sqrt(2 * math.pi))


def match_mergeable(similarity: Tensor, order: Tensor, removed: int, halves: bool) -> Match:
    """Merge among the 2r tokens of highest energy: each source into its most similar target.

    Args:
        similarity: (B, N, N).
        order: (B, N) rows, highest energy first.
        removed: r, 1 <= r <= N // 2.
        halves: the upper half are the sources; else they take turns with the targets, a source first.
    """
    high, protected = order[:, : 2 * removed], order[:, 2 * removed :]
    if halves:
        sources, targets = high[:, :removed], high[:, removed:]
    else:
        sources, targets = high[:, 0::2], high[:, 1::2]
    return join(protected, targets, sources, between(similarity, sources, targets).argmax(-1))


def match_in_turns(similarity: Tensor, order: Tensor, removed: int) -> Match:
    """Let every second token by energy propose to the others, as in ToMe; the best proposals merge.

    Args:
        similarity: (B, N, N).
        order: (B, N) rows, highest energy first.
        removed: 1 <= removed <= (N + 1) // 2.
    """
    ours, theirs = order[:, 0::2], order[:, 1::2]
    best = propose(between(similarity, ours, theirs), removed, in_order=True)
    return join(ours.gather(1, best.stay), theirs, ours.gather(1, best.sources), best.joined)


def between(similarity: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the rows (B, A) and columns (B, M) of (B, N, N), as (B, A, M)."""
    return take(similarity, rows).gather(2, columns.unsqueeze(1).expand(-1, rows.shape[1], -1))
