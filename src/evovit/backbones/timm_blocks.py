"""Views of the plain blocks of timm's VisionTransformer: pre-norm and post-norm.

Checked with timm 1.0.28 to 1.0.31. Each view calls the host's modules in the order of the host's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from evovit.backbones.base import Block, Mix, expect_class, expect_parts, is_hooked, mixed_values
from evovit.ops.select import take_heads
from evovit.tokens import QKV, Tokens

ATTENTION_PARTS = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")


def output_gate(attn: Any, x: Tensor) -> Tensor | None:
    """Return the gate on the attention's output (B, T, H * D), None where the host has none."""
    gate = getattr(attn, "gate", None)  # timm before 1.0.28 has no such attribute
    return None if gate is None else gate(x).sigmoid()


def fused_qkv(attn: Any, x: Tensor) -> QKV:
    """Project normed tokens (B, T, C) to q, k, v as timm's `Attention` does."""
    batch, rows, _ = x.shape
    q, k, v = (
        attn.qkv(x).reshape(batch, rows, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    )
    return QKV(attn.q_norm(q), attn.k_norm(k), v, attn.scale, extra=output_gate(attn, x))


def has_rows(layer: nn.Module) -> bool:
    """Tell whether some outputs of a linear layer are to be had by the rows of its weight."""
    return type(layer) is nn.Linear and not is_hooked(layer)


def part_of_qkv(attn: Any, x: Tensor, part: int, count: int = 1) -> tuple[Tensor, ...]:
    """Project normed tokens (B, T, C) to `count` of q, k, v from 0, 1 or 2 on, before q/k norm.

    Returns:
        (B, H, T, D) each.
    """
    size = attn.num_heads * attn.head_dim
    rows = slice(part * size, (part + count) * size)
    bias = None if attn.qkv.bias is None else attn.qkv.bias[rows]
    y: Tensor = F.linear(x, attn.qkv.weight[rows], bias)
    y = y.reshape(*x.shape[:2], count, attn.num_heads, attn.head_dim)
    return y.permute(2, 0, 3, 1, 4).unbind(0)


def values_alone(attn: Any, x: Tensor) -> QKV:
    """Project normed tokens (B, T, C) to values, with the output gate; see `Block.values`."""
    if not has_rows(attn.qkv):
        return fused_qkv(attn, x)
    (v,) = part_of_qkv(attn, x, 2)
    return QKV(v[:, :, :0], v[:, :, :0], v, attn.scale, extra=output_gate(attn, x))


def check_attention(attn: Any, what: str) -> None:
    """Raise `EvoViTError` unless it is timm's `Attention` (one softmax) with the parts we know."""
    expect_class(attn, ("timm.layers.attention.Attention",), what)
    expect_parts(attn, ATTENTION_PARTS, what)


def attention_output(attn: Any, qkv: QKV, bias: Tensor | None, mix: Mix | None = None) -> Tensor:
    """Return the attention's output (B, T, C), before LayerScale and drop path."""
    x = mixed_values(qkv, bias, mix, attn.attn_drop.p if attn.training else 0.0)
    x = attn.norm(x.transpose(1, 2).flatten(2))  # (B, T, H * D)
    x = x if qkv.extra is None else x * qkv.extra
    return attn.proj_drop(attn.proj(x))  # type: ignore[no-any-return]


class PreNormBlock(Block):
    """`Block`: norm, attention, LayerScale, drop path; norm, FFN, LayerScale, drop path."""

    parts: tuple[str, ...] = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")

    def __init__(self, block: Any, number: int) -> None:
        self.block, self.number = block, number

    @property
    def num_heads(self) -> int:
        """H of this block's `QKV`."""
        return self.block.attn.num_heads  # type: ignore[no-any-return]

    def check(self) -> None:
        """Raise `EvoViTError` where the block holds what this view does not know."""
        expect_parts(self.block, self.parts, f"Block {self.number}")
        check_attention(self.block.attn, f"The attention of block {self.number}")

    def bypassed(self) -> Iterator[nn.Module]:
        """Return the modules whose forward is never called."""
        attn = self.block.attn
        yield from (self.block, attn, attn.attn_drop)

    def before(self, x: Tensor) -> Tensor:
        """Return what the attention's projection reads, (B, T, C)."""
        return self.block.norm1(x)  # type: ignore[no-any-return]

    def attention_input(self, tokens: Tokens) -> Tensor:
        return self.before(tokens.x)

    def qkv(self, tokens: Tokens) -> QKV:
        return fused_qkv(self.block.attn, self.before(tokens.x))

    def scoring_qkv(self, tokens: Tokens) -> QKV:
        attn, x = self.block.attn, self.before(tokens.x)
        if not has_rows(attn.qkv):
            return fused_qkv(attn, x)
        (q,), (k,) = part_of_qkv(attn, x[:, : tokens.num_prefix], 0), part_of_qkv(attn, x, 1)
        k = attn.k_norm(k)
        return QKV(attn.q_norm(q), k, k[:, :, :0], attn.scale)

    def qkv_of_rows(self, active: Tokens, scored: QKV, rows: Tensor) -> QKV:
        if scored.v.shape[2]:
            return super().qkv_of_rows(active, scored, rows)
        attn, x = self.block.attn, self.before(active.x)
        (q,), (v,) = part_of_qkv(attn, x, 0), part_of_qkv(attn, x, 2)
        k = take_heads(scored.k, rows)
        return QKV(attn.q_norm(q), k, v, attn.scale, extra=output_gate(attn, x))

    def queries_keys(self, tokens: Tokens) -> QKV:
        attn, x = self.block.attn, self.before(tokens.x)
        if not has_rows(attn.qkv):
            return fused_qkv(attn, x)
        q, k = part_of_qkv(attn, x, 0, count=2)
        k = attn.k_norm(k)
        return QKV(attn.q_norm(q), k, k[:, :, :0], attn.scale)

    def values(self, tokens: Tokens) -> QKV:
        return values_alone(self.block.attn, self.before(tokens.x))

    def leading_qkv(self, tokens: Tokens, count: int) -> QKV:
        attn = self.block.attn
        if not has_rows(attn.qkv):
            return super().leading_qkv(tokens, count)
        x = self.before(tokens.x)
        first = x[:, :count]
        (q,), (k, v) = part_of_qkv(attn, first, 0), part_of_qkv(attn, x, 1, count=2)
        return QKV(attn.q_norm(q), attn.k_norm(k), v, attn.scale, extra=output_gate(attn, first))

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        branch = attention_output(self.block.attn, qkv, bias, mix)
        return tokens.with_x(tokens.x + self.block.drop_path1(self.block.ls1(branch)))

    def ffn(self, tokens: Tokens) -> Tokens:
        branch = self.block.ls2(self.block.mlp(self.block.norm2(tokens.x)))
        return tokens.with_x(tokens.x + self.block.drop_path2(branch))


class PostNormBlock(PreNormBlock):
    """`ResPostBlock`: the norm comes after attention and FFN (InternViT)."""

    parts = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")

    def before(self, x: Tensor) -> Tensor:
        return x

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        branch = attention_output(self.block.attn, qkv, bias, mix)
        return tokens.with_x(tokens.x + self.block.drop_path1(self.block.norm1(branch)))

    def ffn(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(tokens.x + self.block.drop_path2(self.block.norm2(self.block.mlp(tokens.x))))
