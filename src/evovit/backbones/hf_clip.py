"""transformers' CLIP vision model and its kin, SigLIP, and the vision tower of Idefics3 and SmolVLM."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from evovit.backbones import adapter
from evovit.backbones.base import Backbone, Road
from evovit.backbones.hf_blocks import ClipBlock, HFBlock, full
from evovit.backbones.hf_trunk import HFTrunk
from evovit.ops.select import prefix_queries
from evovit.tokens import QKV, Tokens


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
    refused: ClassVar[tuple[str, ...]] = ("attention_mask",)

    def pooled(self, features: Tensor) -> Tensor | None:
        return self.model.head(features) if self.model.use_head else None


class PaddedBlock(ClipBlock):
    """A block of images with padding: no token attends to patches that are none.

    Args:
        hidden: (B, cells + 1) what to add to the logits of each patch, 0 or -inf; the last for index -1.
    """

    def __init__(self, block: Any, number: int, hidden: Tensor) -> None:
        super().__init__(block, number)
        self.hidden = hidden

    def with_bias(self, qkv: QKV, tokens: Tokens) -> QKV:
        """Return q, k, v with the padding hidden from every query."""
        place = torch.where(tokens.index < 0, self.hidden.shape[1] - 1, tokens.index)
        bias = self.hidden.to(qkv.q.dtype).gather(1, place)[:, None, None]  # (B, 1, 1, N)
        return qkv._replace(bias=bias.expand(-1, -1, qkv.q.shape[2], -1))

    def qkv(self, tokens: Tokens) -> QKV:
        return self.with_bias(super().qkv(tokens), tokens)

    def scoring_qkv(self, tokens: Tokens) -> QKV:
        return self.qkv(tokens)

    def queries_keys(self, tokens: Tokens) -> QKV:
        return self.with_bias(super().queries_keys(tokens), tokens)

    def prefix_qkv(self, tokens: Tokens) -> QKV:
        return prefix_queries(self.qkv(tokens), tokens.num_prefix)


@adapter(*full("idefics3.Idefics3VisionTransformer", "smolvlm.SmolVLMVisionTransformer"))
class HFIdefics3(HFSiglip):
    """View of the tower of Idefics3 and SmolVLM; positions fit any size."""

    parts = ("embeddings", "encoder", "post_layernorm")
    fits_any_size, interpolates = True, False
    refused = ()
    mask: Tensor | None = None  # (B, rows, columns) bool, what is no padding; None: all

    def embeddings(self, images: Tensor) -> Tensor:
        rows, columns = self.grid_of(images)
        mask = self.mask
        if mask is None:
            mask = torch.ones(images.shape[0], rows, columns, dtype=torch.bool, device=images.device)
        return self.model.embeddings(pixel_values=images, patch_attention_mask=mask)  # type: ignore[no-any-return]

    def blocks(self) -> list[HFBlock]:
        if self.mask is None:
            return super().blocks()
        hidden = torch.where(self.mask.flatten(1), 0.0, -torch.inf)
        hidden = F.pad(hidden, (0, 1))
        return [PaddedBlock(block, number, hidden) for number, block in enumerate(self.layers)]

    def pooled(self, features: Tensor) -> Tensor | None:
        return None

    def answer_within(self, whole: Backbone, road: Road, images: Tensor, **arguments: Any) -> Any:
        self.mask = arguments.pop("patch_attention_mask", None)
        return super().answer_within(whole, road, images, **arguments)
