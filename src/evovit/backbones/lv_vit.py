"""LV-ViT and SiT's backbones (`evovit.models.lv_vit`): timm's blocks, a second head on the patch tokens."""

from __future__ import annotations

from torch import Tensor, nn

from evovit.backbones import adapter
from evovit.backbones.base import expect_class, expect_parts
from evovit.backbones.timm_vit import HOST_PARTS, TimmViT


@adapter("evovit.models.lv_vit.LVViT")
class LVViTView(TimmViT):
    """View of `LVViT`; where the second head counts, waiting tokens come back before the heads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.head_reads_patches = self.model.aux_weight > 0 and self.model.num_classes > 0

    def masked_head(self, features: Tensor, mask: Tensor) -> Tensor:
        return self.model.forward_head(features, mask=mask)  # type: ignore[no-any-return]

    def class_logits(self, features: Tensor) -> Tensor:
        return self.model.class_logits(features)  # type: ignore[no-any-return]

    def token_logits(self, features: Tensor) -> Tensor | None:
        return self.model.token_logits(features) if self.head_reads_patches else None

    def check_structure(self) -> None:
        expect_parts(self.model, (*HOST_PARTS, "aux_head"), "The host")
        for number, block in enumerate(self.blocks()):
            block.check()
            expect_class(block.block.ls1, ("evovit.models.lv_vit.Divide",), f"The scale of block {number}")
            expect_class(block.block.ls2, ("evovit.models.lv_vit.Divide",), f"The scale of block {number}")
