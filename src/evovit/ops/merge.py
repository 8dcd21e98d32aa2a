"""Which tokens are alike, and what they become together (bipartite soft matching, ToMe section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from evovit.ops.select import rows_where, split_top, take


@dataclass(frozen=True)
class Match:
    """R of N tokens, the sources, that merge, each into one of the other set of M; all int64 but `joins`."""

    order: Tensor  # (B, N) rows: the first set's that stay, ascending, the other set's, then the sources
    new: Tensor  # (B, N), the row among those left of each token in `order`
    joins: Tensor  # (B, M, R) bool, whether a token of the other set takes a source in

    @property
    def num_left(self) -> int:
        """N - R."""
        return self.order.shape[1] - self.joins.shape[2]

    @property
    def rows(self) -> Tensor:
        """(B, N - R) rows of the tokens that are left, in their new order."""
        return self.order[:, : self.num_left]

    @property
    def sources(self) -> Tensor:
        """(B, R) rows; see `rank` for their order."""
        return self.order[:, self.num_left :]

    @property
    def targets(self) -> Tensor:
        """(B, R) rows; several sources may share one."""
        return self.order.gather(1, self.new[:, self.num_left :])

    @property
    def moved(self) -> Tensor:
        """(B, N), the row among those left of each token in its old order."""
        return torch.zeros_like(self.order).scatter(1, self.order, self.new)


def match_tokens(metric: Tensor, removed: int, first: int) -> Match:
    """Split the tokens in turn into two sets and match the most similar pairs between them, without gradient.

    Each token of the first set proposes its most similar one of the other (cosine, float32); the `removed`
    best proposals merge. Equal similarities: the lower row wins.

    Args:
        metric: (B, N, D).
        removed: 1 <= removed <= N // 2.
        first: 0 or 1, first row of the first set; every second row from there belongs to it.
    """
    metric = F.normalize(metric.detach().float(), dim=-1, eps=1e-6)
    num, other = metric.shape[1], 1 - first
    kind = "cpu" if metric.is_meta else metric.device.type  # autocast knows no meta device
    with torch.autocast(kind, enabled=False):
        similarity = metric[:, first::2] @ metric[:, other::2].transpose(-2, -1)  # (B, N - M, M)
    best, partner = similarity.max(-1)  # (B, N - M); the first of equal ones
    sources, stay = rank(best, removed)
    joined = partner.gather(1, sources)  # (B, R), among the M
    places = torch.arange(num, device=metric.device)
    second = places[other::2].expand(metric.shape[0], -1)
    order = torch.cat((stay * 2 + first, second, sources * 2 + first), dim=1)
    back = places[num - removed :] - (joined + stay.shape[1])  # a source goes where its target is
    new = places - F.pad(back, (num - removed, 0))  # no `cat`: Inductor would not fuse it on GPUs
    joins = joined.unsqueeze(1) == places[: second.shape[1], None]
    return Match(order, new, joins)


def rank(best: Tensor, removed: int) -> tuple[Tensor, Tensor]:
    """Return the rows (B, R) of the `removed` best proposals and of the others, (B, N - M - R) ascending.

    The best come first, except where engines will run the graph: their sorts are not stable. There they
    ascend, and nothing but the order of a sum changes.

    Args:
        best: (B, N - M) float32.
    """
    if torch.compiler.is_exporting():
        chosen = split_top(best, removed)
        return chosen.rows, rows_where(~chosen.kept, best.shape[1] - removed)
    ranked = best.argsort(dim=-1, descending=True, stable=True)
    return ranked[:, :removed], ranked[:, removed:].sort(-1).values


def merge_sizes(size: Tensor, match: Match) -> tuple[Tensor, Tensor]:
    """Return how many patches each token left stands for, and what share of it every token has.

    Args:
        size: (B, N) float32, of all tokens.

    Returns:
        (B, N - R) and (B, N) float32, the second in the match's order.
    """
    ordered = size.gather(1, match.order)
    merged = size.new_zeros(match.rows.shape).scatter_add(1, match.new, ordered)
    return merged, ordered / merged.gather(1, match.new)


def merge_tokens(x: Tensor, share: Tensor, match: Match) -> Tensor:
    """Return the tokens left, (B, N - R, C): a target becomes the size-weighted mean of all that join it.

    Written as one small matrix product, so that it gives the same bits on every run.

    Args:
        x: (B, N, C).
        share: (B, N), of `merge_sizes`.
    """
    x = take(x, match.order) * share.to(x.dtype).unsqueeze(-1)
    num_targets, num_sources = match.joins.shape[1:]
    parts = [x.shape[1] - num_targets - num_sources, num_targets, num_sources]
    stay, targets, sources = torch.split(x, parts, dim=1)
    return torch.cat((stay, targets + match.joins.to(x.dtype) @ sources), dim=1)


def soft_match(
    a: Tensor, b: Tensor, removed: int, neighbours: int, pair_temperature: float, choice_temperature: float
) -> Tensor:
    """Return the share of each token a that goes to each b, (B, A, M) float32, with gradient (DTEM).

    A relaxed choice of `removed` pairs among the `neighbours` most similar b of each a; a row sums to at most
    1, up to rounding.

    Args:
        a: (B, A, D), b: (B, M, D); compared by cosine, in float32.
        removed: at most A.
    """
    a, b = (F.normalize(each.float(), dim=-1, eps=1e-6) for each in (a, b))
    kind = "cpu" if a.is_meta else a.device.type  # autocast knows no meta device
    with torch.autocast(kind, enabled=False):
        similarity = a @ b.transpose(-2, -1)
    best, partner = similarity.topk(min(neighbours, b.shape[1]), dim=-1)  # (B, A, K)
    chosen = relaxed_top(best / pair_temperature, removed, choice_temperature)
    over = (chosen.sum(-1, keepdim=True) - 1).clamp_min(0).detach()
    return torch.zeros_like(similarity).scatter(-1, partner, chosen / (1 + over))


def relaxed_top(score: Tensor, count: int, temperature: float) -> Tensor:
    """Return how much each pair is chosen when `count` rows are drawn one after another, (B, A, K).

    Each draw is a softmax over all pairs; a row that was drawn hardly counts in the next (relaxed top-k
    without replacement).

    Args:
        score: (B, A, K) float32.
    """
    total = torch.zeros_like(score)
    for _ in range(count):
        draw = (score / temperature).flatten(1).softmax(-1).reshape(score.shape)
        total = total + draw
        left = 1 - draw.sum(-1, keepdim=True)
        score = score + left.clamp_min(torch.finfo(torch.float32).tiny).log()
    return total
