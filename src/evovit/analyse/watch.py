"""A forward watched block by block: what entered attention, what the method ranked by, what was kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from evovit.backbones.base import Block, Mix
from evovit.backbones.wrapped import WrappedBlock
from evovit.intermediates import present_rows
from evovit.methods.base import Method
from evovit.model import ReducedViT, backbone_of
from evovit.ops.restore import fill
from evovit.ops.score import attention_column_mean, class_attention, with_bias
from evovit.tokens import QKV, Tokens
from evovit.visualize import kept_cells


class Seen(NamedTuple):
    """One block of a forward of B images; `cells` are those of the stage's grid, in raster order."""

    number: int  # of the block, from 0
    grid: tuple[int, int]  # of the stage
    queries: Tensor  # (B, N, H * D), of the patch tokens that attention saw, all heads side by side
    present: Tensor  # (B, N) bool, which of these have a place of their own and take part
    attention: Tensor  # (B, cells) float32, class attention or column mean; NaN for a cell without a token
    score: Tensor | None  # (B, cells) float32, what the method ranked by in this block; NaN as above
    kept: Tensor  # (B, cells) bool, whether a cell's own token goes on after this block
    rows: Tensor  # (B, cells) int64, of the token that a cell is part of after the block; -1: of none
    tokens: Tensor  # (B,) int64, patch tokens that go on, those without a place among them
    patches: Tensor  # (B, cells, C), after the block; a cell that lost its token has the last value
    prefix: Tensor  # (B, P, C), after the block


class WatchedBlock(WrappedBlock):
    """A view of a block that notes what its attention last saw."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.seen: tuple[Tokens, QKV] | None = None

    def attend(
        self, tokens: Tokens, bias: Tensor | None = None, asking: int | None = None
    ) -> tuple[Tokens, QKV]:
        after, qkv = super().attend(tokens, bias, asking)
        self.note(tokens, qkv, bias)
        return after, qkv

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        self.note(tokens, qkv, bias)
        return super().attention(tokens, qkv, bias, mix)

    def note(self, tokens: Tokens, qkv: QKV, bias: Tensor | None) -> None:
        """Note tokens that attend to each other, with the queries and keys of all."""
        rows = tokens.x.shape[1]
        if qkv.q.shape[2] != rows or qkv.k.shape[2] != rows:  # some do not ask, or the method mixes by itself
            qkv = self.block.qkv(tokens)
            bias = None if bias is not None and bias.shape[-1] != rows else bias
        if bias is None and tokens.mask is not None:
            part = F.pad(tokens.taking_part, (tokens.num_prefix, 0), value=1.0)
            bias = part.log()[:, None, None]  # nobody attends to those that take no part
        self.seen = tokens, with_bias(qkv, bias)


@torch.no_grad()
def watch(model: ReducedViT, images: Tensor) -> Iterator[Seen]:
    """Run a model and yield what happens in each block; the last one is computed whole.

    Args:
        model: in evaluation mode.
        images: (B, channels, height, width), as the model takes them.
    """
    backbone, method = backbone_of(model), model.method
    backbone.expect_images(images)
    embedded, stages = backbone.embed(images), backbone.stages()
    tokens = method.begin(embedded, stages)
    for stage in stages:
        tokens = method.enter_stage(stage, tokens)
        grid = tokens.grid
        held = (tokens if tokens.num_patches == tokens.num_cells else embedded).patches
        for block in stage.blocks:
            view, ranking = WatchedBlock(block), method.ranking(block, tokens)
            tokens = method.run_block(view, tokens)
            held = whole_patches(method, tokens, grid, held)
            assert view.seen is not None
            active, qkv = view.seen
            rows = present_rows(method, active, grid)
            score = class_attention if backbone.spec.has_class_token else attention_column_mean
            yield Seen(
                number=block.number,
                grid=grid,
                queries=qkv.q.transpose(1, 2).flatten(2)[:, tokens.num_prefix :],
                present=(active.index >= 0) & (active.taking_part > 0.5),
                attention=by_cell(score(qkv, tokens.num_prefix), rows),
                score=None if ranking is None else placed(ranking.score, ranking.index, grid),
                kept=kept_now(tokens, grid),
                rows=present_rows(method, tokens, grid),
                tokens=(tokens.taking_part > 0.5).sum(1),
                patches=held,
                prefix=tokens.prefix,
            )


def whole_patches(method: Method, tokens: Tokens, grid: tuple[int, int], held: Tensor) -> Tensor:
    """Return a value for every cell, (B, cells, C), or the tokens as they are where none has a place.

    Args:
        held: what the cells had before.
    """
    if not method.keeps_places and not method.merges and (tokens.index < 0).all():
        return tokens.patches
    if method.keeps_grid:
        whole = method.finish(tokens)
        if whole.grid == grid:
            return whole.patches
    return fill(held, tokens.patches, present_rows(method, tokens, grid))


def kept_now(tokens: Tokens, grid: tuple[int, int]) -> Tensor:
    """Return which cells' tokens go on, (B, cells) bool; a pooled token stands for its window."""
    if tokens.grid != grid:
        return torch.ones(tokens.x.shape[0], grid[0] * grid[1], dtype=torch.bool, device=tokens.x.device)
    kept = kept_cells(tokens).flatten(1)
    if tokens.mask is None:
        return kept
    part = placed(tokens.mask.float(), tokens.index, grid)
    return kept & (part > 0.5)


def by_cell(values: Tensor, rows: Tensor) -> Tensor:
    """Return the value of each cell's token, (B, cells) float32; NaN where it has none.

    Args:
        values: (B, N).
        rows: (B, cells) int64, -1 for a cell without a token.
    """
    if values.shape[1] == 0:
        return torch.full_like(rows, torch.nan, dtype=torch.float32)
    return values.float().gather(1, rows.clamp_min(0)).masked_fill(rows < 0, torch.nan)


def placed(values: Tensor, index: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return values (B, N) at their places `index` (B, N), (B, cells) float32; NaN elsewhere."""
    spare = grid[0] * grid[1]  # one more column, where tokens without a place go
    cells = values.new_full((values.shape[0], spare + 1), torch.nan, dtype=torch.float32)
    return cells.scatter(1, index.where(index >= 0, spare), values.float())[:, :spare]
