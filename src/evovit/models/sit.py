"""SiT (Zong et al., "Self-slimmed Vision Transformer", ECCV 2022), as released; also in timm's registry.

`sit_backbone_*` are its dense hosts, which are also its teachers; `sit_*` are these with SiT's slimming.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import register_model

from evovit.backbones import adapt
from evovit.methods import build_config
from evovit.methods.sit import SiT
from evovit.model import ReducedViT
from evovit.models.lv_vit import LVViT, build_lv_vit
from evovit.models.named import split_options

__all__: list[str] = []  # timm's registry adds the entry points


def _backbone(pretrained: bool, size: dict[str, Any], kwargs: dict[str, Any]) -> LVViT:
    """Build a host whose logits are the class token's; its second head is kept, unused and frozen."""
    return build_lv_vit(0.9, pretrained, **({"stem": "4c", "aux_weight": 0.0} | size | kwargs))


def build_sit(
    host: Callable[..., LVViT], blocks: tuple[int, ...], pretrained: bool, kwargs: dict[str, Any]
) -> ReducedViT:
    """Build a SiT; options of `SiT.Config` go to the method, others to the host."""
    given, kwargs = split_options(SiT, kwargs)
    model = host(pretrained, **kwargs)
    return ReducedViT(model, SiT(build_config(SiT, {"blocks": blocks} | given), adapt(model).spec))


@register_model
def sit_backbone_tiny(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """Teacher of SiT-T: 15.7 M parameters, 3.5 GMACs; 81.8 top-1 as published."""
    return _backbone(pretrained, {"embed_dim": 320, "depth": 14, "num_heads": 5}, kwargs)


@register_model
def sit_backbone_small(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """Teacher of SiT-XS and SiT-S: 25.4 M parameters, 5.5 GMACs; 83.1 top-1 as published."""
    return _backbone(pretrained, {}, kwargs)


@register_model
def sit_backbone_medium(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """Teacher of SiT-M: 55.2 M parameters, 11.9 GMACs; 84.0 top-1 as published."""
    return _backbone(pretrained, {"embed_dim": 512, "depth": 20, "num_heads": 8}, kwargs)


@register_model
def sit_backbone_large(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """Teacher of SiT-L at 288 pixels: 147 M parameters, 56.1 GMACs; 85.3 top-1 as published."""
    size = {"embed_dim": 768, "depth": 24, "num_heads": 12, "skip_lam": 3.0, "stem": "6c", "img_size": 288}
    return _backbone(pretrained, size, kwargs)


@register_model
def sit_tiny(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """SiT-T: 15.9 M parameters, 1.0 GMACs; 80.1 top-1 as published."""
    return build_sit(sit_backbone_tiny, (0, 1, 2), pretrained, kwargs)


@register_model
def sit_extra_small(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """SiT-XS: 25.6 M parameters, 1.5 GMACs; 81.2 top-1 as published."""
    return build_sit(sit_backbone_small, (0, 1, 2), pretrained, kwargs)


@register_model
def sit_small(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """SiT-S: 25.6 M parameters, 4.0 GMACs; 83.1 top-1 as published."""
    return build_sit(sit_backbone_small, (8, 11, 13), pretrained, kwargs)


@register_model
def sit_medium(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """SiT-M: 55.6 M parameters, 8.1 GMACs; 84.2 top-1 as published."""
    return build_sit(sit_backbone_medium, (9, 13, 16), pretrained, kwargs)


@register_model
def sit_large(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """SiT-L at 288 pixels: 148.2 M parameters, 34.4 GMACs; 85.6 top-1 as published."""
    return build_sit(sit_backbone_large, (9, 13, 16), pretrained, kwargs)
