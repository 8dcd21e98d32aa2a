"""transformers' CLIP vision model and its kin, SigLIP, and the vision tower of Idefics3 and SmolVLM."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.backbones import adapter
from evovit.backbones.base import Backbone, Road, class_path
from evovit.backbones.hf_blocks import ClipBlock, HFBlock, full
from evovit.backbones.hf_trunk import HFTrunk
from evovit.errors import EvoViTError, shown
from evovit.ops.select import leading_queries
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


HEADS = full("siglip.SiglipMultiheadAttentionPoolingHead", "siglip2.Siglip2MultiheadAttentionPoolingHead")


@adapter(*full("siglip.SiglipVisionModel"))
class HFSiglip(HFTrunk):
    """View of `SiglipVisionModel`: no class token; attention with one probe pools, if it has a head."""

    parts: ClassVar[tuple[str, ...]] = ("embeddings", "encoder", "post_layernorm", "head")
    stack, norm_name, num_prefix = "encoder.layers", "post_layernorm", 0
    refused: ClassVar[tuple[str, ...]] = ("attention_mask",)

    def pooled(self, features: Tensor) -> Tensor | None:
        return self.model.head(features) if self.model.use_head else None

    def has_probe(self) -> bool:
        head = getattr(self.model, "head", None)
        return (
            head is not None and class_path(head) in HEADS and type(head.attention) is nn.MultiheadAttention
        )

    def probe_qkv(self, tokens: Tokens) -> QKV:
        head = self.model.head
        weights, biases = (
            each.chunk(3) for each in (head.attention.in_proj_weight, head.attention.in_proj_bias)
        )
        q, k = head.probe, self.norm(tokens.patches)
        q, k = (
            F.linear(x, weight, bias).reshape(*x.shape[:2], head.attention.num_heads, -1).transpose(1, 2)
            for x, weight, bias in zip((q, k), weights, biases, strict=False)
        )  # (1, H, 1, D) and (B, H, N, D)
        return QKV(q.expand(k.shape[0], -1, -1, -1), k, k[:, :, :0], k.shape[-1] ** -0.5)


def hidden_bias(hidden: Tensor, tokens: Tokens) -> Tensor:
    """Return what hides padding from a query, (B, 1, 1, N) of 0 and -inf.

    Args:
        hidden: (B, cells + 1), the same for each patch; the last for index -1.
    """
    place = torch.where(tokens.index < 0, hidden.shape[1] - 1, tokens.index)
    return hidden.gather(1, place)[:, None, None]


class PaddedBlock(ClipBlock):
    """A block of images with padding: no token attends to patches that are none.

    Args:
        hidden: (B, cells + 1) what to add to the logits of each patch, 0 or -inf; the last for index -1.
    """

    def __init__(self, block: Any, number: int, hidden: Tensor) -> None:
        super().__init__(block, number)
        self.hidden = hidden

    def with_bias(self, qkv: QKV, tokens: Tokens) -> QKV:
        """Return q, k, v with the padding hidden from every query, and from scores."""
        bias = hidden_bias(self.hidden, tokens).to(qkv.q.dtype)
        return qkv._replace(bias=bias.expand(-1, -1, qkv.q.shape[2], -1), padding=bias[:, 0, 0] < 0)

    def qkv(self, tokens: Tokens) -> QKV:
        return self.with_bias(super().qkv(tokens), tokens)

    def scoring_qkv(self, tokens: Tokens) -> QKV:
        return self.qkv(tokens)

    def queries_keys(self, tokens: Tokens) -> QKV:
        return self.with_bias(super().queries_keys(tokens), tokens)

    def leading_qkv(self, tokens: Tokens, count: int) -> QKV:
        return leading_queries(self.qkv(tokens), count)


class HFPadded(HFSiglip):
    """View of a tower that takes images of several sizes, padded to one."""

    fits_any_size, interpolates = True, False
    refused: ClassVar[tuple[str, ...]] = ()
    mask: Tensor | None = None  # (B, N) bool, what is no padding; None: all

    def hide(self, mask: Tensor) -> None:
        """Hide the padding of the next images from every token; mask (B, ...) has 0 where padding is."""
        mask = mask.flatten(1).bool()
        unread = mask.is_meta or torch.compiler.is_compiling()
        self.mask = mask if unread or not mask.all() else None

    @property
    def hidden(self) -> Tensor | None:
        """What hides the padding, (B, N + 1) of 0 and -inf; the last for tokens without a place."""
        return None if self.mask is None else F.pad(torch.where(self.mask, 0.0, -torch.inf), (0, 1))

    def blocks(self) -> list[HFBlock]:
        hidden = self.hidden
        if hidden is None:
            return super().blocks()
        return [PaddedBlock(block, number, hidden) for number, block in enumerate(self.layers)]

    def probe_qkv(self, tokens: Tokens) -> QKV:
        qkv, hidden = super().probe_qkv(tokens), self.hidden
        return qkv if hidden is None else qkv._replace(bias=hidden_bias(hidden, tokens).to(qkv.q.dtype))

    def expect_apart(self, whole: Backbone, road: Road, tokens: Tokens) -> None:
        if torch.compiler.is_compiling():  # a mask may hide nothing
            return
        mixes = road.method.merges and tokens.num_patches != tokens.num_cells
        if self.mask is not None and (mixes or road.method.finish(tokens).num_patches != tokens.num_cells):
            raise EvoViTError(
                f"The batch has padding, and {type(road.method).__name__} as configured drops or merges "
                "tokens, padding among them; choose a method that brings all back as they are (evo_vit, "
                "idle_vit), or give images of one shape together."
            )


@adapter(*full("idefics3.Idefics3VisionTransformer", "smolvlm.SmolVLMVisionTransformer"))
class HFIdefics3(HFPadded):
    """View of the tower of Idefics3 and SmolVLM; positions fit any size."""

    parts = ("embeddings", "encoder", "post_layernorm")

    def has_probe(self) -> bool:
        return False

    def embeddings(self, images: Tensor) -> Tensor:
        rows, columns = self.grid_of(images)
        mask = self.mask
        if mask is None:
            mask = torch.ones(images.shape[0], rows, columns, dtype=torch.bool, device=images.device)
        mask = mask.reshape(-1, rows, columns)
        return self.model.embeddings(pixel_values=images, patch_attention_mask=mask)  # type: ignore[no-any-return]

    def pooled(self, features: Tensor) -> Tensor | None:
        return None

    def answer_within(self, whole: Backbone, road: Road, images: Tensor, **arguments: Any) -> Any:
        mask = arguments.pop("patch_attention_mask", None)
        if mask is not None and isinstance(images, Tensor) and images.ndim == 4:
            shape = (images.shape[0], *self.grid_of(images))
            if not isinstance(mask, Tensor) or mask.shape != shape:
                raise EvoViTError(f"patch_attention_mask is {shown(mask)}; give a tensor {shape}, or None.")
            self.hide(mask)
        return super().answer_within(whole, road, images, **arguments)
