"""LeViT with a class token and absolute positions (`models.levit_cls`), the host of Evo-LeViT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from evovit.backbones import adapter
from evovit.backbones.base import Backbone, BackboneSpec, Stage, expect_parts, raster_tokens
from evovit.backbones.timm_levit import bypassed_in_stages, check_stages, levit_stages
from evovit.tokens import Tokens

HEADS = {"distilled": "head_dist", "class_token": "head_cls", "class_token_distilled": "head_cls_dist"}


@adapter("evovit.models.levit_cls.LevitCls")
class LevitClsBackbone(Backbone):
    """View of `LevitCls`."""

    model: Any
    head_reads_patches = True

    def __init__(self, model: nn.Module) -> None:
        self.model = host = model  # type: Any
        self.spec = BackboneSpec(
            depths=tuple(len(stage.blocks) for stage in host.stages),
            dims=host.embed_dim,
            num_heads=tuple(stage.blocks[0].attn.num_heads for stage in host.stages),
            grid=host.grid,
            num_prefix=1,
            has_class_token=True,
            num_classes=host.num_classes,
        )
        self.image_shape = (host.in_chans, *host.img_size)

    def embed(self, images: Tensor) -> Tokens:
        return raster_tokens(self.model.embed(images), 1, self.spec.grid)

    def stages(self) -> Sequence[Stage]:
        return levit_stages(self.model)

    def norm(self, x: Tensor) -> Tensor:
        return x

    def head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return predictions; in training those of the first head alone, for the labels."""
        if pre_logits or not self.model.training:
            return self.model.forward_head(features, pre_logits)  # type: ignore[no-any-return]
        return self.model.head(self.model.forward_head(features, True))  # type: ignore[no-any-return]

    def extra_logits(self, features: Tensor) -> dict[str, Tensor]:
        pooled, present = self.model.forward_head(features, True), dict(self.model.named_children())
        return {
            name: present[head](features[:, 0] if name.startswith("class") else pooled)
            for name, head in HEADS.items()
            if head in present
        }

    def host_features(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)  # type: ignore[no-any-return]

    def bypassed(self) -> Iterator[nn.Module]:
        yield self.model
        yield from bypassed_in_stages(self.model)

    def check_structure(self) -> None:
        known = ("stem", "cls_token", "pos_embed", "stages", "head", *HEADS.values())
        expect_parts(self.model, known, "The host")
        check_stages(self.model)
