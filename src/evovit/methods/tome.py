"""ToMe: merge similar tokens in every block, with or without training (Bolya et al., ICLR 2023).

Between attention and FFN, bipartite soft matching on the block's keys picks the pairs that merge into their
size-weighted mean (section 3); attention counts a merged token as often as the patches in it (eq. 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from evovit.backbones.base import BackboneSpec, Block
from evovit.errors import EvoViTError, check_count
from evovit.methods import register
from evovit.methods.base import Method, ScheduledConfig, falling
from evovit.ops.merge import match_tokens, merge_sizes, merge_tokens
from evovit.ops.select import take
from evovit.options import Number, option
from evovit.schedule import KeepSchedule
from evovit.tokens import Tokens


class Merged(NamedTuple):
    """ToMe's state beside the tokens, once some have merged."""

    source: Tensor  # (B, N at the start) int64, the row of the patch token that each grid cell is now part of


@register("tome")
class ToMe(Method):
    """Token merging: the most similar patch tokens of each block become one."""

    needs_class_token = False
    merges = True
    keep_all: ClassVar = {"r": 0}
    example: ClassVar = {"r": 3}

    @dataclass(frozen=True, kw_only=True)
    class Config(ScheduledConfig):
        """Options of ToMe; every r is capped at half the patch tokens present."""

        r: Number | tuple[Number, ...] = option(
            8, "tokens REMOVED by each block; a list may end early, the rest is 0"
        )
        inflection: Annotated[float, Ge(-1), Le(1)] = option(
            0.0, "-1 removes 2r in the first block, falling to 0 in the last; 1 the reverse"
        )
        proportional_attention: bool = option(True, "false suits MAE models that were not trained with ToMe")

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        self.plan(config)

    def plan(self, config: Config) -> None:
        if config.keep_per_block is None:
            self.removed = removed_per_block(config.r, config.inflection, self.spec)
        else:
            self.removed = merged_per_block(config.keep_per_block, self.spec)

    def config_at(self, budget: float) -> Any:
        """Return the options under which equal steps leave this share of the patch tokens at the end."""
        if self.config.keep_per_block is not None:
            return super().config_at(budget)
        whole = math.prod(self.spec.grid)
        return replace(self.config, r=round((1 - budget) * whole / self.spec.depth), inflection=0.0)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        tokens, qkv = block.attend(tokens, self.size_bias(tokens))
        removed = min(self.removed[block.number], tokens.num_patches // 2)
        return block.ffn(self.merge(tokens, qkv.k, removed) if removed > 0 else tokens)

    def size_bias(self, tokens: Tokens) -> Tensor | None:
        """Return log(size) of every key, (B, 1, 1, P + N): proportional attention (eq. 1), fused kernels."""
        if tokens.size is None or not self.config.proportional_attention:
            return None
        bias = nn.functional.pad(tokens.size.log(), (tokens.num_prefix, 0))  # a prefix token counts once
        return bias[:, None, None]

    def merge(self, tokens: Tokens, keys: Tensor, removed: int) -> Tokens:
        """Merge `removed` patch tokens into others. A token keeps the grid position of the one merged into.

        Rows alternate between the two sets from the first prefix token on, as in the paper, where the class
        token is the first row; prefix tokens themselves neither propose nor receive.

        Args:
            keys: (B, H, P + N, D), of this block.
        """
        metric = keys[:, :, tokens.num_prefix :].mean(1)
        match = match_tokens(metric, removed, first=tokens.num_prefix % 2)
        size = torch.ones_like(tokens.index, dtype=torch.float32) if tokens.size is None else tokens.size
        merged, share = merge_sizes(size, match)
        patches, moved = merge_tokens(tokens.patches, share, match), match.moved
        return tokens.change(
            x=torch.cat((tokens.prefix, patches), dim=1),
            index=tokens.index.gather(1, match.rows),
            size=merged,
            carry=Merged(moved.gather(1, tokens.carry.source) if tokens.carry else moved),
        )

    def finish(self, tokens: Tokens) -> Tokens:
        """Give every grid cell its token: a head's mean of them is the size-weighted mean of ToMe."""
        return unmerge(tokens)

    def row_of_cell(self, tokens: Tokens, grid: tuple[int, int]) -> Tensor:
        return tokens.carry.source if tokens.carry else super().row_of_cell(tokens, grid)

    def current_config(self) -> Any:
        most = math.prod(self.spec.grid)  # of the option; a block removes half of the tokens at most
        now: dict[str, Any] = {"r": tuple(min(removed, most) for removed in self.removed), "inflection": 0.0}
        return self.config if self.reduction == 1 else replace(self.config, **now, keep_per_block=None)

    def set_reduction(self, share: float) -> None:
        self.reduction = share
        self.plan(self.config)
        self.removed = tuple(int(share * removed) for removed in self.removed)


def unmerge(tokens: Tokens) -> Tokens:
    """Copy each merged token back to all the grid cells in it: N tokens in raster order again."""
    if tokens.carry is None:
        return tokens
    source = tokens.carry.source
    index = torch.arange(source.shape[1], device=source.device).expand_as(source)
    x = torch.cat((tokens.prefix, take(tokens.patches, source)), dim=1)
    return tokens.change(x=x, index=index, size=None, carry=None)


def merged_per_block(counts: Sequence[int], spec: BackboneSpec) -> tuple[int, ...]:
    """Return how many tokens each block merges into others, from what each keeps."""
    KeepSchedule.from_counts(spec.depth, counts, math.prod(spec.grid))  # refuses what is no schedule
    falling(counts)
    removed = tuple(before - after for before, after in pairwise((counts[0], *counts)))
    for number, each in enumerate(removed):
        if each > counts[number - 1] // 2 and number:
            raise EvoViTError(
                f"keep_per_block falls from {counts[number - 1]} to {counts[number]} at block {number}; "
                "a block merges at most half of its tokens: spread it over more blocks."
            )
    return removed


def removed_per_block(r: int | Sequence[int], inflection: float, spec: BackboneSpec) -> tuple[int, ...]:
    """Return how many tokens each block removes, before the cap (paper, appendix; released `parse_r`)."""
    depth, most = spec.depth, math.prod(spec.grid)
    if isinstance(r, Sequence):
        if len(r) > depth or inflection != 0:
            raise EvoViTError(
                f"r lists {len(r)} values for {depth} blocks; give at most one each, no inflection."
            )
        for removed in r:
            check_count("r", removed, 0, most)
        return (*r, *(0,) * (depth - len(r)))
    check_count("r", r, 0, most, "tokens removed by a block")
    low = int(r * (1 - inflection))
    step = (2 * r - 2 * low) / max(1, depth - 1)
    return tuple(int(low + step * number) for number in range(depth))
