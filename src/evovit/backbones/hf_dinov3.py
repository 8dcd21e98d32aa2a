"""transformers' DINOv3 ViT: queries and keys are rotated by their token's place on the grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evovit.backbones import adapter
from evovit.backbones.hf_blocks import DinoBlock, full
from evovit.backbones.hf_trunk import HFTrunk
from evovit.backbones.timm_rope_blocks import rotate, rotation_table
from evovit.tokens import Tokens


class DINOv3Block(DinoBlock):
    """`DINOv3ViTLayer`.

    Args:
        table: `rotation_table` of the images embedded last.
    """

    attentions = full("dinov3_vit.DINOv3ViTAttention")
    heads_name, dropout_name = "num_heads", "dropout"

    def __init__(self, block: Any, number: int, table: Tensor | None = None) -> None:
        super().__init__(block, number)
        self.table = table

    def placed(self, x: Tensor, tokens: Tokens) -> Tensor:
        if self.table is None:
            raise RuntimeError("embed comes before the blocks run")
        return rotate(x, self.table[tokens.index].unsqueeze(1), tokens.num_prefix, half=True)


@adapter(*full("dinov3_vit.DINOv3ViTModel"))
class HFDINOv3(HFTrunk):
    """View of `DINOv3ViTModel`."""

    parts = ("embeddings", "rope_embeddings", "model", "norm")
    stack, norm_name = "model.layer", "norm"
    fits_any_size, interpolates = True, False
    refused = ("bool_masked_pos",)
    views = dict.fromkeys(full("dinov3_vit.DINOv3ViTLayer"), DINOv3Block)
    table: Tensor | None = None  # rotations of the images embedded last, (N + 1, 2 * D)

    def count_prefix(self) -> int:
        return 1 + self.config.num_register_tokens  # type: ignore[no-any-return]

    def embeddings(self, images: Tensor) -> Tensor:
        x = super().embeddings(images)
        cosine, sine = self.model.rope_embeddings(images)  # in training moved and scaled at random
        self.table = rotation_table(torch.cat((sine, cosine), dim=-1))
        return x

    def blocks(self) -> list[Any]:
        return [DINOv3Block(block, number, self.table) for number, block in enumerate(self.layers)]

    def pooled(self, features: Tensor) -> Tensor | None:
        return features[:, 0]
