"""DTEM: ToMe with a learnt metric, one small linear layer a block (Lee and Hong, NeurIPS 2024).

The metric reads what attention reads, without gradient to it; the host may stay frozen
(`optimizer.freeze_host_epochs` of a recipe). Evaluation is ToMe's. Training merges softly and drops no row: a
relaxed choice of the best pairs moves shares of tokens into others, so that the loss reaches the metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.backbones.base import BackboneSpec, Block, Stage
from evovit.methods import register
from evovit.methods.tome import ToMe
from evovit.ops.mask import mask_bias
from evovit.ops.merge import soft_match
from evovit.options import Count, Number, Positive, option
from evovit.tokens import Tokens

WIDE = 1024  # from this width on the metric has twice as many channels
METRIC_DIM = 64
LEAST = 1e-6  # size of a token that is divided by; one that gave all away may be smaller


class Soft(NamedTuple):
    """DTEM's state beside the tokens, in training."""

    left: int  # patch tokens that take part in the next matching, the first so many
    shares: Tensor  # (B, cells, N) float32, the share of each cell's patch in each row; a cell's sum to 1


@register("dtem")
class DTEM(ToMe):
    """ToMe with a learnt similarity of tokens; the host itself may stay frozen."""

    relaxes_in_training = True
    example: ClassVar = {"r": 3}

    @dataclass(frozen=True, kw_only=True)
    class Config(ToMe.Config):
        """Options of DTEM; the defaults are the released ones. Any r may be used, whatever it learnt with."""

        r: Number | tuple[Number, ...] = option(
            16, "tokens REMOVED by each block; a list may end early, the rest is 0"
        )
        metric_dim: Annotated[int, Ge(1), Le(4096)] | None = option(
            None, "channels of the learnt metric; none: 64, or 128 for hosts of width 1024 or more"
        )
        neighbours: Count = option(3, "in training: partners that one token may be shared between")
        pair_temperature: Positive = option(0.1, "in training: temperature of the similarities of pairs")
        choice_temperature: Positive = option(0.1, "in training: temperature of each relaxed choice of pairs")

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        width = spec.dims[0]
        dim = config.metric_dim or METRIC_DIM * (2 if width >= WIDE else 1)
        self.metric = nn.ModuleList(nn.Linear(width, dim) for _ in range(spec.depth))

    def begin(self, tokens: Tokens, stages: Sequence[Stage]) -> Tokens:
        if not self.training:
            return tokens
        cells = tokens.num_patches
        whole = torch.eye(cells, dtype=torch.float32, device=tokens.x.device).expand(
            tokens.x.shape[0], cells, cells
        )
        return tokens.change(carry=Soft(cells, whole))

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        after, _ = block.attend(tokens, self.size_bias(tokens))
        present = after.carry.left if self.training else after.num_patches
        removed = min(self.removed[block.number], present // 2)
        if removed == 0:
            return block.ffn(after)
        metric = self.metric[block.number](block.attention_input(tokens).detach())
        if self.training:
            return block.ffn(self.merge_softly(after, metric[:, after.num_prefix :], removed))
        return block.ffn(self.merge(after, metric.unsqueeze(1), removed))

    def size_bias(self, tokens: Tokens) -> Tensor | None:
        if not self.training or tokens.size is None or not self.config.proportional_attention:
            return super().size_bias(tokens)
        return F.pad(mask_bias(tokens.size), (tokens.num_prefix, 0))  # a size may be 0

    def merge_softly(self, tokens: Tokens, metric: Tensor, removed: int) -> Tokens:
        """Move shares of tokens into others; all rows stay, largest first.

        Every second of the tokens that take part may be moved, the first among them; the others take in.

        Args:
            metric: (B, N, D) of the patch tokens.
        """
        state: Soft = tokens.carry
        config, present = self.config, state.left
        first, second = slice(0, present, 2), slice(1, present, 2)
        temperatures = config.pair_temperature, config.choice_temperature
        moved = soft_match(metric[:, first], metric[:, second], removed, config.neighbours, *temperatures)
        gone = moved.sum(-1)  # (B, A), at most 1 up to rounding
        stays = 1 - gone
        stays = stays + (stays.clamp(0, 1) - stays).detach()  # the gradient goes past the clip
        size = torch.ones_like(tokens.index, dtype=torch.float32) if tokens.size is None else tokens.size
        given = moved.transpose(1, 2) * size[:, None, first]  # (B, M, A), sizes that go over
        taken = size[:, second] + given.sum(-1)
        patches, kind = tokens.patches, tokens.x.dtype
        sums = size[:, second, None].to(kind) * patches[:, second] + given.to(kind) @ patches[:, first]
        means = sums / taken.unsqueeze(-1).clamp_min(LEAST).to(kind)
        shares = state.shares
        new_shares = shares[..., second] + shares[..., first] @ moved
        old_shares = shares[..., first] * stays[:, None]
        order = self.largest_first(torch.cat((size[:, first] * stays, taken), dim=1), size[:, present:])

        def placed(a: Tensor, b: Tensor, rest: Tensor, dim: int) -> Tensor:
            """Return rows moved from, rows moved into and the others, in the new order."""
            whole = torch.cat((a, b, rest), dim=dim)
            shape = [1] * whole.ndim
            shape[0], shape[dim] = order.shape
            return whole.take_along_dim(order.reshape(shape), dim)

        x = placed(patches[:, first], means, patches[:, present:], 1)
        return tokens.change(
            x=torch.cat((tokens.prefix, x), dim=1),
            index=placed(tokens.index[:, first], tokens.index[:, second], tokens.index[:, present:], 1),
            size=placed(size[:, first] * stays, taken, size[:, present:], 1),
            carry=Soft(present - removed, placed(old_shares, new_shares, shares[..., present:], 2)),
        )

    def largest_first(self, sizes: Tensor, rest: Tensor) -> Tensor:
        """Return the order (B, N) of rows: those that took part by size, equal ones as they stood, the rest.

        Args:
            sizes: (B, present), rows moved from, then rows moved into, which stood in turn.
            rest: (B, N - present) of the others.
        """
        present = sizes.shape[1]
        place = torch.arange(present + rest.shape[1], device=sizes.device)
        stood = place[:present] // 2 + place[:present] % 2 * math.ceil(present / 2)
        by_size = sizes.detach()[:, stood].argsort(dim=1, descending=True, stable=True)
        return torch.cat((stood[by_size], place[present:].expand(rest.shape)), dim=1)

    def finish(self, tokens: Tokens) -> Tokens:
        """Give every grid cell its token, in training the mean of those its patch is shared between."""
        if not isinstance(tokens.carry, Soft):
            return super().finish(tokens)
        cells = tokens.carry.shares.shape[1]
        patches = tokens.carry.shares.to(tokens.x.dtype) @ tokens.patches
        index = torch.arange(cells, device=tokens.x.device).expand(tokens.x.shape[0], cells)
        x = torch.cat((tokens.prefix, patches), dim=1)
        return tokens.change(x=x, index=index, size=None, carry=None)

    def row_of_cell(self, tokens: Tokens, grid: tuple[int, int]) -> Tensor:
        if isinstance(tokens.carry, Soft):  # the row that began as the cell's
            return super().row_of_cell(tokens.change(carry=None), grid)
        return super().row_of_cell(tokens, grid)
