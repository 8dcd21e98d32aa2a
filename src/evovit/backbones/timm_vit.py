"""timm's VisionTransformer: ViT, DeiT (also distilled), DeiT-III, AugReg, MAE, CLIP, SigLIP, DINOv2, q/k-norm, gated.

Checked with timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from evovit.backbones import adapter
from evovit.backbones.base import Backbone, BackboneSpec, Stage, raster_tokens
from evovit.backbones.timm_blocks import BLOCKS
from evovit.errors import EvoViTError
from evovit.tokens import Tokens


@adapter("timm.models.vision_transformer.VisionTransformer")
class TimmViT(Backbone):
    """View of timm's `VisionTransformer` and its subclasses."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        self.model = host = model  # type: Any
        first = host.blocks[0]
        if not {type(block).__name__ for block in host.blocks} <= set(BLOCKS):
            raise EvoViTError(
                f"A host with {type(first).__name__} blocks is not supported: queries, keys and values of one softmax "
                f"attention are needed; supported blocks are {', '.join(sorted(BLOCKS))}."
            )
        self.spec = BackboneSpec(
            depths=(len(host.blocks),),
            dims=(host.embed_dim,),
            num_heads=(next(m.num_heads for m in first.modules() if hasattr(m, "num_heads")),),
            grid=tuple(host.patch_embed.grid_size),
            num_prefix=host.num_prefix_tokens,
            has_class_token=getattr(host, "cls_token", None) is not None,
            num_classes=host.num_classes,
        )
        self.head_reads_patches = host.global_pool != "token" or host.attn_pool is not None

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Return (rows, columns) of the patch grid for these images."""
        return tuple(self.model.patch_embed.dynamic_feat_size(images.shape[-2:]))

    def embed(self, images: Tensor) -> Tokens:
        x = self.model._pos_embed(self.model.patch_embed(images))
        x = self.model.norm_pre(self.model.patch_drop(x))
        return raster_tokens(x, self.spec.num_prefix, self.grid_of(images))

    def stages(self) -> Sequence[Stage]:
        return [Stage(None, [BLOCKS[type(b).__name__](b, i) for i, b in enumerate(self.model.blocks)])]

    def norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)  # type: ignore[no-any-return]

    def head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        out: Tensor | tuple[Tensor, Tensor] = self.model.forward_head(features, pre_logits=pre_logits)
        return (
            (out[0] + out[1]) / 2 if isinstance(out, tuple) else out
        )  # the distilled host in training returns two

    def host_features(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)  # type: ignore[no-any-return]

    def check_structure(self) -> None:
        for block in self.stages()[0].blocks:
            block.check()  # type: ignore[attr-defined]
