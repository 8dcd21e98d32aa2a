"""Which tokens are alike, and what they become together (bipartite soft matching, ToMe section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from evovit.ops.select import descending, rows_where, split_top, take


@dataclass(frozen=True)
class Match:
    """R of N tokens, the sources, that merge, each into one of M targets; indices are int64."""

    order: Tensor  # (B, N) rows: those left in their new order, then the sources
    new: Tensor  # (B, N), the row among those left of each token in `order`
    joins: Tensor  # (B, M, R) bool, whether a target takes a source in
    start: int  # where among those left the targets begin
    dropped: Tensor | None = None  # (B, N) bool, tokens in `order` that live on in no other; None: no one

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
        """(B, N), the row among those left of each token in its old order; -1 for a dropped one."""
        new = self.new if self.dropped is None else self.new.masked_fill(self.dropped, -1)
        return torch.zeros_like(self.order).scatter(1, self.order, new)


class Proposals(NamedTuple):
    """What the A tokens of one set propose to the M of the other; places in the two sets, int64."""

    sources: Tensor  # (B, R) of the best proposals
    stay: Tensor  # (B, A - R), the others
    joined: Tensor  # (B, R) among the M, whom each source proposes to


def propose(weight: Tensor, removed: int, in_order: bool = False) -> Proposals:
    """Let each token of one set propose its best of the other; the `removed` best proposals merge.

    Equal weights: the lower place wins.

    Args:
        weight: (B, A, M) float32.
        in_order: those that stay are in falling order of their best weight, else ascending.
    """
    best, partner = weight.max(-1)  # (B, A); the first of equal ones
    if in_order:
        ranked = descending(best)
        sources, stay = ranked[:, :removed], ranked[:, removed:]
    else:
        sources, stay = rank(best, removed)
    return Proposals(sources, stay, partner.gather(1, sources))


def join(
    stay: Tensor, targets: Tensor, sources: Tensor, joined: Tensor, targets_first: bool = False
) -> Match:
    """Return the match in which each source becomes part of a target.

    Args:
        stay: (B, K) rows that take no part; they come before the targets, or after with `targets_first`.
        targets: (B, M) rows.
        sources: (B, R) rows.
        joined: (B, R) places among the M.
    """
    left = (targets, stay) if targets_first else (stay, targets)
    start, removed = 0 if targets_first else stay.shape[1], sources.shape[1]
    order = torch.cat((*left, sources), dim=1)
    places = torch.arange(order.shape[1], device=order.device)
    back = places[len(places) - removed :] - (joined + start)  # a source goes where its target is
    new = places - F.pad(back, (len(places) - removed, 0))  # no `cat`: Inductor would not fuse it on GPUs
    joins = joined.unsqueeze(1) == places[: targets.shape[1], None]
    return Match(order, new, joins, start)


def unit_rows(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the rows of x (B, N, D) scaled to length 1, float32 without gradient."""
    return F.normalize(x.detach().float(), dim=-1, eps=eps)


def similarities(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the products of rows (B, A, D) with rows (B, M, D), (B, A, M), in their type in autocast too."""
    kind = "cpu" if ours.is_meta else ours.device.type  # autocast knows no meta device
    with torch.autocast(kind, enabled=False):
        return ours @ theirs.transpose(-2, -1)


def match_tokens(metric: Tensor, removed: int, first: int) -> Match:
    """Split the tokens in turn into two sets and match the most similar pairs between them, without gradient.

    Each token of the first set proposes its most similar one of the other (cosine, float32); the `removed`
    best proposals merge. Equal similarities: the lower row wins.

    Args:
        metric: (B, N, D).
        removed: 1 <= removed <= N // 2.
        first: 0 or 1, first row of the first set; every second row from there belongs to it.
    """
    unit = unit_rows(metric)
    return match_by(similarities(unit[:, first::2], unit[:, 1 - first :: 2]), removed, first)


def match_by(weight: Tensor, removed: int, first: int) -> Match:
    """Match the `removed` best proposals of the first set, by weights (B, A, M) between it and the other."""
    best, num = propose(weight, removed), weight.shape[1] + weight.shape[2]
    second = torch.arange(num, device=weight.device)[1 - first :: 2].expand(weight.shape[0], -1)
    return join(best.stay * 2 + first, second, best.sources * 2 + first, best.joined)


def match_both_ways(weight: Tensor, removed: int, first: int) -> list[Match]:
    """Match the pairs of highest weight: half of `removed` from the first set, then the rest from the other.

    The second match is of the tokens that the first leaves; sources of both may end in one token. Tokens of
    the first set come first and ascend, those of the other fall by their best weight (MCTF, section 3.2).

    Args:
        weight: (B, A, M) float32 between the two sets, which take turns.
        removed: 1 <= removed <= (A + M) // 2.
        first: 0 or 1, first row of the first set.
    """
    batch, num = weight.shape[0], weight.shape[1] + weight.shape[2]
    places = torch.arange(num, device=weight.device).expand(batch, num)
    ours, theirs, half = places[:, first::2], places[:, 1 - first :: 2], removed // 2
    matches: list[Match] = []
    if half > 0:
        best = propose(weight, half)
        matches.append(join(ours.gather(1, best.stay), theirs, ours.gather(1, best.sources), best.joined))
        weight = take(weight, best.stay)  # those that merged propose and receive no more
        ours, theirs = places[:, : weight.shape[1]], places[:, weight.shape[1] : num - half]
    back = propose(weight.transpose(1, 2), removed - half, in_order=True)
    stay, sources = theirs.gather(1, back.stay), theirs.gather(1, back.sources)
    return [*matches, join(stay, ours, sources, back.joined, targets_first=True)]


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


def drop_where(match: Match, drops: Tensor, order: Tensor) -> Match:
    """Return the match with its last tokens dropped, instead of merged, in some images.

    Args:
        drops: (B, 1) bool, in which images.
        order: (B, N) rows there: those that stay, in the order they go on in, then the R dropped.
    """
    places = torch.arange(order.shape[1], device=order.device)
    new = match.new.where(~drops, places.clamp_max(match.num_left - 1))
    dropped = drops & (places >= match.num_left)
    joins = match.joins & ~drops.unsqueeze(-1)
    return Match(order.where(drops, match.order), new, joins, match.start, dropped)


def merge_sizes(size: Tensor, match: Match) -> tuple[Tensor, Tensor]:
    """Return how many patches each token left stands for, and what share of it every token has.

    Args:
        size: (B, N) float32, of all tokens, above 0; any weights will do.

    Returns:
        (B, N - R) and (B, N) float32, the second in the match's order; a dropped token has no share.
    """
    ordered = size.gather(1, match.order)
    ordered = ordered if match.dropped is None else ordered.masked_fill(match.dropped, 0.0)
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
    before, targets, after, sources = parted(x, match)
    return whole(before, targets + match.joins.to(x.dtype) @ sources, after)


def merge_largest(x: Tensor, match: Match) -> Tensor:
    """Return the tokens left, (B, N - R, C): a target becomes the largest of all that join it, by channel.

    Args:
        x: (B, N, C).
    """
    before, targets, after, sources = parted(take(x, match.order), match)
    of_sources = sources.unsqueeze(1).masked_fill(~match.joins.unsqueeze(-1), -torch.inf)  # (B, M, R, C)
    return whole(before, torch.maximum(targets, of_sources.amax(2)), after)


def parted(x: Tensor, match: Match) -> Sequence[Tensor]:
    """Return tokens in the match's order (B, N, C) as those before the targets, these, after, the sources."""
    num_targets, num_sources = match.joins.shape[1:]
    after = match.num_left - match.start - num_targets
    return torch.split(x, [match.start, num_targets, after, num_sources], dim=1)


def whole(*parts: Tensor) -> Tensor:
    """Return parts (B, any, C) one after another; engines need not know those without rows."""
    return torch.cat([part for part in parts if part.shape[1] > 0], dim=1)


def follow(source: Tensor | None, match: Match) -> Tensor:
    """Return where each grid cell's token is now, (B, cells) int64; -1: it was dropped.

    Args:
        source: (B, cells), where it was before; None: each cell had the row of its own number.
    """
    moved = match.moved
    if source is None:
        return moved
    if match.dropped is None:
        return moved.gather(1, source)
    return moved.gather(1, source.clamp_min(0)).where(source >= 0, -1)


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
