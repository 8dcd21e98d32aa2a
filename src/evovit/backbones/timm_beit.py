"""timm's Beit: BEiT and BEiT v2; a relative position bias of each block, or one of all.

(BEiT-3 is a `VisionTransformer` in timm.) Checked with timm 1.0.28 to 1.0.31.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evovit.backbones import adapter
from evovit.backbones.base import Block, Mix, expect_class, expect_parts, raster_tokens
from evovit.backbones.timm_relative import biased_output, placed_bias, relative_spec
from evovit.backbones.timm_rope_blocks import projected, projected_for
from evovit.backbones.timm_vit import TimmFlat
from evovit.ops.select import leading_queries
from evovit.tokens import QKV, Tokens

HOST_PARTS = (
    *("patch_embed", "cls_token", "pos_embed", "pos_drop", "rel_pos_bias", "blocks"),
    *("norm", "fc_norm", "head_drop", "head"),
)
BLOCK_PARTS = ("norm1", "attn", "gamma_1", "drop_path1", "norm2", "mlp", "gamma_2", "drop_path2")
ATTENTION_PARTS = (
    *("qkv", "q_bias", "k_bias", "v_bias", "relative_position_bias_table", "relative_position_index"),
    *("attn_drop", "proj", "proj_drop"),
)


class BeitBlock(Block):
    """`Block` of Beit: norm, attention, scale, drop path; norm, FFN, scale, drop path.

    Args:
        shared: (H, 1 + cells, 1 + cells), the bias that all blocks share, if any.
        raster: the index of freshly embedded tokens.
    """

    def __init__(self, block: Any, number: int, shared: Tensor | None, raster: Tensor | None) -> None:
        self.block, self.number, self.shared, self.raster = block, number, shared, raster

    def check(self) -> None:
        """Raise `EvoViTError` where the block holds what this view does not know."""
        what = f"The attention of block {self.number}"
        expect_parts(self.block, BLOCK_PARTS, f"Block {self.number}")
        expect_class(self.block.attn, ("timm.models.beit.Attention",), what)
        expect_parts(self.block.attn, ATTENTION_PARTS, what)

    def attention_input(self, tokens: Tokens) -> Tensor:
        return self.block.norm1(tokens.x)  # type: ignore[no-any-return]

    def qkv(self, tokens: Tokens) -> QKV:
        return self._placed(projected(self.block.attn, self.attention_input(tokens)), tokens)

    def leading_qkv(self, tokens: Tokens, count: int) -> QKV:
        x = self.block.norm1(tokens.x)
        each = projected_for(self.block.attn, x, x[:, :count])
        return leading_queries(self._placed(each, tokens), count)

    def _placed(self, each: Sequence[Tensor], tokens: Tokens) -> QKV:
        """Return projected q, k, v (B, T or fewer, H * D) by heads, with the host's bias."""
        attn = self.block.attn
        q, k, v = (y.reshape(*y.shape[:2], attn.num_heads, -1).transpose(1, 2) for y in each)  # (B, H, T, D)
        bias = self.shared
        if attn.relative_position_bias_table is not None:
            own = attn._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        elif bias is not None:
            bias = bias.unsqueeze(0)
        if bias is not None and self.raster is not None:
            bias = placed_bias(bias, tokens, self.raster).to(q.dtype)
        return QKV(q, k, v, attn.scale, bias)

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        return self._add(tokens, biased_output(self.block.attn, qkv, bias, mix), 1)

    def ffn(self, tokens: Tokens) -> Tokens:
        return self._add(tokens, self.block.mlp(self.block.norm2(tokens.x)), 2)

    def _add(self, tokens: Tokens, branch: Tensor, which: int) -> Tokens:
        gamma, drop_path = (getattr(self.block, f"{part}{which}") for part in ("gamma_", "drop_path"))
        return tokens.with_x(tokens.x + drop_path(branch if gamma is None else gamma * branch))


@adapter("timm.models.beit.Beit")
class TimmBeit(TimmFlat):
    """View of timm's `Beit`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = host = model  # type: Any
        for number, block in enumerate(host.blocks):
            expect_class(block, ("timm.models.beit.Block",), f"Block {number}")
        self.spec = relative_spec(host)
        self.image_shape = (host.in_chans, *host.patch_embed.img_size)
        self.head_reads_patches = host.global_pool != "token"
        self.shared: Tensor | None = None  # (H, 1 + cells, 1 + cells), for the images embedded last
        self.raster: Tensor | None = None  # (B, cells), their index

    def blocks(self) -> list[BeitBlock]:
        return [BeitBlock(b, i, self.shared, self.raster) for i, b in enumerate(self.model.blocks)]

    def takes(self, height: int, width: int) -> bool:
        return (height, width) == tuple(self.model.patch_embed.img_size)

    def embed(self, images: Tensor) -> Tokens:
        host, x = self.model, self.model.patch_embed(images)
        x = torch.cat((host.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = host.pos_drop(x if host.pos_embed is None else x + host.pos_embed)
        self.shared = None if host.rel_pos_bias is None else host.rel_pos_bias()
        tokens = raster_tokens(x, 1, self.spec.grid)
        self.raster = tokens.index
        return tokens

    def bypassed(self) -> Iterator[nn.Module]:
        yield from (self.model, self.model.blocks)
        for block in self.model.blocks:
            yield from (block, block.attn, block.attn.attn_drop)

    def check_structure(self) -> None:
        expect_parts(self.model, HOST_PARTS, "The host")
        for block in self.blocks():
            block.check()
