"""How a photograph becomes a host's input, in timm's terms: read from a host, and stored in a host."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Gt, Le
from torch import nn

from evovit.errors import EvoViTError, check_kind
from evovit.hosts.hf import cfg_near
from evovit.hosts.names import class_names
from evovit.options import Count, Options, Positive, build, option

RESIZE = ("interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Options):
    """How a photograph becomes the model's input; timm's names."""

    title: ClassVar[str] = "preprocessing."

    input_size: tuple[Count, Count, Count] = option(meaning="(channels, height, width)")
    mean: tuple[float, ...] = option(meaning="mean of each channel, which is subtracted")
    std: tuple[Positive, ...] = option(meaning="standard deviation of each channel, which is divided by")
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = option(
        meaning="filter of the resize, as Pillow names it"
    )
    crop_pct: Annotated[float, Gt(0), Le(4)] = option(meaning="side of the crop over the side after resizing")
    crop_mode: Literal["center", "squash", "border"] = option(meaning="how the image is fitted to the crop")
    class_names: tuple[str, ...] = option((), "names of the classes, in their order")


def checked_preprocessing(given: Any, shape: Sequence[int]) -> dict[str, Any]:
    """Return a table of `Preprocessing` as JSON has it; raises `EvoViTError` where it prepares no photograph.

    Args:
        shape: (channels, height, width) that the model takes.
    """
    found = build(Preprocessing, check_kind("preprocessing", given, Mapping, "a table"), "preprocessing")  # type: ignore[type-abstract]
    if found.input_size != tuple(shape) or not len(found.mean) == len(found.std) == shape[0]:
        raise EvoViTError(
            f"preprocessing has input_size {found.input_size}, {len(found.mean)} mean, {len(found.std)} std; "
            f"the model takes {tuple(shape)}, so give {shape[0]} of each."
        )
    plain: dict[str, Any] = json.loads(json.dumps(vars(found)))
    return plain


def read_preprocessing(host: nn.Module, shape: Sequence[int]) -> dict[str, Any]:
    """Return what a host tells of its images, a table of `Preprocessing`; empty where it tells nothing.

    timm's hosts tell it in `pretrained_cfg`; of transformers' hosts the image processor is read that lies
    where the host came from, a folder or the Hub's cache; nothing is fetched.

    Args:
        shape: (channels, height, width) that the host takes.
    """
    cfg: Mapping[str, Any] = getattr(host, "pretrained_cfg", None) or cfg_near(host)
    if not cfg.get("mean") or not cfg.get("std"):
        return {}
    from timm.data import resolve_data_config

    found = resolve_data_config({"input_size": tuple(shape)}, pretrained_cfg=cfg)
    kept = {key: found[key] for key in ("input_size", "mean", "std", *RESIZE)}
    try:
        return checked_preprocessing(kept | {"class_names": class_names(host)}, shape)
    except EvoViTError:  # of images of other channels, or in words that timm alone knows
        return {}


def tell_preprocessing(host: Any, preprocessing: Mapping[str, Any]) -> None:
    """Let a host tell how its images are prepared, where timm's `resolve_data_config` looks for it.

    Args:
        preprocessing: a table of `Preprocessing`; its names of classes become timm's `label_names`, and those
            of transformers' config.
    """
    told = {key: tuple(value) if isinstance(value, list) else value for key, value in preprocessing.items()}
    names = told.pop("class_names", ())
    cfg = {**(getattr(host, "pretrained_cfg", None) or {}), **told}
    cfg.pop("label_descriptions", None)  # of the classes it had before
    host.pretrained_cfg = cfg | ({"label_names": list(names)} if names else {})
    if hasattr(host, "default_cfg"):  # timm's older name
        host.default_cfg = host.pretrained_cfg
    if names and hasattr(host, "config_class") and class_names(host) != list(names):
        host.config.id2label = dict(enumerate(names))
        host.config.label2id = {name: number for number, name in enumerate(names)}
