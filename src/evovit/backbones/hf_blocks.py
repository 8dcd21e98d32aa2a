"""Views of the blocks of transformers' plain vision encoders, different in names and in what ends a branch.

Checked with transformers 5.18 to 5.24. Each view calls the host's modules in the order of the host's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from evovit.backbones.base import Block, Mix, expect_class, expect_parts, mixed_values
from evovit.ops.select import keep_leading, take_heads
from evovit.tokens import QKV, Tokens


def full(*names: str) -> tuple[str, ...]:
    """Return full class paths of transformers' models: `vit.ViTLayer` is in models.vit.modeling_vit."""
    split = [name.split(".") for name in names]
    return tuple(f"transformers.models.{family}.modeling_{family}.{cls}" for family, cls in split)


class HFBlock(Block):
    """Norm, attention, what ends the branch; norm, FFN, what ends the branch. Subclasses say the names."""

    parts: tuple[str, ...]
    attentions: tuple[str, ...]  # full class paths of the attentions it knows
    attention_parts: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    attention_name = "attention"
    norms = ("norm1", "norm2")
    out_name, heads_name, scale_name, dropout_name = "o_proj", "num_heads", "scale", "dropout"

    def __init__(self, block: Any, number: int) -> None:
        self.block, self.number = block, number
        self.attn: Any = getattr(block, self.attention_name)

    @property
    def num_heads(self) -> int:
        """H of this block's `QKV`."""
        return getattr(self.attn, self.heads_name)  # type: ignore[no-any-return]

    def check(self) -> None:
        """Raise `EvoViTError` where the block holds what this view does not know."""
        what = f"The attention of block {self.number}"
        expect_parts(self.block, self.parts, f"Block {self.number}")
        expect_class(self.attn, self.attentions, what)
        expect_parts(self.attn, self.attention_parts, what)

    def bypassed(self) -> Iterator[nn.Module]:
        """Return the modules whose forward is never called."""
        yield from (self.block, self.attn)

    def normed(self, x: Tensor, which: int) -> Tensor:
        """Return what the attention (0) or the FFN (1) reads, (B, T, C)."""
        return getattr(self.block, self.norms[which])(x)  # type: ignore[no-any-return]

    def projected(self, x: Tensor, part: str) -> Tensor:
        """Project normed tokens (B, T, C) to `part` q, k or v, (B, H, T, D)."""
        y: Tensor = getattr(self.attn, f"{part}_proj")(x)
        return self.split_heads(y)

    def split_heads(self, y: Tensor) -> Tensor:
        """Return (B, T, H * D) as (B, H, T, D), also where T is 0."""
        size: int = self.attn.head_dim
        return y.reshape(*y.shape[:2], y.shape[2] // size, size).transpose(1, 2)

    def placed(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Tell queries or keys (B, H, T, D) their tokens' places; default: the embedding did."""
        return x

    def ended(self, branch: Tensor, which: int) -> Tensor:
        """End the attention's (0) or the FFN's branch (1): LayerScale, dropout, drop path; default: none."""
        return branch

    def attention_input(self, tokens: Tokens) -> Tensor:
        return self.normed(tokens.x, 0)

    def qkv(self, tokens: Tokens) -> QKV:
        x = self.normed(tokens.x, 0)
        q, k, v = (self.projected(x, part) for part in "qkv")
        return QKV(self.placed(q, tokens), self.placed(k, tokens), v, self.scale)

    def scoring_qkv(self, tokens: Tokens) -> QKV:
        x = self.normed(tokens.x, 0)
        q = self.projected(x[:, : tokens.num_prefix], "q")  # the prefix has no place on the grid
        k = self.placed(self.projected(x, "k"), tokens)
        return QKV(q, k, k[:, :, :0], self.scale)

    def queries_keys(self, tokens: Tokens) -> QKV:
        x = self.normed(tokens.x, 0)
        q, k = (self.placed(self.projected(x, part), tokens) for part in "qk")
        return QKV(q, k, k[:, :, :0], self.scale)

    def values(self, tokens: Tokens) -> QKV:
        v = self.projected(self.normed(tokens.x, 0), "v")
        return QKV(v[:, :, :0], v[:, :, :0], v, self.scale)

    def leading_qkv(self, tokens: Tokens, count: int) -> QKV:
        x = self.normed(tokens.x, 0)
        q = self.projected(x[:, :count], "q")
        if count > tokens.num_prefix:  # the prefix has no place on the grid
            q = self.placed(q, keep_leading(tokens, count))
        k, v = self.placed(self.projected(x, "k"), tokens), self.projected(x, "v")
        return QKV(q, k, v, self.scale)

    def qkv_of_rows(self, active: Tokens, scored: QKV, rows: Tensor) -> QKV:
        if scored.v.shape[2]:
            return super().qkv_of_rows(active, scored, rows)
        x = self.normed(active.x, 0)
        q = self.placed(self.projected(x, "q"), active)
        return QKV(q, take_heads(scored.k, rows), self.projected(x, "v"), self.scale)

    @property
    def scale(self) -> float:
        """What queries times keys are multiplied by."""
        return getattr(self.attn, self.scale_name)  # type: ignore[no-any-return]

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        dropout = getattr(self.attn, self.dropout_name) if self.attn.training else 0.0
        x = mixed_values(qkv, bias, mix, dropout).transpose(1, 2).flatten(2)  # (B, T, H * D)
        return tokens.with_x(tokens.x + self.ended(getattr(self.attn, self.out_name)(x), 0))

    def ffn(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(tokens.x + self.ended(self.block.mlp(self.normed(tokens.x, 1)), 1))


class ViTBlock(HFBlock):
    """ViT, DeiT, MAE, MSN, I-JEPA: dropout ends both branches."""

    parts = ("layernorm_before", "attention", "layernorm_after", "mlp", "dropout")
    attentions = full(
        *("vit.ViTAttention", "deit.DeiTAttention", "vit_mae.ViTMAEAttention"),
        *("vit_msn.ViTMSNAttention", "ijepa.IJepaAttention"),
    )
    norms = ("layernorm_before", "layernorm_after")
    heads_name, scale_name, dropout_name = "num_attention_heads", "scaling", "attention_dropout"

    def ended(self, branch: Tensor, which: int) -> Tensor:
        return self.block.dropout(branch)  # type: ignore[no-any-return]


class ClipBlock(HFBlock):
    """CLIP, SigLIP and their kin: nothing ends a branch."""

    parts = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
    attentions = full(
        *("clip.CLIPAttention", "metaclip_2.MetaClip2Attention", "altclip.AltCLIPAttention"),
        *("chinese_clip.ChineseCLIPVisionAttention", "siglip.SiglipAttention", "siglip2.Siglip2Attention"),
        *("idefics3.Idefics3VisionAttention", "smolvlm.SmolVLMVisionAttention"),
    )
    attention_parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    attention_name, norms, out_name = "self_attn", ("layer_norm1", "layer_norm2"), "out_proj"


class DinoBlock(HFBlock):
    """DINOv2, also with registers: LayerScale, then one drop path for both branches."""

    parts = ("norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2")
    attentions = full("dinov2.Dinov2Attention", "dinov2_with_registers.Dinov2WithRegistersAttention")
    heads_name, scale_name, dropout_name = "num_attention_heads", "scaling", "attention_dropout"

    def ended(self, branch: Tensor, which: int) -> Tensor:
        scaled = (self.block.layer_scale1, self.block.layer_scale2)[which](branch)
        return self.block.drop_path(scaled)  # type: ignore[no-any-return]


class InternVLBlock(HFBlock):
    """InternVL: norms of the whole queries and keys, LayerScale as parameters, dropout of the FFN alone."""

    parts = ("layernorm_before", "attention", "layernorm_after", "mlp", "dropout", "lambda_1", "lambda_2")
    attentions = full("internvl.InternVLVisionAttention")
    attention_parts = (
        *("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"),
        *("projection_layer", "projection_dropout"),
    )
    norms = ("layernorm_before", "layernorm_after")
    out_name, dropout_name = "projection_layer", "attention_dropout"

    def projected(self, x: Tensor, part: str) -> Tensor:
        y = getattr(self.attn, f"{part}_proj")(x)
        y = y if part == "v" else getattr(self.attn, f"{part}_norm")(y)
        return self.split_heads(y)

    def ended(self, branch: Tensor, which: int) -> Tensor:
        if which == 0:
            return self.block.lambda_1 * self.attn.projection_dropout(branch)  # type: ignore[no-any-return]
        return self.block.lambda_2 * self.block.dropout(branch)  # type: ignore[no-any-return]


BLOCKS: dict[str, type[HFBlock]] = {
    **dict.fromkeys(
        full(
            "vit.ViTLayer", "deit.DeiTLayer", "vit_mae.ViTMAELayer", "vit_msn.ViTMSNLayer", "ijepa.IJepaLayer"
        ),
        ViTBlock,
    ),
    **dict.fromkeys(
        full(
            *("clip.CLIPEncoderLayer", "metaclip_2.MetaClip2EncoderLayer", "altclip.AltCLIPEncoderLayer"),
            *("chinese_clip.ChineseCLIPVisionLayer", "siglip.SiglipEncoderLayer"),
            *("siglip2.Siglip2EncoderLayer", "idefics3.Idefics3EncoderLayer", "smolvlm.SmolVLMEncoderLayer"),
        ),
        ClipBlock,
    ),
    **dict.fromkeys(full("dinov2.Dinov2Layer", "dinov2_with_registers.Dinov2WithRegistersLayer"), DinoBlock),
    **dict.fromkeys(full("internvl.InternVLVisionLayer"), InternVLBlock),
}
