"""Which tokens are kept? Counts are Python integers, indices int64, ties go to the lower raster position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from evovit.tokens import QKV, Tokens

COUNTED = 1024  # up to so many tokens a GPU counts those ahead: N^2 comparisons; not timed yet


class Split(NamedTuple):
    """A choice of K among N patch tokens."""

    rows: Tensor  # (B, K) int64, positions of the kept among the N, ascending
    kept: Tensor  # (B, N) bool


def split_top(score: Tensor, keep: int) -> Split:
    """Keep the `keep` best scores of each image; equal scores: the lower position wins, on every device.

    Nothing leans on the order in which a `topk` gives equal scores, so every export engine selects alike.

    Args:
        score: (B, N) float32, not NaN.
        keep: 1 <= keep <= N.
    """
    score = score.detach()
    counts = score.is_cuda and score.shape[1] <= COUNTED
    kept = best_by_count(score, keep) if counts else best_by_threshold(score, keep)
    return Split(rows_where(kept, keep), kept)


def best_by_threshold(score: Tensor, keep: int) -> Tensor:
    """Return (B, N) bool: all above the `keep`-th best score, and of those equal to it the first that fit."""
    least = score.topk(keep, sorted=False).values.amin(-1, keepdim=True)
    above, equal = score > least, score == least
    room = keep - above.sum(-1, keepdim=True)
    return above | (equal & (equal.int().cumsum(-1) <= room))


def best_by_count(score: Tensor, keep: int) -> Tensor:
    """Return the same by counting the tokens ahead of each, N^2 comparisons: on GPUs one small kernel."""
    return count_ahead(score) < keep


def count_ahead(score: Tensor) -> Tensor:
    """Return how many are ahead of each, (B, N) int64: with a better score, or an equal one before it."""
    place = torch.arange(score.shape[1], device=score.device)
    other, own = score[:, None, :], score[:, :, None]
    ahead = (other > own) | ((other == own) & (place < place[:, None]))
    return ahead.sum(-1)


def descending(score: Tensor) -> Tensor:
    """Return all rows from the best score to the least, (B, N) int64; equal scores: the lower row first.

    Where engines will run the graph the ranks are counted, N^2 comparisons: their sorts are not stable.
    """
    score = score.detach()
    if not torch.compiler.is_exporting():
        return score.argsort(dim=-1, descending=True, stable=True)
    batch, num = score.shape
    place = torch.arange(num, dtype=torch.int32, device=score.device).expand(batch, num)
    rows = torch.zeros(batch, num, dtype=torch.int32, device=score.device)  # as in `rows_where`
    return rows.scatter(1, count_ahead(score), place).long()


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Return the rows `rows` (B, K) of x (B, T, C), as (B, K, C)."""
    return x.flatten(0, 1).index_select(0, _flat(rows, x)).reshape(*rows.shape, x.shape[2])


def put(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Return x (B, T, C) with the rows `rows` (B, K) replaced by values (B, K, C); out of place."""
    return x.flatten(0, 1).index_copy(0, _flat(rows, x), values.flatten(0, 1)).reshape(x.shape)


def _flat(rows: Tensor, x: Tensor) -> Tensor:
    """Return rows (B, K) of x (B, T, C) as rows of all images one after another, (B * K,)."""
    batch, num = x.shape[:2]
    return (rows + torch.arange(0, batch * num, num, device=x.device)[:, None]).flatten()


def with_prefix(rows: Tensor, num_prefix: int) -> Tensor:
    """Return rows of the whole tensor, (B, P + K): the P prefix rows, then patch rows (B, K) shifted by P."""
    prefix = torch.arange(num_prefix, device=rows.device).expand(rows.shape[0], num_prefix)
    return torch.cat((prefix, rows + num_prefix), dim=1)


def keep_rows(tokens: Tokens, rows: Tensor, among_all: Tensor | None = None) -> Tokens:
    """Return the prefix and the patch tokens `rows` (B, K) alone; each keeps its place, size and mask.

    Args:
        among_all: `with_prefix` of the rows, where it is at hand.
    """
    among_all = with_prefix(rows, tokens.num_prefix) if among_all is None else among_all
    index, size, mask = (
        None if each is None else each.gather(1, rows) for each in (tokens.index, tokens.size, tokens.mask)
    )
    return tokens.change(x=take(tokens.x, among_all), index=index, size=size, mask=mask)


def keep_leading(tokens: Tokens, count: int) -> Tokens:
    """Return the first `count` rows alone, the prefix among them: N is count - P."""
    index, size, mask = (
        None if each is None else each[:, : count - tokens.num_prefix]
        for each in (tokens.index, tokens.size, tokens.mask)
    )
    return tokens.change(x=tokens.x[:, :count], index=index, size=size, mask=mask)


def take_heads(x: Tensor, rows: Tensor) -> Tensor:
    """Return the rows `rows` (B, K) of queries, keys or values x (B, H, T, D), as (B, H, K, D)."""
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def take_bias(bias: Tensor, rows: Tensor) -> Tensor:
    """Return the rows and columns `rows` (B, K) of a position bias (1 or B, H, T, T), as (B, H, K, K)."""
    bias = take_heads(bias.expand(rows.shape[0], -1, -1, -1), rows)
    return bias.gather(3, rows[:, None, None, :].expand(-1, bias.shape[1], rows.shape[1], -1))


def take_qkv(qkv: QKV, rows: Tensor) -> QKV:
    """Return what attention sees of the rows `rows` (B, K) of the whole tensor alone."""
    q, k, v = (take_heads(x, rows) for x in (qkv.q, qkv.k, qkv.v))
    bias = None if qkv.bias is None else take_bias(qkv.bias, rows)
    return QKV(q, k, v, qkv.scale, bias, None if qkv.extra is None else take(qkv.extra, rows))


def take_queries(qkv: QKV, rows: Tensor) -> QKV:
    """Return what the attention of the rows `rows` (B, K) of the whole tensor sees: all keys."""
    bias, extra = qkv.bias, qkv.extra
    return qkv._replace(
        q=take_heads(qkv.q, rows),
        bias=None if bias is None else take_heads(bias.expand(rows.shape[0], -1, -1, -1), rows),
        extra=None if extra is None else take(extra, rows),
    )


def leading_queries(qkv: QKV, count: int) -> QKV:
    """Return what the attention of the first `count` rows sees: their queries, the keys and values of all."""
    bias, extra = qkv.bias, qkv.extra
    return qkv._replace(
        q=qkv.q[:, :, :count],
        bias=None if bias is None else bias[:, :, :count],
        extra=None if extra is None else extra[:, :count],
    )


def split_even(index: Tensor, keep: int) -> Split:
    """Keep `keep` evenly spaced rows of the N that `index` (B, N) has."""
    batch, num = index.shape
    steps = torch.arange(keep, device=index.device)
    rows = ((2 * steps + 1) * num // (2 * keep)).expand(batch, keep)
    return Split(rows, torch.zeros_like(index, dtype=torch.bool).scatter(1, rows, True))


def rows_where(chosen: Tensor, count: int) -> Tensor:
    """Return the rows that are True, (B, count) int64 ascending; of `count` or, then 0, fewer in (B, N)."""
    batch, num = chosen.shape
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, count)  # the others write to a spare place
    # int32: on GPUs, Inductor does not fuse a scatter of int64
    rows = torch.zeros(batch, count + 1, dtype=torch.int32, device=chosen.device)
    place = torch.arange(num, dtype=torch.int32, device=chosen.device).expand(batch, num)
    return rows.scatter(1, slot, place)[:, :count].long()
