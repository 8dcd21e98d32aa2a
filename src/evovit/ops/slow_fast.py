"""Slow-fast token evolution between blocks (Evo-ViT, eq. 4 to 7): which tokens go on or wait."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from evovit.ops.score import running_score
from evovit.ops.select import Split, keep_rows, put, split_top, with_prefix
from evovit.ops.update import representative
from evovit.tokens import Tokens


class Waiting(NamedTuple):
    """Evo-ViT's state beside the tokens; all but `score` while placeholders wait."""

    score: Tensor | None = None  # (B, N) float32, score of every patch token present
    split: Split | None = None  # which are awake
    rows: Tensor | None = None  # (B, P + K) int64, where prefix and awake stand among all
    awake: Tensor | None = None  # (B, K) float32, score of the awake
    before: Tokens | None = None  # all tokens as the stage found them
    summary: Tensor | None = None  # (B, 1, C), the representative token as the stage found it


def num_awake(state: Waiting) -> int | None:
    """Return K, the patch tokens that are awake; None while all are."""
    return None if state.awake is None else state.awake.shape[1]


def set_aside(tokens: Tokens, score: Tensor, keep: int, summarise: bool) -> Tokens:
    """Let the `keep` best patch tokens go on, in raster order; the placeholders wait.

    Args:
        score: (B, N) float32.
        summarise: append the representative token of the placeholders (eq. 5), index -1.
    """
    split = split_top(score, keep)
    rows = with_prefix(split.rows, tokens.num_prefix)
    active, summary = keep_rows(tokens, split.rows, rows), None
    if summarise:
        x = torch.cat((active.x, representative(tokens.patches, score, split.kept)), 1)
        summary, active = x[:, -1:], active.change(x=x, index=F.pad(active.index, (0, 1), value=-1))
    awake = score.gather(1, split.rows)
    return active.change(carry=Waiting(score, split, rows, awake, tokens, summary))


def score_awake(tokens: Tokens, new: Tensor, trade_off: float | Tensor) -> Tokens:
    """Update the score of the tokens that took part (eq. 4); the first score is taken as it is.

    Args:
        new: (B, K) float32, score of the awake; (B, N) while all are.
        trade_off: weight of the old score, a number or a tensor of one.
    """
    state: Waiting = tokens.carry
    if state.awake is None:
        return tokens.change(carry=state._replace(score=running_score(state.score, new, trade_off)))
    return tokens.change(carry=state._replace(awake=running_score(state.awake, new, trade_off)))


def bring_back(tokens: Tokens) -> Tokens:
    """Put all tokens back in raster order; placeholders take the representative token's change (eq. 7)."""
    state, num_prefix = tokens.carry, tokens.num_prefix
    if state.split is None:
        return tokens
    x, count = state.before.x, num_prefix + state.awake.shape[1]
    if state.summary is not None:
        x = x + (tokens.x[:, count:] - state.summary)
    x = put(x, state.rows, tokens.x[:, :count])
    score = state.score.scatter(1, state.split.rows, state.awake)
    return tokens.change(x=x, index=state.before.index, carry=Waiting(score))
