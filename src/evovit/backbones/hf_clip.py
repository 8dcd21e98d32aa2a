"""transformers' CLIP vision model and its kin, SigLIP, and the vision tower of Idefics3 and SmolVLM."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from evovit.backbones import adapter
from evovit.backbones.hf_blocks import full
from evovit.backbones.hf_trunk import HFTrunk


@adapter(
    *full(
        *("clip.CLIPVisionModel", "metaclip_2.MetaClip2VisionModel"),
        *("altclip.AltCLIPVisionModel", "chinese_clip.ChineseCLIPVisionModel"),
    )
)
class HFClip(HFTrunk):
    """View of `CLIPVisionModel`: a norm before the blocks; the one behind is for the class token alone."""

    parts = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
    stack, norm_name = "encoder.layers", None
    refused = ("attention_mask",)

    def embeddings(self, images: Tensor) -> Tensor:
        return self.model.pre_layrnorm(super().embeddings(images))  # type: ignore[no-any-return]

    def pooled(self, features: Tensor) -> Tensor | None:
        return self.model.post_layernorm(features[:, 0])  # type: ignore[no-any-return]


@adapter(*full("siglip.SiglipVisionModel"))
class HFSiglip(HFTrunk):
    """View of `SiglipVisionModel`: no class token; attention with one probe pools, if it has a head."""

    parts: ClassVar[tuple[str, ...]] = ("embeddings", "encoder", "post_layernorm", "head")
    stack, norm_name, num_prefix = "encoder.layers", "post_layernorm", 0
    refused = ("attention_mask",)

    def pooled(self, features: Tensor) -> Tensor | None:
        return self.model.head(features) if self.model.use_head else None


@adapter(*full("idefics3.Idefics3VisionTransformer", "smolvlm.SmolVLMVisionTransformer"))
class HFIdefics3(HFSiglip):
    """View of the tower of Idefics3 and SmolVLM, on images without padding; positions fit any size."""

    parts = ("embeddings", "encoder", "post_layernorm")
    fits_any_size, interpolates = True, False
    refused = ("patch_attention_mask",)

    def embeddings(self, images: Tensor) -> Tensor:
        rows, columns = self.grid_of(images)
        whole = torch.ones(images.shape[0], rows, columns, dtype=torch.bool, device=images.device)
        return self.model.embeddings(pixel_values=images, patch_attention_mask=whole)  # type: ignore[no-any-return]

    def pooled(self, features: Tensor) -> Tensor | None:
        return None
