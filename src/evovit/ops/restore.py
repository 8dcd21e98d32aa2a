"""Which token stands for each cell of the grid, and what a cell without one gets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from evovit.ops.select import take

NEIGHBOURS = 8  # tokens that a missing cell is interpolated from
TEMPERATURE = 0.1  # of the softmax over their cosine similarities


def rows_by_place(index: Tensor, cells: int) -> Tensor:
    """Return the row of the token with each place, (B, cells) int64; -1 where there is none.

    Args:
        index: (B, N) raster positions, -1 for a token without a place.
    """
    batch, num = index.shape
    place = index.where(index >= 0, cells)  # one more column, where tokens without a place go
    rows = torch.arange(num, device=index.device).expand(batch, num)
    return index.new_full((batch, cells + 1), -1).scatter(1, place, rows)[:, :cells]


def fill(held: Tensor, patches: Tensor, rows: Tensor) -> Tensor:
    """Return what each cell has, (B, cells, C): its token's value, or its value before.

    Args:
        held: (B, cells, C), the values before.
        patches: (B, N, C).
        rows: (B, cells) int64, -1 for a cell without a token.
    """
    return torch.where((rows >= 0).unsqueeze(-1), take(patches, rows.clamp_min(0)), held)


def interpolate(values: Tensor, reference: Tensor, present: Tensor) -> Tensor:
    """Return a mean of the most similar cells that are present, for every cell, (B, N, C).

    Similarity is the cosine in `reference`; the weights are a softmax over the nearest `NEIGHBOURS`.

    Args:
        values: (B, N, C), now.
        reference: (B, N, C), when all the cells still had a token.
        present: (B, N) bool; at least one of each image.
    """
    unit = F.normalize(reference.float(), dim=-1, eps=1e-6)
    kind = "cpu" if unit.is_meta else unit.device.type  # autocast knows no meta device
    with torch.autocast(kind, enabled=False):
        similarity = unit @ unit.transpose(-2, -1)  # (B, N, N)
    similarity = similarity.masked_fill(~present[:, None], -torch.inf)
    best, rows = similarity.topk(min(NEIGHBOURS, values.shape[1]), dim=-1)  # (B, N, K)
    weight = (best / TEMPERATURE).softmax(-1).to(values.dtype)
    near = take(values, rows.flatten(1)).reshape(*rows.shape, values.shape[2])
    return (weight.unsqueeze(2) @ near).squeeze(2)
