"""Evo-DeiT: DeiT with Evo-ViT built in, as released (YifanXu74/Evo-ViT); also in timm's registry.

Average-pooled head for inference, an assisted head on the class token for training (paper, eq. 8). Defaults
are the released code's: no representative token, no score history before the first selection.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from evovit.backbones import adapt
from evovit.methods import build_config
from evovit.methods.evo_vit import EvoViT
from evovit.model import ReducedViT
from evovit.models.named import imagenet_cfg, own_options, split_options

__all__: list[str] = []  # timm's registry adds the entry points


def released_options(depth: int, start_block: int) -> dict[str, Any]:
    """Return the options under which Evo-ViT computes what the released DeiT code computes."""
    return {
        "fast_update": False,
        "trade_off": (0.0,) * start_block + (0.5,) * (depth - start_block),
        "assisted_head": True,
    }


def build_evo_deit(
    *, img_size: int | tuple[int, int], embed_dim: int, num_heads: int, **kwargs: Any
) -> ReducedViT:
    """Build an Evo-DeiT; options of `EvoViT.Config` go to the method, others to the `VisionTransformer`."""
    given, kwargs = split_options(EvoViT, kwargs)
    host = VisionTransformer(
        img_size=img_size, embed_dim=embed_dim, num_heads=num_heads, **({"global_pool": "avg"} | kwargs)
    )
    shape = (host.in_chans, *host.patch_embed.img_size)
    host.pretrained_cfg = imagenet_cfg(host, shape, first_conv="patch_embed.proj", classifier="head")
    spec = adapt(host).spec
    options = released_options(spec.depth, given.get("start_block", EvoViT.Config.start_block)) | given
    return ReducedViT(host, EvoViT(build_config(EvoViT, options), spec))


def _named(size: int, dim: int, heads: int, pretrained: bool, kwargs: dict[str, Any]) -> ReducedViT:
    call = "load_official('evo_vit', path, num_heads=...)"
    kwargs = own_options(pretrained, kwargs, "Evo-DeiT weights", call)
    return build_evo_deit(**({"img_size": size, "embed_dim": dim, "num_heads": heads} | kwargs))


@register_model
def evo_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-ViT-T: 0.818 GMACs; 72.0 top-1 as published."""
    return _named(224, 192, 3, pretrained, kwargs)


@register_model
def evo_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-ViT-S: 3.033 GMACs; 79.4 top-1 as published."""
    return _named(224, 384, 6, pretrained, kwargs)


@register_model
def evo_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-ViT-B: 11.658 GMACs; 81.3 top-1 as published."""
    return _named(224, 768, 12, pretrained, kwargs)


@register_model
def evo_deit_tiny_patch16_384(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-ViT-T at 384 pixels; no published result."""
    return _named(384, 192, 3, pretrained, kwargs)


@register_model
def evo_deit_small_patch16_384(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-ViT-S at 384 pixels: 9.88 GMACs; 82.0 top-1 as published."""
    return _named(384, 384, 6, pretrained, kwargs)


@register_model
def evo_deit_base_patch16_384(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-ViT-B at 384 pixels: 36.11 GMACs; 82.0 top-1 as published."""
    return _named(384, 768, 12, pretrained, kwargs)
