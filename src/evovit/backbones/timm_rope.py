"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT, Sapiens2; absolute and rotary positions.

Checked with timm 1.0.28 to 1.0.31.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from evovit.backbones import adapter
from evovit.backbones.base import class_path, expect_class, expect_parts, raster_tokens
from evovit.backbones.timm_rope_blocks import BLOCKS, EvaBlock, rotation_table
from evovit.backbones.timm_vit import HOST_PARTS, TimmFlat, timm_grid, timm_spec, timm_takes
from evovit.tokens import Tokens


@adapter("timm.models.eva.Eva")
class TimmEva(TimmFlat):
    """View of timm's `Eva` and its subclasses."""

    def __init__(self, model: nn.Module) -> None:
        host: Any = model
        self.model = host
        for number, block in enumerate(host.blocks):
            expect_class(block, BLOCKS, f"Block {number}")
        self.spec = timm_spec(host, host.blocks[0].attn.num_heads)
        self.image_shape = (host.in_chans, *host.patch_embed.img_size)
        self.head_reads_patches = host.global_pool != "token" or host.attn_pool is not None
        self.pools_prefix = host.attn_pool is not None  # all other poolings leave it out
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

    def bypassed(self) -> Iterator[nn.Module]:
        yield from (self.model, self.model.blocks)
        for block in self.blocks():
            yield from block.bypassed()

    def check_structure(self) -> None:
        expect_parts(self.model, (*HOST_PARTS, "rope"), "The host")
        for block in self.blocks():
            block.check()
