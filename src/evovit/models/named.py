"""What named models share: timm's registry passes more arguments than a host takes; no weights are hosted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from evovit.errors import EvoViTError, in_one_line, shown
from evovit.methods.base import Method
from evovit.options import Number, Options, Positive, Share, Weight

__all__: list[str] = []  # no entry points

# Limits far above what there is: a slip of the keyboard is told before memory or time ends.
Side = Annotated[int, Ge(1), Le(16384)]  # pixels
Width = Annotated[int, Ge(1), Le(65536)]
Depth = Annotated[int, Ge(1), Le(1000)]
Ratio = Annotated[float, Gt(0), Le(1000)]  # of two widths
Classes = Annotated[int, Ge(0), Le(1_000_000)]
REGISTRY_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_model_args")


@dataclass(frozen=True, kw_only=True)
class HostArguments(Options):
    """What hosts are created with, where it is of a known kind: constructors take nearly anything."""

    img_size: Side | tuple[Side, Side] | None = None
    patch_size: Side | tuple[Side, Side] | None = None
    in_chans: Width | None = None
    num_classes: Classes | None = None
    embed_dim: Width | tuple[Width, ...] | None = None
    depth: Depth | tuple[Depth, ...] | None = None
    num_heads: Width | tuple[Width, ...] | None = None
    key_dim: Width | tuple[Width, ...] | None = None
    mlp_ratio: Ratio | tuple[Ratio, ...] | None = None
    reg_tokens: Annotated[int, Ge(0), Le(65536)] | None = None
    init_values: Weight | None = None
    drop_rate: Share | None = None
    drop_path_rate: Share | None = None
    proj_drop_rate: Share | None = None
    attn_drop_rate: Share | None = None
    patch_drop_rate: Share | None = None
    pos_drop_rate: Share | None = None
    qkv_bias: bool | None = None
    qk_norm: bool | None = None
    fc_norm: bool | None = None
    pre_norm: bool | None = None
    class_token: bool | None = None
    no_embed_class: bool | None = None
    dynamic_img_size: bool | None = None
    dynamic_img_pad: bool | None = None
    distilled: bool | None = None
    class_heads: bool | None = None
    fresh_parts: bool | None = None
    aux_in_training: bool | None = None
    stem_width: Width | None = None
    skip_lam: Positive | None = None
    aux_weight: Weight | None = None
    seed: Number | None = None


def checked_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of a host with values of Python's own types.

    Raises:
        EvoViTError: one of another type or out of its range.
    """
    known = {f.name for f in fields(HostArguments)} & given.keys()
    plain = HostArguments(**{key: given[key] for key in known})
    return {key: getattr(plain, key) if key in known else value for key, value in given.items()}


def refusal(what: str, arguments: Mapping[str, Any], error: Exception) -> EvoViTError:
    """Return the sentence for a constructor that fails with a stranger's arguments.

    Args:
        what: the beginning, such as "timm cannot make deit_tiny_patch16_224".
    """
    why = f"{type(error).__name__}: {in_one_line(error)}"
    return EvoViTError(f"{what} with {shown(dict(arguments))} ({why}).")


def own_options(pretrained: bool, kwargs: dict[str, Any], what: str, call: str) -> dict[str, Any]:
    """Return `kwargs` without what timm's registry adds.

    Args:
        what: the weights, and `call` how to load the authors', for the sentence if `pretrained` is asked for.
    """
    if pretrained:
        raise EvoViTError(
            f"No {what} are hosted; download the authors' checkpoint and use evovit.{call}, or create the "
            "model with pretrained=False."
        )
    if kwargs.pop("features_only", False):
        raise EvoViTError(
            "features_only is True, but a reduced model gives its maps by evovit.features; create it without "
            "and wrap it: evovit.features(model, out_indices=...)."
        )
    own = checked_arguments(kwargs)
    return {key: value for key, value in own.items() if key not in REGISTRY_ONLY}


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
