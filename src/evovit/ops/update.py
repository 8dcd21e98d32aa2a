"""How the tokens that were not selected are summarised and brought up to date."""

from __future__ import annotations

import torch
from torch import Tensor


def representative(patches: Tensor, score: Tensor, kept: Tensor) -> Tensor:
    """Return the score-weighted mean of the placeholder tokens (Evo-ViT eq. 5, weighted sum).

    Placeholders are weighed in place, not gathered.

    Args:
        patches: (B, N, C).
        score: (B, N) float32, not negative.
        kept: (B, N) bool; at least one token of each image is not kept.

    Returns:
        (B, 1, C) in the type of `patches`.
    """
    weight = score.masked_fill(kept, 0.0)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    return weight.to(patches.dtype).unsqueeze(1) @ patches


def weighted_sum(patches: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """Return the sum of the tokens that are not kept, each times its weight, not normalised (EViT, eq. 3).

    Args:
        patches: (B, N, C).
        weight: (B, N) float32; its gradient flows on.
        kept: (B, N) bool.

    Returns:
        (B, 1, C) in the type of `patches`.
    """
    return weight.masked_fill(kept, 0.0).to(patches.dtype).unsqueeze(1) @ patches
