"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT, Sapiens2; absolute and rotary positions.

Checked with timm 1.0.26 to 1.0.31.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from evovit.backbones import adapter
from evovit.backbones.base import Backbone, Stage, class_path, expect_class, expect_parts, raster_tokens
from evovit.backbones.timm_heads import masked_logits
from evovit.backbones.timm_rope_blocks import BLOCKS, EvaBlock, rotation_table
from evovit.backbones.timm_vit import HOST_PARTS, timm_grid, timm_spec, timm_takes
from evovit.tokens import Tokens


@adapter("timm.models.eva.Eva")
class TimmEva(Backbone):
    """View of timm's `Eva` and its subclasses."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        self.model = host = model  # type: Any
        for number, block in enumerate(host.blocks):
            expect_class(block, BLOCKS, f"Block {number}")
        self.spec = timm_spec(host, host.blocks[0].attn.num_heads)
        self.image_shape = (host.in_chans, *host.patch_embed.img_size)
        self.head_reads_patches = host.global_pool != "token" or host.attn_pool is not None
        # rotations of the images embedded last: (N + 1, 2 * D), or (depth, H, N + 1, 2 * D) if mixed
        self.table: Tensor | None = None

    def blocks(self) -> list[EvaBlock]:
        """Return fresh views of the blocks, with the rotations of the images embedded last."""
        table, views = self.table, []
        for number, block in enumerate(self.model.blocks):
            own = table[number] if table is not None and self.model.rope_mixed else table
            views.append(BLOCKS[class_path(block)](block, number, own))
        return views

    def takes(self, height: int, width: int) -> bool:
        return timm_takes(self.model, height, width)

    def embed(self, images: Tensor) -> Tokens:
        x = self.model.patch_embed(images)
        grid = timm_grid(self.model, x)
        x, rope = self.model._pos_embed(x)  # in training the host may shift or scale the positions at random
        self.table = None if rope is None else rotation_table(rope)
        return raster_tokens(self.model.norm_pre(x), self.spec.num_prefix, grid)

    def stages(self) -> Sequence[Stage]:
        return [Stage(None, self.blocks())]

    def norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)  # type: ignore[no-any-return]

    def head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(features, pre_logits=pre_logits)  # type: ignore[no-any-return]

    def masked_head(self, features: Tensor, mask: Tensor) -> Tensor:
        if self.head_reads_patches:  # only attention pooling reads the prefix too
            logits = masked_logits(self.model, features, mask, self.model.attn_pool is not None)
            if logits is not None:
                return logits
        return super().masked_head(features, mask)

    def host_features(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)  # type: ignore[no-any-return]

    def bypassed(self) -> Iterator[nn.Module]:
        yield from (self.model, self.model.blocks)
        for block in self.blocks():
            yield from block.bypassed()

    def check_structure(self) -> None:
        expect_parts(self.model, (*HOST_PARTS, "rope"), "The host")
        for block in self.blocks():
            block.check()
