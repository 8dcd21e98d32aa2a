"""Views of the blocks of timm's VisionTransformer: pre-norm, post-norm and the two parallel ones.

Checked with timm 1.0.31. Each view calls the host's own modules, in the order of the host's forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evovit.backbones.base import Block, expect_parts
from evovit.tokens import QKV, Tokens

ATTENTION_PARTS = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")


def fused_qkv(attn: Any, x: Tensor) -> QKV:
    """Project normed tokens (B, T, C) to q, k, v as timm's `Attention` does."""
    batch, rows, _ = x.shape
    gate = attn.gate(x).sigmoid() if getattr(attn, "gate", None) is not None else None
    q, k, v = (
        attn.qkv(x).reshape(batch, rows, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    )
    return QKV(attn.q_norm(q), attn.k_norm(k), v, attn.scale, side=gate)


def attention_output(attn: Any, qkv: QKV, bias: Tensor | None) -> Tensor:
    """Return the attention's output (B, T, C), fused kernel, before LayerScale and drop path."""
    dropout = attn.attn_drop.p if attn.training else 0.0
    x = F.scaled_dot_product_attention(qkv.q, qkv.k, qkv.v, bias, dropout, scale=qkv.scale)
    x = attn.norm(x.transpose(1, 2).flatten(2))  # (B, T, H * D)
    x = x if qkv.side is None else x * qkv.side
    return attn.proj_drop(attn.proj(x))  # type: ignore[no-any-return]


class PreNormBlock(Block):
    """`Block`: norm, attention, LayerScale, drop path; norm, FFN, LayerScale, drop path."""

    parts: tuple[str, ...] = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")

    def __init__(self, block: Any, number: int) -> None:
        self.block, self.number = block, number

    def check(self) -> None:
        expect_parts(self.block, self.parts, f"block {self.number}")
        expect_parts(self.block.attn, ATTENTION_PARTS, f"the attention of block {self.number}")

    def qkv(self, tokens: Tokens) -> QKV:
        return fused_qkv(self.block.attn, self.block.norm1(tokens.x))

    def attention(self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None) -> Tokens:
        branch = attention_output(self.block.attn, qkv, bias)
        return tokens.with_x(tokens.x + self.block.drop_path1(self.block.ls1(branch)))

    def ffn(self, tokens: Tokens) -> Tokens:
        branch = self.block.ls2(self.block.mlp(self.block.norm2(tokens.x)))
        return tokens.with_x(tokens.x + self.block.drop_path2(branch))


class PostNormBlock(PreNormBlock):
    """`ResPostBlock`: the norm comes after attention and FFN (InternViT)."""

    parts = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")

    def qkv(self, tokens: Tokens) -> QKV:
        return fused_qkv(self.block.attn, tokens.x)

    def attention(self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None) -> Tokens:
        branch = attention_output(self.block.attn, qkv, bias)
        return tokens.with_x(tokens.x + self.block.drop_path1(self.block.norm1(branch)))

    def ffn(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(tokens.x + self.block.drop_path2(self.block.norm2(self.block.mlp(tokens.x))))


class ParallelThingsBlock(PreNormBlock):
    """`ParallelThingsBlock`: several attentions summed, then several FFNs summed; the heads of all stand side by side."""

    parts = ("attns", "ffns")

    def check(self) -> None:
        expect_parts(self.block, self.parts, f"block {self.number}")
        for branch in self.block.attns:
            expect_parts(branch, ("norm", "attn", "ls", "drop_path"), f"a branch of block {self.number}")
            expect_parts(branch.attn, ATTENTION_PARTS, f"an attention of block {self.number}")

    def qkv(self, tokens: Tokens) -> QKV:
        each = [fused_qkv(branch.attn, branch.norm(tokens.x)) for branch in self.block.attns]
        q, k, v = (torch.cat(part, dim=1) for part in zip(*((e.q, e.k, e.v) for e in each), strict=True))
        gate = (
            None if each[0].side is None else torch.cat([e.side for e in each if e.side is not None], dim=-1)
        )
        return QKV(q, k, v, each[0].scale, side=gate)

    def attention(self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None) -> Tokens:
        count, out = len(self.block.attns), []
        gates = [None] * count if qkv.side is None else qkv.side.chunk(count, dim=-1)
        heads = zip(qkv.q.chunk(count, 1), qkv.k.chunk(count, 1), qkv.v.chunk(count, 1), gates, strict=True)
        for branch, (q, k, v, gate) in zip(self.block.attns, heads, strict=True):
            y = attention_output(branch.attn, QKV(q, k, v, qkv.scale, side=gate), bias)
            out.append(branch.drop_path(branch.ls(y)))
        return tokens.with_x(tokens.x + torch.stack(out).sum(0))

    def ffn(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(tokens.x + torch.stack([ffn(tokens.x) for ffn in self.block.ffns]).sum(0))


class ParallelScalingBlock(PreNormBlock):
    """`ParallelScalingBlock` (ViT-22B): attention and FFN read the same norm, so `attention` adds both, `ffn` nothing."""

    parts = (
        *("in_norm", "in_proj", "mlp_bias", "q_norm", "k_norm", "attn_drop", "mlp_drop", "mlp_act"),
        *("out_proj", "attn_out_proj", "mlp_out_proj", "ls", "drop_path"),
    )

    def check(self) -> None:
        expect_parts(self.block, self.parts, f"block {self.number}")

    def qkv(self, tokens: Tokens) -> QKV:
        block = self.block
        hidden, q, k, v = block.in_proj(block.in_norm(tokens.x)).split(block.in_split, dim=-1)
        hidden = hidden if block.mlp_bias is None else hidden + block.mlp_bias
        q, k, v = (y.unflatten(-1, (block.num_heads, block.head_dim)) for y in (q, k, v))
        q, k = block.q_norm(q), block.k_norm(k)
        return QKV(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block.scale, side=hidden)

    def attention(self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None) -> Tokens:
        block, dropout = self.block, self.block.attn_drop.p if self.block.training else 0.0
        x = F.scaled_dot_product_attention(qkv.q, qkv.k, qkv.v, bias, dropout, scale=qkv.scale)
        x, hidden = x.transpose(1, 2).flatten(2), block.mlp_drop(block.mlp_act(qkv.side))
        if block.out_proj is not None:
            y = block.out_proj(torch.cat((x, hidden), dim=-1))
        else:
            y = block.attn_out_proj(x) + block.mlp_out_proj(hidden)
        return tokens.with_x(tokens.x + block.drop_path(block.ls(y)))

    def ffn(self, tokens: Tokens) -> Tokens:
        return tokens


BLOCKS: dict[str, type[PreNormBlock]] = {
    "Block": PreNormBlock,
    "ResPostBlock": PostNormBlock,
    "ParallelThingsBlock": ParallelThingsBlock,
    "ParallelScalingBlock": ParallelScalingBlock,
}
