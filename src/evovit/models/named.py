"""What named models share: timm's registry gives more than a host takes, and nobody hosts their weights."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from evovit.errors import EvoViTError, check_count
from evovit.methods.base import Method

__all__: list[str] = []  # no entry points

MOST = 1_000_000  # classes, pixels, channels
REGISTRY_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_model_args")


def own_options(pretrained: bool, kwargs: dict[str, Any], what: str, call: str) -> dict[str, Any]:
    """Return `kwargs` without what timm's registry adds.

    Args:
        what: the weights, and `call` how to load the authors', for the sentence if `pretrained` is asked for.
    """
    for key in ("num_classes", "img_size", "in_chans"):
        sizes = kwargs.get(key, 1)
        low = 0 if key == "num_classes" else 1
        for size in sizes if isinstance(sizes, tuple | list) else (sizes,):
            check_count(key, size, low, MOST)
    if pretrained:
        raise EvoViTError(
            f"No {what} are hosted; download the authors' checkpoint and use evovit.{call}, or create the "
            "model with pretrained=False."
        )
    return {key: value for key, value in kwargs.items() if key not in REGISTRY_ONLY}


def split_options(method: type[Method], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of a method's `Config`, and the others, which are the host's."""
    own = {f.name for f in fields(method.Config)} & kwargs.keys()
    return {key: kwargs[key] for key in own}, {key: kwargs[key] for key in kwargs if key not in own}


def imagenet_cfg(host: Any, image_shape: tuple[int, int, int], **own: Any) -> dict[str, Any]:
    """Return timm's `pretrained_cfg` of a host trained on ImageNet-1k.

    Args:
        image_shape: (channels, height, width).
        own: first_conv and classifier, and what differs from the usual.
    """
    return {
        "input_size": image_shape,
        "num_classes": host.num_classes,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        **own,
    }
