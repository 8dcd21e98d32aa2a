"""Several tokens become one in more than one step; attention by the map of before (MCTF, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evovit.ops.merge import Match, follow, merge_largest, merge_sizes, merge_tokens
from evovit.ops.select import take_heads, with_prefix
from evovit.tokens import QKV


@dataclass(frozen=True)
class Fusion:
    """R of N tokens become part of others: matches in turn, each of the tokens that the one before leaves."""

    matches: Sequence[Match]
    shares: Sequence[Tensor] | None  # (B, N) float32 each, in its match's order; None: the largest is taken

    @property
    def moved(self) -> Tensor:
        """(B, N) int64, the row among those left that each token is now part of."""
        return self.followed(None)

    def merged(self, x: Tensor) -> Tensor:
        """Return the rows left (B, N - R, C) of x (B, N, C): weighted means, or the largest by channel."""
        for step, match in enumerate(self.matches):
            x = merge_largest(x, match) if self.shares is None else merge_tokens(x, self.shares[step], match)
        return x

    def followed(self, source: Tensor | None) -> Tensor:
        """Return where each grid cell's token is now, (B, cells) int64; see `follow`."""
        for match in self.matches:
            source = follow(source, match)
        assert source is not None  # there is a match
        return source

    def places(self, index: Tensor) -> Tensor:
        """Return the places (B, N - R) of the tokens left, those of the ones merged into, from (B, N)."""
        for match in self.matches:
            index = index.gather(1, match.rows)
        return index


def weighted_fusion(matches: Sequence[Match], weight: Tensor) -> Fusion:
    """Return the fusion to means by weight (B, N) float32, above 0, no gradient."""
    shares = []
    for match in matches:
        weight, share = merge_sizes(weight, match)
        shares.append(share)
    return Fusion(matches, shares)


def aggregated(qkv: QKV, bias: Tensor | None, fusion: Fusion, num_prefix: int) -> Tensor:
    """Return what fused tokens mix by the old map, (B, H, P + N - R, D); see `backbones.base.Mix`.

    A column of a fused token is the sum of its tokens' columns, a row the mean of their rows. The sums are
    not formed: each token reads the value of the one it is part of.

    Args:
        qkv: in place of queries the map (B, H, P + N, P + N); values of the fused tokens.
        bias: is in the map already.
    """
    attention, values = qkv.q, qkv.v
    rows = with_prefix(fusion.moved, num_prefix)  # (B, P + N)
    if fusion.shares is not None:
        return merged_rows(attention @ take_heads(values, rows), fusion, num_prefix)
    places = torch.arange(values.shape[2], device=rows.device)  # the largest row is one of sums
    groups = (rows[:, None, :, None] == places).to(attention.dtype)  # (B, 1, P + N, P + N - R)
    return merged_rows(attention @ groups, fusion, num_prefix) @ values


def merged_rows(x: Tensor, fusion: Fusion, num_prefix: int) -> Tensor:
    """Return x (B, H, P + N, D) with its patch rows fused, (B, H, P + N - R, D)."""
    heads = x.shape[1]
    flat = x.transpose(1, 2).flatten(2)  # (B, P + N, H * D)
    flat = torch.cat((flat[:, :num_prefix], fusion.merged(flat[:, num_prefix:])), dim=1)
    return flat.reshape(*flat.shape[:2], heads, -1).transpose(1, 2)
