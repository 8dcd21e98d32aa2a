"""Views of LeViT's blocks and of the attention that down-samples between its stages.

For timm's Levit and for `models.levit_cls`, which names its parts alike. A position bias is gathered by
`Tokens.index`, so a token keeps its own wherever it sits in the sequence. Checked with timm 1.0.28 to 1.0.31.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evovit.backbones.base import Block, Mix, expect_class, expect_parts, mixed_values
from evovit.tokens import QKV, Tokens

ATTENTIONS = ("timm.models.levit.Attention", "evovit.models.levit_cls.Attention")
ATTENTION_PARTS = ("qkv", "proj", "attention_biases", "attention_bias_idxs")
ENTRY_PARTS = ("kv", "q", "proj", "attention_biases", "attention_bias_idxs", "pos_embed")


def relative_bias(table: Tensor, index: Tensor, columns: int) -> Tensor:
    """Return the position bias of each pair of patch tokens, (B, H, N, N); 0 for a token without a place.

    Args:
        table: (H, rows * columns), the bias of each (|dy|, |dx|) in raster order.
        index: (B, N) raster positions.
    """
    place = index.clamp(min=0)
    y, x = place // columns, place % columns
    distance = (y[:, :, None] - y[:, None]).abs() * columns + (x[:, :, None] - x[:, None]).abs()  # (B, N, N)
    nowhere = index < 0
    bias = table[:, distance].transpose(0, 1)  # (B, H, N, N)
    return bias.masked_fill((nowhere[:, :, None] | nowhere[:, None])[:, None], 0.0)


def even_cells(x: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """Return every `stride`-th row and column of x (B, rows * columns, ...), flat again."""
    return x.unflatten(1, grid)[:, ::stride, ::stride].flatten(1, 2)  # type: ignore[no-untyped-call,no-any-return]


def heads_of(x: Tensor, num_heads: int, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Split projected tokens (B, T, H * sum of widths), heads outermost, into (B, H, T, width) each."""
    split = x.unflatten(-1, (num_heads, -1)).split(widths, dim=-1)  # type: ignore[no-untyped-call]
    return tuple(part.transpose(1, 2) for part in split)


class LevitBlock(Block):
    """`LevitBlock`: attention, drop path; MLP, drop path. Norms are batch norms inside the projections."""

    parts = ("attn", "drop_path1", "mlp", "drop_path2")

    def __init__(self, block: Any, number: int) -> None:
        self.block, self.number = block, number

    def check(self) -> None:
        """Raise `EvoViTError` where the block holds what this view does not know."""
        expect_parts(self.block, self.parts, f"Block {self.number}")
        expect_class(self.block.attn, ATTENTIONS, f"The attention of block {self.number}")
        expect_parts(self.block.attn, ATTENTION_PARTS, f"The attention of block {self.number}")

    def qkv(self, tokens: Tokens) -> QKV:
        attn = self.block.attn
        widths = (attn.key_dim, attn.key_dim, attn.val_dim)
        q, k, v = heads_of(attn.qkv(tokens.x), attn.num_heads, widths)
        table = getattr(attn, "attention_biases", None)  # `levit_cls` has positions in the tokens instead
        bias = None if table is None else relative_bias(table, tokens.index, tokens.grid[1]).to(q.dtype)
        return QKV(q, k, v, attn.scale, bias)

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        x = mixed_values(qkv, bias, mix, 0.0).transpose(1, 2).flatten(2)  # (B, T, H * value width)
        return tokens.with_x(tokens.x + self.block.drop_path1(self.block.attn.proj(x)))

    def ffn(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(tokens.x + self.block.drop_path2(self.block.mlp(tokens.x)))


class LevitEntry:
    """`LevitDownsample`: the tokens on even rows and columns ask all tokens, then one MLP; without skip."""

    def __init__(self, down: Any) -> None:
        self.down, self.stride = down, int(down.attn_downsample.stride)

    def check(self) -> None:
        """Raise `EvoViTError` where the down-sampling holds what this view does not know."""
        what, attn = "A down-sampling", self.down.attn_downsample
        expect_parts(self.down, ("attn_downsample", "mlp", "drop_path"), what)
        expect_parts(attn, ENTRY_PARTS, what)
        expect_parts(attn.q, ("down", "ln"), what)
        for part in (part for name, part in attn.q.named_children() if name == "down"):
            expect_parts(part, (), what)  # a pool would not be strided sub-sampling

    def __call__(self, tokens: Tokens) -> Tokens:
        return self.attend(tokens)[0]

    def attend(self, tokens: Tokens) -> tuple[Tokens, QKV]:
        """Return the next stage's tokens, and what the attention between the stages saw.

        Queries are prefix and even cells, keys and values all tokens.

        Args:
            tokens: all of the stage's, in raster order.
        """
        down, attn = self.down, self.down.attn_downsample
        num_prefix, stride = tokens.num_prefix, self.stride
        grid = tuple(-(-side // stride) for side in tokens.grid)
        position = getattr(attn, "pos_embed", None)
        x = tokens.x if position is None else tokens.x + position
        k, v = heads_of(attn.kv(x), attn.num_heads, (attn.key_dim, attn.val_dim))
        asking = torch.cat((x[:, :num_prefix], even_cells(x[:, num_prefix:], tokens.grid, stride)), dim=1)
        (q,) = heads_of(attn.q.ln(asking), attn.num_heads, (attn.key_dim,))
        table = getattr(attn, "attention_biases", None)
        bias = None if table is None else table[:, attn.attention_bias_idxs].unsqueeze(0).to(q.dtype)
        qkv = QKV(q, k, v, attn.scale, bias)
        x = attn.proj(mixed_values(qkv, None, None, 0.0).transpose(1, 2).flatten(2))
        x = x + down.drop_path(down.mlp(x))  # (B, P + N / stride^2, C of the next stage)
        index = torch.arange(grid[0] * grid[1], device=x.device).expand(x.shape[0], -1)
        return tokens.change(x=x, index=index, grid=grid), qkv
