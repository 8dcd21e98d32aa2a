"""Token squeezing: a dropped token joins the most similar kept one (TPS, Wei et al., CVPR 2023)."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor

from evovit.ops.select import Split, keep_rows, rows_where, take
from evovit.tokens import Tokens

Rest = Literal["drop", "squeeze"]  # what becomes of the tokens that a method does not keep
Temperature = Annotated[float, Ge(0.02)]  # of cosines; below it their exponentials leave float32

BARRED = -100.0  # similarity to a token that cannot take another in


class Squeezed(NamedTuple):
    """State beside the tokens, once some were squeezed."""

    source: Tensor  # (B, N at the start) int64, the row of the patch token that each grid cell is now part of


def keep_split(tokens: Tokens, split: Split, rest: str, temperature: float) -> Tokens:
    """Return the prefix and the kept patch tokens; the others are dropped, or squeezed into the kept.

    Args:
        rest: "squeeze", or anything else to drop.
    """
    if rest == "squeeze":
        return squeeze_rows(tokens, split, temperature)
    return keep_rows(tokens, split.rows)


def squeeze_rows(tokens: Tokens, split: Split, temperature: float) -> Tokens:
    """Return the prefix and the kept patch tokens, each with those that go and are most similar to it.

    Args:
        split: at least one token is dropped, at least one kept.
    """
    count = split.rows.shape[1]
    gone = rows_where(~split.kept, tokens.num_patches - count)  # (B, R)
    kept = keep_rows(tokens, split.rows)
    patches, host = squeeze(kept.patches, take(tokens.patches, gone), temperature)
    places = torch.arange(count, device=gone.device).expand_as(split.rows)
    moved = torch.zeros_like(tokens.index).scatter(1, split.rows, places).scatter(1, gone, host)
    source = moved.gather(1, tokens.carry.source) if tokens.carry else moved
    return kept.change(x=torch.cat((tokens.prefix, patches), dim=1), carry=Squeezed(source))


def squeeze(kept: Tensor, gone: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Merge each dropped token into the kept one of largest cosine; equal cosines: the lower row.

    A kept token counts e, one that joins it exp(cosine / temperature); the gradient flows through both.

    Args:
        kept: (B, K, C).
        gone: (B, R, C).

    Returns:
        (B, K, C) in the type of `kept`, and the row among the kept that each token joins, (B, R) int64.
    """
    similarity, host = (cosines(gone, kept) / temperature).max(-1)
    return _join(kept, gone, similarity.exp(), host), host


def squeeze_masked(patches: Tensor, keep: Tensor, before: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the same where tokens are masked out instead of dropped, (B, N, C); these stay unchanged.

    The decision has a gradient: as released, each token sends one to its nearest kept token.

    Args:
        patches: (B, N, C).
        keep: (B, N) 1 for tokens that stay, with gradient.
        before: (B, N) 1 for tokens that were there.
    """
    gone = (1 - keep) * before
    itself = torch.eye(patches.shape[1], dtype=torch.bool, device=patches.device)
    barred = itself | (keep < 0.5).unsqueeze(1)
    similarity, host = (cosines(patches, patches) / temperature).masked_fill(barred, BARRED).max(-1)
    return _join(patches, patches, (gone * similarity).exp() * gone, host)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of each row of a (B, N, C) and each of b (B, M, C), (B, N, M) float32."""
    kind = "cpu" if a.is_meta else a.device.type  # autocast knows no meta device
    with torch.autocast(kind, enabled=False):
        return _unit(a) @ _unit(b).transpose(-2, -1)


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / (length + 1e-6)


def _join(kept: Tensor, gone: Tensor, weight: Tensor, host: Tensor) -> Tensor:
    """Return the weighted mean of each kept token, whose weight is e, and those that join it.

    Written as one matrix product, not a scatter, so that it gives the same bits on every run.

    Args:
        weight: (B, R) float32.
        host: (B, R) int64, rows of `kept`.
    """
    rows = torch.arange(kept.shape[1], device=host.device)
    given = (host.unsqueeze(1) == rows[:, None]) * weight.unsqueeze(1)  # (B, K, R)
    whole = math.e + given.sum(-1, keepdim=True)
    return kept * (math.e / whole).to(kept.dtype) + (given / whole).to(kept.dtype) @ gone
