"""Evo-LeViT: LeViT with Evo-ViT built in, as released (YifanXu74/Evo-ViT); also in timm's registry.

All three stages select tokens, in 128S the last two. Training has two heads on the mean token and two on the
class token. Accuracies are the published ones, GMACs those of evaluation.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model

from evovit.backbones import adapt
from evovit.methods import build_config
from evovit.methods.evo_levit import EvoLeViT
from evovit.model import ReducedViT
from evovit.models.levit_cls import build_levit_cls
from evovit.models.named import split_options

__all__: list[str] = []  # timm's registry adds the entry points


def _named(size: str, pixels: int, pretrained: bool, kwargs: dict[str, Any]) -> ReducedViT:
    """Build an Evo-LeViT; options of `EvoLeViT.Config` go to the method, others to `LevitCls`."""
    options, kwargs = split_options(EvoLeViT, kwargs)
    host = build_levit_cls(size, pretrained, {"img_size": pixels} | kwargs)
    return ReducedViT(host, EvoLeViT(build_config(EvoLeViT, options), adapt(host).spec))


@register_model
def evo_levit_128s(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-LeViT-128S: 0.256 GMACs; 73.0 top-1."""
    return _named("128s", 224, pretrained, kwargs)


@register_model
def evo_levit_128(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-LeViT-128: 0.305 GMACs; 74.4 top-1."""
    return _named("128", 224, pretrained, kwargs)


@register_model
def evo_levit_192(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-LeViT-192: 0.510 GMACs; 76.8 top-1."""
    return _named("192", 224, pretrained, kwargs)


@register_model
def evo_levit_256(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-LeViT-256: 0.880 GMACs; 78.8 top-1."""
    return _named("256", 224, pretrained, kwargs)


@register_model
def evo_levit_384(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-LeViT-384: 1.849 GMACs; 80.7 top-1."""
    return _named("384", 224, pretrained, kwargs)


@register_model
def evo_levit_128s_384(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-LeViT-128S at 384 pixels; no published result."""
    return _named("128s", 384, pretrained, kwargs)


@register_model
def evo_levit_128_384(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-LeViT-128 at 384 pixels; no published result."""
    return _named("128", 384, pretrained, kwargs)


@register_model
def evo_levit_192_384(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-LeViT-192 at 384 pixels; no published result."""
    return _named("192", 384, pretrained, kwargs)


@register_model
def evo_levit_256_384(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-LeViT-256 at 384 pixels: 2.763 GMACs; 81.1 top-1."""
    return _named("256", 384, pretrained, kwargs)


@register_model
def evo_levit_384_384(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
    """Evo-LeViT-384 at 384 pixels: 5.622 GMACs; 82.2 top-1."""
    return _named("384", 384, pretrained, kwargs)
