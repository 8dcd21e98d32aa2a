"""Structured sub-sampling in one block: the pooling and convolution rows of Evo-ViT's table 4 (AAAI 2022).

The paper pools "at the seventh layer" (block 6); window and convolution are not given, so a window equals its
stride and the convolution starts as the average, which makes it usable before training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.backbones.base import BackboneSpec, Block
from evovit.errors import EvoViTError, check_count
from evovit.methods import register
from evovit.methods.base import Method
from evovit.options import Count, Number, option
from evovit.tokens import Tokens

Kind = Literal["average", "max", "conv"]


@register("subsample")
class Subsample(Method):
    """Average, max or convolution pooling of the patch grid before one block."""

    keeps_grid = True
    needs_class_token = False
    merges = True
    keep_all: ClassVar = {"stride": 1}
    example: ClassVar = {"block": 2}

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Options of sub-sampling."""

        kind: Kind = option("average", "how a window of patches is pooled into one token")
        block: Number = option(6, "block before which tokens are pooled, counted from 0")
        stride: Count = option(2, "side of a pooling window, in patches")

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        check_count("block", config.block, 0, spec.depth - 1, "blocks count from 0")
        check_count("stride", config.stride, 1, min(spec.grid), "at most the grid's shorter side")
        self.keeps_places = config.stride == 1  # else a token stands for its window
        self.conv = (
            nn.Conv2d(spec.dims[0], spec.dims[0], config.stride, config.stride)
            if config.kind == "conv"
            else None
        )
        if self.conv is not None:
            with torch.no_grad():
                share = 1 / config.stride**2
                self.conv.weight.copy_(
                    torch.eye(spec.dims[0])[:, :, None, None].expand_as(self.conv.weight) * share
                )
                nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        return block(self.pool(tokens) if block.number == self.config.block else tokens)

    def pool(self, tokens: Tokens) -> Tokens:
        """Pool the grid; a token takes the position of its window's first patch. Ragged edges are cut off."""
        side, (rows, columns) = self.config.stride, tokens.grid
        if min(rows, columns) < side:
            raise EvoViTError(
                f"stride is {side}, but the grid of these images is {rows} x {columns}; give larger images, "
                "or a smaller stride."
            )
        grid = tokens.patches.transpose(1, 2).unflatten(2, (rows, columns))  # type: ignore[no-untyped-call]
        pooled = self._pool_map(grid, side)  # (B, C, rows // side, columns // side)
        shape = (pooled.shape[2], pooled.shape[3])
        cells = torch.arange(rows * columns, device=grid.device).view(rows, columns)
        first = cells[::side, ::side][: shape[0], : shape[1]].flatten()
        index = tokens.index.index_select(1, first)
        x = torch.cat((tokens.prefix, pooled.flatten(2).transpose(1, 2)), dim=1)
        return tokens.change(x=x, index=index, grid=shape)

    def row_of_cell(self, tokens: Tokens, grid: tuple[int, int]) -> Tensor:
        if tokens.grid == grid:
            return super().row_of_cell(tokens, grid)
        side, (rows, columns) = self.config.stride, tokens.grid
        y, x = (torch.arange(length, device=tokens.x.device) // side for length in grid)
        row: Tensor = y[:, None] * columns + x
        row = row.where((y < rows)[:, None] & (x < columns), -1)  # ragged edges are in no window
        return row.flatten().expand(tokens.x.shape[0], -1)

    def _pool_map(self, grid: Tensor, side: int) -> Tensor:
        if self.conv is not None:
            return self.conv(grid)  # type: ignore[no-any-return]
        return F.avg_pool2d(grid, side) if self.config.kind == "average" else F.max_pool2d(grid, side)
