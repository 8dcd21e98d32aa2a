"""What the methods that merge tokens share: sizes, the way back to the grid, counts removed by each block."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from evovit.backbones.base import BackboneSpec
from evovit.methods.base import Method
from evovit.ops.merge import Match, follow, merge_sizes, merge_tokens
from evovit.ops.select import take
from evovit.options import MOST, Number, option
from evovit.schedule import removed_per_block
from evovit.tokens import Tokens


class Merged(NamedTuple):
    """The state beside the tokens, once some have merged."""

    source: Tensor  # (B, N at the start) int64, the row of the patch token that each grid cell is now part of


class Merging(Method):
    """Merged tokens know how many patches they stand for, and every grid cell knows its token."""

    needs_class_token = False
    merges = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """The option of all methods that merge."""

        proportional_attention: bool = option(
            True, "attention counts a merged token once for each patch in it"
        )

    def size_bias(self, tokens: Tokens) -> Tensor | None:
        """Return log(size) of each key, (B, 1, 1, P + N), for proportional attention (ToMe, eq. 1)."""
        if tokens.size is None or not self.config.proportional_attention:
            return None
        bias = nn.functional.pad(tokens.size.log(), (tokens.num_prefix, 0))  # a prefix token counts once
        return bias[:, None, None]

    def merge_by(self, tokens: Tokens, match: Match) -> Tokens:
        """Merge patch tokens to size-weighted means, at the grid positions of those merged into."""
        merged, share = merge_sizes(sizes_of(tokens), match)
        source = follow(tokens.carry.source if tokens.carry else None, match)
        return tokens.change(
            x=torch.cat((tokens.prefix, merge_tokens(tokens.patches, share, match)), dim=1),
            index=tokens.index.gather(1, match.rows),
            size=merged,
            carry=Merged(source),
        )

    def finish(self, tokens: Tokens) -> Tokens:
        """Give every grid cell its token: a head's mean of them is the size-weighted mean."""
        return unmerge(tokens)

    def row_of_cell(self, tokens: Tokens, grid: tuple[int, int]) -> Tensor:
        source = source_of(tokens)
        return super().row_of_cell(tokens, grid) if source is None else source


def sizes_of(tokens: Tokens) -> Tensor:
    """Return how many patches each patch token stands for, (B, N) float32."""
    return torch.ones_like(tokens.index, dtype=torch.float32) if tokens.size is None else tokens.size


def source_of(tokens: Tokens) -> Tensor | None:
    """Return the row of each grid cell's token, (B, cells) int64; None while nothing has merged."""
    return tokens.carry.source if tokens.carry else None


def unmerge(tokens: Tokens) -> Tokens:
    """Copy each merged token back to all the grid cells in it: N tokens in raster order again."""
    source = source_of(tokens)
    if source is None:
        return tokens
    index = torch.arange(source.shape[1], device=source.device).expand_as(source)
    x = torch.cat((tokens.prefix, take(tokens.patches, source)), dim=1)
    return tokens.change(x=x, index=index, size=None, carry=None)


class CountedMerging(Merging):
    """A merging method whose options say how many tokens each block removes."""

    keep_all: ClassVar = {"r": 0}
    bounded: ClassVar[bool] = False  # r above the patches of the host is refused; else cut in each block

    @dataclass(frozen=True, kw_only=True)
    class Config(Merging.Config):
        """Options of the counts; every r is capped at half the patch tokens present."""

        r: Number | tuple[Number, ...] = option(
            8, "tokens REMOVED by each reducing block; a list may end early, the rest is 0"
        )
        inflection: Annotated[float, Ge(-1), Le(1)] = option(
            0.0, "-1 removes 2r in the first block, falling to 0 in the last; 1 the reverse"
        )

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        self.plan(config)

    @property
    def most(self) -> int:
        """What the option r may be at most."""
        return math.prod(self.spec.grid) if self.bounded else MOST

    @property
    def steps(self) -> int:
        """How many blocks reduce."""
        return self.spec.depth

    def plan(self, config: Any) -> None:
        self.removed = removed_per_block(config.r, config.inflection, self.spec.depth, self.most)

    def config_at(self, budget: float) -> Any:
        """Return the options under which equal steps leave this share of the patch tokens at the end."""
        if getattr(self.config, "keep_per_block", None) is not None:
            return super().config_at(budget)  # refuses
        r = round((1 - budget) * math.prod(self.spec.grid) / max(1, self.steps))
        return replace(self.config, r=r, inflection=0.0)

    def current_config(self) -> Any:
        now = {"r": tuple(min(removed, self.most) for removed in self.removed), "inflection": 0.0}
        return self.config if self.reduction == 1 else replace(self.config, **now)

    def set_reduction(self, share: float) -> None:
        self.reduction = share
        self.plan(self.config)
        self.removed = tuple(int(share * removed) for removed in self.removed)
