"""Views of the blocks of timm's Eva, where a token's queries and keys are rotated by its place on the grid.

The rotation is looked up by `Tokens.index`, so a token keeps its own wherever it sits in the sequence.
Checked with timm 1.0.28 to 1.0.31. Each view calls the host's modules in the order of the host's forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.backbones.base import Block, Mix, expect_class, expect_parts
from evovit.backbones.timm_blocks import ATTENTION_PARTS, attention_output, has_rows, output_gate
from evovit.tokens import QKV, Tokens

ROPE_ATTENTION_PARTS = (*ATTENTION_PARTS, "q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias")
ATTENTIONS = ("timm.models.eva.EvaAttention", "timm.layers.attention.AttentionRope")


def rotation_table(rope: Tensor) -> Tensor:
    """Return the host's rotations with one more row that rotates nothing, last, where index -1 reads.

    Args:
        rope: (..., N, 2 * D), sines then cosines of each grid position.
    """
    sine, cosine = rope[..., :1, :].chunk(2, dim=-1)
    still = torch.cat((torch.zeros_like(sine), torch.ones_like(cosine)), dim=-1)
    return torch.cat((rope, still), dim=-2)  # (..., N + 1, 2 * D)


def rotate(x: Tensor, rotation: Tensor, num_prefix: int, half: bool) -> Tensor:
    """Rotate the patch rows of queries or keys (B, H, P + N, D); prefix tokens have no place on the grid.

    Args:
        rotation: (B, 1 or H, N, 2 * D), sines then cosines.
        half: channel i turns with channel i + D / 2; otherwise each even channel with the next.
    """
    prefix, patches = x[:, :, :num_prefix], x[:, :, num_prefix:]
    sine, cosine = rotation.chunk(2, dim=-1)
    if half:
        first, second = patches.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-patches[..., 1::2], patches[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((prefix, (patches * cosine + turned * sine).to(x.dtype)), dim=2)


def projected(attn: Any, x: Tensor) -> Sequence[Tensor]:
    """Project normed tokens (B, T, C) to q (B, T, H * D) and k, v (B, T, K * D), as the host does."""
    if attn.qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    bias = added_bias(attn)
    if bias is None:
        return attn.qkv(x).chunk(3, dim=-1)  # type: ignore[no-any-return]
    y = attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)
    return y.chunk(3, dim=-1)


def projected_for(attn: Any, x: Tensor, first: Tensor) -> Sequence[Tensor]:
    """Project normed tokens x (B, T, C) to k and v, and the first of them, (B, Q, C), to q."""
    if attn.qkv is None:
        return attn.q_proj(first), attn.k_proj(x), attn.v_proj(x)
    if not has_rows(attn.qkv):
        q, k, v = projected(attn, x)
        return q[:, : first.shape[1]], k, v
    weight, bias = attn.qkv.weight, added_bias(attn)
    bias, size = attn.qkv.bias if bias is None else bias, weight.shape[0] // 3
    of_q, of_kv = (None, None) if bias is None else (bias[:size], bias[size:])
    return F.linear(first, weight[:size], of_q), *F.linear(x, weight[size:], of_kv).chunk(2, dim=-1)


def added_bias(attn: Any) -> Tensor | None:
    """Return the bias of q, k and v that stands beside the projection; `AttentionRope` has it inside."""
    q_bias = getattr(attn, "q_bias", None)
    return None if q_bias is None else torch.cat((q_bias, attn.k_bias, attn.v_bias))


def rope_qkv(attn: Any, x: Tensor, tokens: Tokens, table: Tensor | None, asking: int | None = None) -> QKV:
    """Return q, k, v of normed tokens x (B, T, C) as timm's `EvaAttention` and `AttentionRope` do.

    Args:
        asking: the first rows, that have queries, the prefix among them; None: all.
    """
    first = x if asking is None else x[:, :asking]
    q, k, v = projected(attn, x) if asking is None else projected_for(attn, x, first)
    dim = q.shape[-1] // attn.num_heads
    q, k, v = (
        y.reshape(*y.shape[:2], y.shape[2] // dim, dim).transpose(1, 2) for y in (q, k, v)
    )  # (B, H or K, T, D)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if table is not None:
        rotation = table[..., tokens.index, :]  # (B, N, 2 * D) or (H, B, N, 2 * D)
        rotation = rotation.unsqueeze(1) if table.ndim == 2 else rotation.transpose(0, 1)
        half = attn.rotate_half
        k = rotate(k, rotation, tokens.num_prefix, half).type_as(v)
        num = q.shape[2] - tokens.num_prefix  # patch tokens that ask
        q = (rotate(q, rotation[:, :, :num], tokens.num_prefix, half) if num else q).type_as(v)
    groups = attn.num_heads // k.shape[1]
    if groups > 1:  # grouped queries: K < H heads of keys and values
        k, v = (y.repeat_interleave(groups, dim=1) for y in (k, v))
    return QKV(q, k, v, attn.scale, extra=output_gate(attn, first))


class EvaBlock(Block):
    """`EvaBlock`: norm, attention, LayerScale, drop path; norm, FFN, LayerScale, drop path.

    Args:
        table: this block's `rotation_table`, None where the host has absolute positions alone.
    """

    parts: tuple[str, ...] = (
        *("norm1", "attn", "gamma_1", "drop_path1"),
        *("norm2", "mlp", "gamma_2", "drop_path2"),
    )

    def __init__(self, block: Any, number: int, table: Tensor | None) -> None:
        self.block, self.number, self.table = block, number, table

    def check(self) -> None:
        """Raise `EvoViTError` where the block holds what this view does not know."""
        what = f"The attention of block {self.number}"
        expect_parts(self.block, self.parts, f"Block {self.number}")
        expect_class(self.block.attn, ATTENTIONS, what)
        expect_parts(self.block.attn, ROPE_ATTENTION_PARTS, what)

    def bypassed(self) -> Iterator[nn.Module]:
        """Return the modules whose forward is never called."""
        attn = self.block.attn
        yield from (self.block, attn, attn.attn_drop)

    def before(self, x: Tensor) -> Tensor:
        """Return what the attention's projections read, (B, T, C)."""
        return self.block.norm1(x)  # type: ignore[no-any-return]

    def attention_input(self, tokens: Tokens) -> Tensor:
        return self.before(tokens.x)

    def qkv(self, tokens: Tokens) -> QKV:
        return rope_qkv(self.block.attn, self.before(tokens.x), tokens, self.table)

    def leading_qkv(self, tokens: Tokens, count: int) -> QKV:
        return rope_qkv(self.block.attn, self.before(tokens.x), tokens, self.table, count)

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        branch, gamma = attention_output(self.block.attn, qkv, bias, mix), self.block.gamma_1
        branch = branch if gamma is None else gamma * branch
        return tokens.with_x(tokens.x + self.block.drop_path1(branch))

    def ffn(self, tokens: Tokens) -> Tokens:
        branch, gamma = self.block.mlp(self.block.norm2(tokens.x)), self.block.gamma_2
        branch = branch if gamma is None else gamma * branch
        return tokens.with_x(tokens.x + self.block.drop_path2(branch))


class EvaBlockPostNorm(EvaBlock):
    """`EvaBlockPostNorm`: the norm comes after attention and FFN, there is no LayerScale."""

    parts = ("attn", "norm1", "drop_path1", "mlp", "norm2", "drop_path2")

    def before(self, x: Tensor) -> Tensor:
        return x

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        branch = self.block.norm1(attention_output(self.block.attn, qkv, bias, mix))
        return tokens.with_x(tokens.x + self.block.drop_path1(branch))

    def ffn(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(tokens.x + self.block.drop_path2(self.block.norm2(self.block.mlp(tokens.x))))


BLOCKS: dict[str, type[EvaBlock]] = {
    "timm.models.eva.EvaBlock": EvaBlock,
    "timm.models.eva.EvaBlockPostNorm": EvaBlockPostNorm,
}
