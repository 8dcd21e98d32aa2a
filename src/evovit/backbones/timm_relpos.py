"""timm's VisionTransformerRelPos: relative positions from a table or a small MLP, of each block or of all.

Checked with timm 1.0.28 to 1.0.31.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evovit.backbones import adapter
from evovit.backbones.base import (
    Block,
    Mix,
    class_path,
    expect_class,
    expect_parts,
    raster_tokens,
)
from evovit.backbones.timm_blocks import fused_qkv, values_alone
from evovit.backbones.timm_relative import biased_output, placed_bias, relative_spec
from evovit.backbones.timm_vit import TimmFlat
from evovit.tokens import QKV, Tokens

HOST_PARTS = ("patch_embed", "shared_rel_pos", "cls_token", "blocks", "norm", "fc_norm", "head_drop", "head")
ATTENTION_PARTS = ("qkv", "q_norm", "k_norm", "rel_pos", "attn_drop", "proj", "proj_drop")
POSITIONS = ("timm.layers.pos_embed_rel.RelPosMlp", "timm.layers.pos_embed_rel.RelPosBias")


class RelPosBlock(Block):
    """`RelPosBlock`: norm, attention, LayerScale, drop path; norm, FFN, LayerScale, drop path.

    Args:
        shared: (1, H, P + cells, P + cells), the bias that all blocks share, if any.
        raster: the index of freshly embedded tokens.
    """

    parts: tuple[str, ...] = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")

    def __init__(self, block: Any, number: int, shared: Tensor | None, raster: Tensor | None) -> None:
        self.block, self.number, self.shared, self.raster = block, number, shared, raster

    def check(self) -> None:
        """Raise `EvoViTError` where the block holds what this view does not know."""
        what, attn = f"The attention of block {self.number}", self.block.attn
        expect_parts(self.block, self.parts, f"Block {self.number}")
        expect_class(attn, ("timm.models.vision_transformer_relpos.RelPosAttention",), what)
        expect_parts(attn, ATTENTION_PARTS, what)
        if attn.rel_pos is not None:
            expect_class(attn.rel_pos, POSITIONS, f"The position bias of block {self.number}")

    def attention_input(self, tokens: Tokens) -> Tensor:
        return self.block.norm1(tokens.x)  # type: ignore[no-any-return]

    def qkv(self, tokens: Tokens) -> QKV:
        return self.placed(fused_qkv(self.block.attn, self.attention_input(tokens)), tokens)

    def values(self, tokens: Tokens) -> QKV:
        return values_alone(self.block.attn, self.attention_input(tokens))  # without the bias

    def placed(self, qkv: QKV, tokens: Tokens) -> QKV:
        """Return q, k, v with the host's bias for the tokens present."""
        own, bias = self.block.attn.rel_pos, self.shared
        bias = bias if own is None else own.get_bias()
        if bias is None or self.raster is None:
            return qkv
        return qkv._replace(bias=placed_bias(bias, tokens, self.raster).to(qkv.q.dtype))

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        branch = self.block.ls1(biased_output(self.block.attn, qkv, bias, mix))
        return tokens.with_x(tokens.x + self.block.drop_path1(branch))

    def ffn(self, tokens: Tokens) -> Tokens:
        branch = self.block.ls2(self.block.mlp(self.block.norm2(tokens.x)))
        return tokens.with_x(tokens.x + self.block.drop_path2(branch))


class ResPostRelPosBlock(RelPosBlock):
    """`ResPostRelPosBlock`: the norm comes after attention and FFN, there is no LayerScale."""

    parts = ("attn", "norm1", "drop_path1", "mlp", "norm2", "drop_path2")

    def attention_input(self, tokens: Tokens) -> Tensor:
        return tokens.x

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        branch = self.block.norm1(biased_output(self.block.attn, qkv, bias, mix))
        return tokens.with_x(tokens.x + self.block.drop_path1(branch))

    def ffn(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(tokens.x + self.block.drop_path2(self.block.norm2(self.block.mlp(tokens.x))))


BLOCKS: dict[str, type[RelPosBlock]] = {
    "timm.models.vision_transformer_relpos.RelPosBlock": RelPosBlock,
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock": ResPostRelPosBlock,
}


@adapter("timm.models.vision_transformer_relpos.VisionTransformerRelPos")
class TimmRelPos(TimmFlat):
    """View of timm's `VisionTransformerRelPos`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = host = model  # type: Any
        for number, block in enumerate(host.blocks):
            expect_class(block, BLOCKS, f"Block {number}")
        self.spec = relative_spec(host)
        self.image_shape = (host.in_chans, *host.patch_embed.img_size)
        self.head_reads_patches = host.global_pool != "token"
        self.shared: Tensor | None = None  # (1, H, P + cells, P + cells), for the images embedded last
        self.raster: Tensor | None = None  # (B, cells), their index

    def blocks(self) -> list[RelPosBlock]:
        views = enumerate(self.model.blocks)
        return [BLOCKS[class_path(block)](block, i, self.shared, self.raster) for i, block in views]

    def takes(self, height: int, width: int) -> bool:
        return (height, width) == tuple(self.model.patch_embed.img_size)

    def embed(self, images: Tensor) -> Tokens:
        host, x = self.model, self.model.patch_embed(images)
        if host.cls_token is not None:
            x = torch.cat((host.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        self.shared = None if host.shared_rel_pos is None else host.shared_rel_pos.get_bias()
        tokens = raster_tokens(x, self.spec.num_prefix, self.spec.grid)
        self.raster = tokens.index
        return tokens

    def bypassed(self) -> Iterator[nn.Module]:
        yield from (self.model, self.model.blocks)
        if self.model.shared_rel_pos is not None:
            yield self.model.shared_rel_pos
        for block in self.model.blocks:
            yield from (block, block.attn, block.attn.attn_drop)
            if block.attn.rel_pos is not None:
                yield block.attn.rel_pos

    def check_structure(self) -> None:
        expect_parts(self.model, HOST_PARTS, "The host")
        if self.model.shared_rel_pos is not None:
            expect_class(self.model.shared_rel_pos, POSITIONS, "The position bias of all blocks")
        for block in self.blocks():
            block.check()
