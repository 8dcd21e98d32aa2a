"""Views of the two parallel blocks of timm's VisionTransformer.

Checked with timm 1.0.28 to 1.0.31. Each view calls the host's modules in the order of the host's forward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from evovit.backbones.base import Block, Mix, expect_parts, mixed_values
from evovit.backbones.timm_blocks import PreNormBlock, attention_output, check_attention, fused_qkv
from evovit.tokens import QKV, Tokens


class ParallelThingsBlock(PreNormBlock):
    """`ParallelThingsBlock`: several attentions summed, then several FFNs; all heads stand side by side."""

    parts = ("attns", "ffns")
    scoring_qkv, qkv_of_rows, leading_qkv = Block.scoring_qkv, Block.qkv_of_rows, Block.leading_qkv
    queries_keys, values = Block.queries_keys, Block.values

    @property
    def num_heads(self) -> int:
        return sum(branch.attn.num_heads for branch in self.block.attns)

    def check(self) -> None:
        expect_parts(self.block, self.parts, f"Block {self.number}")
        for branch in self.block.attns:
            expect_parts(branch, ("norm", "attn", "ls", "drop_path"), f"A branch of block {self.number}")
            check_attention(branch.attn, f"An attention of block {self.number}")

    def bypassed(self) -> Iterator[nn.Module]:
        yield self.block
        for branch in self.block.attns:
            yield from (branch, branch.attn, branch.attn.attn_drop)

    def before(self, x: Tensor) -> Tensor:
        return self.block.attns[0].norm(x)  # type: ignore[no-any-return]  # each branch has its own

    def qkv(self, tokens: Tokens) -> QKV:
        each = [fused_qkv(branch.attn, branch.norm(tokens.x)) for branch in self.block.attns]
        q, k, v = (torch.cat(part, dim=1) for part in zip(*((e.q, e.k, e.v) for e in each), strict=True))
        gate = (
            None
            if each[0].extra is None
            else torch.cat([e.extra for e in each if e.extra is not None], dim=-1)
        )
        return QKV(q, k, v, each[0].scale, extra=gate)

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        count, out = len(self.block.attns), []
        gates = [None] * count if qkv.extra is None else qkv.extra.chunk(count, dim=-1)
        heads = zip(qkv.q.chunk(count, 1), qkv.k.chunk(count, 1), qkv.v.chunk(count, 1), gates, strict=True)
        for branch, (q, k, v, gate) in zip(self.block.attns, heads, strict=True):
            y = attention_output(branch.attn, QKV(q, k, v, qkv.scale, extra=gate), bias, mix)
            out.append(branch.drop_path(branch.ls(y)))
        return tokens.with_x(tokens.x + torch.stack(out).sum(0))

    def ffn(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(tokens.x + torch.stack([ffn(tokens.x) for ffn in self.block.ffns]).sum(0))


class ParallelScalingBlock(PreNormBlock):
    """`ParallelScalingBlock` (ViT-22B): both branches read one norm; `attention` adds both, `ffn` nothing."""

    parts = (
        *("in_norm", "in_proj", "mlp_bias", "q_norm", "k_norm", "attn_drop", "mlp_drop", "mlp_act"),
        *("out_proj", "attn_out_proj", "mlp_out_proj", "ls", "drop_path"),
    )
    scoring_qkv, qkv_of_rows, leading_qkv = Block.scoring_qkv, Block.qkv_of_rows, Block.leading_qkv
    queries_keys, values = Block.queries_keys, Block.values

    @property
    def num_heads(self) -> int:
        return self.block.num_heads  # type: ignore[no-any-return]

    def check(self) -> None:
        expect_parts(self.block, self.parts, f"Block {self.number}")

    def bypassed(self) -> Iterator[nn.Module]:
        yield from (self.block, self.block.attn_drop)

    def before(self, x: Tensor) -> Tensor:
        return self.block.in_norm(x)  # type: ignore[no-any-return]

    def qkv(self, tokens: Tokens) -> QKV:
        block = self.block
        hidden, q, k, v = block.in_proj(self.before(tokens.x)).split(block.in_split, dim=-1)
        hidden = hidden if block.mlp_bias is None else hidden + block.mlp_bias
        q, k, v = (y.unflatten(-1, (block.num_heads, block.head_dim)) for y in (q, k, v))
        q, k = block.q_norm(q), block.k_norm(k)
        return QKV(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block.scale, extra=hidden)

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        block, dropout = self.block, self.block.attn_drop.p if self.block.training else 0.0
        x = mixed_values(qkv, bias, mix, dropout)
        x, hidden = x.transpose(1, 2).flatten(2), block.mlp_drop(block.mlp_act(qkv.extra))
        if block.out_proj is not None:
            y = block.out_proj(torch.cat((x, hidden), dim=-1))
        else:
            y = block.attn_out_proj(x) + block.mlp_out_proj(hidden)
        return tokens.with_x(tokens.x + block.drop_path(block.ls(y)))

    def ffn(self, tokens: Tokens) -> Tokens:
        return tokens
